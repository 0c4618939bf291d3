"""Shared fixtures: where the reference cases lie, and a bundle of the mini checkpoint; fast tests first."""

import os
import shutil
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "data" / "golden"
UNDERSTANDING = GOLDEN / "understanding"
GENERATION = GOLDEN / "generation"


def pytest_configure() -> None:
    """Hypothesis without its time limit per example: no test may fail because the machine is busy."""
    try:
        from hypothesis import settings
    except ModuleNotFoundError:  # a bare GPU machine runs tests/gpu without it
        return
    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The fast ones first, then those marked slow, then those that need a server; the order is kept within each."""
    items.sort(key=lambda item: 2 if item.get_closest_marker("triton") else int(bool(item.get_closest_marker("slow"))))


@pytest.fixture(scope="session")
def understanding_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the mini checkpoint with the engines of the understanding path, built once for the session."""
    from builders.build import Options, build
    from ming_trt import presets
    from ming_trt.mini import write_mini

    folder = tmp_path_factory.mktemp("understanding")
    write_mini(folder / "checkpoint")
    engines = ("vision_encoder", "audio_encoder", "llm")
    assert build(Options(folder / "checkpoint", folder / "bundle", presets.load("mini-cpu"), engines)).ok
    return folder / "bundle"


@pytest.fixture(scope="session")
def mini_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the mini checkpoint with all engines, built once for the session (minutes on two cores).

    `MING_TRT_TEST_BUNDLE` names one that was built before: `ming-trt mini`, then `ming-trt build --preset mini-cpu`.
    """
    from builders.build import Options, build
    from ming_trt import presets

    if given := os.environ.get("MING_TRT_TEST_BUNDLE"):
        return Path(given)
    understanding: Path = request.getfixturevalue("understanding_bundle")
    folder = tmp_path_factory.mktemp("mini")
    shutil.copytree(understanding, folder / "bundle")
    assert build(Options(understanding.parent / "checkpoint", folder / "bundle", presets.load("mini-cpu"))).ok
    return folder / "bundle"
