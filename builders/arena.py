"""How much memory ONNX Runtime's arena touches for a sequence of allocations.

The arena takes regions from the system, each twice as large as the one before, and cuts chunks out of them: best fit,
neighbours that are free are joined, regions never are. A chunk that no free one can hold makes a new region, and what
lies free in the old ones stays resident. Rules of `BFCArena` with ONNX Runtime's defaults.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

_ALIGNMENT = 256
_FIRST_REGION = 1 << 20
_LARGEST_STEP = 1 << 30
# A free chunk is cut if half of it, or this much, would be wasted.
_MAX_WASTE = 128 << 20


@dataclass(slots=True)
class _Region:
    """`chunks`: (start, size, owner) in order, None = free. `touched`: how far it was ever used."""

    size: int
    chunks: list[tuple[int, int, int | None]] = field(default_factory=list)
    touched: int = 0


class Arena:
    """Allocations by a key; `touched` bytes of all regions have been used at least once."""

    def __init__(self) -> None:
        self._regions: list[_Region] = []
        self._where: dict[int, _Region] = {}
        self._step = _FIRST_REGION
        self.touched = 0

    def allocate(self, key: int, size: int) -> None:
        """Takes `size` bytes under `key`, which must not be in use."""
        size = -(-max(size, 1) // _ALIGNMENT) * _ALIGNMENT
        region, index = self._best(size)
        start, have, _ = region.chunks[index]
        if have >= 2 * size or have - size >= _MAX_WASTE:
            region.chunks[index : index + 1] = [(start, size, key), (start + size, have - size, None)]
        else:
            region.chunks[index] = (start, have, key)
        self._where[key] = region
        end = start + size
        if end > region.touched:
            self.touched += end - region.touched
            region.touched = end

    def free(self, key: int) -> None:
        """Gives the chunk of `key` back."""
        region = self._where.pop(key)
        index = next(i for i, chunk in enumerate(region.chunks) if chunk[2] == key)
        first = index - 1 if index and region.chunks[index - 1][2] is None else index
        last = index + 1 if index + 1 < len(region.chunks) and region.chunks[index + 1][2] is None else index
        start = region.chunks[first][0]
        region.chunks[first : last + 1] = [(start, sum(chunk[1] for chunk in region.chunks[first : last + 1]), None)]

    def rename(self, old: int, new: int) -> None:
        """Lets `new` take over the chunk of `old`."""
        region = self._where[new] = self._where.pop(old)
        index = next(i for i, chunk in enumerate(region.chunks) if chunk[2] == old)
        region.chunks[index] = (*region.chunks[index][:2], new)

    def _best(self, size: int) -> tuple[_Region, int]:
        free = [
            (chunk[1], number, index)
            for number, region in enumerate(self._regions)
            for index, chunk in enumerate(region.chunks)
            if chunk[2] is None and chunk[1] >= size
        ]
        if free:
            _, number, index = min(free)
            return self._regions[number], index
        grown = False
        while self._step < size:
            self._step, grown = self._step * 2, True
        region = _Region(self._step, [(0, self._step, None)])
        self._regions.append(region)
        if not grown:
            self._step = min(2 * self._step, max(_LARGEST_STEP, self._step))
        return region, 0


@dataclass(frozen=True, slots=True)
class Event:
    """`size` bytes are taken under `key` (in the place of `instead`, if that is not None), or given back (0)."""

    key: int
    size: int = 0
    instead: int | None = None


def live_peak(events: Iterable[Event]) -> int:
    """The most bytes that are in use at a time."""
    sizes: dict[int, int] = {}
    now = peak = 0
    for event in events:
        if event.size:
            now -= sizes.pop(event.instead, 0) if event.instead is not None else 0
            sizes[event.key] = event.size
            now += event.size
            peak = max(peak, now)
        else:
            now -= sizes.pop(event.key)
    return peak


def arena_peak(events: Iterable[Event]) -> int:
    """The most bytes that the arena holds, from empty."""
    arena = Arena()
    for event in events:
        if not event.size:
            arena.free(event.key)
        elif event.instead is not None:
            arena.rename(event.instead, event.key)
        else:
            arena.allocate(event.key, event.size)
    return arena.touched
