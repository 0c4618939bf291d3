"""Benchmarks of this folder do not measure the machine: that takes seconds and is tested by itself."""

import pytest

from ming_trt.bench.machine import Ceiling


@pytest.fixture(autouse=True)
def known_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ming_trt.bench.run.measure_ceiling", lambda: Ceiling(1, 1e10, 1e11, "a test"))
