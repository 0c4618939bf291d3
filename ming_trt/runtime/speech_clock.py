"""What the time of a spoken answer went into, where talker, decoder and listener work at the same time.

Each of these threads has a `Lane`, whose `Path` says without gaps what its time until now was spent on. Who gets
something that was made later than it did anything itself has waited for that, so its path is then that of the thing it
got: the critical path, carried forward along with codes and sound. What ran beside it is not in it, so a path adds up
to the time that passed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from time import perf_counter

LABELS = ("voice", "text", "talker", "flow", "vocoder", "listener")
"""What time can go into: finding or making the voice; waiting for text; the talker; flow encoder and its Euler steps;
pitch and vocoder; sending, and waiting until the listener has room. The wait for an engine's turn is its stage's."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Path:
    """`label` until `end` (seconds of `perf_counter`), after what was `before`; without that it is a path's begin."""

    label: str
    end: float
    before: Path | None = None

    def then(self, label: str, end: float) -> Path:
        """The path that goes on with `label` until `end`."""
        return Path(label, end, self.before if label == self.label and self.before else self)

    def split(self, since: float = -math.inf) -> dict[str, float]:
        """Seconds of each of `LABELS` from `since` on; they add up to the time from there, or from the path's begin."""
        found = dict.fromkeys(LABELS, 0.0)
        here = self
        while here.before is not None and here.end > since:
            found[here.label] += here.end - max(since, here.before.end)
            here = here.before
        return found


class Lane:
    """The path of one thread, which alone writes it; `path` may be read by others."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or Path("", perf_counter())

    def lap(self, label: str) -> None:
        """What this thread did since its path's end was `label`."""
        self.path = self.path.then(label, perf_counter())

    def took(self, other: Path) -> None:
        """This thread goes on with what came by `other`: if that ended later, it was waited for."""
        if other.end > self.path.end:
            self.path = other
