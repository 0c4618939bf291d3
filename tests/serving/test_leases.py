"""One thread renews the leases of all answers of a client, and goes when there is nothing left to renew."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from ming_trt.serving import leases
from ming_trt.serving.leases import Leases

PATIENCE_S = 20.0


class Held:
    """A lease that ends with its `last` renewal."""

    def __init__(self, last: int) -> None:
        self._left, self.ended, self.lengths = last, False, list[float]()
        self.threads = set[str]()
        self.over = threading.Event()

    def renew(self, lease_s: float) -> None:
        self.lengths.append(lease_s)
        self.threads.add(threading.current_thread().name)
        self._left -= 1
        if self._left == 0:
            self.ended = True
            self.over.set()


@pytest.fixture
def all_leases() -> Iterator[Leases]:
    made = Leases()
    yield made
    made.close()


def renewers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "leases"]


def test_each_lease_is_renewed_until_its_answer_ends(all_leases: Leases) -> None:
    long, short, ended = Held(1), Held(4), Held(1)
    ended.ended = True
    all_leases.add(long, 0.6)
    all_leases.add(short, 0.03)  # due before the thread wakes for the other
    all_leases.add(ended, 0.03)
    assert short.over.wait(PATIENCE_S) and long.over.wait(PATIENCE_S)
    assert short.lengths == [0.03] * 4 and long.lengths == [0.6] and not ended.lengths
    assert short.threads == long.threads == {"leases"}


def test_the_thread_goes_and_comes_back(all_leases: Leases, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(renewers())
    monkeypatch.setattr(leases, "_LINGER_S", 0.01)
    for _ in range(2):
        held = Held(1)
        all_leases.add(held, 0.01)
        assert held.over.wait(PATIENCE_S)
        for thread in set(renewers()) - before:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


def test_closing_ends_it() -> None:
    before = set(renewers())
    closed = Leases()
    closed.add(Held(1), 1000.0)
    (thread,) = set(renewers()) - before
    closed.close()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
