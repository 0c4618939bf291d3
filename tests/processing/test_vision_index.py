"""The vision encoder's index arrays, for any mixture of pictures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ming_trt.config import VisionConfig
from ming_trt.errors import InputError
from ming_trt.processing.vision_index import vision_indices

CONFIG = VisionConfig(4, 80, 2, 96, 3, 14, 2, 2, 112, (1, 3), 256)
GRIDS = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 12).map(lambda n: 2 * n), st.integers(1, 12).map(lambda n: 2 * n)),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60, deadline=None)
@given(grids=GRIDS)
def test_groups_are_partitions(grids: list[tuple[int, int, int]]) -> None:
    got = vision_indices(grids, CONFIG)
    total = sum(t * h * w for t, h, w in grids)
    # What every row is: item, frame pair, row, column, in the processor's order.
    rows = [
        (item, frame, cell_row * 2 + a, cell_column * 2 + b)
        for item, (t, h, w) in enumerate(grids)
        for frame in range(t)
        for cell_row in range(h // 2)
        for cell_column in range(w // 2)
        for a in range(2)
        for b in range(2)
    ]
    assert got["patch_position"].tolist() == [list(row[2:]) for row in rows]
    keys = {
        "window": [(item, frame, row // 8, column // 8) for item, frame, row, column in rows],
        "frame": [(item, frame) for item, frame, _, _ in rows],
    }
    for kind, key in keys.items():
        index, length, slot = (got[f"{kind}_{part}"] for part in ("index", "length", "slot"))
        assert {array.dtype for array in (index, length, slot)} == {np.dtype(np.int64)}
        assert len(index) == len(length) == len(set(key))
        assert index.reshape(-1)[slot].tolist() == list(range(total))
        assert int(length.sum()) == total and length.min() >= 1
        for group, count in zip(index, length, strict=True):
            members = group[:count]
            assert len({key[row] for row in members.tolist()}) == 1
            assert (np.diff(members) > 0).all()
            assert (group[count:] == 0).all()
    assert got["window_index"].shape[1] == 64
    assert got["frame_index"].shape[1] == max(h * w for _, h, w in grids)


@pytest.mark.parametrize("grid", [[], [[1, 3, 4]], [[0, 2, 2]], [[1, 2]], [[1, -2, 2]], [4, 4, 4]])
def test_refuses(grid: list[object]) -> None:
    with pytest.raises(InputError, match="resize the pictures first"):
        vision_indices(np.array(grid, dtype=np.int64), CONFIG)
