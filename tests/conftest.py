"""Shared fixtures: where the reference cases lie, and a bundle of the mini checkpoint."""

from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "data" / "golden"
UNDERSTANDING = GOLDEN / "understanding"
GENERATION = GOLDEN / "generation"


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
