"""Antialiased bicubic resize of video frames in float32, rounded once at the end.

The reference resizes pictures in 8 bits (Pillow) but video frames in float32 (torch, `antialias=True`), where overshoot
at sharp edges survives between the two directions. Frames are rounded to grey levels afterwards, so a last-bit
difference of a sum can become a whole level: the weights and sums here repeat the roundings of torch's x86-64 build,
which multiplies and adds the taps after the first in fours, and the remaining ones fused.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def resize_frames(frames: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """u8 [n, h, w, 3] to u8 [n, height, width, 3]; the same array if the size is the same."""
    if frames.shape[1:3] == (height, width):
        return frames
    resized = np.empty((len(frames), height, width, frames.shape[3]), np.uint8)
    for i, frame in enumerate(frames):
        # one frame at a time: the intermediate values are four to eight times as large as the frame
        wide = _along(frame.astype(np.float32), width, axis=1)
        resized[i] = np.rint(_along(wide, height, axis=0)).clip(0, 255)
    return resized


def _along(values: Floats, size: int, axis: int) -> Floats:
    if values.shape[axis] == size:
        return values
    weights, index, unfused = _weights(values.shape[axis], size)
    shape = [1] * values.ndim
    shape[axis] = size
    total = np.take(values, index[:, 0], axis=axis) * weights[:, 0].reshape(shape)
    for tap in range(1, weights.shape[1]):
        value, weight = np.take(values, index[:, tap], axis=axis), weights[:, tap].reshape(shape)
        plain = tap < unfused
        if plain.all():
            total = total + value * weight
        elif plain.any():
            total = np.where(plain.reshape(shape), total + value * weight, _fma(value, weight, total))
        else:
            total = _fma(value, weight, total)
    return total


@lru_cache(maxsize=64)
def _weights(before: int, after: int) -> tuple[Floats, npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Weights [after, taps], zero beyond a pixel's support; the source pixels they belong to; and for each output the
    first tap that is added fused."""
    one, half = np.float32(1), np.float32(0.5)
    scale = np.float32(before) / np.float32(after)
    stretch = max(scale, one)
    support = np.float32(2) * stretch
    centre = scale * (np.arange(after, dtype=np.float32) + half)
    first = np.maximum((centre - support + half).astype(np.intp), 0)
    last = np.minimum((centre + support + half).astype(np.intp), before)
    tap = np.arange(int((last - first).max()))
    index = first[:, None] + tap
    distance = np.abs((index.astype(np.float32) - centre[:, None] + half) * (one / stretch))
    weights = np.where(index < last[:, None], _cubic(distance), np.float32(0))
    total = np.zeros(after, np.float32)
    for column in weights.T:
        total = total + column
    unfused = 1 + (last - first - 1) // 4 * 4
    return weights / total[:, None], np.minimum(index, before - 1), unfused


def _cubic(x: Floats) -> Floats:
    """The cubic kernel with a = -1/2, for x >= 0."""
    near = _fma(_fma(x, 1.5, -2.5) * x, x, 1.0)
    far = _fma(_fma(_fma(x, -0.5, 2.5), x, -4.0), x, 2.0)
    return np.where(x < 1, near, np.where(x < 2, far, np.float32(0)))


def _fma(a: Floats, b: Floats | float, c: Floats | float) -> Floats:
    """a·b + c with one rounding to float32: the product of two float32 numbers is exact in float64."""
    return (a.astype(np.float64) * b + c).astype(np.float32)
