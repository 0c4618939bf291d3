"""Repositories: what is written, what is refused, that nothing half is ever left."""

import json
import shutil
from pathlib import Path

import pytest

from ming_trt import bundle
from ming_trt.bundle import DRAWING_ENGINES, SPEAKING_ENGINES
from ming_trt.errors import BundleError, ServeError
from ming_trt.serving.assemble import assemble, open_bundle, read_mark
from ming_trt.serving.configs import ensemble_config, from_text
from ming_trt.serving.graph import DRAWING, REQUIRED_COMPONENTS, SPEAKING, absent, left_out, stages_for
from ming_trt.serving.preflight import check_repository

from .toy_bundle import HIDDEN, write_bundle

UNDERSTANDING = stages_for(REQUIRED_COMPONENTS)
STEPS = [stage.name for stage in UNDERSTANDING if stage.in_graph]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle")
    assemble(tmp_path / "bundle", tmp_path / "repo")
    return tmp_path / "repo"


def test_every_model_has_config_and_code(made: Path) -> None:
    configs = check_repository(made)
    assert set(configs) == {stage.name for stage in UNDERSTANDING} | {"ming"}
    assert (made / "ming" / "1").is_dir() and not list((made / "ming" / "1").iterdir())
    assert configs["llm"].model_transaction_policy.decoupled
    for name, config in configs.items():
        if name != "ming":
            assert config.instance_group[0].kind == config.instance_group[0].KIND_CPU
            assert (made / name / "1" / "model.py").is_file()
    rows = {tensor.name: tensor for tensor in configs["llm"].input}["vision_rows"]
    assert list(rows.dims) == [-1, HIDDEN]


def test_ensemble_takes_media_optionally(made: Path) -> None:
    config = from_text((made / "ming" / "config.pbtxt").read_text())
    assert {tensor.name: tensor.optional for tensor in config.input} == {
        "request": False,
        "images": True,
        "videos": True,
        "audios": True,
    }
    assert [step.model_name for step in config.ensemble_scheduling.step] == [
        s.name for s in UNDERSTANDING if s.in_graph
    ]


def test_repository_and_bundle_move_together(made: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "deeper"
    moved.mkdir(parents=True)
    shutil.move(made, moved / "repo")
    with pytest.raises(BundleError, match="move both together"):
        open_bundle(moved / "repo", read_mark(moved / "repo"))
    shutil.move(tmp_path / "bundle", moved / "bundle")
    assert open_bundle(moved / "repo", read_mark(moved / "repo")).path == moved / "bundle"


def test_assembling_again_replaces(made: Path, tmp_path: Path) -> None:
    (made / "stale").mkdir()
    assemble(tmp_path / "bundle", made)
    assert not (made / "stale").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "repo"]


def test_foreign_folder_is_not_touched(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(ServeError, match="holds other files"):
        assemble(tmp_path / "bundle", tmp_path / "home")
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["letter.txt"]


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    (tmp_path / "source").mkdir()
    with pytest.raises((ServeError, OSError)):
        assemble(tmp_path / "bundle", tmp_path / "repo", source=tmp_path / "source")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "source"]


@pytest.mark.parametrize("verdict", [bundle.FAILED, bundle.MISSING])
def test_gate_is_kept(tmp_path: Path, verdict: str) -> None:
    write_bundle(tmp_path / "bundle", verdict)
    with pytest.raises(BundleError, match="--allow-ungated"):
        assemble(tmp_path / "bundle", tmp_path / "repo")
    assert assemble(tmp_path / "bundle", tmp_path / "repo", allow_ungated=True).ungated
    assert json.loads((tmp_path / "repo" / "ming-trt.json").read_text())["ungated"] is True


def test_compiled_bundle_can_be_assembled(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle", bundle.NOT_RUN)
    assert not assemble(tmp_path / "bundle", tmp_path / "repo").ungated


def test_missing_component_is_named(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle", without="audio_encoder")
    with pytest.raises(BundleError, match="audio_encoder"):
        assemble(tmp_path / "bundle", tmp_path / "repo")


@pytest.mark.parametrize("kinds", [("dit",), ("talker",), ("dit", "talker")])
def test_pictures_and_speech_join_the_graph(kinds: tuple[str, ...]) -> None:
    """They add outputs on one decoupled track, and models that the graph does not run by itself."""
    engines = {"dit": DRAWING_ENGINES, "talker": SPEAKING_ENGINES}
    stages = stages_for((*REQUIRED_COMPONENTS, *(engine for kind in kinds for engine in engines[kind])))
    outputs = {"dit": "image", "talker": "audio"}
    config = ensemble_config(stages, HIDDEN)
    assert [t.name for t in config.output] == ["text", "state", *(outputs[kind] for kind in kinds)]
    assert [step.model_name for step in config.ensemble_scheduling.step] == [
        s.name for s in UNDERSTANDING if s.in_graph
    ]
    assert {s.name for s in stages} - {s.name for s in UNDERSTANDING} == {
        {"dit": "image", "talker": "speech"}[kind] for kind in kinds
    }
    assert {s.name: s.decoupled for s in stages}["postprocess"] and not UNDERSTANDING[4].decoupled
    assert ("voice" in {t.name for t in config.input}) == ("talker" in kinds)


@pytest.mark.parametrize("engines", [DRAWING_ENGINES, SPEAKING_ENGINES])
def test_a_stage_whose_engines_are_not_all_there_is_left_out(engines: tuple[str, ...]) -> None:
    """A server with a stage that cannot load would not start at all."""
    what, stage = (DRAWING, "image") if DRAWING in engines else (SPEAKING, "speech")
    for lacking in engines:
        components = {*REQUIRED_COMPONENTS, *engines} - {lacking}
        assert stages_for(components) == UNDERSTANDING and absent(components, what) == [lacking]
        told = [f"the bundle has no {lacking}: the stage '{stage}' is left out; build them too to have it"]
        assert left_out(components) == ([] if lacking == what else told)
    assert left_out({*REQUIRED_COMPONENTS, *engines}) == []
