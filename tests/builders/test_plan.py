"""Plans: exact weights against a built bundle, sources of headers alone, refusals that name the largest item."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from safetensors.numpy import load_file, save_file

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
@pytest.mark.parametrize("name", ["cpu-fp32", "cpu-int8", "cpu-int4", "cpu-w8a8"])
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


def reduced(folder: Path, kind: str) -> Path:
    """The golden checkpoint's configuration; of its weights headers, an index, one of two shards, or nothing."""
    folder.mkdir()
    (folder / "config.json").write_bytes((GOLDEN / "config.json").read_bytes())
    data = (GOLDEN / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    names = [name for name in json.loads(data[8 : 8 + length]) if name != "__metadata__"]
    if kind == "headers":
        (folder / "model.safetensors").write_bytes(data[: 8 + length])
    elif kind == "index":
        index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "one of two shards":
        tensors = load_file(GOLDEN / "model.safetensors")
        halves = [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])]
        files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
        save_file(halves[0], folder / files[0])
        weight_map = {name: file for half, file in zip(halves, files, strict=True) for name in half}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    ("kind", "note"),
    [
        ("headers", "model.safetensors is cut short after the header: the sizes are right"),
        ("index", "model-00001-of-00001.safetensors is missing: the sizes of its tensors follow from config.json"),
        ("one of two shards", "model-00002-of-00002.safetensors is missing: the sizes of its tensors follow"),
        ("configuration alone", "there are no shards and no index: sizes follow from config.json"),
    ],
)
def test_less_than_a_checkpoint_is_enough_and_said(tmp_path: Path, kind: str, note: str) -> None:
    whole = plan(GOLDEN, CPU)
    assert whole.notes == ()
    folder = reduced(tmp_path / "part", kind)
    partial = plan(folder, CPU)
    assert (partial.weight_bytes, partial.parameters) == (whole.weight_bytes, whole.parameters)
    assert [engine.name for engine in partial.engines if not engine.reason] == list(UNDERSTANDING)
    assert not partial.problem and len(partial.notes) == 1 and partial.notes[0].startswith(note)
    with pytest.raises(CheckpointError):
        build(Options(folder, tmp_path / "bundle", CPU))


def test_headers_of_the_folders_beside_are_enough(tmp_path: Path) -> None:
    """Shapes that configurations do not state (the condition's MLP) come from headers, also of files cut short."""
    source = GOLDEN.parents[1] / "generation" / "checkpoint"
    whole = plan(source, CPU)
    folder = tmp_path / "part"
    shutil.copytree(source, folder)
    cut = sorted(folder.rglob("*.safetensors"))
    for path in cut:
        length = struct.unpack("<Q", path.read_bytes()[:8])[0]
        os.truncate(path, 8 + length)
    before = {path: path.stat().st_size for path in cut}
    partial = plan(folder, CPU)
    assert partial.weight_bytes == whole.weight_bytes and partial.source_bytes == whole.source_bytes
    assert partial.steps == whole.steps and "cut short" in partial.notes[0]
    assert {path: path.stat().st_size for path in cut} == before


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
    for damaged in (b"\x08\0\0\0\0\0\0\0{broken}", b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]"):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
            plan(tmp_path, CPU)
    with pytest.raises(BuildError, match="there is no component"):
        plan(GOLDEN, CPU, ("lllm",))
