"""How a run on a device is laid out, worked out before anything is queued: profile, addresses, copies. Pure.

Inputs that come from numpy's memory lie one behind the other in one buffer, and so do the outputs that go there, so
that a run copies once in each direction. Arrays of the device are used where they are. What cannot be used in place
because input and output share memory, or must, gets a place of its own and a copy on the device.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ming_trt.errors import EngineError
from ming_trt.runtime.device import ALIGNMENT, Range, Shape, aligned
from ming_trt.runtime.device_array import DeviceArray
from ming_trt.runtime.engine import TensorSpec


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is: at `address`, or, if `arena` is "in" or "out", that many bytes behind the buffer's start."""

    arena: str
    address: int
    size: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A run, apart from the values. Equal layouts in equal buffers queue the same work.

    `places` say where each tensor is; the buffers "in" and "out" have `arena_in` and `arena_out` bytes. `uploads` come
    from the host, to the first `uploaded` bytes of "in"; `downloads` go there, the first `downloaded` bytes of "out";
    `late` are outputs that go there too, but lie in an input's place. `before` and `after` are copies on the device,
    (target, source), around the run.
    """

    places: Mapping[str, Place]
    arena_in: int
    arena_out: int
    uploads: tuple[tuple[str, Place], ...]
    uploaded: int
    downloads: tuple[str, ...]
    downloaded: int
    late: tuple[str, ...]
    before: tuple[tuple[Place, Place], ...]
    after: tuple[tuple[Place, Place], ...]


def choose_profile(stage: str, profiles: Sequence[Mapping[str, Range]], shapes: Mapping[str, Shape]) -> int:
    """Index of the first profile that takes the shapes. Raises `EngineError`: the input that the closest one (with the
    fewest inputs outside, and those by least) does not take, its value, and the limits."""
    misfits: list[list[str]] = []
    for index, profile in enumerate(profiles):
        outside = [name for name, limit in profile.items() if not _within(shapes[name], limit)]
        if not outside:
            return index
        misfits.append(outside)
    nearest = min(
        range(len(profiles)),
        key=lambda i: (len(misfits[i]), max(_excess(shapes[name], profiles[i][name]) for name in misfits[i])),
    )
    name = misfits[nearest][0]
    limit = profiles[nearest][name]
    few = f" (profile {nearest + 1} of {len(profiles)})" if len(profiles) > 1 else ""
    raise EngineError(
        f"engine '{stage}' got {list(shapes[name])} for '{name}', and its plan takes {list(limit.low)} to "
        f"{list(limit.high)}{few}: send less, or build the plan with larger limits in the preset's profile"
    )


def _within(shape: Shape, limit: Range) -> bool:
    return all(low <= size <= high for low, size, high in zip(limit.low, shape, limit.high, strict=True))


def _excess(shape: Shape, limit: Range) -> float:
    """By what factor the worst size is outside."""
    return max(
        max(size / max(1, high), low / max(1, size))
        for low, size, high in zip(limit.low, shape, limit.high, strict=True)
    )


class _Arena:
    """Places one behind the other."""

    def __init__(self, name: str) -> None:
        self.name, self.end = name, 0

    def take(self, size: int) -> Place:
        place = Place(self.name, self.end, size)
        self.end += aligned(size)
        return place


def lay_out(
    stage: str,
    inputs: Mapping[str, TensorSpec],
    outputs: Mapping[str, TensorSpec],
    aliases: Mapping[str, str],
    feeds: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    wanted: Collection[str],
    into: Mapping[str, Any],
) -> Layout:
    """The layout of a run. `shapes` are those of the outputs; `wanted` outputs go to the host, `into` says where others
    go if that is a device array. Raises `EngineError` for device arrays that the plan cannot read."""
    resident = {name: array for name, array in feeds.items() if isinstance(array, DeviceArray)}
    targets = {name: array for name, array in into.items() if isinstance(array, DeviceArray)}
    for name, array in (*resident.items(), *targets.items()):
        _check(stage, name, array)
    arena_in, arena_out = _Arena("in"), _Arena("out")
    before: list[tuple[Place, Place]] = []
    after: list[tuple[Place, Place]] = []
    # inputs that the run changes, since an output must have the very same memory
    changed = {source: output for output, source in aliases.items()}
    uploads = tuple((name, arena_in.take(feeds[name].nbytes)) for name in inputs if name not in resident)
    uploaded = arena_in.end
    places = dict(uploads)
    for name in inputs:
        given = resident.get(name)
        if name not in changed:
            if given is not None:
                places[name] = _at(given)
            continue
        target = targets.get(changed[name])
        if given is None:
            if target is not None:
                before.append((_at(target), places[name]))
                places[name] = _at(target)
        elif target is not None and target.address == given.address:
            places[name] = _at(given)
        elif target is not None and target.shares_memory(given):
            raise EngineError(f"engine '{stage}' got overlapping arrays for '{name}' and '{changed[name]}'")
        else:
            # The caller's array is changed only if the result is to go there.
            places[name] = arena_in.take(given.nbytes) if target is None else _at(target)
            before.append((places[name], _at(given)))
    sizes = {name: prod(shapes[name]) * spec.dtype.itemsize for name, spec in outputs.items()}
    hosted = tuple(name for name in outputs if name in wanted and name not in aliases)
    for name in hosted:
        places[name] = arena_out.take(sizes[name])
    downloaded = arena_out.end
    for name in outputs:
        if name in aliases:
            places[name] = places[aliases[name]]
        elif name not in hosted:
            target = targets.get(name)
            if target is not None and not any(target.shares_memory(array) for array in resident.values()):
                places[name] = _at(target)
                continue
            places[name] = arena_out.take(sizes[name])
            if target is not None:
                after.append((_at(target), places[name]))
    late = tuple(name for name in outputs if name in wanted and name in aliases)
    lists = (tuple(before), tuple(after))
    return Layout(places, arena_in.end, arena_out.end, uploads, uploaded, hosted, downloaded, late, *lists)


def _at(array: DeviceArray) -> Place:
    return Place("", array.address, array.nbytes)


def _check(stage: str, name: str, array: DeviceArray) -> None:
    if not array.contiguous:
        raise EngineError(f"engine '{stage}' cannot use the device array for '{name}': it has gaps, pass whole rows")
    if array.address % ALIGNMENT:
        raise EngineError(
            f"engine '{stage}' cannot use the device array for '{name}': it starts at a multiple of "
            f"{array.address & -array.address} bytes, and TensorRT asks for {ALIGNMENT}"
        )
