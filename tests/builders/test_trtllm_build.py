"""`ming-trt build --only llm-checkpoint` as a user runs it: result, refusals before any work, kills, no rebuild."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from builders.audit import audit
from builders.build import Options, build
from builders.calibration import MODALITIES, Sample, calibrate
from builders.calibration_samples import SYNTHETIC, Source, choose, load
from builders.steps import Outcome
from builders.trtllm import kv_bytes, kv_precision
from ming_trt import presets
from ming_trt.bundle import NOT_RUN, PASSED, Bundle, files_below
from ming_trt.checkpoint import Checkpoint
from ming_trt.config import load_config
from ming_trt.errors import BuildError, BundleError, MingError
from ming_trt.models.llm import MingLLM, trace, weight_map
from ming_trt.models.weights import load_weights
from ming_trt.presets import Preset
from ming_trt.runtime.stages import llm_options
from ming_trt.trtllm import stamp
from ming_trt.trtllm.contract import check_checkpoint
from ming_trt.trtllm.open import open_service
from tests.conftest import UNDERSTANDING
from tests.trtllm import fake_library

GOLDEN = UNDERSTANDING / "checkpoint"
ONLY = ("llm-checkpoint",)


def preset(precision: str = "bf16", **changes: Any) -> Preset:
    return dataclasses.replace(presets.load("h200-fp8").with_options(precision=precision), **changes)


@pytest.mark.parametrize("precision", ["fp8"])
def test_build_and_again(tmp_path: Path, precision: str) -> None:
    """The gate passes, the network asks for just these weights, a second build does nothing."""
    options = Options(GOLDEN, tmp_path / "bundle", preset(precision), ONLY, tensor_parallel=2, expert_parallel=2)
    report = build(options)
    assert report.ok and report.verdict == PASSED
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.check() == []
    entry = bundle.component("llm-checkpoint")
    assert entry.precision == precision and entry.rung == "typed"
    folder = bundle.model_path("llm-checkpoint").parent
    assert check_checkpoint(folder) == []
    config = json.loads((folder / "config.json").read_text())
    assert config["mapping"] == {"world_size": 2, "tp_size": 2, "pp_size": 1, "moe_tp_size": 1, "moe_ep_size": 2}
    if precision == "fp8":
        assert entry.facts["calibration"]["data"]["source"] == SYNTHETIC
        assert set(entry.facts["calibration"]["data"]["tokens"]) == set(MODALITIES.values())
    assert {result.outcome for result in build(options).results.values()} == {Outcome.NOOP}


def test_engine_is_part_of_the_one_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With (a stand-in for) the library the build goes on to the engine, which the manifest lists as `llm`."""
    log = fake_library.write(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("FAKE_LIBRARY_LOG", str(log))
    monkeypatch.setattr(stamp, "gpu_capability", lambda index=0: "sm90")
    options = Options(GOLDEN, tmp_path / "bundle", preset("bf16"), ("llm-engine",), tensor_parallel=2)
    report = build(options)
    assert report.ok and report.verdict == NOT_RUN
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.check() == [] and set(bundle.manifest.components) == {"llm-checkpoint", "llm"}
    llm = bundle.component("llm")
    assert (llm.target, llm.verdict, llm.rung) == ("tensorrt-llm", NOT_RUN, "compiled")
    assert bundle.component("llm-checkpoint").verdict == PASSED
    files = {path.name for path in bundle.model_path("llm").iterdir()}
    assert files == {"config.json", "build.log", "rank0.engine", "rank1.engine"}
    outcomes = {name: str(result.outcome) for name, result in build(options).results.items()}
    assert set(outcomes) >= {"assets", "llm-checkpoint", "gate:llm-checkpoint", "llm-engine", "gate:llm-engine"}
    assert outcomes.pop("rope_table") == outcomes.pop("gate:rope_table") == "SKIPPED"
    assert set(outcomes.values()) == {"NOOP"} and log.read_text().split() == ["0", "1"]
    assert audit(bundle, GOLDEN, ("llm",))[0].gate.verdict == NOT_RUN
    # the engine is opened by what the manifest says: a budget that cannot hold a request is refused before the GPU
    with pytest.raises(BundleError, match=r"a kv_budget of 0 MiB holds \d+ tokens"):
        open_service(bundle, dataclasses.replace(llm_options(bundle), kv_budget=1 << 16))


def _refused(tmp_path: Path, sentence: str, chosen: Preset, **options: Any) -> None:
    out = tmp_path / "bundle"
    with pytest.raises(MingError) as caught:
        build(Options(GOLDEN, out, chosen, **{"only": ONLY, **options}))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert not (out / "llm-checkpoint").exists() and not (out / "assets").exists()


def test_refusals_come_before_any_work(tmp_path: Path) -> None:
    _refused(tmp_path, "4 attention heads do not divide by 3", preset(), tensor_parallel=3)
    _refused(tmp_path, "above the preset's kv_budget of 1.0 MiB", preset(kv_budget=2**20))
    _refused(tmp_path, "there is no calibration folder", preset("fp8"), calibration=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    _refused(tmp_path, "holds no *.json request", preset("fp8"), calibration=tmp_path / "empty")
    _refused(tmp_path, "calibration is for fp8", preset("bf16"), calibration=tmp_path / "empty")
    _refused(tmp_path, "above --max-host-memory 10 MiB", preset(), max_host_memory=10 * 2**20)
    _refused(tmp_path, "is not installed", preset(), only=())
    _refused(tmp_path, "--only llm-checkpoint works on any machine", preset(), only=())
    _refused(tmp_path, "--only llm-checkpoint works on any machine", preset(), only=("llm-engine",))
    _refused(tmp_path, "has no engine 'llm': name llm-checkpoint, or llm-engine", preset(), only=("llm",))
    _refused(tmp_path, "target tensorrt needs TensorRT", preset(), only=("dit",))
    (tmp_path / "requests").mkdir()
    request = {"messages": [{"role": "user", "content": "hello"}]}
    (tmp_path / "requests" / "a.json").write_text(json.dumps(request))
    _refused(tmp_path, "need a tokenizer", preset("fp8"), calibration=tmp_path / "requests")


def test_another_targets_bundle_is_left_alone(tmp_path: Path) -> None:
    from builders.workspace import Record, Workspace

    with Workspace(tmp_path / "bundle") as space:
        work = space.begin("dit")
        (work / "model.onnx").write_bytes(b"x")
        space.publish(Record("dit", "key", "dit"), work)
    with pytest.raises(BuildError, match="holds dit for another target"):
        build(Options(GOLDEN, tmp_path / "bundle", preset(), ONLY))
    assert (tmp_path / "bundle" / "dit" / "model.onnx").exists()


def test_kv_cache_precision() -> None:
    """fp8 only where asked for in an FP8 model; half the bytes."""
    config = load_config(GOLDEN).llm
    plain = presets.load("h200-fp8")
    asked = dataclasses.replace(plain, precision={**plain.precision, "kv_cache": "fp8"})
    assert (kv_precision(plain), kv_precision(asked), kv_precision(preset("bf16"))) == ("bf16", "fp8", "bf16")
    assert kv_bytes(plain, config) == 2 * kv_bytes(asked, config)


def test_calibration_is_the_torch_definition(tmp_path: Path) -> None:
    """The layers that calibration runs give the residual stream of the whole model; ranges are its magnitudes."""
    config, checkpoint = load_config(GOLDEN), Checkpoint(GOLDEN)
    samples = load(Source(SYNTHETIC, ""), config, checkpoint)[:2]
    ranges = calibrate(config.llm, checkpoint, samples, tmp_path, "key")
    with torch.device("meta"):
        model = MingLLM(config.llm)
    load_weights(model, checkpoint, weight_map(config.llm))
    kept = torch.load(tmp_path / f"{config.llm.num_layers}.calibration.pt", weights_only=True)
    largest = 0.0
    for sample, hidden in zip(samples, kept, strict=True):
        length = len(sample.embeds)
        seen: list[torch.Tensor] = []
        hook = model.layers[1].attention.query_key_value.register_forward_pre_hook(lambda _, a, s=seen: s.append(a[0]))
        cache = [torch.zeros(1, config.llm.num_kv_heads, length, config.llm.head_dim)] * (2 * config.llm.num_layers)
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        inputs = (
            torch.zeros(1, length, dtype=torch.long),
            sample.embeds,
            torch.arange(length)[None],
            sample.modality[None],
            sample.positions[:, None],
            torch.zeros(1, dtype=torch.long),
            mask,
            torch.zeros(1, 1, dtype=torch.long),
        )
        traced = trace(model, *inputs, *cache)
        hook.remove()
        # float32, sums in another order
        torch.testing.assert_close(hidden, traced.layer_hidden[-1][0], rtol=1e-4, atol=1e-4)
        largest = max(largest, float(seen[0].abs().max()))
    assert ranges.amax["transformer.layers.1.attention.qkv"] == pytest.approx(largest, rel=1e-5)


def test_calibration_names_unreached_experts_and_missing_modalities(tmp_path: Path) -> None:
    config, checkpoint = load_config(GOLDEN), Checkpoint(GOLDEN)
    whole = load(Source(SYNTHETIC, ""), config, checkpoint)[0]
    # one token of each modality reaches at most three times top-k experts
    places = [int((whole.modality == code).nonzero()[0]) for code in MODALITIES]
    few = Sample("few", whole.embeds[places], whole.modality[places], whole.positions[:, places])
    ranges = calibrate(config.llm, checkpoint, [few], tmp_path / "few", "key")
    reached = len(MODALITIES) * config.llm.top_k
    for layer in range(config.llm.num_layers):
        assert len(ranges.unreached[str(layer)]) >= config.llm.num_experts - reached
        # the layer's maximum stands for all of them
        assert ranges.amax[f"transformer.layers.{layer}.mlp.proj"] > 0
    text = Sample("text", whole.embeds[:8], whole.modality[:8], whole.positions[:, :8])
    with pytest.raises(BuildError, match="no image and no audio tokens"):
        calibrate(config.llm, checkpoint, [text], tmp_path / "text", "key")


def test_calibration_goes_on_after_a_layer(tmp_path: Path) -> None:
    config, checkpoint = load_config(GOLDEN), Checkpoint(GOLDEN)
    samples = load(Source(SYNTHETIC, ""), config, checkpoint)[:1]
    expected = calibrate(config.llm, checkpoint, samples, tmp_path / "whole", "key").facts()

    class Stopped(Exception):
        pass

    def stop(_: str) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        calibrate(config.llm, checkpoint, samples, tmp_path / "part", "key", stop)
    notes: list[str] = []
    assert calibrate(config.llm, checkpoint, samples, tmp_path / "part", "key", notes.append).facts() == expected
    assert len(notes) == config.llm.num_layers - 1


def test_prepared_prompts_of_a_folder(tmp_path: Path) -> None:
    config, checkpoint = load_config(GOLDEN), Checkpoint(GOLDEN)
    arrays = {
        "input_ids": np.array([5, config.tokens.image_patch, config.tokens.audio_patch, 7]),
        "modality": np.array([0, 1, 2, 0]),
        "positions": np.tile(np.arange(4), (3, 1)),
        "feature_index": np.array([-1, 0, 1, -1]),
        "features": np.ones((2, config.llm.hidden_size), np.float32),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    source = choose(tmp_path, GOLDEN)
    (sample,) = load(source, config, checkpoint)
    table = checkpoint.read("model.model.word_embeddings.weight").float()
    assert torch.equal(sample.embeds[[0, 3]], table[[5, 7]])
    assert torch.equal(sample.embeds[1:3], torch.ones(2, config.llm.hidden_size))
    np.savez(tmp_path / "a.npz", **{**arrays, "positions": np.zeros((3, 5))})
    assert choose(tmp_path, GOLDEN).digest != source.digest
    with pytest.raises(BuildError, match="do not belong together"):
        load(choose(tmp_path, GOLDEN), config, checkpoint)


def samples_of_one_prompt(folder: Path, checkpoint: Path = GOLDEN) -> Path:
    """A calibration folder with a few tokens of each modality: all steps run, and calibration takes no time."""
    config = load_config(checkpoint)
    folder.mkdir()
    np.savez(
        folder / "a.npz",
        input_ids=np.array([5, config.tokens.image_patch, config.tokens.audio_patch, 7]),
        modality=np.array([0, 1, 2, 0]),
        positions=np.tile(np.arange(4), (3, 1)),
        feature_index=np.array([-1, 0, 1, -1]),
        features=np.ones((2, config.llm.hidden_size), np.float32),
    )
    return folder


FORKS = """
import os, random, signal, sys
from pathlib import Path
from builders.build import Options, build
from builders.steps import Silent
from builders.trtllm_file import TensorFiles
from ming_trt import presets
import builders.trtllm_verify, builders.calibration_samples, builders.trtllm_write

left = 0

def change(*_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

class Notes(Silent):
    def note(self, step, text):
        change()

def run(out):
    preset, samples = presets.load("h200-fp8"), Path({samples!r})
    build(Options(Path({source!r}), Path(out), preset, ("llm-checkpoint",), 0, samples, 2), Notes(), change)

for name in ("write", "finish"):
    def counted(*args, plain=getattr(TensorFiles, name)):
        change()
        return plain(*args)
    setattr(TensorFiles, name, counted)
run({whole!r})
killed = 0
for attempt in range(10):
    # dies before its n-th change: a line of the journal, a layer of calibration, a part of a tensor, a rename; soon at
    # first, since what is finished stays finished
    left = random.Random(attempt).randint(1, 40 if attempt > 3 else 9)
    child = os.fork()
    if child == 0:
        run({out!r})
        os._exit(0)
    killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
left = 0
run({out!r})
print(killed)
"""


@pytest.mark.slow
def test_a_build_killed_ten_times_gives_the_same_bundle(tmp_path: Path) -> None:
    """Kills fall into calibration, writing, publication and gate. Every file but the journal is equal."""
    samples = samples_of_one_prompt(tmp_path / "samples")
    paths = {"source": GOLDEN, "whole": tmp_path / "whole", "out": tmp_path / "killed", "samples": samples}
    script = FORKS.format(**{name: str(path) for name, path in paths.items()})
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], timeout=300, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    # what is finished stays finished, so the last attempts may find too little left to die in
    assert int(done.stdout.split()[-1]) >= 8
    names = [name for name in files_below(tmp_path / "whole") if not name.startswith(".")]
    assert names == [name for name in files_below(tmp_path / "killed") if not name.startswith(".")]
    assert len(names) >= 5
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_memory_at_the_official_widths(tmp_path: Path) -> None:
    """Two layers of 280 MiB, calibrated, exported and read back, within 900 MiB: a step that held a whole layer in
    float32 (550 MiB) beside the 400 MiB of the process would fail. The benchmark has the official number of experts."""
    root = Path(__file__).parents[2]
    script = (
        "import sys; sys.path.insert(0, 'benchmarks'); import trtllm_export; from pathlib import Path; "
        "config = trtllm_export.config(2); config['llm_config']['num_experts'] = 16; "
        f"trtllm_export.config = lambda layers: config; trtllm_export.make(Path({str(tmp_path / 'wide')!r}), 2)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root)
    samples = samples_of_one_prompt(tmp_path / "samples", tmp_path / "wide")
    command = [sys.executable, "-m", "ming_trt", "build", str(tmp_path / "wide"), "-o", str(tmp_path / "bundle")]
    command += ["--only", "llm-checkpoint", "--precision", "fp8", "--max-host-memory", "900MiB", "--tp", "2"]
    command += ["--calibration", str(samples)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in (tmp_path / "bundle" / ".journal").read_text().splitlines()]
    peaks = {event["step"]: event["peak_bytes"] for event in events if event["event"] == "built"}
    assert set(peaks) == {"assets", "llm-calibration", "llm-checkpoint", "gate:llm-checkpoint"}
    assert max(peaks.values()) < 900 << 20, peaks


def test_changed_samples_are_noticed(tmp_path: Path) -> None:
    """The shortcut of an unchanged build looks at the calibration folder too."""
    folder = samples_of_one_prompt(tmp_path / "samples")
    arrays = dict(np.load(folder / "a.npz"))
    options = Options(GOLDEN, tmp_path / "bundle", preset("fp8"), ONLY, calibration=folder)
    first = build(options).results["llm-calibration"].record
    np.savez(folder / "a.npz", **{**arrays, "features": 9 * arrays["features"]})
    second = build(options).results["llm-calibration"].record
    assert first is not None and second is not None
    assert first.facts["amax"] != second.facts["amax"]
    assert second.facts["data"]["source"] == "the folder 'samples'"


@pytest.mark.slow
def test_shipped_requests_cover_every_modality(tmp_path: Path) -> None:
    """A checkpoint with a tokenizer is calibrated with real requests, their media through the towers."""
    from ming_trt.mini import write_mini

    write_mini(tmp_path / "mini")
    config, checkpoint = load_config(tmp_path / "mini"), Checkpoint(tmp_path / "mini")
    source = choose(None, tmp_path / "mini")
    samples = load(source, config, checkpoint)
    assert len(samples) == len(source.prompts) == 18
    for code in MODALITIES:
        assert sum(int((sample.modality == code).sum()) for sample in samples) > 100
    media = torch.cat([sample.embeds[sample.modality > 0] for sample in samples])
    torch.testing.assert_close(media.norm(dim=1), torch.ones(len(media)), rtol=1e-4, atol=1e-4)
