"""Index arrays of the vision encoder: which patches attend to each other.

The encoder's graph has no data-dependent shapes; what depends on the picture sizes is made here (docs/DESIGN.md, 4.1).
Rows of patches come in the processor's order: for each item, frame pair, merge-cell row, merge-cell column, then the
`merge x merge` patches of the cell.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ming_trt.config import VisionConfig
from ming_trt.errors import InputError

Indices = dict[str, npt.NDArray[np.int64]]


def vision_indices(grid_thw: npt.ArrayLike, config: VisionConfig) -> Indices:
    """The encoder's inputs other than `patches`, all int64, for items of `grid_thw` [n, 3] (t, h, w in patches).

    N = sum(t * h * w). Windows are blocks of `window_cells` x `window_cells` merge cells of one frame pair, smaller at
    the right and bottom border; P = `window_patches`, L = the most patches of any frame pair.

    patch_position [N, 2]: row and column in the item's patch grid.
    window_index [W, P], window_length [W], window_slot [N]; frame_index [F, L], frame_length [F], frame_slot [N]:
    `index` holds rows of `patches`, padded with 0 beyond `length`; `slot` is each row's place in the flattened index.

    Raises `InputError` if a grid is empty, not positive, or not a multiple of the merge size.
    """
    grid = np.asarray(grid_thw, dtype=np.int64)
    merge = config.merge_size
    if grid.ndim != 2 or grid.shape[1:] != (3,) or len(grid) == 0 or (grid < 1).any() or (grid[:, 1:] % merge).any():
        raise InputError(
            f"picture grids {grid.tolist()} must be rows of (frame pairs, rows, columns) with rows and columns "
            f"multiples of {merge}: resize the pictures first"
        )
    positions: list[npt.NDArray[np.int64]] = []
    windows: list[npt.NDArray[np.int64]] = []
    frames: list[npt.NDArray[np.int64]] = []
    start = 0
    for t, h, w in grid.tolist():
        position, groups = _frame(h, w, config)
        for _ in range(t):
            positions.append(position)
            windows += [start + rows for rows in groups]
            frames.append(np.arange(start, start + h * w, dtype=np.int64))
            start += h * w
    window_index, window_length, window_slot = _pad(windows, config.window_patches)
    frame_index, frame_length, frame_slot = _pad(frames, max(len(rows) for rows in frames))
    return {
        "patch_position": np.concatenate(positions),
        "window_index": window_index,
        "window_length": window_length,
        "window_slot": window_slot,
        "frame_index": frame_index,
        "frame_length": frame_length,
        "frame_slot": frame_slot,
    }


def _frame(h: int, w: int, config: VisionConfig) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[np.int64]]]:
    """Positions [h * w, 2] of a frame pair's patches in their order, and its windows as rows of them."""
    merge, side = config.merge_size, config.window_cells
    rows, columns = np.divmod(np.arange(h * w, dtype=np.int64).reshape(h, w), w)
    cells = (h // merge, merge, w // merge, merge)
    order = (0, 2, 1, 3)
    position = np.stack([axis.reshape(cells).transpose(order).reshape(-1) for axis in (rows, columns)], axis=1)
    window = position // (merge * side)
    number = window[:, 0] * -(-w // (merge * side)) + window[:, 1]
    by_window = np.argsort(number, kind="stable")
    ends = np.flatnonzero(np.diff(number[by_window])) + 1
    return position, np.split(by_window, ends)


def _pad(
    groups: list[npt.NDArray[np.int64]], width: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    length = np.array([len(rows) for rows in groups], dtype=np.int64)
    index = np.zeros((len(groups), width), dtype=np.int64)
    slot = np.empty(int(length.sum()), dtype=np.int64)
    for number, rows in enumerate(groups):
        index[number, : len(rows)] = rows
        slot[rows] = number * width + np.arange(len(rows))
    return index, length, slot
