"""Plans of the published model from the sizes that ship with the project, against figures known from elsewhere."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from builders.plan import Plan, plan
from builders.skeleton import checkpoint_folder, write_skeleton
from ming_trt import presets
from ming_trt.checkpoint import Checkpoint
from ming_trt.errors import BuildError
from ming_trt.resources import shipped
from ming_trt.torch_file import state_dict

OFFICIAL = Path("official")
FOLDER = shipped("engines") / "official"


@pytest.fixture(scope="module")
def whole() -> Plan:
    return plan(OFFICIAL, presets.load("h200-fp8"))


def test_totals_of_the_published_checkpoint(tmp_path: Path) -> None:
    write_skeleton(FOLDER, tmp_path)
    root = Checkpoint(tmp_path)
    main = [root.info(name) for name in root.names() if not name.startswith("talker.")]
    assert len(main) == 6544 and len(root.files) == 8
    assert sum(math.prod(info.shape) for info in main) == 18_201_175_296
    denoiser = root.part("transformer")
    tables = [name for name in denoiser.names() if name.endswith("pos_embed.pos_embed")]
    sizes = {name: math.prod(denoiser.info(name).shape) for name in denoiser.names()}
    assert [sizes.pop(name) for name in tables] == [226_492_416] * 2 and sum(sizes.values()) == 2_413_232_832
    mlp = root.part("mlp")
    assert sum(math.prod(mlp.info(name).shape) for name in mlp.names("mlp.")) == 12_601_344
    for file, total in (("flow_stream.pt", 110_762_992), ("hift_v2.pt", 20_821_295)):
        assert sum(math.prod(info.shape) for info in state_dict(tmp_path / "talker" / file).values()) == total
    # as large as the download, and next to nothing on disk
    files = [path.stat() for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(state.st_size for state in files) > 50e9
    assert sum(512 * state.st_blocks for state in files) < 10e6


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 300_000


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with checkpoint_folder(OFFICIAL) as folder:
        assert (folder / "config.json").is_file()
    assert not folder.exists()
    (tmp_path / "official").mkdir()
    with checkpoint_folder(OFFICIAL) as folder:
        assert folder == OFFICIAL


def test_the_gpu_preset_lists_the_checkpoint_and_what_is_served_beside_it(whole: Plan) -> None:
    last = ("llm-calibration", "llm-checkpoint", "gate:llm-checkpoint", "llm-engine", "gate:llm-engine")
    assert whole.steps[0] == "assets" and whole.steps[-5:] == last and "gate:dit" in whole.steps
    engines = {engine.name: engine for engine in whole.engines}
    assert "llm" not in engines
    assert engines["llm-engine"].weight_bytes == engines["llm-checkpoint"].weight_bytes
    assert whole.disk_bytes == whole.weight_bytes + engines["llm-engine"].weight_bytes
    assert whole.build_peak_bytes == 2 * engines["llm-engine"].weight_bytes
    assert not any(engine.reason for engine in engines.values())
    # FP8 but for routers (float32), embedding, head and norms (bf16), and scales
    plain = 2 * 126464 * 2048
    routers = 28 * 3 * 64 * 2048
    rest = 16_809_314_304 - plain - routers
    assert engines["llm-checkpoint"].weight_bytes == pytest.approx(2 * plain + 4 * routers + rest, rel=1e-3)
    assert whole.kv_bytes_per_token == 2 * 28 * 4 * 128 * 2
    assert whole.kv_bytes == 57344 * 32 * 16384
    what = [item.what for item in whole.run_items]
    assert {"the KV cache", "the CUDA graphs (estimate)", "the caches of talker", "the activations of dit"} <= set(what)
    assert whole.run_bytes == sum(item.size for item in whole.run_items) and not whole.problem


def test_streams_of_speech_share_a_budget(whole: Plan) -> None:
    """On a GPU each holds 1536 frames from the start: keys and values of an encoder and of two rows in ten steps."""
    engines = {engine.name: engine for engine in whole.engines}
    encoder, estimator = (engines[name].cache_bytes for name in ("flow_encoder", "flow_estimator"))
    assert estimator > 3 << 30
    items = {item.what: item.size for item in whole.run_items}
    preset = presets.load("h200-fp8")
    streams = preset.flow_budget // (encoder + estimator)
    assert streams == 4
    # and one utterance at a time that is decoded as a whole
    assert items["the caches of the flow"] == streams * (encoder + estimator) + encoder + estimator // 10
    assert items["copies of caches"] == encoder + estimator // 10 + engines["talker"].cache_bytes // 32
    tight = replace(presets.load("tensorrt-fp8"), flow_budget=3 << 30)
    made = plan(OFFICIAL, tight, ("flow_encoder", "flow_estimator"))
    assert "speech in parts holds 3.31 GiB for each stream on this target" in made.problem
    assert "flow_budget of 3.00 GiB: raise it" in made.problem


def test_inputs_and_profiles(whole: Plan) -> None:
    engines = {engine.name: engine for engine in whole.engines}
    assert engines["audio_encoder"].inputs == {"mel": "f32 [frames, 128]"}
    assert engines["llm-checkpoint"].inputs["past_key_N"] == "bf16 [B, 4, T, 128]"
    prefill = {way.name: way for way in engines["llm-checkpoint"].profiles}["prefill"]
    assert prefill.sizes["S"] == (1, 4096, 4096)


def test_two_gpus() -> None:
    only = ("llm-checkpoint",)
    one, two = (plan(OFFICIAL, presets.load("h200-fp8"), only, gpus=gpus) for gpus in (1, 2))
    sizes = [{item.what: item.size for item in made.run_items} for made in (one, two)]
    weights, cache = "the weights of llm-checkpoint", "the KV cache"
    assert sizes[1][cache] * 2 == sizes[0][cache]
    # what lies on both: embedding, routers, rows of 32 slots of pictures in two places each, a pair for every position
    assert sizes[0]["the prompt table"] == sizes[1]["the prompt table"] == 2 * 32 * 8192 * 2048 * 2
    assert sizes[0]["the rotary tables"] == sizes[1]["the rotary tables"] == 32 * 16384 * 128 * 4
    assert 0.5 < sizes[1][weights] / sizes[0][weights] < 0.53
    with pytest.raises(BuildError, match="heads do not divide by 3"):
        plan(OFFICIAL, presets.load("h200-fp8"), only, gpus=3)
    with pytest.raises(BuildError, match="--tp 2 --ep 1 need target tensorrt-llm"):
        plan(OFFICIAL, presets.load("cpu-fp32"), gpus=2)


def test_what_does_not_fit_names_the_nearest_preset() -> None:
    only = ("vision_encoder", "audio_encoder", "llm")
    made = plan(OFFICIAL, presets.load("cpu-fp32"), only, memory_limit=32 << 30)
    assert "the largest item is the weights of llm with 62.62 GiB: take preset cpu-int8" in made.problem
    made = plan(OFFICIAL, presets.load("h200-fp8"), memory_limit=74 << 30)
    assert "take preset h100-fp8" in made.problem
    long = replace(presets.load("h200-fp8"), kv_budget=8 << 30)
    assert (
        "the KV cache of 32 slots of 16384 tokens needs 28.00 GiB" in plan(OFFICIAL, long, ("llm-checkpoint",)).problem
    )
