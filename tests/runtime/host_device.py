"""A device made of host memory, with ONNX Runtime in the place of TensorRT: for the logic around them, not for them.

It is stricter than a GPU where that finds mistakes: new and freed memory is full of NaN, addresses must lie in memory
that is allocated, copies may not run over its end, aligned to 256 bytes, and nothing is done before `wait`. A graph
replays what was queued with the addresses and shapes of its capture.
"""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ming_trt.errors import EngineError
from ming_trt.runtime.device import ALIGNMENT, Bytes, CaptureError, Queue, Range, Shape, aligned
from ming_trt.runtime.device_engine import DeviceEngine
from ming_trt.runtime.engine import TensorSpec
from ming_trt.runtime.onnxruntime import OnnxRuntimeEngine

POISON = 0xFF  # NaN in every floating type, -1 in every integer


class HostQueue:
    """See `ming_trt.runtime.device.Queue`. Work is kept and done by `wait`, in order."""

    def __init__(self) -> None:
        self.handle = id(self)
        self.memory: dict[int, tuple[Bytes, int]] = {}
        self.host: dict[int, Bytes] = {}
        self._starts: list[int] = []
        self._work: list[Callable[[], None]] = []
        self._recorded: list[Callable[[], None]] | None = None
        self.waits = self.launches = self.alive_graphs = 0
        self.closed = False
        self.fail_capture = ""

    def add(self, work: Callable[[], None]) -> None:
        """Queues, or records."""
        assert not self.closed
        (self._work if self._recorded is None else self._recorded).append(work)

    def allocate(self, size: int) -> int:
        assert self._recorded is None and size > 0
        raw = np.full(aligned(size) + ALIGNMENT, POISON, np.uint8)
        address = -(-int(raw.ctypes.data) // ALIGNMENT) * ALIGNMENT
        self.memory[address] = (raw, aligned(size))
        bisect.insort(self._starts, address)
        return address

    def free(self, address: int) -> None:
        if not self.closed:
            self.wait()
            raw, _ = self.memory.pop(address)
            self._starts.remove(address)
            raw[:] = POISON

    def pinned(self, size: int) -> Bytes:
        memory = np.full(size, POISON, np.uint8)
        self.host[int(memory.ctypes.data)] = memory
        return memory

    def unpin(self, memory: Bytes) -> None:
        if not self.closed:
            self.wait()
            del self.host[int(memory.ctypes.data)]

    def upload(self, target: int, source: int, size: int) -> None:
        self.check(target, size)
        self.add(lambda: self._move(target, source, size))

    def download(self, target: int, source: int, size: int) -> None:
        self.check(source, size)
        self.add(lambda: self._move(target, source, size))

    def copy(self, target: int, source: int, size: int) -> None:
        self.copy_rows(target, size, source, size, size, 1)

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int
    ) -> None:
        assert width <= target_pitch and width <= source_pitch and height >= 1
        self.check(target, (height - 1) * target_pitch + width)
        self.check(source, (height - 1) * source_pitch + width)

        def work() -> None:
            for row in range(height):
                self._move(target + row * target_pitch, source + row * source_pitch, width)

        self.add(work)

    def clear_rows(self, target: int, pitch: int, width: int, height: int) -> None:
        assert width <= pitch
        self.check(target, (height - 1) * pitch + width)

        def work() -> None:
            for row in range(height):
                ctypes.memset(target + row * pitch, 0, width)

        self.add(work)

    def wait(self) -> None:
        assert self._recorded is None
        self.waits += 1
        work, self._work = self._work, []
        for each in work:
            each()

    def capture(self, work: Callable[[], None]) -> Any:
        self._recorded = []
        try:
            work()
            if self.fail_capture:
                raise EngineError(self.fail_capture)
        except EngineError as error:
            raise CaptureError(str(error)) from None
        finally:
            recorded, self._recorded = self._recorded, None
        self.alive_graphs += 1
        return recorded

    def launch(self, graph: Any) -> None:
        self.launches += 1
        self._work += graph

    def release(self, graph: Any) -> None:
        self.wait()
        self.alive_graphs -= 1

    def trim(self) -> None:
        self.wait()

    def close(self) -> None:
        if not self.closed:
            self.wait()
            self.closed = True
            self.memory.clear()

    def check(self, address: int, size: int) -> None:
        """That `size` bytes from `address` are allocated."""
        place = bisect.bisect_right(self._starts, address) - 1
        assert place >= 0, f"{address:#x} is not device memory"
        start = self._starts[place]
        assert address + size <= start + self.memory[start][1], f"{size} bytes at {address:#x} run over the end"

    def array(self, address: int, spec: TensorSpec, shape: Shape) -> np.ndarray:
        """The tensor at an address."""
        size = prod(shape) * spec.dtype.itemsize
        self.check(address, max(1, size))
        return np.frombuffer((ctypes.c_uint8 * size).from_address(address), spec.dtype).reshape(shape)

    @staticmethod
    def _move(target: int, source: int, size: int) -> None:
        ctypes.memmove(target, source, size)


