"""Plans: exact weights against a built bundle, sources of headers alone, refusals that name the largest item."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from builders.build import Options, build
from builders.plan import plan
from ming_trt import presets
from ming_trt.config import load_config
from ming_trt.errors import BuildError, CheckpointError, ConfigError

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "understanding" / "checkpoint"
CPU = presets.load("cpu-fp32")
UNDERSTANDING = ("vision_encoder", "audio_encoder", "llm")


def test_weights_are_those_of_the_bundle(checkpoint: Path) -> None:
    made = plan(checkpoint, CPU)
    report = build(Options(checkpoint, checkpoint.parent / "bundle", CPU))
    written = sum((report.bundle / name / "model.onnx.data").stat().st_size for name in ("alpha", "beta"))
    # two matrices of 16 and two rows of 4 numbers each; the file may pad tensors
    assert made.weight_bytes == 2 * 2 * 20 * 4
    assert made.weight_bytes <= written
    assert list(made.steps) == list(report.results)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu-fp32", "cpu-int8", "cpu-int4"])
def test_weights_of_real_engines_within_one_percent(tmp_path: Path, name: str) -> None:
    preset = presets.load(name)
    only = ("vision_encoder", "llm")
    report = build(Options(GOLDEN, tmp_path / "bundle", preset, only))
    sizes = {engine.name: engine.weight_bytes for engine in plan(GOLDEN, preset, only).engines}
    for engine in only:
        assert sizes[engine] == pytest.approx(_written(report.bundle / engine / "model.onnx"), rel=0.01)


def _written(model: Path) -> int:
    """Bytes of the engine's weights without what aligns them, which weighs something in tiny engines only."""
    graph = onnx.load(model, load_external_data=False).graph
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in graph.initializer]
    return sum(int(place["length"]) for place in places if place)


def headers_only(folder: Path, cut: bool) -> Path:
    """The golden checkpoint's configuration with its headers (`cut`), or with an index that names tensors only."""
    folder.mkdir()
    (folder / "config.json").write_bytes((GOLDEN / "config.json").read_bytes())
    data = (GOLDEN / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    if cut:
        (folder / "model.safetensors").write_bytes(data[: 8 + length])
    else:
        names = [name for name in json.loads(data[8 : 8 + length]) if name != "__metadata__"]
        index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("cut", [True, False])
def test_headers_are_enough(tmp_path: Path, cut: bool) -> None:
    whole = plan(GOLDEN, CPU)
    partial = plan(headers_only(tmp_path / "headers", cut), CPU)
    assert (partial.weight_bytes, partial.parameters) == (whole.weight_bytes, whole.parameters)
    assert [engine.name for engine in partial.engines if not engine.reason] == list(UNDERSTANDING)
    assert not partial.problem
    with pytest.raises(CheckpointError):
        build(Options(tmp_path / "headers", tmp_path / "bundle", CPU))


def test_cache_by_hand() -> None:
    llm = load_config(GOLDEN).llm
    made = plan(GOLDEN, CPU, UNDERSTANDING)
    assert made.kv_bytes_per_token == 2 * llm.num_layers * llm.num_kv_heads * llm.head_dim * 4
    assert made.kv_bytes == made.kv_bytes_per_token * 4 * 8192
    assert plan(GOLDEN, CPU, ("audio_encoder",)).kv_bytes == 0


def test_refusals_name_the_largest_item() -> None:
    made = plan(GOLDEN, CPU, memory_limit=1 << 20)
    assert "the largest item is the processes with" in made.problem
    assert "no shipped preset fits, mini-cpu comes nearest with" in made.problem
    tight = replace(CPU, kv_budget=1 << 20)
    assert "lower max_seq_len or slots, or raise kv_budget" in plan(GOLDEN, tight).problem
    # of the presets that need less, the one that needs most
    run = plan(GOLDEN, CPU).run_bytes
    assert "take preset cpu-int8" in plan(GOLDEN, CPU, memory_limit=run - (1 << 20)).problem


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config.json in"):
        plan(tmp_path, CPU)
    (tmp_path / "config.json").write_bytes((GOLDEN / "config.json").read_bytes())
    with pytest.raises(CheckpointError):
        plan(tmp_path, CPU)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    with pytest.raises(CheckpointError):
        plan(tmp_path, CPU)
    with pytest.raises(BuildError, match="there is no component"):
        plan(GOLDEN, CPU, ("lllm",))
