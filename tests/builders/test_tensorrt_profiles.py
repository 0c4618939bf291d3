"""Every call that is made of an engine lies in one of its profiles, also for the smallest presets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from builders import registry
from builders.component import ExportOptions
from builders.export import signature_of
from builders.tensorrt_profiles import fixed_sizes, phases
from builders.verify import sample
from ming_trt.checkpoint import Checkpoint
from ming_trt.config import load_config
from ming_trt.presets import Profile
from ming_trt.runtime.vision_runs import PLACES, runs
from tests.conftest import GENERATION, UNDERSTANDING
from tests.profiles import in_a_profile

# Of one request at a time, with the longest prompt step below one tile.
SMALLEST = Profile(max_seq_len=64, slots=1, prefill_chunk=16)
OPTIONS = ExportOptions("tensorrt", "fp32")
SOURCES = {
    name: UNDERSTANDING if name in ("vision_encoder", "audio_encoder", "llm") else GENERATION
    for name in registry.COMPONENTS
}


@pytest.mark.parametrize("name", registry.COMPONENTS)
@pytest.mark.parametrize("profile", [SMALLEST, Profile()], ids=["smallest", "default"])
def test_the_sample_of_the_gate_fits(name: str, profile: Profile) -> None:
    """All rows at once, or one by one, as `builders/tensorrt_gate.py` runs them."""
    folder: Path = SOURCES[name] / "checkpoint"
    config, made = load_config(folder), registry.component(name)
    assert made.needs(config, Checkpoint(folder)) is None
    signature = signature_of(lambda: made.graph(config, OPTIONS))  # type: ignore[attr-defined]
    shapes = {each: signature.shape(each) for each in signature.inputs}
    facts = made.facts(config, OPTIONS)  # type: ignore[attr-defined]
    ways, fixed = phases(name, profile, facts), fixed_sizes(name, profile)
    feeds = {each: value.shape for each, value in sample(made, config).items()}
    alone = {
        each: tuple(1 if symbol == "B" else size for symbol, size in zip(shapes[each], sizes, strict=True))
        for each, sizes in feeds.items()
    }
    assert in_a_profile(ways, fixed, shapes, feeds) or in_a_profile(ways, fixed, shapes, alone), name


@settings(max_examples=300)
@given(
    st.sampled_from([64, 1000, 8192]),
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=30),
)
@example(8192, [(8, 24, 32)])  # 16 frames of a common size: 8 pairs of 3072 patches
@example(8192, [(1, 1, 1)] * 29 + [(1, 45, 45)])  # one large picture behind many small ones
@example(8192, [(64, 8, 16)])
def test_all_pictures_and_videos_of_a_request_fit(tokens: int, cells: list[tuple[int, int, int]]) -> None:
    """Merge cells of any number and size, up to the limit of the preset."""
    ways = phases("vision_encoder", Profile(max_image_tokens=tokens), {})
    sizes = np.array([t * h * w for t, h, w in cells])
    kept = np.cumsum(sizes) <= tokens
    grids = np.array([(t, 2 * h, 2 * w) for t, h, w in cells])[kept]
    found = list(runs(grids, min(PLACES, 4 * tokens)))
    assert [i for first, stop in found for i in range(first, stop)] == list(range(len(grids)))
    for first, stop in found:
        frames, length = int(grids[first:stop, 0].sum()), int(grids[first:stop, 1:].prod(axis=1).max())
        assert stop == first + 1 or frames * length <= PLACES
        run = {"N": int(grids[first:stop].prod(axis=1).sum()), "F": frames, "L": length}
        assert any(all(way.sizes[s][0] <= size <= way.sizes[s][2] for s, size in run.items()) for way in ways), run


def test_the_estimator_takes_both_rows_of_guidance_whatever_the_slots() -> None:
    for slots in (1, 2, 8):
        (part,) = phases("flow_estimator", Profile(slots=slots), {})
        assert part.sizes["B"][0] <= 2 <= part.sizes["B"][2]


def test_the_talkers_cache_holds_a_whole_conversation_and_what_it_says() -> None:
    assert fixed_sizes("talker", Profile(max_seq_len=8192)) == {"T": 9216}
    assert fixed_sizes("llm", Profile(max_seq_len=8100)) == {"T": 8192}
