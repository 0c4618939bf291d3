"""Weights as streams: tensors of an ONNX graph that are read, converted and written one piece at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from ming_trt.errors import BuildError
from ming_trt.models.weights import Stack

if TYPE_CHECKING:
    from ming_trt.checkpoint import Checkpoint
    from ming_trt.models.weights import WeightSource

Array = npt.NDArray[Any]
Pieces = Callable[[], Iterable[Array]]

DTYPES: dict[str, ir.DataType] = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class StreamedTensor(ir.LazyTensor):
    """A tensor whose bytes come in pieces; nothing is read before it is written.

    `pieces` gives a fresh iterator of arrays on each call; their flattened concatenation is the flattened tensor. Only
    one piece is held while the tensor is written, so the memory for a stack of experts is that of one matrix.
    """

    def __init__(self, name: str, pieces: Pieces, dtype: ir.DataType, shape: Sequence[int]) -> None:
        super().__init__(self._whole, dtype=dtype, shape=ir.Shape(shape), name=name)
        self.pieces = pieces

    def __repr__(self) -> str:
        return f"StreamedTensor({self.name!r}, {self.dtype.name}{list(self.shape)})"

    def checked_pieces(self) -> Iterator[Array]:
        """The pieces, contiguous. Raises `BuildError` if their type or the count of their elements is not declared."""
        dims, expected, count = self.shape.numpy(), self.dtype.numpy(), 0
        for piece in self.pieces():
            if piece.dtype != expected:
                raise BuildError(f"'{self.name}' came as {piece.dtype}, but the graph declares {expected}")
            count += piece.size
            yield np.ascontiguousarray(piece)
        if count != math.prod(dims):
            raise BuildError(f"'{self.name}' came with {count} elements, but the graph declares {list(dims)}")

    def rows_backwards(self) -> Iterator[Array]:
        """`rows`, the last one first. A stack of the checkpoint is read in that order, anything else as a whole."""
        if isinstance(self.pieces, StackPieces):
            yield from StreamedTensor(str(self.name), self.pieces.backwards(), self.dtype, self.shape.numpy()).rows()
        else:
            yield from self.numpy()[::-1]

    def rows(self) -> Iterator[Array]:
        """The entries along axis 0 one by one, each of shape `shape[1:]`, whatever the pieces are."""
        shape = self.shape.numpy()[1:]
        size, held, pending = math.prod(shape), 0, list[Array]()
        for piece in self.checked_pieces():
            flat = piece.reshape(-1)
            while held + flat.size >= size:
                pending.append(flat[: size - held])
                flat = flat[size - held :]
                yield np.concatenate(pending).reshape(shape)
                held, pending = 0, []
            if flat.size:
                pending.append(flat)
                held += flat.size

    def _whole(self) -> ir.TensorProtocol:
        whole = np.concatenate([piece.reshape(-1) for piece in self.checked_pieces()])
        return ir.Tensor(whole.reshape(self.shape.numpy()), dtype=self.dtype, shape=self.shape, name=self.name)

    def tofile(self, file: BinaryIO) -> None:
        """Writes the pieces one after the other."""
        for piece in self.checked_pieces():
            file.write(piece.reshape(-1).view(np.uint8).data)


def quantized(
    name: str,
    matrices: Callable[[], Iterable[Array]],
    quantize: Callable[[Array], tuple[Array, Array]],
    codes: tuple[ir.DataType, Sequence[int]],
    scales: Sequence[int],
) -> tuple[StreamedTensor, StreamedTensor]:
    """Codes (their type and shape) and float32 scales (their shape) that `quantize` makes of each matrix.

    Matrices are read and quantised once: the scales, a small part, wait in memory from when the codes are written until
    they are written themselves. Asked for at another time, they are made again.
    """
    waiting: list[Array] = []

    def first() -> Iterator[Array]:
        waiting.clear()
        made = []
        for matrix in matrices():
            numbers, scale = quantize(matrix)
            made.append(scale)
            yield numbers
        waiting.extend(made)

    def second() -> Iterator[Array]:
        made = waiting[:] or (quantize(matrix)[1] for matrix in matrices())
        waiting.clear()
        yield from made

    return (
        StreamedTensor(f"{name}_codes", first, *codes),
        StreamedTensor(f"{name}_scales", second, ir.DataType.FLOAT, scales),
    )


def weight_pieces(source: WeightSource, checkpoint: Checkpoint, precision: str = "fp32") -> Pieces:
    """The stream of a checkpoint source, converted to `precision`."""
    if isinstance(source, Stack):
        return StackPieces(source, checkpoint, precision)
    return lambda: _converted(source, checkpoint, precision)


@dataclass(frozen=True, slots=True)
class StackPieces:
    """The stream of a stack, which can also be had from its end."""

    source: Stack
    checkpoint: Checkpoint
    precision: str

    def __call__(self) -> Iterable[Array]:
        return _converted(self.source, self.checkpoint, self.precision)

    def backwards(self) -> StackPieces:
        """The last entry first."""
        return replace(self, source=Stack(self.source.sources[::-1]))


def _converted(source: WeightSource, checkpoint: Checkpoint, precision: str) -> Iterator[Array]:
    dtype = TORCH_DTYPES[precision]
    for piece in source.pieces(checkpoint, dtype):
        # numpy has no bfloat16 of its own: the same bits under the type that onnx uses
        yield piece.view(torch.uint16).numpy().view(BFLOAT16) if dtype is torch.bfloat16 else piece.numpy()


def weight_streams(
    sources: Mapping[str, WeightSource], checkpoint: Checkpoint, precision: str = "fp32"
) -> dict[str, Pieces]:
    """`weight_pieces` of a whole weight map."""
    return {name: weight_pieces(source, checkpoint, precision) for name, source in sources.items()}


def streamed(value: ir.Value) -> StreamedTensor:
    """The stream bound to an initializer. Raises `BuildError` if none is bound."""
    tensor = value.const_value
    if not isinstance(tensor, StreamedTensor):
        raise BuildError(f"initializer '{value.name}' has no weight bound to it: call bind_weights first")
    return tensor


def bound(graph: ir.Graph, tensor: StreamedTensor) -> ir.Value:
    """Registers `tensor` as an initializer of `graph` (or finds the one of that name) and returns its value."""
    existing = graph.initializers.get(str(tensor.name))
    if existing is not None:
        return existing
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def drop_unused(graph: ir.Graph, values: Iterable[ir.Value]) -> None:
    """Removes those of `values` from the initializers that nothing uses any more."""
    for value in values:
        if value.name in graph.initializers and not value.uses() and not value.is_graph_output():
            del graph.initializers[value.name]
