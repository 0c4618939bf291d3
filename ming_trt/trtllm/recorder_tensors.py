"""Values of a recorded network: shapes and types, and the operators on them that the network definition uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ming_trt.errors import MingError

Dim = int | str
Shape = tuple[Dim, ...]
TOKENS = "tokens"


class ShapeError(MingError):
    """A shape or a type that does not fit, in the network definition or in what it is given."""


@dataclass(eq=False)
class Tensor:
    """A value of the network: shape and type. `marked` collects the outputs of the network it belongs to."""

    shape: Shape
    dtype: str
    marked: dict[str, tuple[Shape, str]]

    def __add__(self, other: Tensor) -> Tensor:
        return elementwise("+", self, other)

    def mark_output(self, name: str, dtype: str) -> None:
        """Makes the value an output of the network, converted to `dtype`."""
        if name in self.marked:
            raise ShapeError(f"two outputs are named '{name}': rename one")
        self.marked[name] = (self.shape, dtype)

    def like(self, shape: Shape, dtype: str | None = None) -> Tensor:
        return Tensor(shape, dtype or self.dtype, self.marked)


def elementwise(what: str, left: Any, right: Any, dtype: str | None = None) -> Tensor:
    """Two tensors of one type, or a tensor and a number; sizes equal or 1."""
    tensors = [value for value in (left, right) if isinstance(value, Tensor)]
    if len({tensor.dtype for tensor in tensors}) != 1 or len({len(tensor.shape) for tensor in tensors}) != 1:
        raise ShapeError(f"{what} of {' and '.join(f'{t.dtype}{list(t.shape)}' for t in tensors)}")
    shape = tensors[0].shape
    for tensor in tensors[1:]:
        shape = tuple(_broadcast(what, a, b) for a, b in zip(shape, tensor.shape, strict=True))
    return tensors[0].like(shape, dtype)


def _broadcast(what: str, a: Dim, b: Dim) -> Dim:
    if a == b or b == 1:
        return a
    if a == 1:
        return b
    raise ShapeError(f"{what} of sizes {a} and {b}")


def expect(what: str, tensor: Any, shape: Shape, dtype: str) -> None:
    """Raises `ShapeError` unless `tensor` is just that."""
    if not isinstance(tensor, Tensor) or tensor.shape != shape or tensor.dtype != dtype:
        given = f"{tensor.dtype}{list(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
        raise ShapeError(f"{what} is {given}, expected {dtype}{list(shape)}")


def _cast(input: Tensor, dtype: str) -> Tensor:
    return input.like(input.shape, dtype)


def _where(condition: Tensor, left: Tensor, right: Tensor) -> Tensor:
    result = elementwise("where", left, right)
    if condition.dtype != "bool" or len(condition.shape) != len(result.shape):
        raise ShapeError(f"where of {list(result.shape)} by {condition.dtype}{list(condition.shape)}")
    shape = tuple(_broadcast("where", a, b) for a, b in zip(condition.shape, result.shape, strict=True))
    return result.like(shape)


def _compare(left: Any, right: Any) -> Tensor:
    return elementwise("a comparison", left, right, "bool")


def _number(left: Any, right: Any) -> Tensor:
    return elementwise("arithmetic", left, right)


def _and(left: Tensor, right: Tensor) -> Tensor:
    if left.dtype != "bool":
        raise ShapeError(f"a logical and of {left.dtype}")
    return elementwise("and", left, right)


def _unsqueeze(input: Tensor, axis: int) -> Tensor:
    if axis != -1:
        raise ShapeError(f"unsqueeze at axis {axis}")
    return input.like((*input.shape, 1))


def _allreduce(tensor: Tensor, group: list[int]) -> Tensor:
    return tensor


OPERATORS: Mapping[str, Callable[..., Tensor]] = {
    "cast": _cast,
    "where": _where,
    "gt": _compare,
    "eq": _compare,
    "op_and": _and,
    "sub": _number,
    "mul": _number,
    "floordiv": _number,
    "unsqueeze": _unsqueeze,
    "allreduce": _allreduce,
}
"""The library's operators by name."""
