"""The stream's bookkeeping over a double of the CUDA runtime that has the real types and does its work at once.

What CUDA does with these calls is for tests/gpu; that it takes their arguments is in `test_signatures.py`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ming_trt.errors import EngineError
from ming_trt.runtime import cuda
from ming_trt.runtime.cuda import Stream
from ming_trt.runtime.device import CaptureError
from ming_trt.runtime.device_array import DeviceArray, upload

real = pytest.importorskip("cuda.bindings.runtime", reason="the CUDA bindings are not installed")
OK, INVALID, NO_MEMORY = (
    real.cudaError_t.cudaSuccess,
    real.cudaError_t.cudaErrorInvalidValue,
    real.cudaError_t.cudaErrorMemoryAllocation,
)
TOTAL = 1 << 20


class Runtime:
    """Memory is the host's; `fail` names a function that fails; a capture keeps what is queued."""

    def __init__(self) -> None:
        self.device: dict[int, Any] = {}
        self.host: dict[int, Any] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.executables: dict[int, list[Callable[[], None]]] = {}
        self.capturing: list[Callable[[], None]] | None = None
        self.fail = ""
        self.alive = 0
        self.waits = 0
        self.attributes: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        if name not in cuda.CALLS:
            return getattr(real, name)  # types and constants

        def call(*arguments: Any) -> tuple[Any, ...]:
            if name == self.fail:
                return (INVALID, None)
            return getattr(self, f"do_{name[4:]}")(*arguments)

        return call

    def queue(self, work: Callable[[], None]) -> tuple[Any, ...]:
        if self.capturing is not None:
            self.capturing.append(work)
        else:
            work()
        return (OK,)

    def do_GetErrorString(self, error: Any) -> tuple[Any, ...]:
        return real.cudaGetErrorString(error)

    def do_GetLastError(self) -> tuple[Any, ...]:
        return (OK,)

    def do_SetDevice(self, device: int) -> tuple[Any, ...]:
        return (OK,)

    def do_MemGetInfo(self) -> tuple[Any, ...]:
        return OK, TOTAL - self.used, TOTAL

    @property
    def used(self) -> int:
        return sum(len(memory) - 256 for memory in self.device.values())

    def do_MemPoolCreate(self, properties: Any) -> tuple[Any, ...]:
        assert properties.location.id == 0
        self.alive += 1
        return OK, real.cudaMemPool_t(11)

    def do_MemPoolSetAttribute(self, pool: Any, attribute: Any, value: Any) -> tuple[Any, ...]:
        self.attributes.append(int(value))
        return (OK,)

    def do_MemPoolTrimTo(self, pool: Any, keep: int) -> tuple[Any, ...]:
        return (OK,)

    def do_MemPoolDestroy(self, pool: Any) -> tuple[Any, ...]:
        self.alive -= 1
        return (OK,)

    def do_StreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        self.alive += 1
        return OK, real.cudaStream_t(77)

    def do_StreamDestroy(self, stream: Any) -> tuple[Any, ...]:
        self.alive -= 1
        return (OK,)

    def do_StreamSynchronize(self, stream: Any) -> tuple[Any, ...]:
        self.waits += 1
        return (INVALID,) if self.capturing is not None else (OK,)

    def do_MallocFromPoolAsync(self, size: int, pool: Any, stream: Any) -> tuple[Any, ...]:
        if self.used + size > TOTAL:
            return NO_MEMORY, None
        memory = (ctypes.c_uint8 * (size + 256))()
        address = -(-ctypes.addressof(memory) // 256) * 256
        self.device[address] = memory
        return OK, address

    def do_FreeAsync(self, address: int, stream: Any) -> tuple[Any, ...]:
        del self.device[address]
        return (OK,)

    def do_HostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:
        memory = (ctypes.c_uint8 * size)()
        self.host[ctypes.addressof(memory)] = memory
        return OK, ctypes.addressof(memory)

    def do_FreeHost(self, address: int) -> tuple[Any, ...]:
        del self.host[address]
        return (OK,)

    def do_MemcpyAsync(self, target: int, source: int, size: int, kind: Any, stream: Any) -> tuple[Any, ...]:
        return self.queue(lambda: ctypes.memmove(target, source, size) and None)

    def do_Memcpy2DAsync(self, dst: int, dp: int, src: int, sp: int, w: int, h: int, *_: Any) -> tuple[Any, ...]:
        return self.queue(lambda: [ctypes.memmove(dst + i * dp, src + i * sp, w) for i in range(h)] and None)

    def do_MemsetAsync(self, target: int, value: int, size: int, stream: Any) -> tuple[Any, ...]:
        return self.queue(lambda: ctypes.memset(target, value, size) and None)

    def do_Memset2DAsync(self, dst: int, pitch: int, value: int, w: int, h: int, stream: Any) -> tuple[Any, ...]:
        return self.queue(lambda: [ctypes.memset(dst + i * pitch, value, w) for i in range(h)] and None)

    def do_StreamBeginCapture(self, stream: Any, mode: Any) -> tuple[Any, ...]:
        assert self.capturing is None
        self.capturing = []
        return (OK,)

    def do_StreamEndCapture(self, stream: Any) -> tuple[Any, ...]:
        assert self.capturing is not None
        recorded, self.capturing = self.capturing, None
        number = 100 + len(self.graphs)
        self.graphs[number] = recorded
        self.alive += 1
        return OK, real.cudaGraph_t(number)

    def do_GraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:
        number = 500 + len(self.executables)
        self.executables[number] = self.graphs[int(graph)]
        self.alive += 1
        return OK, real.cudaGraphExec_t(number)

    def do_GraphLaunch(self, executable: Any, stream: Any) -> tuple[Any, ...]:
        for work in self.executables[int(executable)]:
            work()
        return (OK,)

    def do_GraphDestroy(self, graph: Any) -> tuple[Any, ...]:
        self.alive -= 1
        return (OK,)

    def do_GraphExecDestroy(self, executable: Any) -> tuple[Any, ...]:
        self.alive -= 1
        return (OK,)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime()
    monkeypatch.setattr(cuda, "cuda", lambda: cuda.Cuda(made))
    return made


def test_memory_and_copies(runtime: Runtime) -> None:
    stream = Stream()
    assert stream.handle == 77 and runtime.attributes == [2**64 - 1]
    expected = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    array = upload(stream, expected)
    assert stream.bytes_in_use == 256
    array[1, :, :2] = array[0, :, 2:]
    expected[1, :, :2] = expected[0, :, 2:]
    array[0, 1:, 3:] = 0
    expected[0, 1:, 3:] = 0
    np.testing.assert_array_equal(array.numpy(), expected)
    del array
    assert not runtime.device and stream.bytes_in_use == 0
    stream.trim()
    stream.close()
    stream.close()
    assert runtime.alive == 0


def test_page_locked_memory(runtime: Runtime) -> None:
    stream = Stream()
    memory = stream.pinned(5)
    assert memory.shape == (256,) and memory.dtype == np.uint8
    memory[:] = 7
    block = DeviceArray.zeros(stream, (256,), np.uint8)
    stream.upload(block.address, int(memory.ctypes.data), 256)
    assert (block.numpy() == 7).all()
    stream.unpin(memory)
    assert not runtime.host
    stream.close()


def test_no_memory_is_a_sentence_with_the_figures(runtime: Runtime) -> None:
    stream = Stream()
    with pytest.raises(
        EngineError, match=r"the GPU has no 2\.0 MiB left \(1 of 1 MiB are free; .*out of memory.*slots"
    ):
        stream.allocate(2 << 20)
    stream.close()


def test_graphs(runtime: Runtime) -> None:
    stream = Stream()
    block = DeviceArray.zeros(stream, (4,), np.uint8)
    other = upload(stream, np.arange(1, 5, dtype=np.uint8))
    graph = stream.capture(lambda: stream.copy(block.address, other.address, 4))
    assert not block.numpy().any()
    stream.launch(graph)
    np.testing.assert_array_equal(block.numpy(), [1, 2, 3, 4])
    stream.release(graph)
    assert runtime.alive == 2  # the stream and its pool
    stream.capture(lambda: None)
    stream.close()
    assert runtime.alive == 0 and not runtime.device


def test_memory_that_is_collected_during_a_capture_is_freed_after_it(runtime: Runtime) -> None:
    stream = Stream()
    arrays = [DeviceArray.zeros(stream, (4,), np.uint8)]

    def work() -> None:
        arrays.clear()
        assert len(runtime.device) == 1

    stream.capture(work)
    assert not runtime.device and stream.bytes_in_use == 0
    stream.close()


def test_a_stream_that_failed_closes_with_its_error(runtime: Runtime) -> None:
    stream = Stream()
    array = DeviceArray.zeros(stream, (4,), np.uint8)
    runtime.fail = "cudaStreamSynchronize"
    with pytest.raises(EngineError, match="cudaStreamSynchronize failed"):
        stream.close()
    stream.close()
    del array


@pytest.mark.parametrize("step", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "work"])
def test_captures_that_fail_leave_nothing_behind(runtime: Runtime, step: str) -> None:
    stream = Stream()

    def work() -> None:
        if step == "work":
            stream.wait()

    runtime.fail = step
    with pytest.raises(CaptureError, match="cudaStreamSynchronize" if step == "work" else step):
        stream.capture(work)
    runtime.fail = ""
    if step == "cudaStreamEndCapture":  # the double keeps what CUDA drops
        runtime.capturing = None
    assert runtime.alive == 2
    stream.release(stream.capture(lambda: None))
    stream.close()
    assert runtime.alive == 0


def test_what_is_left_goes_with_the_stream(runtime: Runtime) -> None:
    stream = Stream()
    array, memory = DeviceArray.zeros(stream, (9,), np.float32), stream.pinned(10)
    graph = stream.capture(lambda: None)
    stream.close()
    assert runtime.alive == 0 and not runtime.device and not runtime.host
    stream.release(graph)
    stream.unpin(memory)
    del array
    stream.wait()