@dataclass
class OrtPlan:
    """See `ming_trt.runtime.device.Plan`: an ONNX file as a plan. Caches must be shared as TensorRT's must, if
    `in_place`; `profiles` as TensorRT has them (None: one that takes everything)."""

    path: Path
    name: str
    in_place: bool = True
    ranges: Sequence[Mapping[str, Range]] | None = None
    scratch_bytes: Sequence[int] = (1000,)
    contexts: list[OrtContext] = field(default_factory=list)
    closed: int = 0

    def __post_init__(self) -> None:
        self.engine = OnnxRuntimeEngine(self.path, self.name, threads=1)
        self.inputs, self.outputs = self.engine.inputs, self.engine.outputs
        graph = onnx.load(self.path, load_external_data=False).graph
        caches = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "TensorScatter"}
        self.aliases = {out: caches[out] for out in self.outputs if out in caches} if self.in_place else {}
        everything = {
            name: Range(
                tuple(size if isinstance(size, int) else 0 for size in spec.shape),
                tuple(size if isinstance(size, int) else 1 << 30 for size in spec.shape),
            )
            for name, spec in self.inputs.items()
        }
        self.profiles = [everything] if self.ranges is None else list(self.ranges)
        self.weight_bytes = self.path.stat().st_size

    def scratch(self, profile: int) -> int:
        return self.scratch_bytes[profile % len(self.scratch_bytes)]

    def context(self, profile: int, queue: Queue) -> OrtContext:
        assert isinstance(queue, HostQueue) and not self.closed
        self.contexts.append(OrtContext(self, profile, queue))
        return self.contexts[-1]

    def close(self) -> None:
        self.closed += 1
        self.engine.close()


class OrtContext:
    """See `ming_trt.runtime.device.Context`. The outputs' shapes come from a run on zeros."""

    def __init__(self, plan: OrtPlan, profile: int, queue: HostQueue) -> None:
        self.plan, self.profile, self.queue = plan, profile, queue
        self.shapes: dict[str, Shape] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = (0, 0)
        self.settled: dict[str, Shape] | None = None

    def set_scratch(self, address: int, size: int) -> None:
        assert size >= self.plan.scratch(self.profile)
        self.queue.check(address, size)
        self.scratch = (address, size)

    def set_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        for name, limit in self.plan.profiles[self.profile].items():
            assert all(low <= size <= high for low, size, high in zip(limit.low, shapes[name], limit.high, strict=True))
        zeros = {name: np.zeros(shape, self.plan.inputs[name].dtype) for name, shape in shapes.items()}
        results = {name: array.shape for name, array in self.plan.engine.run(zeros).items()}
        self.shapes = {**shapes, **results}
        self.addresses = {}
        return results

    def set_addresses(self, addresses: Mapping[str, int]) -> None:
        assert addresses.keys() == self.shapes.keys()
        for name, address in addresses.items():
            assert address % ALIGNMENT == 0
            spec = {**self.plan.inputs, **self.plan.outputs}[name]
            self.queue.check(address, max(1, prod(self.shapes[name]) * spec.dtype.itemsize))
        self.addresses = dict(addresses)

    def enqueue(self) -> None:
        plan, addresses, shapes = self.plan, dict(self.addresses), dict(self.shapes)
        self.queue.check(*self.scratch)
        assert addresses, "no addresses since the shapes were set"
        for output, source in plan.aliases.items():
            assert addresses[output] == addresses[source], f"{output} and {source} must share memory"
        captured = self.queue._recorded is not None
        if captured:
            assert self.settled == shapes, "captured before a run with these shapes"
        self.settled = shapes
        state = (shapes, addresses, self.scratch)

        def work() -> None:
            if captured:
                assert state == (self.shapes, self.addresses, self.scratch), "its context was changed since the capture"
            feeds = {n: self.queue.array(addresses[n], plan.inputs[n], shapes[n]) for n in plan.inputs}
            copies = {name: array.copy() for name, array in feeds.items()}
            # what a kernel writes before another has read it is undefined on a GPU: poison what is not meant to be
            ctypes.memset(self.scratch[0], POISON, self.scratch[1])
            for name in plan.outputs:
                if name not in plan.aliases:
                    self.queue.array(addresses[name], plan.outputs[name], shapes[name]).view(np.uint8)[...] = POISON
            if any(
                not np.array_equal(copies[name], array, equal_nan=array.dtype.kind == "f")
                for name, array in feeds.items()
            ):
                raise AssertionError("an output lies over an input that it may not share memory with")
            for name, result in plan.engine.run(copies).items():
                self.queue.array(addresses[name], plan.outputs[name], shapes[name])[...] = result

        self.queue.add(work)


def open_host_engine(path: Path, name: str, *, in_place: bool = True, **options: Any) -> DeviceEngine:
    """An engine on the host's device. `options`: `ranges` of the plan, and those of `DeviceEngine`."""
    options.pop("threads", None)
    ranges = options.pop("ranges", None)
    return DeviceEngine(name, OrtPlan(Path(path), name, in_place, ranges), HostQueue(), **options)
