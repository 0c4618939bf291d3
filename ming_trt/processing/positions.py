"""Position ids on three axes (time, height, width) for both kinds of rotary embedding.

Text takes one position per token on all axes. A picture or video with merged grid (T, H, W) takes, with n the next free
position and (a, b, c) a token's place in the grid,

* "3D": (n + a, n + b, n + c), and the text goes on at n + max(T, H, W);
* "video_rope": time n + 2a; rows and columns centred on it, so they may be negative; the text goes on one after the
  last frame's time.

The token generated at absolute index i of a row gets position i + delta on all axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ming_trt.config import ROPE_3D, ROPE_KINDS, ROPE_VIDEO
from ming_trt.errors import ConfigError, InputError

Ints = npt.NDArray[np.integer[Any]]
# Positions between two frames under "video_rope".
FRAME_STEP = 2
# What the reference leaves in padded slots. No token reads it.
PADDED = 1


def position_ids(
    input_ids: Ints | Sequence[int],
    grids: Ints | Sequence[Sequence[int]],
    *,
    image_patch: int,
    rope_kind: str = ROPE_3D,
    merge_size: int = 2,
    mask: Ints | None = None,
) -> tuple[npt.NDArray[np.int32], int]:
    """Positions i32 [3, L] and delta of one row of L token ids.

    `grids` [n, 3] holds (t, h, w) in patches of every picture and video in the order of the text (see
    `grids_in_text_order`); `image_patch` is the id of their tokens; `mask` [L] is 0 at padded slots, which get the
    position 1. Raises `InputError` where the patch tokens do not match the grids.
    """
    if rope_kind not in ROPE_KINDS:
        raise ConfigError(f"the rope kind is '{rope_kind}': choose one of {', '.join(ROPE_KINDS)}")
    row = np.asarray(input_ids).reshape(-1)
    real = np.ones(len(row), bool) if mask is None else np.asarray(mask).astype(bool)
    ids = row[real]
    shape = np.asarray(grids, np.int64).reshape(-1, 3)
    walked, free = _walk(ids == image_patch, shape // (1, merge_size, merge_size), rope_kind)
    positions = np.full((3, len(row)), PADDED, np.int32)
    positions[:, real] = walked
    if len(shape) == 0 and len(row):
        # As in the reference the largest value counts here, even that of a padded slot: a padded row with a single real
        # token therefore continues one position late.
        free = int(positions.max()) + 1
    return positions, free - len(row)


def _walk(patch: npt.NDArray[np.bool_], grids: npt.NDArray[np.int64], kind: str) -> tuple[npt.NDArray[np.int64], int]:
    """Positions [3, L] of an unpadded row, whose patch tokens `patch` marks, and the next free position."""
    places = np.flatnonzero(patch)
    wanted = int(grids.prod(axis=1).sum())
    if len(places) != wanted:
        raise InputError(
            f"the prompt has {len(places)} patch tokens but its pictures and videos make {wanted}: "
            "leave the words <imagePatch>, <image> and <video> out of the text"
        )
    pieces: list[npt.NDArray[np.int64]] = []
    done = free = used = 0
    for t, h, w in grids.tolist():
        size = t * h * w
        start = int(places[used])
        if not patch[start : start + size].all():
            raise InputError(
                f"a picture or video of {size} tokens is interrupted in the prompt: keep its tokens together"
            )
        pieces.append(_text(free, start - done))
        free += start - done
        item, free = _item(free, t, h, w, kind)
        pieces.append(item)
        done, used = start + size, used + size
    pieces.append(_text(free, len(patch) - done))
    return np.concatenate(pieces, axis=1), free + len(patch) - done


def _text(first: int, count: int) -> npt.NDArray[np.int64]:
    return np.broadcast_to(np.arange(first, first + count), (3, count))


def _item(free: int, t: int, h: int, w: int, kind: str) -> tuple[npt.NDArray[np.int64], int]:
    place = np.indices((t, h, w)).reshape(3, -1)
    if kind == ROPE_VIDEO:
        time = free + place[0] * FRAME_STEP
        centred = np.stack([time, time + place[1] - (h - 1) // 2, time + place[2] - (w - 1) // 2])
        return centred, free + (t - 1) * FRAME_STEP + 1
    return free + place, free + max(t, h, w)


def grids_in_text_order(
    input_ids: Ints | Sequence[int],
    image_grids: Ints | Sequence[Sequence[int]],
    video_grids: Ints | Sequence[Sequence[int]],
    *,
    image_patch: int,
    video_start: int,
) -> npt.NDArray[np.int64]:
    """Merges the two lists [n, 3] into the order in which their items stand in the text.

    The token before a run of patches says whether it is a video. (The reference cannot mix both kinds in one prompt.)
    """
    images = np.asarray(image_grids, np.int64).reshape(-1, 3)
    videos = np.asarray(video_grids, np.int64).reshape(-1, 3)
    if len(images) == 0 or len(videos) == 0:
        return np.concatenate([images, videos])
    ids = np.asarray(input_ids).reshape(-1)
    patch = ids == image_patch
    starts = np.flatnonzero(patch & ~np.concatenate([[False], patch[:-1]]))
    is_video = ids[starts - 1] == video_start if len(starts) else np.zeros(0, bool)
    if len(starts) != len(images) + len(videos) or int(is_video.sum()) != len(videos):
        raise InputError(
            f"the prompt has {len(starts)} pictures and videos ({int(is_video.sum())} videos) but "
            f"{len(images)} pictures and {len(videos)} videos were given: send one file for each"
        )
    order = np.empty((len(starts), 3), np.int64)
    order[is_video], order[~is_video] = videos, images
    return order
