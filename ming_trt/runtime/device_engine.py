"""An engine over a plan on a device: buffers that are kept between runs, one wait a run, and captured graphs.

A run copies what came from numpy's memory into page-locked memory, queues one upload, the plan and one download, and
waits once. Where the same work is queued again (same shapes, same addresses), it is captured as a graph after its
second run and launched as one from then on: a decode step, a denoising step, a part of an utterance.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ming_trt.errors import EngineError
from ming_trt.runtime.device import Bytes, CaptureError, Context, Plan, Queue, Shape, aligned
from ming_trt.runtime.device_array import Block, DeviceArray, upload
from ming_trt.runtime.device_buffer import Buffer
from ming_trt.runtime.device_call import Layout, Place, choose_profile, lay_out
from ming_trt.runtime.engine import Array, Arrays, TensorSpec, check_call, check_finite

MAX_CALLS = 64
"""Kinds of runs (and captured graphs) that an engine remembers; the one unused for longest goes."""
# Decode, not prefill: runs whose shapes seldom repeat gain nothing, and capturing takes longer than they do.
CAPTURED_PROFILE = 0


@dataclass(slots=True)
class Counts:
    """What an engine did: runs, those that were launched as a graph, graphs captured, and why others could not be."""

    runs: int = 0
    launched: int = 0
    captured: int = 0
    refused: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True, eq=False)
class _Site:
    """A context, and what it was told last."""

    context: Context
    shapes: dict[str, Shape] | None = None
    scratch: tuple[int, int] = (0, 0)


@dataclass(slots=True, eq=False)
class _Call:
    """A kind of run: everything but the values. `own` is the context of its graph, `bases` the addresses that the graph
    was captured with."""

    profile: int
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    layout: Layout
    host_out: int
    runs: int = 0
    own: _Site | None = None
    graph: Any = None
    bases: tuple[int, ...] = ()
    refused: bool = False


class DeviceEngine:
    """See `ming_trt.runtime.engine.Engine` for the contract, and `OwnMemory` for arrays that stay on the device.

    Owns `queue` and one use of `plan`. `capture`: whether runs of the first profile that repeat are captured as graphs
    (`max_calls` of them at most); `shrink_memory` gives buffers and working memory back after each run, unless such
    graphs refer to them.
    """

    def __init__(
        self,
        name: str,
        plan: Plan,
        queue: Queue,
        *,
        finite: Collection[str] = (),
        shrink_memory: bool = False,
        capture: bool = False,
        max_calls: int = MAX_CALLS,
    ) -> None:
        self.name = name
        self.inputs: Mapping[str, TensorSpec] = plan.inputs
        self.outputs: Mapping[str, TensorSpec] = plan.outputs
        self.counts = Counts()
        self._plan: Plan | None = plan
        self._queue = queue
        self._finite = tuple(finite)
        self._shrink = shrink_memory and not capture
        self._capture, self._max_calls = capture, max_calls
        self._calls: OrderedDict[tuple[Any, ...], _Call] = OrderedDict()
        # by profile, for runs that are not captured
        self._contexts: dict[int, _Site] = {}
        self._scratch: Block | None = None
        self._in, self._out = Buffer(queue), Buffer(queue)
        unknown = set(self._finite) - self.outputs.keys()
        if unknown:
            self.close()
            raise EngineError(f"engine '{name}' has no output '{min(unknown)}' to check: it has {list(self.outputs)}")

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """A `DeviceArray` of zeros, which `run` takes in the place of a numpy array."""
        self._open()
        return cast(Array, DeviceArray.zeros(self._queue, shape, dtype))

    def place(self, array: Array, over: Array | None = None) -> Array:
        """`array` as a `DeviceArray`, in the memory of `over` if that has its shape and type."""
        self._open()
        if isinstance(array, DeviceArray):
            return array
        return cast(Array, upload(self._queue, array, over if isinstance(over, DeviceArray) else None))

    def run(
        self,
        feeds: Mapping[str, Array],
        outputs: Collection[str] | None = None,
        into: Mapping[str, Array] | None = None,
    ) -> Arrays:
        """See `Engine.run`. Device arrays must be of this engine; an output in `into` that is one stays there."""
        plan, into = self._open(), into or {}
        made = [name for name in (self.outputs if outputs is None else outputs) if name not in into]
        call = self._call(plan, feeds, made, into)
        try:
            self._execute(plan, call, feeds)
        except EngineError as error:
            raise EngineError(f"engine '{self.name}' failed ({error})") from error
        hosted = self._hosted(call)
        for name, array in into.items():
            if name in hosted:
                np.copyto(array, hosted[name])
        results: Arrays = {**into, **{name: hosted[name].copy() for name in made}}
        if self._shrink:
            self._give_back()
        check_finite(
            self.name,
            {name: self._numpy(results[name]) for name in self._finite if name in results},
            self._finite,
        )
        return results

    def takes(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether a profile of the plan takes inputs of these shapes."""
        try:
            choose_profile(self.name, self._open().profiles, shapes)
        except EngineError:
            return False
        return True

    def memory(self) -> dict[str, int]:
        """Bytes on the device: `weights` (shared with other engines of the same plan), `scratch` and `buffers`; what
        `zeros` and `place` gave out is its holders'."""
        scratch = self._scratch.size if self._scratch is not None else 0
        return {
            "weights": self._open().weight_bytes,
            "scratch": scratch,
            "buffers": self._in.size + self._out.size,
        }

    def close(self) -> None:
        """See `Engine.close`. Arrays that stay on the device are gone with it."""
        if self._plan is None:
            return
        plan, self._plan = self._plan, None
        try:
            self._queue.wait()
        finally:
            # The queue takes the graphs and all memory with it; contexts must be gone before the plan.
            self._calls.clear()
            self._contexts.clear()
            try:
                self._queue.close()
            finally:
                self._scratch = None
                self._in, self._out = Buffer(self._queue), Buffer(self._queue)
                plan.close()

    def _open(self) -> Plan:
        if self._plan is None:
            raise EngineError(f"engine '{self.name}' was closed: open it again")
        return self._plan

    def _call(self, plan: Plan, feeds: Mapping[str, Array], made: list[str], into: Mapping[str, Array]) -> _Call:
        """The kind of this run. What was checked once of names, types, shapes and addresses needs no second look: with
        caches of many layers that takes as long as a step."""
        key = self._key(feeds, made, into)
        call = self._calls.get(key) if key is not None else None
        if call is not None:
            self._calls.move_to_end(key)  # type: ignore[arg-type]
            return call
        check_call(self, feeds, made, into, (DeviceArray,))
        self._refuse_foreign(feeds)
        self._refuse_foreign(into)
        assert key is not None
        shapes = {name: tuple(feeds[name].shape) for name in self.inputs}
        wanted = {*made, *(name for name, array in into.items() if not isinstance(array, DeviceArray))}
        profile = choose_profile(self.name, plan.profiles, shapes)
        if profile not in self._contexts:
            self._contexts[profile] = self._context(plan, profile)
        given = self._set_shapes(self._contexts[profile], shapes)
        for name, array in into.items():
            if tuple(array.shape) != given[name]:
                raise EngineError(
                    f"engine '{self.name}' got {list(array.shape)} for '{name}', which has {list(given[name])} here"
                )
        layout = lay_out(self.name, self.inputs, self.outputs, plan.aliases, feeds, given, wanted, into)
        late = sum(aligned(layout.places[name].size) for name in layout.late)
        call = _Call(profile, shapes, given, layout, layout.downloaded + late)
        if len(self._calls) >= self._max_calls:
            # Runs that come once must not push out the graphs of those that come again.
            oldest = next((each for each, known in self._calls.items() if known.graph is None), next(iter(self._calls)))
            dropped = self._calls.pop(oldest)
            self._drop_graph(dropped)
            dropped.own = None
        self._calls[key] = call
        return call

    def _key(self, feeds: Mapping[str, Any], made: list[str], into: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """All that a layout depends on; None for what no good call has."""
        parts: list[Any] = [tuple(made)]
        if len(feeds) != len(self.inputs):
            return None
        for name in self.inputs:
            array = feeds.get(name)
            if isinstance(array, DeviceArray) and array.block.queue is self._queue:
                parts.append((array.shape, array.dtype, array.address, array.strides))
            elif isinstance(array, np.ndarray):
                parts.append((array.shape, array.dtype))
            else:
                return None
        for name, array in into.items():
            if isinstance(array, DeviceArray) and array.block.queue is self._queue:
                parts.append((name, array.shape, array.dtype, array.address, array.strides))
            elif isinstance(array, np.ndarray) and array.flags.c_contiguous and array.flags.writeable:
                parts.append((name, array.shape, array.dtype))
            else:
                return None
        return tuple(parts)

    def _refuse_foreign(self, arrays: Mapping[str, Any]) -> None:
        """Raises `EngineError` for a device array of another queue: nothing orders their work."""
        for name, array in arrays.items():
            if isinstance(array, DeviceArray) and array.block.queue is not self._queue:
                raise EngineError(
                    f"engine '{self.name}' got a device array of another engine for '{name}': make it by this engine's "
                    "`zeros` or `place`"
                )

    def _context(self, plan: Plan, profile: int) -> _Site:
        context = plan.context(profile, self._queue)
        self._queue.wait()
        return _Site(context)

    def _set_shapes(self, place: _Site, shapes: dict[str, Shape]) -> dict[str, Shape]:
        place.shapes = None
        given = place.context.set_shapes(shapes)
        unknown = [name for name, shape in given.items() if min(shape, default=0) < 0]
        if unknown:
            raise EngineError(
                f"engine '{self.name}' has an output '{unknown[0]}' whose shape depends on values: the runtime has no "
                "memory for it, since no graph of ours may have one"
            )
        place.shapes = shapes
        return given

    def _execute(self, plan: Plan, call: _Call, feeds: Mapping[str, Array]) -> None:
        layout = call.layout
        self._reserve(plan, call)
        host = self._in.host
        for name, place in layout.uploads:
            assert host is not None
            np.copyto(_view(host, place.address, self.inputs[name], call.inputs[name]), feeds[name])
        self.counts.runs += 1
        call.runs += 1
        bases = self._bases()
        if call.graph is not None and call.bases != bases:
            self._drop_graph(call)
        if call.graph is not None:
            self._queue.launch(call.graph)
            self._queue.wait()
            self.counts.launched += 1
            return
        capture = self._capture and call.profile == CAPTURED_PROFILE and call.runs > 1 and not call.refused
        if capture and call.own is None:
            # A graph holds for the state of its context: other runs may not change that, so it has one to itself.
            try:
                call.own = self._context(plan, call.profile)
            except EngineError as error:
                capture = self._refuse(call, error)
        chosen = call.own or self._contexts[call.profile]
        self._run(chosen, call)
        # Only now has the context settled for these shapes; capturing runs nothing.
        if capture:
            try:
                call.graph = self._queue.capture(lambda: self._enqueue(chosen.context, call))
            except CaptureError as error:
                self._refuse(call, error)
            else:
                call.bases = bases
                self.counts.captured += 1

    def _refuse(self, call: _Call, error: EngineError) -> bool:
        """Notes why runs of this kind are not captured; always false."""
        call.refused, call.own = True, None
        self.counts.refused[str(error)] += 1
        return False

    def _run(self, place: _Site, call: _Call) -> None:
        """Runs piece by piece, and waits."""
        if place.shapes != call.inputs:
            self._set_shapes(place, call.inputs)
        assert self._scratch is not None
        scratch = (self._scratch.address, self._scratch.size)
        if place.scratch != scratch:
            place.context.set_scratch(*scratch)
            place.scratch = scratch
        place.context.set_addresses({name: self._address(at) for name, at in call.layout.places.items()})
        try:
            self._enqueue(place.context, call)
        finally:
            self._queue.wait()

    def _enqueue(self, context: Context, call: _Call) -> None:
        """Queues a whole run: copies and the plan."""
        queue, layout = self._queue, call.layout
        if layout.uploaded:
            queue.upload(self._in.address, self._in.host_address, layout.uploaded)
        self._copies(layout.before)
        context.enqueue()
        self._copies(layout.after)
        if layout.downloaded:
            queue.download(self._out.host_address, self._out.address, layout.downloaded)
        for name, offset in self._late(call):
            place = layout.places[name]
            if place.size:
                queue.download(self._out.host_address + offset, self._address(place), place.size)

    def _copies(self, pairs: tuple[tuple[Place, Place], ...]) -> None:
        for target, source in pairs:
            if source.size:
                self._queue.copy(self._address(target), self._address(source), source.size)

    def _late(self, call: _Call) -> list[tuple[str, int]]:
        """Outputs in an input's place, and where each goes in the host's buffer."""
        offset, found = call.layout.downloaded, []
        for name in call.layout.late:
            found.append((name, offset))
            offset += aligned(call.layout.places[name].size)
        return found

    def _hosted(self, call: _Call) -> dict[str, Array]:
        """Views of the outputs that came to the host."""
        host = self._out.host
        offsets = [(name, call.layout.places[name].address) for name in call.layout.downloads] + self._late(call)
        if host is None:
            return {}
        return {name: _view(host, offset, self.outputs[name], call.outputs[name]) for name, offset in offsets}

    def _address(self, place: Place) -> int:
        base = {"in": self._in, "out": self._out}.get(place.arena)
        return place.address + (base.address if base is not None else 0)

    def _reserve(self, plan: Plan, call: _Call) -> None:
        self._in.reserve(call.layout.arena_in, call.layout.uploaded)
        self._out.reserve(call.layout.arena_out, call.host_out)
        needed = plan.scratch(call.profile)
        if self._scratch is None or needed > self._scratch.size:
            self._scratch = None  # first: the old memory may be what the new one is made of
            self._scratch = Block(self._queue, needed)

    def _bases(self) -> tuple[int, ...]:
        """Addresses that a captured graph holds besides those of the caller's arrays."""
        scratch = self._scratch.address if self._scratch is not None else 0
        buffers = (self._in.address, self._in.host_address, self._out.address, self._out.host_address)
        return (*buffers, scratch)

    def _drop_graph(self, call: _Call) -> None:
        if call.graph is not None:
            self._queue.release(call.graph)
            call.graph = None

    def _give_back(self) -> None:
        self._in.drop()
        self._out.drop()
        self._scratch = None
        self._queue.trim()

    @staticmethod
    def _numpy(array: Any) -> Array:
        return array.numpy() if isinstance(array, DeviceArray) else array


def _view(host: Bytes, offset: int, spec: TensorSpec, shape: Shape) -> Array:
    count = int(np.prod(shape, dtype=np.int64))
    return np.frombuffer(host, spec.dtype, count, offset).reshape(shape)
