"""What engines on a GPU need of it: a queue of work with memory, copies and captured graphs, and a plan to run.

The queue is `cuda.py`'s, the plan is `tensorrt.py`'s; `device_engine.py` makes an engine of both and knows neither CUDA
nor TensorRT. Addresses are plain integers. Nothing here waits for the GPU but `wait`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ming_trt.errors import EngineError
from ming_trt.runtime.engine import TensorSpec

Bytes = npt.NDArray[np.uint8]
Shape = tuple[int, ...]
# TensorRT asks for it of every tensor and of its working memory; CUDA's allocations have it.
ALIGNMENT = 256


class CaptureError(EngineError):
    """Work could not be recorded as a graph. It can still be queued piece by piece."""


class Queue(Protocol):
    """Work done in order (a CUDA stream), and the memory used through it. For one thread at a time.

    `handle` is what a plan's own calls take (a `cudaStream_t` as a number). Raises `EngineError` where the driver
    refuses, from any method: errors of earlier work may show late.
    """

    handle: int

    def allocate(self, size: int) -> int:
        """Address of `size` bytes (at least 1) on the device, aligned to `ALIGNMENT`; contents are undefined."""
        ...

    def free(self, address: int) -> None:
        """Gives memory back once the work queued so far is done. Harmless after `close`."""
        ...

    def pinned(self, size: int) -> Bytes:
        """Page-locked host memory, which copies overlap with; it lives until `unpin` or `close`."""
        ...

    def unpin(self, memory: Bytes) -> None:
        """Gives page-locked memory back, after the work queued so far."""
        ...

    def upload(self, target: int, source: int, size: int) -> None:
        """Queues a copy from host memory, which must stay unchanged until it is done."""
        ...

    def download(self, target: int, source: int, size: int) -> None:
        """Queues a copy to host memory."""
        ...

    def copy(self, target: int, source: int, size: int) -> None:
        """Queues a copy on the device."""
        ...

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int
    ) -> None:
        """Queues a copy on the device of `height` rows of `width` bytes, whose starts are `pitch` bytes apart."""
        ...

    def clear_rows(self, target: int, pitch: int, width: int, height: int) -> None:
        """Queues writing zeros to `height` rows of `width` bytes."""
        ...

    def wait(self) -> None:
        """Until all queued work is done."""
        ...

    def capture(self, work: Callable[[], None]) -> Any:
        """A graph of what `work` queues, which is not run. Raises `CaptureError`; the queue is usable afterwards."""
        ...

    def launch(self, graph: Any) -> None:
        """Queues everything in a graph."""
        ...

    def release(self, graph: Any) -> None:
        """Frees a graph, after the work queued so far."""
        ...

    def trim(self) -> None:
        """Gives memory that is free but kept for the next allocation back to the system."""
        ...

    def close(self) -> None:
        """Waits, and frees everything that was allocated here. Closing twice is harmless."""
        ...


class Context(Protocol):
    """One way to run a plan: a profile of it, with shapes and addresses of its own. For one queue."""

    def set_scratch(self, address: int, size: int) -> None:
        """Working memory for all runs to come."""
        ...

    def set_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Sets every input's shape, which must fit the profile; the outputs' shapes that follow."""
        ...

    def set_addresses(self, addresses: Mapping[str, int]) -> None:
        """Where every input is read and every output written."""
        ...

    def enqueue(self) -> None:
        """Queues a run. Must come once after a change of shapes before a run is captured."""
        ...


@dataclass(frozen=True, slots=True)
class Range:
    """Smallest and largest shape of an input in a profile."""

    low: Shape
    high: Shape


class Plan(Protocol):
    """A loaded plan; contexts of it share its weights, in any number of threads.

    `profiles` map inputs to their range; `aliases` an output to the input whose memory it must share; `weight_bytes` is
    what the weights take on the device.
    """

    @property
    def inputs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def profiles(self) -> Sequence[Mapping[str, Range]]: ...

    @property
    def aliases(self) -> Mapping[str, str]: ...

    @property
    def weight_bytes(self) -> int: ...

    def scratch(self, profile: int) -> int:
        """Bytes of working memory that a run with the profile may need."""
        ...

    def context(self, profile: int, queue: Queue) -> Context:
        """A new context, ready once what `queue` holds is done."""
        ...

    def close(self) -> None:
        """Lets go of the plan; the last of its users frees it. Contexts must be gone by then."""
        ...


def aligned(size: int) -> int:
    """`size` rounded up to whole `ALIGNMENT`, at least one: an empty tensor needs an address too."""
    return max(1, -(-size // ALIGNMENT)) * ALIGNMENT
