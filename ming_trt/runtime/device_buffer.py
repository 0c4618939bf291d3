"""Memory that runs of an engine share: on the device, and page-locked on the host beside it."""

from __future__ import annotations

from ming_trt.runtime.device import Bytes, Queue, aligned
from ming_trt.runtime.device_array import Block

# Above this size buffers grow to what is needed, below it to a power of two, since captured graphs know addresses.
_LARGE = 1 << 26


class Buffer:
    """Device memory and page-locked host memory that only grow."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._block: Block | None = None
        self.host: Bytes | None = None

    @property
    def address(self) -> int:
        return self._block.address if self._block is not None else 0

    @property
    def host_address(self) -> int:
        return int(self.host.ctypes.data) if self.host is not None else 0

    @property
    def size(self) -> int:
        return self._block.size if self._block is not None else 0

    def reserve(self, size: int, host: int) -> None:
        if size > self.size:
            self._block = None  # first: the old memory may be what the new one is made of
            self._block = Block(self._queue, _rounded(size))
        if host > (self.host.size if self.host is not None else 0):
            if self.host is not None:
                self._queue.unpin(self.host)
            self.host = None
            self.host = self._queue.pinned(_rounded(host))

    def drop(self) -> None:
        self._block = None
        if self.host is not None:
            self._queue.unpin(self.host)
        self.host = None


def _rounded(size: int) -> int:
    return aligned(size) if size >= _LARGE else max(1 << 12, 1 << (size - 1).bit_length())
