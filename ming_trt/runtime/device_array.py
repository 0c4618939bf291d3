"""Arrays in a device's memory: what stays there between runs (caches, conditions) and is passed to an engine again.

They have as much of numpy's interface as `runtime/kv_cache.py` needs: slices, copies between slices, and zeros.
"""

from __future__ import annotations

from math import prod
from types import EllipsisType
from typing import Any

import numpy as np
import numpy.typing as npt

from ming_trt.errors import EngineError
from ming_trt.runtime.device import Queue, Shape, aligned

Index = int | slice | EllipsisType


class Block:
    """Memory of a queue that is freed with the last array in it."""

    def __init__(self, queue: Queue, size: int) -> None:
        self.queue = queue
        self.size = aligned(size)
        self.address = 0
        self.address = queue.allocate(self.size)

    def __del__(self) -> None:
        if self.address:
            self.queue.free(self.address)


class DeviceArray:
    """A view of a block: `shape` and byte `strides`, as numpy's, from `address` on. Its work goes to the block's
    queue."""

    __slots__ = ("_offset", "address", "block", "dtype", "ndim", "shape", "strides")

    def __init__(self, block: Block, offset: int, shape: Shape, strides: Shape, dtype: np.dtype[Any]) -> None:
        self.block, self._offset = block, offset
        self.shape, self.strides, self.dtype = shape, strides, dtype
        self.address, self.ndim = block.address + offset, len(shape)

    @classmethod
    def empty(cls, queue: Queue, shape: Shape, dtype: npt.DTypeLike) -> DeviceArray:
        """New memory with undefined contents."""
        kind = np.dtype(dtype)
        return cls(Block(queue, prod(shape) * kind.itemsize), 0, shape, _strides(shape, kind.itemsize), kind)

    @classmethod
    def zeros(cls, queue: Queue, shape: Shape, dtype: npt.DTypeLike) -> DeviceArray:
        """New memory full of zeros."""
        array = cls.empty(queue, shape, dtype)
        array[...] = 0
        return array

    @property
    def size(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        """Whether the elements follow each other without gaps; sizes of 1 have no stride to speak of."""
        expected = _strides(self.shape, self.dtype.itemsize)
        pairs = zip(self.shape, self.strides, expected, strict=True)
        return not self.size or all(size == 1 or got == want for size, got, want in pairs)

    def shares_memory(self, other: DeviceArray) -> bool:
        """Whether the extents overlap (for arrays in one block that interleave: taken as overlapping)."""
        if self.block is not other.block or not self.size or not other.size:
            return False
        return self._offset < other._end and other._offset < self._end

    @property
    def _end(self) -> int:
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return self._offset + last + self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"DeviceArray({self.dtype.name} {list(self.shape)} at {self.address:#x})"

    def __getitem__(self, key: Index | tuple[Index, ...]) -> DeviceArray:
        """A view; steps other than 1 are refused."""
        keys = list(key) if isinstance(key, tuple) else [key]
        if ... in keys:
            place = keys.index(...)
            keys[place : place + 1] = [slice(None)] * (self.ndim - len(keys) + 1)
        keys += [slice(None)] * (self.ndim - len(keys))
        if len(keys) != self.ndim:
            raise EngineError(f"{len(keys)} indices for an array of shape {list(self.shape)}")
        offset, shape, strides = self._offset, list[int](), list[int]()
        for index, size, stride in zip(keys, self.shape, self.strides, strict=True):
            if isinstance(index, slice):
                start, stop, step = index.indices(size)
                if step != 1:
                    raise EngineError(f"a step of {step} in a device array: only whole runs of elements are views")
                shape.append(max(0, stop - start))
                strides.append(stride)
            else:
                assert not isinstance(index, EllipsisType)
                start = index + size if index < 0 else int(index)
                if not 0 <= start < size:
                    raise EngineError(f"index {index} is outside of an axis of {size}")
            offset += start * stride
        return DeviceArray(self.block, offset, tuple(shape), tuple(strides), self.dtype)

    def __setitem__(self, key: Index | tuple[Index, ...], value: DeviceArray | int) -> None:
        """Writes zeros, or another array of the same shape and type on the same queue that does not overlap."""
        view = self[key]
        if isinstance(value, DeviceArray):
            view._copy(value)
        elif value == 0:
            view._clear()
        else:
            raise EngineError(f"a device array can be set to 0 or to another device array, not to {value!r}")

    def numpy(self) -> npt.NDArray[Any]:
        """A copy in numpy's memory. Waits for the queue."""
        if not self.contiguous:
            whole = DeviceArray.empty(self.block.queue, self.shape, self.dtype)
            whole[...] = self
            return whole.numpy()
        result = np.empty(self.shape, self.dtype)
        if self.size:
            self.block.queue.download(int(result.ctypes.data), self.address, self.nbytes)
            self.block.queue.wait()
        return result

    def _copy(self, source: DeviceArray) -> None:
        if source.shape != self.shape or source.dtype != self.dtype or source.block.queue is not self.block.queue:
            raise EngineError(f"cannot copy {source} to {self}: shape, type and queue must be equal")
        for own, other, width, height in _runs(self, source):
            queue = self.block.queue
            if height == 1:
                queue.copy(own[0], other[0], width)
            else:
                queue.copy_rows(own[0], own[1], other[0], other[1], width, height)

    def _clear(self) -> None:
        for (address, pitch), _, width, height in _runs(self, self):
            self.block.queue.clear_rows(address, pitch, width, height)


def upload(queue: Queue, array: npt.NDArray[Any], over: DeviceArray | None = None) -> DeviceArray:
    """A device array with the contents of `array`: `over`, if that has its shape and type, else a new one. Waits for
    the queue."""
    source = np.ascontiguousarray(array)
    fits = over is not None and over.contiguous and over.block.queue is queue
    if over is not None and fits and over.shape == source.shape and over.dtype == source.dtype:
        result = over
    else:
        result = DeviceArray.empty(queue, source.shape, source.dtype)
    if source.nbytes:
        queue.upload(result.address, int(source.ctypes.data), source.nbytes)
        queue.wait()
    return result


def _strides(shape: Shape, itemsize: int) -> Shape:
    strides = [itemsize] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


def _runs(one: DeviceArray, two: DeviceArray) -> list[tuple[tuple[int, int], tuple[int, int], int, int]]:
    """`((address, pitch) of one, the same of two, width, height)`: blocks of rows that are all of both."""
    if not one.size:
        return []
    shape, first, second = list(one.shape), list(one.strides), list(two.strides)
    width = one.dtype.itemsize
    # what is without gaps in both is one run of bytes
    while shape and (shape[-1] == 1 or (first[-1] == width and second[-1] == width)):
        width *= shape.pop()
        first.pop()
        second.pop()
    height = shape.pop() if shape else 1
    pitches = (first.pop(), second.pop()) if height > 1 else (width, width)
    places = [(one.address, two.address)]
    for size, a, b in zip(shape, first, second, strict=True):
        places = [(x + i * a, y + i * b) for x, y in places for i in range(size)]
    return [((x, pitches[0]), (y, pitches[1]), width, height) for x, y in places]
