"""Faults planted in real engines are found by the gate and named with their layer.

Each fault changes the built engine only; the checkpoint stays right.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from builders import registry
from builders.audit import audit
from builders.build import Options, build
from builders.component import ExportOptions
from ming_trt import presets
from ming_trt.bundle import FAILED, PASSED, Bundle
from ming_trt.checkpoint import Checkpoint
from ming_trt.config import load_config

CHECKPOINT = Path(__file__).parents[1] / "data" / "golden" / "understanding" / "checkpoint"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the understanding engines."""
    folder = tmp_path_factory.mktemp("good") / "bundle"
    report = build(Options(CHECKPOINT, folder, presets.load("cpu-fp32"), ("vision_encoder", "audio_encoder", "llm")))
    assert report.ok
    return folder


def tamper(model: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replaces an initializer's values in the data file."""
    graph = onnx.load(model, load_external_data=False).graph
    tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    values = np.memmap(
        model.parent / place["location"], np.float32, "r+", int(place.get("offset", 0)), tuple(tensor.dims)
    )
    changed = change(np.array(values))
    assert not np.array_equal(changed, values), "the fault must change something"
    values[:] = changed
    values.flush()


def swap_text_and_image_gate(weight: np.ndarray) -> np.ndarray:
    text, image, audio = np.split(weight, 3, axis=1)
    return np.concatenate((image, text, audio), axis=1)


def transpose_a_square_of_one_expert(weight: np.ndarray) -> np.ndarray:
    changed = weight.copy()
    side = min(weight.shape[1:])
    changed[3, :side, :side] = weight[3, :side, :side].T
    return changed


@pytest.mark.parametrize(
    ("engine", "tensor", "change", "place"),
    [
        ("llm", "layers.1.mlp.gates.weight_T", swap_text_and_image_gate, "/layers.1/mlp/gates"),
        ("llm", "layers.0.mlp.down_backwards", transpose_a_square_of_one_expert, "/layers.0/mlp"),
        ("llm", "layers.1.mlp.down_backwards", lambda w: w * 2, "/layers.1/mlp"),
        ("vision_encoder", "blocks.2.attn.proj.bias", np.zeros_like, "/blocks.2/attn/proj"),
        ("audio_encoder", "blocks.1.mlp.0.bias", np.zeros_like, "/blocks.1/mlp.0"),
    ],
)
def test_wrong_weight(
    good: Path, tmp_path: Path, engine: str, tensor: str, change: Callable[[np.ndarray], np.ndarray], place: str
) -> None:
    shutil.copytree(good, tmp_path / "bundle")
    tamper(tmp_path / "bundle" / engine / "model.onnx", tensor, change)
    bundle = Bundle.open(tmp_path / "bundle")
    found = audit(bundle, CHECKPOINT, (engine,), layers=True)[0]
    assert found.gate.verdict == FAILED
    assert found.first_divergence == place
    assert bundle.check() == [f"'{engine}/model.onnx.data' does not have the digest that the manifest states"]


def test_rope_section_off_by_one(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "bundle")
    config = load_config(CHECKPOINT)
    time, height, width = config.llm.rope_sections
    wrong = replace(config, llm=replace(config.llm, rope_sections=(time - 1, height + 1, width)))
    folder = tmp_path / "bundle" / "llm"
    shutil.rmtree(folder)
    folder.mkdir()
    registry.component("llm").export(wrong, Checkpoint(CHECKPOINT), folder, ExportOptions())
    found = audit(_opened(tmp_path / "bundle"), CHECKPOINT, ("llm",), layers=True)[0]
    assert found.gate.verdict == FAILED
    assert found.first_divergence.startswith("/layers.0/attention")


def test_audio_length_off_by_one(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "bundle")
    path = tmp_path / "bundle" / "audio_encoder" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    conv = next(node for node in model.graph.node if node.name == "/conv1/Conv")
    pads = next(attribute for attribute in conv.attribute if attribute.name == "pads")
    pads.ints[:] = [1, 0]
    path.write_bytes(model.SerializeToString())
    found = audit(_opened(tmp_path / "bundle"), CHECKPOINT, ("audio_encoder",), layers=True, determinism=True)[0]
    assert found.gate.verdict == FAILED
    assert "audio_encoder" in found.gate.reason and "\n" not in found.gate.reason


def test_untouched_engines_match_layer_by_layer(good: Path) -> None:
    for found in audit(Bundle.open(good), CHECKPOINT, layers=True, determinism=True):
        assert found.gate.verdict == PASSED and found.first_divergence == ""
        assert len(found.layers) >= 20
        again = {repetition.condition: repetition for repetition in found.repetitions}
        assert again["the same session again"].equal and again["a new session"].equal


def _opened(folder: Path) -> Bundle:
    """The bundle as its manifest describes it, whatever the sizes of the files are by now."""
    import json

    from ming_trt.bundle import Manifest

    return Bundle(folder, Manifest.from_dict(json.loads((folder / "manifest.json").read_text())))
