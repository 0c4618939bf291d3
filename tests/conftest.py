"""Shared fixtures: where the reference cases lie, and a bundle of the mini checkpoint; the order of the tests."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
GOLDEN = HERE / "data" / "golden"
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


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The fast ones first, then those that need a server, then those marked slow; the order is kept within each.

    Under `make test`, two processes share the work (pytest-xdist): all tests with a server stay in one of them, while
    the other goes on to the slow ones, a file at a time; other tests that share a folder's fixtures stay together.
    """
    items.sort(key=_turn)
    for item in items:
        if item.config.pluginmanager.hasplugin("xdist"):
            item.add_marker(pytest.mark.xdist_group(_group(item)))


def _turn(item: pytest.Item) -> int:
    return 1 if item.get_closest_marker("triton") else 2 * int(bool(item.get_closest_marker("slow")))


def _group(item: pytest.Item) -> str:
    if item.get_closest_marker("triton"):
        return "triton"
    folder, turn = item.path.parent, _turn(item)
    shares = turn == 0 and folder != HERE and (folder / "conftest.py").exists()
    return f"{(folder if shares else item.path).relative_to(HERE).as_posix()}, turn {turn}"


def built_once(name: str, tmp_path_factory: pytest.TempPathFactory, make: Callable[[Path], None]) -> Path:
    """The session's folder `name`, filled by `make` in the first process that asks; the other waits and shares it."""
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = shared / f"shared-{name}", shared / f"shared-{name}.done"
    with FileLock(shared / f"shared-{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def understanding_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the mini checkpoint with the engines of the understanding path, built once for the session."""
    from builders.build import Options, build
    from ming_trt import presets
    from ming_trt.mini import write_mini

    def make(folder: Path) -> None:
        write_mini(folder / "checkpoint")
        engines = ("vision_encoder", "audio_encoder", "llm")
        assert build(Options(folder / "checkpoint", folder / "bundle", presets.load("mini-cpu"), engines)).ok

    return built_once("understanding", tmp_path_factory, make) / "bundle"


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

    def make(folder: Path) -> None:
        shutil.copytree(understanding, folder / "bundle")
        assert build(Options(understanding.parent / "checkpoint", folder / "bundle", presets.load("mini-cpu"))).ok

    return built_once("mini", tmp_path_factory, make) / "bundle"
