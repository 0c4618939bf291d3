"""Back-pressure by what the client has heard."""

import threading
import time
from pathlib import Path

import pytest

from ming_trt.errors import CancelledError
from ming_trt.runtime.cancel import CancelBoard
from ming_trt.runtime.heard import Allowance


def test_the_board_keeps_what_was_heard(tmp_path: Path) -> None:
    board = CancelBoard(tmp_path)
    assert board.heard("a") == 0
    board.hear("a", 1.25)
    board.hear("b", 7000.5)
    board.hear("a", 2.5)
    assert board.heard("a") == 2.5 and board.heard("b") == 7000.5
    assert board.sweep() == 0 and not board.is_cancelled("a")
    assert all(note.is_symlink() for note in tmp_path.iterdir()), "a note is a link, made by one call"
    board.forget("a")
    assert board.heard("a") == 0


def test_sound_waits_for_its_listener(tmp_path: Path) -> None:
    """At most `ahead` seconds and one chunk are on their way; what was heard lets the next go."""
    board, sent = CancelBoard(tmp_path), []
    allowance = Allowance(board, "a", ahead=2.0)

    def send() -> None:
        for _ in range(12):
            allowance.spend(0.75)
            sent.append(0.75)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    heard = 0.0
    while heard < 12 * 0.75:
        wait_until(sent, min(heard + 2.0, 12 * 0.75))
        time.sleep(0.1)  # were there no limit, more would come now
        assert sum(sent) <= heard + 2.0 + 0.75
        heard += 1.5
        board.hear("a", heard)
    thread.join(10)
    assert not thread.is_alive() and len(sent) == 12


@pytest.mark.parametrize("how", ["cancel", "lease"])
def test_a_client_that_is_gone_ends_the_wait(tmp_path: Path, how: str) -> None:
    board = CancelBoard(tmp_path)
    allowance = Allowance(board, "a", ahead=0.5)
    allowance.spend(3)
    if how == "cancel":
        board.cancel("a")
    else:
        board.renew("a", 0.05)
    with pytest.raises(CancelledError, match="waited for the client"):
        allowance.spend(3)


def test_without_a_limit_nothing_waits(tmp_path: Path) -> None:
    allowance = Allowance(CancelBoard(tmp_path), "a", ahead=0)
    for _ in range(1000):
        allowance.spend(10)
    assert allowance.sent == 10_000


def wait_until(sent: list[float], seconds: float) -> None:
    deadline = time.monotonic() + 10
    while sum(sent) < seconds:
        assert time.monotonic() < deadline
        time.sleep(0.01)
