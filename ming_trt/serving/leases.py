"""Renews the leases of a client's answers, all from one thread.

A thread for each answer would be made just when the server begins to work on it, and take the time from it.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

# How long the thread stays when no answer streams, so that the next one need not make it again.
_LINGER_S = 60.0


class Leased(Protocol):
    """What is renewed until it has ended."""

    @property
    def ended(self) -> bool: ...

    def renew(self, lease_s: float) -> None: ...


class Leases:
    """`add` from any thread; every lease is renewed three times in its length."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: dict[Leased, tuple[float, float]] = {}  # when it is renewed next, and its length
        self._wakes = 0.0  # when the thread looks again
        self._running = self._closed = False

    def add(self, answer: Leased, lease_s: float) -> None:
        """Renews the answer's lease of `lease_s` seconds until it has ended."""
        with self._changed:
            due = time.monotonic() + lease_s / 3
            self._due[answer] = due, lease_s
            if not self._running:
                self._running, self._wakes = True, due
                threading.Thread(target=self._work, name="leases", daemon=True).start()
            elif due < self._wakes:
                self._changed.notify()

    def close(self) -> None:
        """Ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _work(self) -> None:
        while (now_due := self._wait()) is not None:
            for answer, lease_s in now_due:
                if not answer.ended:
                    answer.renew(lease_s)

    def _wait(self) -> list[tuple[Leased, float]] | None:
        """Waits until leases are due and gives them; None when the thread is to end."""
        with self._changed:
            linger = time.monotonic() + _LINGER_S
            while not self._closed:
                now = time.monotonic()
                self._due = {answer: entry for answer, entry in self._due.items() if not answer.ended}
                ready = [(answer, lease_s) for answer, (due, lease_s) in self._due.items() if due <= now]
                if ready:
                    self._due |= {answer: (now + lease_s / 3, lease_s) for answer, lease_s in ready}
                    return ready
                if not self._due and now >= linger:
                    break
                self._wakes = min((due for due, _ in self._due.values()), default=linger)
                self._changed.wait(self._wakes - now)
            self._running = False
            return None
