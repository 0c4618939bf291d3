"""Fixtures of the build tests: toy engines in place of the registered ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from builders import registry

HERE = Path(__file__).parent


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The registry holds `alpha` and `beta` only."""
    monkeypatch.syspath_prepend(str(HERE))
    import toy_components

    monkeypatch.setattr(registry, "COMPONENTS", dict(toy_components.COMPONENTS))
    yield
    for toy in (toy_components.ALPHA, toy_components.BETA):
        toy.fault = ""
    sys.modules.pop("toy_components", None)


@pytest.fixture
def checkpoint(toys: None, tmp_path: Path) -> Path:
    """A checkpoint of both toys."""
    import toy_components

    config = HERE.parent / "data" / "golden" / "understanding" / "checkpoint" / "config.json"
    return toy_components.write_checkpoint(tmp_path / "checkpoint", config)
