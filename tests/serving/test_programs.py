"""The environment of the server's processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from ming_trt.serving.programs import TUNABLES_VARIABLE, find_program, huge_pages


def test_huge_pages_are_asked_for_unless_the_user_decided() -> None:
    assert huge_pages("") == "glibc.malloc.hugetlb=1"
    assert huge_pages("glibc.malloc.arena_max=2") == "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"
    assert huge_pages("glibc.malloc.hugetlb=0") == "glibc.malloc.hugetlb=0"


def test_the_server_gets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TUNABLES_VARIABLE, raising=False)
    assert find_program(tmp_path).environment[TUNABLES_VARIABLE] == "glibc.malloc.hugetlb=1"
