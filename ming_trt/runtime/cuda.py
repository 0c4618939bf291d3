"""CUDA through `cuda.bindings.runtime`: a stream with its memory pool, pinned memory and captured graphs.

The bindings carry the CUDA runtime and find the driver by themselves; no toolkit and no torch. Every function and
constant used is listed in `CALLS` and `CONSTANTS`, and reached through `Cuda.call` only, so that the list can be
compared with the installed bindings (`runtime/signatures.py`). Written against cuda-bindings 13.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from ming_trt.errors import EngineError, UnavailableError
from ming_trt.runtime.device import Bytes, CaptureError, aligned

MODULE = "cuda.bindings.runtime"
NUMBERS = "cuda.bindings.driver"  # the type of numbers that are passed by reference is there
# Function -> names of its parameters in order; it returns the error code and then one value, if `gives`.
CALLS: dict[str, tuple[str, ...]] = {
    "cudaGetDeviceCount": (),
    "cudaGetErrorString": ("error",),
    "cudaSetDevice": ("device",),
    "cudaMemGetInfo": (),
    "cudaMemPoolCreate": ("poolProps",),
    "cudaMemPoolSetAttribute": ("memPool", "attr", "value"),
    "cudaMemPoolTrimTo": ("memPool", "minBytesToKeep"),
    "cudaMemPoolDestroy": ("memPool",),
    "cudaStreamCreateWithFlags": ("flags",),
    "cudaStreamSynchronize": ("stream",),
    "cudaStreamDestroy": ("stream",),
    "cudaMallocFromPoolAsync": ("size", "memPool", "stream"),
    "cudaFreeAsync": ("devPtr", "hStream"),
    "cudaHostAlloc": ("size", "flags"),
    "cudaFreeHost": ("ptr",),
    "cudaMemcpyAsync": ("dst", "src", "count", "kind", "stream"),
    "cudaMemcpy2DAsync": ("dst", "dpitch", "src", "spitch", "width", "height", "kind", "stream"),
    "cudaMemsetAsync": ("devPtr", "value", "count", "stream"),
    "cudaMemset2DAsync": ("devPtr", "pitch", "value", "width", "height", "stream"),
    "cudaStreamBeginCapture": ("stream", "mode"),
    "cudaStreamEndCapture": ("stream",),
    "cudaGraphInstantiate": ("graph", "flags"),
    "cudaGraphLaunch": ("graphExec", "stream"),
    "cudaGraphDestroy": ("graph",),
    "cudaGraphExecDestroy": ("graphExec",),
    "cudaGetLastError": (),
}
# Enumeration.member, or a constant of the module.
CONSTANTS = (
    "cudaError_t.cudaSuccess",
    "cudaMemAllocationType.cudaMemAllocationTypePinned",
    "cudaMemLocationType.cudaMemLocationTypeDevice",
    "cudaMemAllocationHandleType.cudaMemHandleTypeNone",
    "cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold",
    "cudaMemcpyKind.cudaMemcpyHostToDevice",
    "cudaMemcpyKind.cudaMemcpyDeviceToHost",
    "cudaMemcpyKind.cudaMemcpyDeviceToDevice",
    "cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal",
    "cudaStreamNonBlocking",
    "cudaHostAllocDefault",
)
# Fields of the structures that are filled in.
FIELDS = {"cudaMemPoolProps": ("allocType", "handleTypes", "location"), "cudaMemLocation": ("type", "id")}
_KEEP_ALL = 2**64 - 1


class Cuda:
    """The bindings, with errors as `EngineError`."""

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime
        self._success = self.constant("cudaError_t.cudaSuccess")

    def constant(self, path: str) -> Any:
        """A member of `CONSTANTS`."""
        assert path in CONSTANTS, path
        value = self.runtime
        for part in path.split("."):
            value = getattr(value, part)
        return value

    def call(self, name: str, *arguments: Any) -> Any:
        """Calls a function of `CALLS`. Returns its value, None if it has none. Raises `EngineError`."""
        assert len(arguments) == len(CALLS[name]), name
        error, *values = getattr(self.runtime, name)(*arguments)
        if error != self._success:
            raise EngineError(f"{name} failed: {self._describe(error)}")
        return values[0] if len(values) == 1 else tuple(values) or None

    @staticmethod
    def number(value: int) -> Any:
        """An unsigned 64 bit number, as attributes of a pool take it."""
        return importlib.import_module(NUMBERS).cuuint64_t(value)

    def _describe(self, error: Any) -> str:
        text = self.runtime.cudaGetErrorString(error)[1]
        return f"{text.decode() if isinstance(text, bytes) else text} (CUDA error {int(error)})"


@cache
def cuda() -> Cuda:
    """The bindings of this process. Raises `UnavailableError` if they, the driver or a GPU are missing."""
    try:
        found = Cuda(importlib.import_module(MODULE))
    except ImportError as error:
        raise UnavailableError(
            f"running on a GPU needs the CUDA bindings, which are not installed ({error}): pip install cuda-bindings"
        ) from None
    try:
        count = found.call("cudaGetDeviceCount")
    except EngineError as error:
        raise UnavailableError(f"there is no GPU that can be used ({error}): check `nvidia-smi`") from None
    if not count:
        raise UnavailableError("the driver shows no GPU to this process: check CUDA_VISIBLE_DEVICES")
    return found


class Stream:
    """See `ming_trt.runtime.device.Queue`. Memory comes from a pool of its own, which keeps what is freed until `trim`.

    `handle` is the `cudaStream_t` as a number. The GPU is the one with index `device` among those visible.
    """

    def __init__(self, device: int = 0) -> None:
        self._cuda = cuda()
        self._device = device
        call, constant = self._cuda.call, self._cuda.constant
        call("cudaSetDevice", device)
        runtime = self._cuda.runtime
        properties = runtime.cudaMemPoolProps()
        properties.allocType = constant("cudaMemAllocationType.cudaMemAllocationTypePinned")
        properties.handleTypes = constant("cudaMemAllocationHandleType.cudaMemHandleTypeNone")
        location = runtime.cudaMemLocation()
        location.type = constant("cudaMemLocationType.cudaMemLocationTypeDevice")
        location.id = device
        properties.location = location
        self._pool = call("cudaMemPoolCreate", properties)
        call(
            "cudaMemPoolSetAttribute",
            self._pool,
            constant("cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold"),
            self._cuda.number(_KEEP_ALL),
        )
        # Work on the default stream would wait for this one, and TensorRT would synchronise the device there.
        self._stream = call("cudaStreamCreateWithFlags", constant("cudaStreamNonBlocking"))
        self.handle = int(self._stream)
        self._mode = constant("cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal")
        self._to_device = constant("cudaMemcpyKind.cudaMemcpyHostToDevice")
        self._to_host = constant("cudaMemcpyKind.cudaMemcpyDeviceToHost")
        self._on_device = constant("cudaMemcpyKind.cudaMemcpyDeviceToDevice")
        self._allocated: dict[int, int] = {}
        self._pinned: dict[int, int] = {}
        self._graphs: set[int] = set()
        self._capturing = False
        self._late: list[int] = []
        self._closed = False

    def allocate(self, size: int) -> int:
        """See `Queue.allocate`."""
        total = aligned(size)
        try:
            address = int(self._cuda.call("cudaMallocFromPoolAsync", total, self._pool, self._stream))
        except EngineError as error:
            self._forget_error()
            free, whole = self._cuda.call("cudaMemGetInfo")
            raise EngineError(
                f"the GPU has no {total / 2**20:.1f} MiB left ({free / 2**20:.0f} of {whole / 2**20:.0f} MiB are free; "
                f"{error}): lower profile.slots or profile.max_seq_len, or serve fewer engines on it"
            ) from None
        self._allocated[address] = total
        return address

    def free(self, address: int) -> None:
        """See `Queue.free`."""
        if self._closed or address not in self._allocated:
            return
        if self._capturing:
            # Python may collect an array at any moment: its memory must not be freed each time the graph is launched.
            self._late.append(address)
            return
        del self._allocated[address]
        self._cuda.call("cudaFreeAsync", address, self._stream)

    @property
    def bytes_in_use(self) -> int:
        """Device memory that was allocated and not freed."""
        return sum(self._allocated.values())

    def pinned(self, size: int) -> Bytes:
        """See `Queue.pinned`."""
        total = aligned(size)
        address = int(self._cuda.call("cudaHostAlloc", total, self._cuda.constant("cudaHostAllocDefault")))
        self._pinned[address] = total
        return np.ctypeslib.as_array((ctypes.c_uint8 * total).from_address(address))

    def unpin(self, memory: Bytes) -> None:
        """See `Queue.unpin`."""
        address = int(memory.ctypes.data)
        if not self._closed and self._pinned.pop(address, 0):
            self.wait()
            self._cuda.call("cudaFreeHost", address)

    def upload(self, target: int, source: int, size: int) -> None:
        """See `Queue.upload`."""
        self._cuda.call("cudaMemcpyAsync", target, source, size, self._to_device, self._stream)

    def download(self, target: int, source: int, size: int) -> None:
        """See `Queue.download`."""
        self._cuda.call("cudaMemcpyAsync", target, source, size, self._to_host, self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """See `Queue.copy`."""
        self._cuda.call("cudaMemcpyAsync", target, source, size, self._on_device, self._stream)

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int
    ) -> None:
        """See `Queue.copy_rows`."""
        pitches = (target, target_pitch, source, source_pitch)
        self._cuda.call("cudaMemcpy2DAsync", *pitches, width, height, self._on_device, self._stream)

    def clear_rows(self, target: int, pitch: int, width: int, height: int) -> None:
        """See `Queue.clear_rows`."""
        if height == 1:  # no limit on the width there
            self._cuda.call("cudaMemsetAsync", target, 0, width, self._stream)
        else:
            self._cuda.call("cudaMemset2DAsync", target, pitch, 0, width, height, self._stream)

    def wait(self) -> None:
        """See `Queue.wait`."""
        if not self._closed:
            self._cuda.call("cudaStreamSynchronize", self._stream)

    def capture(self, work: Callable[[], None]) -> Any:
        """See `Queue.capture`."""
        self._capturing = True
        try:
            return self._capture(work)
        finally:
            self._capturing = False
            late, self._late = self._late, []
            for address in late:
                self.free(address)

    def _capture(self, work: Callable[[], None]) -> Any:
        call = self._cuda.call
        try:
            call("cudaStreamBeginCapture", self._stream, self._mode)
        except EngineError as error:
            raise CaptureError(str(error)) from None
        try:
            work()
        except EngineError as error:
            # The stream stays unusable until the capture is ended, which fails in its turn where the work broke it.
            self._abandon()
            raise CaptureError(str(error)) from None
        except BaseException:
            self._abandon()
            raise
        try:
            graph = call("cudaStreamEndCapture", self._stream)
        except EngineError as error:
            self._forget_error()
            raise CaptureError(str(error)) from None
        try:
            executable = call("cudaGraphInstantiate", graph, 0)
        except EngineError as error:
            self._forget_error()
            raise CaptureError(str(error)) from None
        finally:
            call("cudaGraphDestroy", graph)
        self._graphs.add(int(executable))
        return executable

    def launch(self, graph: Any) -> None:
        """See `Queue.launch`."""
        self._cuda.call("cudaGraphLaunch", graph, self._stream)

    def release(self, graph: Any) -> None:
        """See `Queue.release`."""
        if not self._closed and int(graph) in self._graphs:
            self._graphs.discard(int(graph))
            self.wait()
            self._cuda.call("cudaGraphExecDestroy", graph)

    def trim(self) -> None:
        """See `Queue.trim`."""
        self.wait()
        self._cuda.call("cudaMemPoolTrimTo", self._pool, 0)

    def close(self) -> None:
        """See `Queue.close`."""
        if self._closed:
            return
        call = self._cuda.call
        try:
            self.wait()
        except EngineError:
            # After such an error CUDA frees nothing any more in this process.
            self._closed = True
            raise
        for executable in self._graphs:
            call("cudaGraphExecDestroy", self._cuda.runtime.cudaGraphExec_t(executable))
        for address in self._allocated:
            call("cudaFreeAsync", address, self._stream)
        self.wait()
        for address in self._pinned:
            call("cudaFreeHost", address)
        self._closed = True
        call("cudaStreamDestroy", self._stream)
        call("cudaMemPoolDestroy", self._pool)

    def _abandon(self) -> None:
        """Ends a capture that went wrong, and drops what was recorded."""
        error, graph = self._cuda.runtime.cudaStreamEndCapture(self._stream)
        if not int(error) and graph is not None and int(graph):
            self._cuda.call("cudaGraphDestroy", graph)
        self._forget_error()

    def _forget_error(self) -> None:
        """Errors that were dealt with must not show in the next call that looks for one."""
        self._cuda.runtime.cudaGetLastError()
