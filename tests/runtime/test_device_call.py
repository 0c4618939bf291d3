"""How a run is laid out: profiles, and for any mix of host and device arrays a layout whose places do not collide."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ming_trt.errors import EngineError
from ming_trt.runtime.device import ALIGNMENT, Range, aligned
from ming_trt.runtime.device_array import DeviceArray
from ming_trt.runtime.device_call import Layout, Place, choose_profile, lay_out
from ming_trt.runtime.engine import TensorSpec

from .host_device import HostQueue

DECODE = {"ids": Range((1, 1), (8, 1)), "cache": Range((1, 128), (8, 128))}
PREFILL = {"ids": Range((1, 1), (1, 512)), "cache": Range((1, 128), (1, 128))}


@pytest.mark.parametrize(
    ("ids", "cache", "profile"), [((1, 1), (1, 128), 0), ((8, 1), (8, 128), 0), ((1, 2), (1, 128), 1)]
)
def test_the_first_profile_that_fits_is_taken(ids: Any, cache: Any, profile: int) -> None:
    assert choose_profile("llm", [DECODE, PREFILL], {"ids": ids, "cache": cache}) == profile


@pytest.mark.parametrize(
    ("ids", "cache", "message"),
    [
        ((9, 1), (9, 128), r"engine 'llm' got \[9, 1\] for 'ids', and its plan takes \[1, 1\] to \[8, 1\]"),
        ((1, 513), (1, 128), r"\[1, 513\] for 'ids'"),
        ((1, 2), (1, 64), r"\[1, 64\] for 'cache', and its plan takes \[1, 128\] to \[1, 128\] \(profile 2 of 2\)"),
    ],
)
def test_shapes_outside_of_all_profiles_are_named_with_the_limit(ids: Any, cache: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        choose_profile("llm", [DECODE, PREFILL], {"ids": ids, "cache": cache})


sizes = st.integers(0, 200)


@given(st.data())
def test_places_do_not_collide_and_every_tensor_gets_there(data: st.DataObject) -> None:
    """Any tensors, each on the host or on the device; some outputs must share an input's memory; any are wanted."""
    queue = HostQueue()
    shapes = {f"in{i}": (data.draw(sizes),) for i in range(data.draw(st.integers(0, 4)))}
    outputs = {f"out{i}": (data.draw(sizes),) for i in range(data.draw(st.integers(0, 4)))}
    aliases = {}
    for name in outputs:
        if f"in{name[3:]}" in shapes and data.draw(st.booleans()):
            aliases[name] = f"in{name[3:]}"
            outputs[name] = shapes[aliases[name]]
    feeds: dict[str, Any] = {}
    into: dict[str, Any] = {}
    for name, shape in shapes.items():
        feeds[name] = DeviceArray.zeros(queue, shape, np.float32) if data.draw(st.booleans()) else np.zeros(shape, "f4")
    for name, shape in outputs.items():
        choice = data.draw(st.sampled_from(["none", "host", "device", "same"]))
        same = feeds.get(f"in{name[3:]}")
        if choice == "same" and isinstance(same, DeviceArray) and same.shape == shape:
            into[name] = same
        elif choice == "device":
            into[name] = DeviceArray.zeros(queue, shape, np.float32)
    wanted = {name for name in outputs if name not in into and data.draw(st.booleans())}
    specs = [{name: TensorSpec(name, np.dtype(np.float32), (None,)) for name in names} for names in (shapes, outputs)]
    layout = lay_out("toy", *specs, aliases, feeds, outputs, wanted, into)

    assert layout.places.keys() == shapes.keys() | outputs.keys()
    assert all(place.address % ALIGNMENT == 0 for place in layout.places.values())
    for output, source in aliases.items():
        assert layout.places[output] == layout.places[source]
    assert {*layout.downloads, *layout.late} == wanted
    check_arena(layout, "in", layout.arena_in, [place for _, place in layout.uploads])
    check_arena(layout, "out", layout.arena_out, [])
    assert layout.uploaded == sum(aligned(place.size) for _, place in layout.uploads)
    assert all(layout.places[name].address + layout.places[name].size <= layout.downloaded for name in layout.downloads)
    # what goes where it should: straight, or by a copy afterwards
    copied = {target.address for target, _ in layout.after}
    for name, array in into.items():
        assert layout.places[name].address == array.address or array.address in copied
    # inputs on the device are read where they are, or from a copy; they are written only if a result goes there
    given_at = {name: array.address for name, array in feeds.items() if isinstance(array, DeviceArray) and array.size}
    written = {layout.places[name].address for name in outputs if not layout.places[name].arena}
    written |= {target.address for target, _ in (*layout.before, *layout.after) if not target.arena}
    results = {array.address for array in into.values()}
    assert not (written & set(given_at.values())) - results
    for name in outputs:
        if name not in aliases and not layout.places[name].arena and outputs[name][0]:
            assert layout.places[name].address not in given_at.values(), "written while it is read"


def check_arena(layout: Layout, arena: str, size: int, more: list[Place]) -> None:
    """Places in a buffer are inside, and those of different tensors apart."""
    places = sorted({p for p in (*layout.places.values(), *more) if p.arena == arena}, key=lambda p: p.address)
    for first, second in pairwise(places):
        assert first.address + aligned(first.size) <= second.address
    assert not places or places[-1].address + aligned(places[-1].size) <= size


def test_device_arrays_that_a_plan_cannot_read_are_refused() -> None:
    queue = HostQueue()
    array = DeviceArray.zeros(queue, (4, 70), np.float32)
    spec = {"x": TensorSpec("x", np.dtype(np.float32), (None, None))}

    def layout(x: DeviceArray) -> Layout:
        return lay_out("toy", spec, {}, {}, {"x": x}, {}, (), {})

    assert layout(array[:2]).places["x"].address == array.address
    with pytest.raises(EngineError, match="it has gaps"):
        layout(array[:, :3])
    with pytest.raises(EngineError, match="starts at a multiple of 8 bytes, and TensorRT asks for 256"):
        layout(array[1:, :])


def test_overlapping_caches_are_refused() -> None:
    cache = DeviceArray.zeros(HostQueue(), (4, 64), np.float32)
    spec = TensorSpec("past", np.dtype(np.float32), ("B", 64))
    feeds, into = {"past": cache[:3]}, {"present": cache[1:]}
    with pytest.raises(EngineError, match="overlapping arrays for 'past' and 'present'"):
        lay_out("toy", {"past": spec}, {"present": spec}, {"present": "past"}, feeds, {"present": (3, 64)}, (), into)
