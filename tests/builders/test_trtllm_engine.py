"""Step `llm-engine`: children, logs, stamps, resuming. The library is a stand-in that builds nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from builders import trtllm_engine
from builders.steps import Context
from builders.trtllm import config_json
from builders.trtllm_layout import layout, parallel
from ming_trt import presets
from ming_trt.bundle import NOT_RUN
from ming_trt.config import load_config
from ming_trt.errors import BuildError, BundleError, UnavailableError
from ming_trt.trtllm import open as opening
from ming_trt.trtllm import signatures, stamp
from ming_trt.trtllm.facts import engine_facts
from tests.builders.trtllm_help import POSITIONS, export
from tests.conftest import UNDERSTANDING
from tests.trtllm import fake_library
from tests.trtllm.test_service import API

GOLDEN = UNDERSTANDING / "checkpoint"
PRESET = presets.load("h200-fp8")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The list of ranks that the stand-in was asked for, in this process and in its children."""
    log = fake_library.write(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("FAKE_LIBRARY_LOG", str(log))
    monkeypatch.setattr(stamp, "gpu_capability", lambda index=0: "sm90")
    return log


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """What the step is given: a bf16 checkpoint of two ranks."""
    checkpoint, work = tmp_path / "llm-checkpoint", tmp_path / "work"
    export(GOLDEN, checkpoint, "bf16", 2, 1)
    work.mkdir()
    return Context(work, {"llm-checkpoint": checkpoint}, {"llm-checkpoint": {"precision": "bf16", "weights": "w"}})


def config() -> dict[str, Any]:
    llm = load_config(GOLDEN).llm
    return config_json(llm, layout(llm, parallel(llm, 2, 1)), "bf16", POSITIONS)


def test_ranks_are_built_once_resumed_and_stamped(
    built: Path, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builder dies on rank 1; the next build makes rank 1 only. The facts say with what and for which GPU."""
    cache = tmp_path / "cache"
    step, gate = trtllm_engine.steps(PRESET, config(), cache)
    monkeypatch.setenv("FAKE_LIBRARY_FAULT", "die 1")
    with pytest.raises(BuildError, match=r"builder died with signal SIGKILL \(building rank 1\): see '.*build.log'"):
        step.run(context)
    monkeypatch.setenv("FAKE_LIBRARY_FAULT", "raise 1")
    with pytest.raises(BuildError, match=r"builder failed \(RuntimeError: no tactic found\) \(rank 1; see"):
        step.run(context)
    monkeypatch.delenv("FAKE_LIBRARY_FAULT")
    facts = dict(step.run(context))
    assert built.read_text().split() == ["0", "1", "1", "1"]
    assert sorted(path.name for path in context.work.iterdir()) == [
        "build.log",
        "config.json",
        "rank0.engine",
        "rank1.engine",
    ]
    assert not (cache / "llm-engine").exists()
    expected = {"tensorrt_llm": "1.2.1", "tensorrt": "10.14.1.48", "device": "sm90", "ranks": 2}
    assert facts["engine"]["stamp"] == expected and facts["model"] == "llm-engine" and facts["precision"] == "bf16"
    assert stamp.EngineStamp.from_facts(json.loads(json.dumps(facts))).as_dict() == expected
    assert engine_facts(context.work).ranks == 2
    report = gate.run(Context(tmp_path, {}, {"llm-engine": facts}))
    assert report["verdict"] == NOT_RUN and "built by TensorRT-LLM 1.2.1 for sm90, not run" in report["reason"]


def test_keys_and_checkpoints_that_changed(
    built: Path, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another GPU, limit or cut is another key; half-done ranks of another checkpoint are built again."""
    keys = {trtllm_engine.steps(PRESET, config(), tmp_path)[0].key}
    profile = dataclasses.replace(PRESET.profile, slots=8)
    keys.add(trtllm_engine.steps(dataclasses.replace(PRESET, profile=profile), config(), tmp_path)[0].key)
    monkeypatch.setattr(stamp, "gpu_capability", lambda index=0: "sm89")
    keys.add(trtllm_engine.steps(PRESET, config(), tmp_path)[0].key)
    assert len(keys) == 3
    cache = tmp_path / "cache" / "llm-engine"
    cache.mkdir(parents=True)
    (cache / "key").write_text("of another checkpoint")
    (cache / "rank0.done").write_text("{}")
    trtllm_engine.steps(PRESET, config(), tmp_path / "cache")[0].run(context)
    assert built.read_text().split() == ["0", "1"]


def test_checkpoint_that_does_not_fit_is_refused_before_the_builder(built: Path, context: Context) -> None:
    (context.inputs["llm-checkpoint"] / "rank1.safetensors").write_bytes(
        (context.inputs["llm-checkpoint"] / "rank0.safetensors").read_bytes()[:64]
    )
    with pytest.raises(BuildError, match="rank 0; see"):
        trtllm_engine.steps(PRESET, config(), context.work / "cache")[0].run(context)
    assert not built.exists()


def test_refusals_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, text in (("", "is not installed"), ("1.3.0", "1.3.0 is installed and the engine needs 1.2.1")):
        monkeypatch.setattr(signatures, "installed", lambda version=version: version)
        with pytest.raises(UnavailableError, match=text) as caught:
            trtllm_engine.check()
        assert "--only llm-checkpoint works on any machine" in str(caught.value) and "\n" not in str(caught.value)


def test_engines_of_elsewhere_are_refused(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = stamp.here(1)
    stamp.check(good)
    for change, text in (
        ({"tensorrt_llm": "1.2.0"}, "with TensorRT-LLM 1.2.0 and 1.2.1 is here"),
        ({"tensorrt": "10.13.3"}, "with TensorRT 10.13.3 and 10.14.1.48 is here"),
        ({"device": "sm100"}, "for sm100 and this GPU is sm90"),
    ):
        with pytest.raises(BundleError, match=text):
            stamp.check(dataclasses.replace(good, **change))

    def one_gpu(index: int = 0) -> str:
        if index:
            raise UnavailableError("none")
        return "sm90"

    monkeypatch.setattr(stamp, "gpu_capability", one_gpu)
    with pytest.raises(BundleError, match="needs 2 GPUs and GPU 1 is not there: build with --tp 1"):
        stamp.check(dataclasses.replace(good, ranks=2))
    with pytest.raises(BundleError, match="no stamp"):
        stamp.EngineStamp.from_facts({"engine": {}})


def test_executor_of_several_ranks_is_an_orchestrator(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One server process; the executor starts the ranks with TensorRT-LLM's worker program, which must be there."""
    plain = vars(opening.executor_config(API, 4096, 1))
    assert plain["enable_chunked_context"] is True and "parallel_config" not in plain
    assert vars(plain["kv_cache_config"]) == {"enable_block_reuse": False, "max_tokens": 4096}
    assert [output.name for output in plain["additional_model_outputs"]] == ["hidden", "embeds"]
    with pytest.raises(UnavailableError, match="worker program"):
        opening.executor_config(API, 4096, 2)
    worker = built.parent / "tensorrt_llm" / "bin" / "executorWorker"
    worker.parent.mkdir()
    worker.write_bytes(b"")
    chosen = vars(opening.executor_config(API, 4096, 2))["parallel_config"].orchestrator_config
    assert chosen.is_orchestrator is True and Path(chosen.worker_executable_path) == worker
