"""FP8 against its bf16 twin, and planted faults in quantised components: each is named with its layer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from builders import registry
from builders.audit import audit
from builders.build import Options, build
from builders.fp8_ranges import DRAWN, choose, ranges
from builders.reference import reference, reference_bytes
from builders.tensorrt_audit import audit_graph
from builders.twin import AGAINST, twin_outputs
from builders.verify import reference_outputs, sample
from ming_trt import presets
from ming_trt.bundle import FAILED, NOT_RUN, PASSED, Bundle, ComponentEntry
from ming_trt.checkpoint import Checkpoint
from ming_trt.config import load_config
from ming_trt.errors import BuildError
from tests.builders.test_planted_faults import tamper
from tests.conftest import UNDERSTANDING

CHECKPOINT = UNDERSTANDING / "checkpoint"
NAME, OUTPUTS = "audio_encoder", ["rows"]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The ranges that the build of an FP8 audio encoder finds."""
    config, checkpoint = load_config(CHECKPOINT), Checkpoint(CHECKPOINT)
    samples = choose(NAME, None, CHECKPOINT)
    assert samples.what == DRAWN
    scratch = tmp_path_factory.mktemp("ranges")
    return ranges(registry.component(NAME), config, checkpoint, samples, None, scratch).amax


def audited(amax: dict[str, float]):  # type: ignore[no-untyped-def]
    config, checkpoint = load_config(CHECKPOINT), Checkpoint(CHECKPOINT)
    facts = {"calibration": {"samples": DRAWN, "input_amax": amax}}
    entry = ComponentEntry(NAME, "tensorrt", "fp8", f"{NAME}/model.plan", {}, {name: {} for name in OUTPUTS}, facts)
    return audit_graph(
        registry.component(NAME), config, checkpoint, entry, presets.load("tensorrt-fp8").thresholds(NAME)
    )


def test_twin_is_the_definition_in_bfloat16() -> None:
    """Whole or layer by layer it is the same; from float32 it differs by bfloat16's rounding, and does differ."""
    config, checkpoint, component = load_config(CHECKPOINT), Checkpoint(CHECKPOINT), registry.component(NAME)
    feeds = sample(component, config)
    whole, streamed = reference_bytes(component, config)
    twins = [
        twin_outputs(component, config, checkpoint, feeds, OUTPUTS, memory)["rows"] for memory in (whole, streamed)
    ]
    assert np.array_equal(*twins)
    module = reference(component, config, checkpoint, whole)
    assert module is not None and next(module.parameters()).dtype == torch.float32
    exact = reference_outputs(module, feeds, OUTPUTS)["rows"]
    error = np.linalg.norm(twins[0] - exact) / np.linalg.norm(exact)
    # eight bits of mantissa, through three layers
    assert 2**-12 < error < 2**-4
    with pytest.raises(BuildError, match=f"the bf16 twin of {NAME} does not fit"):
        twin_outputs(component, config, checkpoint, feeds, OUTPUTS, streamed - 1)


def test_fp8_is_compared_with_its_definition_and_its_twin(calibrated: dict[str, float]) -> None:
    report, layers, _ = audited(calibrated)
    assert report.verdict == NOT_RUN
    assert [output.name for output in report.outputs] == ["rows", "rows" + AGAINST]
    for output in report.outputs:
        # FP8 gives some 20 dB; bfloat16 alone would give 40
        assert output.verdict == PASSED and output.compared > 1000 and 16 < output.sqnr_db < 40
    assert report.outputs[0].max_abs != report.outputs[1].max_abs
    assert layers and all(layer.verdict == PASSED for layer in layers)


@pytest.mark.parametrize("layer", ["blocks.0.attn.query", "blocks.1.mlp.2"])
@pytest.mark.parametrize("factor", [0.05, 1e5])
def test_a_wrong_range_names_its_layer(calibrated: dict[str, float], layer: str, factor: float) -> None:
    """Too small it clips, too large it loses the small numbers."""
    report, layers, _ = audited({**calibrated, layer: calibrated[layer] * factor})
    assert report.verdict == FAILED
    assert [found.name for found in layers if found.verdict != PASSED] == [layer]


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "bundle"
    assert build(Options(CHECKPOINT, folder, presets.load("cpu-int8"), ("audio_encoder", "llm"))).ok
    return folder


@pytest.fixture(scope="module")
def fp8_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8") / "bundle"
    assert build(Options(CHECKPOINT, folder, presets.load("h200-fp8"), ("llm-checkpoint",))).ok
    return folder


def swapped_gate(tensors: dict[str, torch.Tensor]) -> str:
    name = "transformer.layers.1.mlp.router.weight"
    text, image, audio = tensors[name].chunk(3)
    tensors[name] = torch.cat((image, text, audio)).contiguous()
    return "layer 1 experts"


def transposed_expert(tensors: dict[str, torch.Tensor]) -> str:
    name = "transformer.layers.0.mlp.proj.weight"
    weight = tensors[name].view(torch.uint8).clone()
    side = min(weight.shape[1:])
    weight[3, :side, :side] = weight[3, :side, :side].T.clone()
    tensors[name] = weight.view(tensors[name].dtype)
    return "layers.0.mlp.proj (expert 3)"


def doubled_scale(tensors: dict[str, torch.Tensor]) -> str:
    name = "transformer.layers.1.attention.dense.weights_scaling_factor"
    tensors[name] = tensors[name] * 2
    return "layers.1.attention.dense"


@pytest.mark.parametrize("fault", [swapped_gate, transposed_expert, doubled_scale])
def test_faults_in_the_fp8_checkpoint(
    fp8_checkpoint: Path, tmp_path: Path, fault: Callable[[dict[str, torch.Tensor]], str]
) -> None:
    shutil.copytree(fp8_checkpoint, tmp_path / "bundle")
    file = tmp_path / "bundle" / "llm-checkpoint" / "rank0.safetensors"
    tensors = load_file(file)
    place = fault(tensors)
    save_file(tensors, file)
    bundle = Bundle.open(fp8_checkpoint)
    assert audit(bundle, CHECKPOINT, layers=True)[0].gate.verdict == PASSED
    # whatever the sizes of the files are by now
    found = audit(Bundle(tmp_path / "bundle", bundle.manifest), CHECKPOINT, ("llm-checkpoint",))[0]
    assert found.name == "llm-checkpoint" and found.gate.verdict == FAILED
    assert found.first_divergence == place


def test_a_doubled_scale_of_int8(int8: Path, tmp_path: Path) -> None:
    import onnx

    shutil.copytree(int8, tmp_path / "bundle")
    model = tmp_path / "bundle" / "audio_encoder" / "model.onnx"
    graph = onnx.load(model, load_external_data=False).graph
    scales = [t.name for t in graph.initializer if "scale" in t.name and "blocks.1.mlp.0" in t.name and t.external_data]
    assert scales, [t.name for t in graph.initializer]
    tamper(model, scales[0], lambda scale: scale * 2)
    found = audit(Bundle.open(tmp_path / "bundle"), CHECKPOINT, ("audio_encoder",), layers=True)[0]
    assert found.gate.verdict == FAILED
    assert found.first_divergence == "/blocks.1/mlp.0"
