"""The weight-map language: how parameters are made of checkpoint tensors.

A map is `dict[parameter name, WeightSource]`. A source knows its shape without reading anything, loads alone, and
can be streamed: `pieces` yields consecutive parts of the row-major result, each of the size of one checkpoint tensor
or one transformed group of them, so that a stack of all experts never has to be in memory at once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ming_trt.checkpoint import Checkpoint
from ming_trt.errors import CheckpointError

Shape = tuple[int, ...]


class WeightSource(ABC):
    """Where one parameter comes from. Subclasses are frozen dataclasses, so sources compare and print by value."""

    __slots__ = ()

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The checkpoint tensors that are read, in order."""

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """Shape of the result."""

    @abstractmethod
    def fill(self, target: torch.Tensor, checkpoint: Checkpoint) -> None:
        """Writes the result into `target` (of `shape`, any strides), converting to its dtype."""

    @abstractmethod
    def check(self, checkpoint: Checkpoint) -> None:
        """Raises `CheckpointError` if a tensor is absent or has another shape. Reads headers only."""

    def stored_dtype(self, checkpoint: Checkpoint) -> str:
        """The safetensors dtype of the tensors behind it, or "F32" if they differ. Reads headers only."""
        found = {checkpoint.info(name).dtype for name in self.names}
        return found.pop() if len(found) == 1 else "F32"

    def load(self, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The result, contiguous, in `dtype` (default: as stored)."""
        wanted = TORCH_DTYPES[self.stored_dtype(checkpoint)] if dtype is None else dtype
        target = torch.empty(self.shape, dtype=wanted)
        self.fill(target, checkpoint)
        return target

    def pieces(self, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
        """Consecutive contiguous parts; their flattened concatenation is the flattened `load`."""
        yield self.load(checkpoint, dtype)


TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class Tensor(WeightSource):
    """One checkpoint tensor as it is."""

    name: str
    size: Shape

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def shape(self) -> Shape:
        return self.size

    def check(self, checkpoint: Checkpoint) -> None:
        checkpoint.require(self.name, self.size)

    def fill(self, target: torch.Tensor, checkpoint: Checkpoint) -> None:
        self.check(checkpoint)
        target.copy_(checkpoint.read(self.name))


@dataclass(frozen=True, slots=True)
class _Group(WeightSource):
    """Several sources joined along a dimension."""

    sources: tuple[WeightSource, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for source in self.sources for name in source.names)

    def check(self, checkpoint: Checkpoint) -> None:
        for source in self.sources:
            source.check(checkpoint)


@dataclass(frozen=True, slots=True)
class Stack(_Group):
    """Equal shapes stacked on a new first dimension."""

    @property
    def shape(self) -> Shape:
        return (len(self.sources), *self.sources[0].shape)

    def fill(self, target: torch.Tensor, checkpoint: Checkpoint) -> None:
        for row, source in zip(target, self.sources, strict=True):
            source.fill(row, checkpoint)

    def pieces(self, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
        wanted = TORCH_DTYPES[self.stored_dtype(checkpoint)] if dtype is None else dtype
        for source in self.sources:
            yield from source.pieces(checkpoint, wanted)


@dataclass(frozen=True, slots=True)
class Concat(_Group):
    """Shapes equal but for dimension `dim`, concatenated along it."""

    dim: int = 0

    @property
    def shape(self) -> Shape:
        first = list(self.sources[0].shape)
        first[self.dim] = sum(source.shape[self.dim] for source in self.sources)
        return tuple(first)

    def fill(self, target: torch.Tensor, checkpoint: Checkpoint) -> None:
        start = 0
        for source in self.sources:
            length = source.shape[self.dim]
            source.fill(target.narrow(self.dim, start, length), checkpoint)
            start += length

    def pieces(self, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
        if self.dim != 0:
            yield self.load(checkpoint, dtype)
            return
        wanted = TORCH_DTYPES[self.stored_dtype(checkpoint)] if dtype is None else dtype
        for source in self.sources:
            yield from source.pieces(checkpoint, wanted)


@dataclass(frozen=True, slots=True)
class WeightNorm(_Group):
    """Two sources, lengths [n, 1, ...] and directions [n, ...]: each entry of the second, scaled to that length."""

    @property
    def shape(self) -> Shape:
        return self.sources[1].shape

    def fill(self, target: torch.Tensor, checkpoint: Checkpoint) -> None:
        length, direction = (source.load(checkpoint, torch.float32) for source in self.sources)
        norm = torch.linalg.vector_norm(direction, dim=tuple(range(1, direction.ndim)), keepdim=True)
        target.copy_(direction * (length / norm))


@dataclass(frozen=True, slots=True)
class _Wrapped(WeightSource):
    """One source, rearranged."""

    source: WeightSource

    @property
    def names(self) -> tuple[str, ...]:
        return self.source.names

    def check(self, checkpoint: Checkpoint) -> None:
        self.source.check(checkpoint)


@dataclass(frozen=True, slots=True)
class Reshape(_Wrapped):
    """The same numbers in the same order with another shape."""

    size: Shape

    def __post_init__(self) -> None:
        if math.prod(self.size) != math.prod(self.source.shape):
            raise ValueError(f"{self.source.shape} cannot be reshaped to {self.size}")

    @property
    def shape(self) -> Shape:
        return self.size

    def fill(self, target: torch.Tensor, checkpoint: Checkpoint) -> None:
        target.copy_(self.source.load(checkpoint, target.dtype).reshape(self.size))

    def pieces(self, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
        yield from self.source.pieces(checkpoint, dtype)


@dataclass(frozen=True, slots=True)
class Permute(_Wrapped):
    """Dimensions in another order (`dims` as in `torch.permute`); a linear layer's transpose is `(1, 0)`."""

    dims: tuple[int, ...]

    @property
    def shape(self) -> Shape:
        return tuple(self.source.shape[d] for d in self.dims)

    def fill(self, target: torch.Tensor, checkpoint: Checkpoint) -> None:
        back = sorted(range(len(self.dims)), key=self.dims.__getitem__)
        self.source.fill(target.permute(back), checkpoint)


@dataclass(frozen=True, slots=True)
class Interleave(_Wrapped):
    """`[gate; up]` rows (two halves of the first dimension) become gate 0, up 0, gate 1, up 1, ..."""

    @property
    def shape(self) -> Shape:
        return self.source.shape

    def fill(self, target: torch.Tensor, checkpoint: Checkpoint) -> None:
        gate, up = self.source.load(checkpoint, target.dtype).chunk(2)
        target[0::2] = gate
        target[1::2] = up


def check_sources(sources: Mapping[str, WeightSource], checkpoint: Checkpoint) -> None:
    """Raises `CheckpointError` for the first tensor that is absent or has another shape. Reads headers only."""
    for source in sources.values():
        source.check(checkpoint)


def source_names(sources: Mapping[str, WeightSource]) -> list[str]:
    """All checkpoint tensors behind a map, sorted, each once."""
    return sorted({name for source in sources.values() for name in source.names})


def tensor_shapes(sources: Mapping[str, WeightSource]) -> dict[str, Shape]:
    """Name -> shape of every checkpoint tensor that the maps of this module's sources name."""
    shapes: dict[str, Shape] = {}
    left = list(sources.values())
    while left:
        match left.pop():
            case Tensor(name, shape):
                shapes[name] = shape
            case _Group(sources=group):
                left.extend(group)
            case _Wrapped(source=inner):
                left.append(inner)
            case other:
                raise TypeError(f"the tensors of a {type(other).__name__} have no known shapes")
    return shapes


def load_weights(
    module: torch.nn.Module,
    checkpoint: Checkpoint,
    sources: Mapping[str, WeightSource],
    dtype: torch.dtype = torch.float32,
) -> torch.nn.Module:
    """Gives every parameter of `module` (built on any device, e.g. `meta`) its weights on the CPU in `dtype`.

    The map must name exactly the parameters and their shapes. Returns `module`, in evaluation mode.
    """
    parameters = dict(module.named_parameters())
    unmatched = parameters.keys() ^ sources.keys()
    if unmatched:
        raise CheckpointError(f"weight map and {type(module).__name__} disagree about {sorted(unmatched)[:4]}")
    check_sources(sources, checkpoint)
    for name, source in sources.items():
        if tuple(parameters[name].shape) != source.shape:
            raise CheckpointError(f"parameter '{name}' is {tuple(parameters[name].shape)}, its source {source.shape}")
        owner, _, leaf = name.rpartition(".")
        value = torch.nn.Parameter(source.load(checkpoint, dtype), requires_grad=False)
        setattr(module.get_submodule(owner), leaf, value)
    return module.eval()
