from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ming_trt.errors import ServeError
from ming_trt.runtime.cancel import CancelBoard


@pytest.fixture
def board(tmp_path: Path) -> CancelBoard:
    return CancelBoard(tmp_path / "run" / "board")


def test_a_flag_is_seen_by_another_process(board: CancelBoard) -> None:
    code = "import sys; from ming_trt.runtime.cancel import CancelBoard; CancelBoard(sys.argv[1]).cancel(sys.argv[2])"
    assert not board.is_cancelled("a/../b\n语")
    subprocess.run([sys.executable, "-c", code, str(board.folder), "a/../b\n语"], check=True)
    assert board.is_cancelled("a/../b\n语")
    assert not board.is_cancelled("another")


def test_a_lease_runs_out_unless_it_is_renewed(board: CancelBoard) -> None:
    board.renew("x", 1000)
    assert not board.is_cancelled("x")
    board.renew("x", 0.02)
    board.renew("y", 1000)
    time.sleep(0.05)
    assert board.is_cancelled("x") and not board.is_cancelled("y")
    board.renew("x", 1000)
    assert not board.is_cancelled("x")


def test_a_renewed_lease_does_not_revive_what_was_cancelled(board: CancelBoard) -> None:
    board.cancel("x")
    board.renew("x", 1000)
    assert board.is_cancelled("x")
    board.forget("x")
    board.forget("x")
    assert not board.is_cancelled("x")


def test_sweeping_keeps_what_may_still_be_read(board: CancelBoard) -> None:
    board.cancel("old")
    board.renew("ended", -100)
    board.renew("alive", 1000)
    board.renew("before restart", 40 * 86400)
    assert board.sweep(keep_seconds=3600) == 1
    time.sleep(0.02)
    assert board.sweep(keep_seconds=0.01) == 2
    assert [path.suffix for path in board.folder.iterdir()] == [".lease"]
    assert not board.is_cancelled("alive")


def test_the_folder_is_private_and_must_be_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = CancelBoard(tmp_path / "board")
    assert board.folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(ServeError, match="cannot be made"):
        CancelBoard(tmp_path / "file")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ServeError, match="belongs to another user"):
        CancelBoard(tmp_path / "board")
