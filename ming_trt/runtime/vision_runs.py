"""Which pictures of a request share a run of the vision engine.

Results do not depend on it, since no picture sees another, but working memory does: frames are padded to the longest of
their run, so one large picture among many small ones would make them all as large.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

PLACES = 4096
"""Patches of a run, with those that padding adds, unless a single picture or video has more."""
FRAMES = 256
"""Frame pairs of a run, unless a single video has more."""


def runs(grids: npt.NDArray[np.int64], places: int = PLACES) -> Iterator[tuple[int, int]]:
    """Ranges (first, stop) of neighbours that share a run of `places` at most, or of one alone.

    `grids` int [n, 3] holds (t, h, w) of each in patches.
    """
    first, frames, longest = 0, 0, 0
    for i, (t, h, w) in enumerate(grids.tolist()):
        frames, longest = frames + t, max(longest, h * w)
        if i > first and (frames * longest > places or frames > FRAMES):
            yield first, i
            first, frames, longest = i, t, h * w
    if len(grids):
        yield first, len(grids)
