"""Benchmarks of this folder do not measure the machine: that takes seconds and is tested by itself."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ming_trt.bench.machine import Ceiling

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def known_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ming_trt.bench.run.measure_ceiling", lambda: Ceiling(1, 1e10, 1e11, "a test"))


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    """Imports scripts by name, as they import each other."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(FOLDER))
