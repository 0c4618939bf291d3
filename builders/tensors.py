"""Weights as streams: tensors of an ONNX graph that are read, converted and written one part at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ming_trt.errors import BuildError

Array = npt.NDArray[Any]
PARTS = Callable[[], Iterable[Array]]

DTYPES: dict[str, ir.DataType] = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}


class StreamedTensor(ir.LazyTensor):
    """A tensor made of parts that follow each other along axis 0; nothing is read before it is written.

    `parts` gives a fresh iterator of arrays on each call. Only one part is held while the tensor is written, so the
    memory for a stack of experts is that of one expert.
    """

    def __init__(self, name: str, parts: PARTS, dtype: ir.DataType, shape: Sequence[int]) -> None:
        super().__init__(self._whole, dtype=dtype, shape=ir.Shape(shape), name=name)
        self.parts = parts

    def __repr__(self) -> str:
        return f"StreamedTensor({self.name!r}, {self.dtype.name}{list(self.shape)})"

    def _checked(self) -> Iterator[Array]:
        dims, expected, rows = tuple(self.shape.numpy()), self.dtype.numpy(), 0
        for part in self.parts():
            if part.dtype != expected or part.shape[1:] != dims[1:]:
                raise BuildError(
                    f"part of '{self.name}' is {part.dtype}{list(part.shape)}, but the graph declares {expected}{list(dims)}"
                )
            rows += part.shape[0] if part.ndim else 1
            yield np.ascontiguousarray(part)
        if rows != (dims[0] if dims else 1):
            raise BuildError(f"'{self.name}' has {rows} rows, but the graph declares {list(dims)}")

    def _whole(self) -> ir.TensorProtocol:
        parts = list(self._checked())
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return ir.Tensor(whole, dtype=self.dtype, shape=self.shape, name=self.name)

    def tofile(self, file: BinaryIO) -> None:
        """Writes the parts one after the other."""
        for part in self._checked():
            file.write(part.reshape(-1).view(np.uint8).data)

    def map(
        self, name: str, change: Callable[[Array], Array], shape: Sequence[int], dtype: ir.DataType | None = None
    ) -> StreamedTensor:
        """A tensor whose parts are `change` of this one's parts; `change` must keep axis 0 independent of the rest."""
        return StreamedTensor(name, lambda: map(change, self.parts()), dtype or self.dtype, shape)


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
