"""Query tokens: the 336 learned positions whose hidden states carry a picture out of the LLM.

Three square scales are appended after the assistant prefix, each between the ordinary picture delimiters. Their
positions are image patches to the LLM: embeddings come from the learned rows, the image router takes them, and the
position ids see each scale as a strip of one frame, one merged row and `side**2` merged columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SCALES: tuple[int, ...] = (4, 8, 16)
QUERY_TOKENS = sum(side * side for side in SCALES)
APPENDED = QUERY_TOKENS + 2 * len(SCALES)
USED = SCALES[-1] ** 2  # only the last scale goes on to the connector


@dataclass(frozen=True, slots=True)
class QuerySpans:
    """A prompt with its query spans. `L` = prompt length + `APPENDED`.

    input_ids: i64 [L]. query_mask: bool [L], true on the `QUERY_TOKENS` learned positions.
    grid_thw: i64 [n, 3], the prompt's picture grids and then the strips, in patches before merging.
    """

    input_ids: npt.NDArray[np.int64]
    query_mask: npt.NDArray[np.bool_]
    grid_thw: npt.NDArray[np.int64]


def strip_grids(merge: int = 2) -> npt.NDArray[np.int64]:
    """The grids i64 [3, 3] under which the position ids see the scales; `merge` patches a side make one token."""
    return np.array([(1, merge, merge * side * side) for side in SCALES], np.int64)


def append_query_tokens(
    input_ids: npt.ArrayLike, grid_thw: npt.ArrayLike | None, *, start: int, patch: int, end: int, merge: int = 2
) -> QuerySpans:
    """Appends the three query spans to a prompt that ends with the assistant prefix.

    `start`, `patch` and `end` are the ids of the ordinary `<image>`, `<imagePatch>` and `</image>`; `grid_thw` [n, 3]
    are the grids of the prompt's own pictures, or None; `merge` as for `strip_grids`.
    """
    ids = [np.asarray(input_ids, np.int64).reshape(-1)]
    mask = [np.zeros(ids[0].shape, np.bool_)]
    for side in SCALES:
        count = side * side
        ids.append(np.array([start, *[patch] * count, end], np.int64))
        mask.append(np.array([False, *[True] * count, False]))
    grids = strip_grids(merge)
    if grid_thw is not None:
        grids = np.concatenate([np.asarray(grid_thw, np.int64).reshape(-1, 3), grids])
    return QuerySpans(np.concatenate(ids), np.concatenate(mask), grids)
