"""How much memory the flows of all streams may take together.

A flow that runs part by part keeps keys and values for every Euler step: about 4.6 MB a frame at the official sizes in
float32, 2.6 GB for 5 s behind a prompt of 6 s; where an engine's caches have one capacity, all of that from the start.
So streams share a budget (`flow_budget` of the preset), and one that finds no room is told so at once.
"""

from __future__ import annotations

import threading


class FlowMemory:
    """A budget of `budget` bytes; `used` of them are taken. For any number of threads."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = 0
        # a share may be collected, and give back, while its thread is in here
        self._lock = threading.RLock()

    def take(self, count: int) -> bool:
        """Takes `count` bytes if they are free."""
        with self._lock:
            if self.used + count > self.budget:
                return False
            self.used += count
            return True

    def give(self, count: int) -> None:
        """Gives back what was taken."""
        with self._lock:
            self.used -= count


class Share:
    """What one stream, or its caches while they wait for the next, has taken; given back by `close`, or when nobody
    refers to it any more."""

    def __init__(self, memory: FlowMemory) -> None:
        self._memory = memory
        self._taken = 0

    def grow(self, total: int) -> bool:
        """Takes what is missing to `total` bytes; false, and nothing is taken, if there is no room for it."""
        more = total - self._taken
        if more > 0 and not self._memory.take(more):
            return False
        self._taken = max(self._taken, total)
        return True

    def close(self) -> None:
        """Gives all back; harmless when repeated."""
        taken, self._taken = self._taken, 0
        self._memory.give(taken)

    def __del__(self) -> None:
        self.close()
