"""Device arrays do what numpy's do: slices, copies between them, zeros; and nothing outside of the slice changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ming_trt.errors import EngineError
from ming_trt.runtime.device_array import DeviceArray, upload

from .host_device import HostQueue

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
TYPES = st.sampled_from([np.float32, np.int64, np.uint16, np.bool_])


def slices(data: st.DataObject, shape: tuple[int, ...]) -> tuple[Any, ...]:
    keys = []
    for size in shape:
        if data.draw(st.booleans()):
            keys.append(data.draw(st.integers(-size, size - 1)))
        else:
            start = data.draw(st.integers(0, size))
            keys.append(slice(start, data.draw(st.integers(start, size + 1))))
    keys = keys[: data.draw(st.integers(0, len(keys)))]
    return (*keys, ...) if data.draw(st.booleans()) else tuple(keys)


def made(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)


@given(SHAPES, TYPES, st.data())
def test_views_and_zeros_are_numpys(shape: tuple[int, ...], dtype: Any, data: st.DataObject) -> None:
    queue, expected = HostQueue(), made(shape, dtype)
    array = upload(queue, expected)
    keys = slices(data, shape)
    view = array[keys]
    np.testing.assert_array_equal(view.numpy(), expected[keys])
    assert view.shape == expected[keys].shape and view.nbytes == expected[keys].nbytes
    assert view.contiguous == bool(expected[keys].flags.c_contiguous)
    array[keys] = 0
    expected[keys] = 0
    np.testing.assert_array_equal(array.numpy(), expected)


@given(SHAPES, TYPES, st.data())
def test_copies_between_slices_are_numpys(shape: tuple[int, ...], dtype: Any, data: st.DataObject) -> None:
    """Of arrays whose strides differ, as those of a cache before and after it grew."""
    queue = HostQueue()
    wider = tuple(size + data.draw(st.integers(0, 2)) for size in shape)
    source, target = made(wider, dtype, 1), made(shape, dtype, 2)
    own, other = upload(queue, target), upload(queue, source)
    keys = slices(data, shape)
    inner = tuple(slice(0, size) for size in shape)
    own[keys] = other[inner][keys]
    target[keys] = source[inner][keys]
    np.testing.assert_array_equal(own.numpy(), target)
    np.testing.assert_array_equal(other.numpy(), source)


@given(st.integers(1, 5), st.data())
def test_sharing_memory_is_numpys(rows: int, data: st.DataObject) -> None:
    queue, twin = HostQueue(), np.zeros((rows, 3), np.float32)
    array = DeviceArray.zeros(queue, (rows, 3), np.float32)
    ranges = [
        slice(start, data.draw(st.integers(start, rows)))
        for start in (data.draw(st.integers(0, rows)) for _ in range(2))
    ]
    assert array[ranges[0]].shares_memory(array[ranges[1]]) == np.shares_memory(twin[ranges[0]], twin[ranges[1]])
    assert not array.shares_memory(DeviceArray.zeros(queue, (rows, 3), np.float32))


def test_memory_lives_as_long_as_its_last_view() -> None:
    queue = HostQueue()
    array = DeviceArray.zeros(queue, (4, 4), np.float32)
    view = array[2:]
    del array
    assert len(queue.memory) == 1 and view.numpy().shape == (2, 4)
    del view
    assert not queue.memory
    late = DeviceArray.zeros(queue, (1,), np.float32)
    queue.close()
    del late  # after its queue: nothing is left to free


def test_what_it_cannot_do_is_refused() -> None:
    queue = HostQueue()
    array = DeviceArray.zeros(queue, (4, 3), np.float32)
    with pytest.raises(EngineError, match="step of 2"):
        array[::2]
    with pytest.raises(EngineError, match="index 4 is outside of an axis of 4"):
        array[4]
    with pytest.raises(EngineError, match="3 indices for an array of shape"):
        array[0, 0, 0]
    with pytest.raises(EngineError, match="set to 0 or to another device array"):
        array[0] = 1
    for other in (
        DeviceArray.zeros(queue, (4, 4), np.float32),
        DeviceArray.zeros(queue, (4, 3), np.int32),
        DeviceArray.zeros(HostQueue(), (4, 3), np.float32),
    ):
        with pytest.raises(EngineError, match="shape, type and queue must be equal"):
            array[...] = other
