"""From resized RGB frames to the rows that the vision tower reads, and the rule by which sizes are fitted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ming_trt.errors import InputError

# Sides are multiples of this: a patch of 14 pixels times a merge cell of 2 patches.
FACTOR = 28
# Long side : short side.
MAX_ASPECT_RATIO = 200

# The constants of CLIP's image normalisation.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# [256, 3]: the normalised value of every grey level per channel, in the reference's order of roundings.
_GREYS = (np.arange(256, dtype=np.float64) / 255).astype(np.float32)[:, None]
_NORMALISED = (_GREYS - np.asarray(MEAN, np.float32)) / np.asarray(STD, np.float32)


@dataclass(frozen=True, slots=True)
class PatchShape:
    """Sides of a patch in pixels and frames, and of a merge cell in patches."""

    size: int = 14
    frames: int = 2
    merge: int = 2

    @property
    def factor(self) -> int:
        return self.size * self.merge


def fit(height: int, width: int, low: float, high: float, factor: int = FACTOR) -> tuple[int, int]:
    """(height, width), multiples of `factor`, near the given ratio, whose product lies within `low`..`high` pixels
    where that is possible. Raises `InputError` for ratios above `MAX_ASPECT_RATIO`.
    """
    if min(height, width) < 1:
        raise InputError(f"the picture has {width}x{height} pixels: it must have at least one")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise InputError(
            f"the picture has {width}x{height} pixels, a ratio of {max(height, width) / min(height, width):.0f}:1: "
            f"crop it to at most {MAX_ASPECT_RATIO}:1"
        )
    # round() to even, as in the reference
    fitted = tuple(max(factor, round(side / factor) * factor) for side in (height, width))
    pixels = fitted[0] * fitted[1]
    if pixels > high:
        scale = math.sqrt(height * width / high)
        fitted = tuple(math.floor(side / scale / factor) * factor for side in (height, width))
    elif pixels < low:
        scale = math.sqrt(low / (height * width))
        fitted = tuple(math.ceil(side * scale / factor) * factor for side in (height, width))
    if min(fitted) < 1:
        raise InputError(
            f"a picture of {width}x{height} pixels cannot be shrunk to {int(high)} pixels at {factor} pixels a side or "
            "more: raise 'max_pixels' or crop it"
        )
    return fitted[0], fitted[1]


def patchify(
    frames: npt.NDArray[np.uint8], shape: PatchShape | None = None
) -> tuple[npt.NDArray[np.float32], tuple[int, int, int]]:
    """Frames u8 [T, H, W, 3], sides multiples of `shape.factor`, to normalised rows f32 [N, 3·frames·size²] and the
    grid (t, h, w) in patches, N = t·h·w.

    The last frame is repeated until the frames fill whole patches. Row order: frame group, cell row, cell column, then
    the patches of the merge cell; within a row: channel, frame, y, x.
    """
    shape = shape or PatchShape()
    missing = -len(frames) % shape.frames
    if missing:
        frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    t, h, w = len(frames) // shape.frames, frames.shape[1] // shape.size, frames.shape[2] // shape.size
    m, p = shape.merge, shape.size
    split = frames.reshape(t, shape.frames, h // m, m, p, w // m, m, p, 3)
    rows = split.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, 3, shape.frames * p * p)
    values = np.empty(rows.shape, np.float32)
    for channel in range(3):
        np.take(_NORMALISED[:, channel], rows[:, channel], out=values[:, channel], mode="clip")
    return values.reshape(t * h * w, -1), (t, h, w)
