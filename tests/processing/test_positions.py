import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ming_trt.errors import ConfigError, InputError
from ming_trt.golden.cases import Cases
from ming_trt.processing.positions import grids_in_text_order, position_ids
from tests.conftest import UNDERSTANDING

CASES = Cases(UNDERSTANDING)
TOKENS = CASES.index["tokenizer"]["special_tokens"]
PATCH, IMAGE, VIDEO, END = (TOKENS[name] for name in ("<imagePatch>", "<image>", "<video>", "</image>"))
POSITION_CASES = [case for case in CASES.index["cases"] if case["group"] == "position_ids"]


def optional(name: str) -> np.ndarray:
    return CASES.array(name) if name in CASES else np.zeros((0, 3), np.int64)


def test_all_reference_prompts_are_there() -> None:
    assert len(POSITION_CASES) == 20


@pytest.mark.parametrize("rope", ["3D", "video_rope"])
@pytest.mark.parametrize("case", POSITION_CASES, ids=lambda case: str(case["id"]))
def test_reference_positions_exactly(case: dict, rope: str) -> None:
    name = case["id"]
    ids = CASES.array(f"{name}.input_ids")
    grids = grids_in_text_order(
        ids,
        optional(f"{name}.image_grid_thw"),
        optional(f"{name}.video_grid_thw"),
        image_patch=PATCH,
        video_start=VIDEO,
    )
    got, delta = position_ids(ids, grids, image_patch=PATCH, rope_kind=rope, mask=CASES.array(f"{name}.attention_mask"))
    np.testing.assert_array_equal(got, CASES.array(f"{name}.{rope}.position_ids"))
    assert delta == int(CASES.array(f"{name}.{rope}.delta"))


item = st.tuples(st.booleans(), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 5))


def prompt(items: list[tuple[bool, int, int, int, int]]) -> tuple[list[int], list[list[int]], list[list[int]]]:
    ids: list[int] = [1]
    images: list[list[int]] = []
    videos: list[list[int]] = []
    for is_video, t, h, w, text in items:
        (videos if is_video else images).append([t, 2 * h, 2 * w])
        ids += [VIDEO if is_video else IMAGE, *[PATCH] * (t * h * w), END, *[2] * text]
    return ids, images, videos


def token_by_token(ids: list[int], grids: list[list[int]], kind: str) -> tuple[list[tuple[int, int, int]], int]:
    """The rule of the module's docstring, one token at a time."""
    result: list[tuple[int, int, int]] = []
    free, i, left = 0, 0, list(grids)
    while i < len(ids):
        if ids[i] != PATCH:
            result.append((free, free, free))
            free, i = free + 1, i + 1
            continue
        t, h, w = left.pop(0)
        h, w = h // 2, w // 2
        for a in range(t):
            for b in range(h):
                for c in range(w):
                    if kind == "3D":
                        result.append((free + a, free + b, free + c))
                    else:
                        time = free + 2 * a
                        result.append((time, time + b - (h - 1) // 2, time + c - (w - 1) // 2))
        free += max(t, h, w) if kind == "3D" else 2 * (t - 1) + 1
        i += t * h * w
    return result, free


@given(st.lists(item, max_size=4), st.sampled_from(["3D", "video_rope"]), st.integers(0, 6))
def test_any_mix_of_pictures_and_videos_and_any_left_padding(
    items: list[tuple[bool, int, int, int, int]], kind: str, padding: int
) -> None:
    ids, images, videos = prompt(items)
    grids = grids_in_text_order(ids, images, videos, image_patch=PATCH, video_start=VIDEO)
    assert grids.tolist() == [[t, 2 * h, 2 * w] for _, t, h, w, _ in items]
    want, free = token_by_token(ids, grids.tolist(), kind)
    got, delta = position_ids(ids, grids, image_patch=PATCH, rope_kind=kind)
    assert got.dtype == np.int32
    assert list(map(tuple, got.T.tolist())) == want
    assert len(ids) + delta == free
    mask = np.array([0] * padding + [1] * len(ids))
    padded, padded_delta = position_ids([0] * padding + ids, grids, image_patch=PATCH, rope_kind=kind, mask=mask)
    np.testing.assert_array_equal(padded[:, padding:], got)
    assert (padded[:, :padding] == 1).all()
    if len(ids) > 1:
        assert padded_delta == delta - padding


def test_the_reference_s_quirk_for_one_real_token_in_a_padded_row() -> None:
    positions, delta = position_ids([0, 0, 7], [], image_patch=PATCH, mask=np.array([0, 0, 1]))
    assert positions.tolist() == [[1, 1, 0]] * 3
    assert delta == 2 - 3


def test_patches_that_do_not_match_the_grids_are_refused() -> None:
    with pytest.raises(InputError, match="5 patch tokens but its pictures and videos make 4"):
        position_ids([IMAGE, *[PATCH] * 5], [[1, 4, 4]], image_patch=PATCH)
    with pytest.raises(InputError, match="interrupted"):
        position_ids([PATCH, PATCH, 1, PATCH, PATCH], [[1, 4, 4]], image_patch=PATCH)
    with pytest.raises(InputError, match="one file for each"):
        grids_in_text_order(
            [IMAGE, PATCH, END, IMAGE, PATCH], [[1, 2, 2]], [[1, 2, 2]], image_patch=PATCH, video_start=VIDEO
        )
    with pytest.raises(ConfigError, match="2D"):
        position_ids([1], [], image_patch=PATCH, rope_kind="2D")
