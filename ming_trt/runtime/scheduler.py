"""Who runs next: requests wait, then one at a time is read (prefill, in chunks), then all that were read decode
together.

Invariant: the sequences that decode hold the cache rows 0..n-1 in the order of `decoding`, and the one being read
holds row n.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from time import perf_counter

from ming_trt.runtime.kv_cache import KVCache
from ming_trt.runtime.sequence import Sequence


class Scheduler:
    """Keeps the queue, the rows and their order. Used by one thread."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.waiting: deque[Sequence] = deque()
        self.reading: Sequence | None = None
        self.decoding: list[Sequence] = []

    def __iter__(self) -> Iterator[Sequence]:
        """Every sequence, whatever its state."""
        yield from list(self.decoding)
        if self.reading:
            yield self.reading
        yield from list(self.waiting)

    @property
    def idle(self) -> bool:
        """Nothing to do."""
        return not (self.waiting or self.reading or self.decoding)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence behind the others."""
        self.waiting.append(sequence)

    def next_to_read(self) -> Sequence | None:
        """The sequence whose prompt is read now: the one begun, else the oldest that waits if a row is free."""
        if self.reading is None and self.waiting and self.cache.count < self.cache.slots:
            sequence = self.waiting.popleft()
            sequence.slot = self.cache.allocate()
            sequence.admitted = perf_counter()
            self.reading = sequence
        return self.reading

    def promote(self) -> None:
        """The prompt has been read: from now on its sequence decodes with the others."""
        assert self.reading is not None
        self.decoding.append(self.reading)
        self.reading = None

    def release(self, sequence: Sequence) -> None:
        """Forgets a sequence in any state, and gives its row back. Forgetting one twice is harmless."""
        if sequence.slot >= 0:
            self.cache.free(sequence.slot, boundary=len(self.decoding))
            if sequence is self.reading:
                self.reading = None
            else:
                self.decoding[sequence.slot] = self.decoding[-1]
                self.decoding.pop()
            for slot, other in enumerate(self.decoding):
                other.slot = slot
            if self.reading:
                self.reading.slot = len(self.decoding)
            sequence.slot = -1
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
