"""Size buckets, query spans and reference pictures against the reference cases, and for any size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ming_trt.errors import InputError
from ming_trt.processing.image import first_pass
from ming_trt.processing.image_size import BUCKETS, MAX_SIDE, fit_size, requested_size
from ming_trt.processing.positions import position_ids
from ming_trt.processing.query import APPENDED, QUERY_TOKENS, USED, append_query_tokens
from ming_trt.processing.reference import prepare_reference

from ..picture import cases, config

SIDES = st.integers(1, MAX_SIDE)


def test_buckets_of_the_cases() -> None:
    for height, width, *expected in cases().array("ratio.table").tolist():
        size = fit_size(height, width)
        assert [size.height, size.width, size.resize_height, size.resize_width] == expected


@given(SIDES, SIDES)
def test_resized_picture_covers_its_bucket(height: int, width: int) -> None:
    size = fit_size(height, width)
    assert (size.height, size.width) in {bucket[1:] for bucket in BUCKETS}
    assert size.resize_height >= size.height
    assert size.resize_width >= size.width
    assert size.resize_height == size.height or size.resize_width == size.width
    assert size.height % 32 == 0 and size.width % 32 == 0


def test_buckets_map_to_themselves() -> None:
    for _, height, width in BUCKETS:
        size = fit_size(height, width)
        assert (size.height, size.width, size.resize_height, size.resize_width) == (height, width, height, width)


@pytest.mark.parametrize("size", [(0, 512), (512, -1), (MAX_SIDE + 1, 512), (100, 1601)])
def test_sizes_that_cannot_be_asked_for(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="picture size"):
        requested_size(*size)


def _names(group: str) -> list[str]:
    return sorted({name.split(".")[1] for name in cases().arrays if name.startswith(f"{group}.")})


@pytest.mark.parametrize("name", _names("prompt"))
def test_query_spans(name: str) -> None:
    tokens, case = config().tokens, f"prompt.{name}"
    grid = cases().index["prompts"][name]["grid_thw"]
    spans = append_query_tokens(
        cases().array(f"{case}.input_ids"),
        None if grid is None else [grid],
        start=tokens.image_start,
        patch=tokens.image_patch,
        end=tokens.image_end,
    )
    cases().check(f"{case}.all_ids", spans.input_ids)
    cases().check(f"{case}.gen_mask", spans.query_mask.astype(np.int64))
    cases().check(f"{case}.grid_thw", spans.grid_thw)
    positions, _ = position_ids(spans.input_ids, spans.grid_thw, image_patch=tokens.image_patch)
    cases().check(f"{case}.position_ids", positions)
    assert spans.query_mask.sum() == QUERY_TOKENS
    assert spans.query_mask[-1 - USED : -1].all()
    assert len(spans.input_ids) == len(cases().array(f"{case}.input_ids")) + APPENDED


@pytest.mark.parametrize("name", _names("ref"))
def test_reference_picture(name: str) -> None:
    """Pillow of another version may round differently by one grey level, as the cases' notes say."""
    case = f"ref.{name}"
    picture = Image.fromarray(cases().array(f"{case}.raw"))
    loaded = first_pass(picture)
    cases().check(f"{case}.first_pass_size", np.array([loaded.height, loaded.width]))
    direct, reference = prepare_reference(picture), prepare_reference(loaded)
    cases().check(f"{case}.direct.u8_rows", direct.pixels[::16], 1)
    cases().check(f"{case}.loaded.u8", reference.pixels, 1)
    cases().check(f"{case}.loaded.size", np.array([reference.size.height, reference.size.width]))
    cases().check(f"{case}.loaded.rows", reference.vae_input()[0, :, :2], 2 / 255)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 400), st.integers(1, 400))
def test_reference_fills_the_bucket(height: int, width: int) -> None:
    reference = prepare_reference(Image.new("RGB", (width, height), (255, 0, 51)))
    assert reference.pixels.shape == (reference.size.height, reference.size.width, 3)
    values = reference.vae_input()
    assert values.shape == (1, 3, reference.size.height, reference.size.width)
    np.testing.assert_allclose(values[0, :, 0, 0], [1, -1, -0.6], atol=1e-6)
