"""Every engine of the mini checkpoint through the real builder; the float16 graphs that it compiles also run.

Exporting is what takes the time, so there is one layer of each kind here, and a graph that two tests need is exported
once.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from builders import export as exporter
from builders import registry
from builders.component import ExportOptions, Feeds
from builders.export import MODEL_FILE
from builders.precision import Floats, FP8PerChannel
from builders.tensorrt import Settings, compile_plan, expect_layers
from builders.tensorrt_api import RTX, load
from builders.tensorrt_audit import run_graph
from builders.tensorrt_profiles import Phase, fixed_sizes, phases
from builders.verify import compare_all, reference_outputs, sample
from ming_trt.bundle import NOT_RUN, PASSED, Bundle, sha256
from ming_trt.checkpoint import Checkpoint
from ming_trt.config import load_config
from ming_trt.errors import BundleError, UnavailableError
from ming_trt.presets import Profile, Thresholds

pytestmark = pytest.mark.slow
# float16 through a few blocks of random weights. The vocoder's waveform follows a phase, and its spectrum is an
# exponential: errors grow there, the most in single samples.
TOLERANCES = {"vocoder": Thresholds(3e-1, 0.999, 30.0)}
FP16 = Thresholds(2e-2, 0.9999, 38.0)
CAPACITY = 128
PROFILE = Profile(max_seq_len=512, slots=2, prefill_chunk=64, max_image_tokens=1024, max_audio_frames=3000)
# Pitch is float32 in every preset.
FLOATS = {"f0_predictor": "fp32"}


@pytest.fixture(scope="module", autouse=True)
def rtx() -> None:
    try:
        load(RTX)
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mini checkpoint with one layer of each kind: a window and a full one in vision; dual, joint and last blocks
    in the denoiser, and a refiner of each input."""
    from ming_trt.mini import image, speech, write_mini

    folder = tmp_path_factory.mktemp("mini") / "checkpoint"
    with pytest.MonkeyPatch.context() as patch:
        flow = {"encoder_layers": 1, "up_layers": 1, "mid_stages": 1}
        patch.setattr(speech, "FLOW", replace(speech.FLOW, **flow))
        patch.setattr(speech, "HIFT", replace(speech.HIFT, resblock_kernels=(3,)))
        blocks = {"num_layers": 3, "dual_attention_layers": [0], "num_refiner_layers": 1}
        patch.setattr(image, "_TRANSFORMER", {**image._TRANSFORMER, **blocks})
        write_mini(folder)
    change(folder / "vae" / "config.json", layers_per_block=1)
    change(folder / "connector" / "config.json", num_hidden_layers=1)
    change(folder / "talker" / "config.json", num_hidden_layers=1)
    vision = json.loads((folder / "config.json").read_text("utf-8"))["vision_config"]
    change(folder / "config.json", vision_config={**vision, "depth": 2, "fullatt_block_indexes": [1]})
    return folder


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **values}), "utf-8")


@pytest.fixture(scope="module", autouse=True)
def graphs_once() -> Iterator[None]:
    """A graph without weights depends on the configuration and the type of its floats alone: each is exported once."""
    known: dict[tuple[str, str, str], ir.Model] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in registry.COMPONENTS:
            component = registry.component(name)

            def graph(config: Any, options: ExportOptions, name: str = name, export: Any = component.graph) -> ir.Model:
                if exporter._only_signature.get():  # no graph is wanted then
                    return export(config, options)
                key = (name, options.float_precision, repr(config))
                if key not in known:
                    known[key] = export(config, options)
                return known[key].clone()

            patch.setattr(component, "graph", graph, raising=True)
        yield


@pytest.mark.parametrize("name", registry.COMPONENTS)
def test_the_graph_that_is_compiled_also_runs(name: str, mini: Path, tmp_path: Path) -> None:
    config, checkpoint = load_config(mini), Checkpoint(mini)
    component = registry.component(name)
    assert component.needs(config, checkpoint) is None
    feeds = with_capacity(sample(component, config), CAPACITY)
    # Caches are static in TensorRT: the graph is fixed at the capacity of the sample's.
    fixed = dict.fromkeys(fixed_sizes(name, PROFILE), CAPACITY)
    floats = FLOATS.get(name, "fp16")
    options = ExportOptions("tensorrt", floats, Floats(floats), fixed=tuple(fixed.items()))
    facts = component.export(config, checkpoint, tmp_path, options)
    before = sha256(tmp_path / MODEL_FILE)

    ranges = phases(name, PROFILE, facts)
    if fixed:
        cut = {"S": (1, 16, CAPACITY), "C": (1, 16, CAPACITY)}
        ranges = [
            Phase(p.name, {**p.sizes, **{k: v for k, v in cut.items() if p.sizes.get(k, (1, 1, 1))[2] > 1}})
            for p in ranges
        ]
    built = compile_plan(tmp_path / MODEL_FILE, facts["inputs"], ranges, tmp_path, Settings(RTX))
    expect_layers(built, facts["operators"], name)
    assert built.plan_bytes > 0 and (tmp_path / "model.plan").stat().st_size == built.stamp.size

    got = run_graph(tmp_path / MODEL_FILE, feeds)
    expected = reference_outputs(component.reference(config, checkpoint), feeds, list(facts["outputs"]))
    report = compare_all(got, expected, TOLERANCES.get(name, FP16))
    assert report.verdict == PASSED, [(o.name, o.relative, o.sqnr_db, o.note) for o in report.outputs]
    assert sha256(tmp_path / MODEL_FILE) == before


def with_capacity(feeds: Feeds, capacity: int) -> Feeds:
    """The sample with caches of another capacity, of which the added places are empty and not seen."""

    def padded(name: str, value: np.ndarray) -> np.ndarray:
        axis = {"past": 2, "mask": 3, "attention": 3}.get(name.split("_")[0], -1)
        if axis < 0 or value.ndim < 4:
            return value
        before = [(0, 0)] * value.ndim
        before[axis] = (0, capacity - value.shape[axis])
        return np.pad(value, before)

    return {name: padded(name, value) for name, value in feeds.items()}


@pytest.mark.parametrize("name", ["connector", "llm"])
def test_other_precisions_differ_in_types_and_qdq_only(name: str, mini: Path) -> None:
    config, checkpoint = load_config(mini), Checkpoint(mini)
    component = registry.component(name)
    modules = dict(component.reference(config, checkpoint).named_modules())
    ranges = [(module, 1.0) for module, inner in modules.items() if hasattr(inner, "in_features")]
    stacks = [f"{module}.{part}" for module in modules for part in ("gate_up", "down") if module.endswith(".mlp")]
    ranges += [(stack, 1.0) for stack in stacks]
    lists, graphs = [], []
    for scheme in (Floats("fp16"), Floats("bf16"), FP8PerChannel("bf16")):
        model = component.model(config, checkpoint, ExportOptions("tensorrt", "", scheme, ranges=tuple(ranges)))
        graphs.append(model)
        lists.append([(node.name, node.domain, node.op_type) for node in model.graph])
    fp16, bf16, fp8 = lists
    assert bf16 == fp16
    qdq = ("QuantizeLinear", "DequantizeLinear")
    # a node of experts holds its Q/DQ in its body (tests/builders/test_fp8_experts.py)
    plain = [(*node[:2], node[2].removesuffix("FP8")) for node in fp8 if node[2] not in qdq]
    assert plain == fp16
    assert any(node[2] in qdq for node in fp8)
    values = [{v.name: v.dtype.name for n in model.graph for v in n.outputs if v.dtype} for model in graphs[:2]]
    changed = {pair for name in values[0] if (pair := (values[0][name], values[1].get(name, "")))[0] != pair[1]}
    assert changed == {("FLOAT16", "BFLOAT16")}
    if name == "llm":
        kept = {
            node.inputs[1].name for node in graphs[2].graph if node.op_type == "MatMul" and node.inputs[1].const_value
        }
        assert any("gates" in weight for weight in kept) and any("lm_head" in weight for weight in kept)


def test_a_bundle_of_plans_is_compiled_not_run(mini: Path, tmp_path: Path) -> None:
    from builders.audit import audit
    from builders.build import Options, build
    from ming_trt import presets
    from ming_trt.serving.assemble import check_gate

    preset = presets.from_dict(
        {
            "target": RTX,
            "precision": {
                "default": "bf16",
                "condition": "fp8",
                "llm": "fp8",
                "vocoder": "fp16",
                "f0_predictor": "fp32",
            },
            "profile": {"max_seq_len": 512, "slots": 2, "prefill_chunk": 64},
        },
        "mine",
    )
    options = Options(mini, tmp_path / "bundle", preset, ("condition", "llm"))
    report = build(options)
    assert report.ok and report.verdict == NOT_RUN
    bundle = Bundle.open(tmp_path / "bundle")
    entry = bundle.component("condition")
    assert (entry.model, entry.rung, entry.verdict) == ("condition/model.plan", "compiled", NOT_RUN)
    assert not bundle.check() and {"condition/model.plan", "condition/build.log"} <= set(bundle.manifest.files)
    stamp = entry.facts["plan"]["stamp"]
    # sm_80 has no FP8: RTX's default target rises with the graph
    assert stamp["edition"] == RTX and stamp["devices"] == ["sm89"]
    assert entry.facts["calibration"]["input_amax"]["mlp.fc1"] > 0 and len(entry.facts["graph"]["sha256"]) == 64

    assert check_gate(bundle, allow_ungated=False, running=False) is False
    with pytest.raises(BundleError, match="was compiled, not run, so its numbers are unknown"):
        check_gate(bundle, allow_ungated=False, running=True)

    again = build(options)
    assert {str(result.outcome) for name, result in again.results.items() if "condition" in name} == {"NOOP"}

    (talk,) = audit(bundle, mini, ("llm",))
    # the experts too, in basic operators since no plugin is loaded; every linear and every expert keeps 25 dB
    assert talk.gate.verdict == NOT_RUN and all(output.verdict == PASSED for output in talk.gate.outputs)
    layers = {layer.name: layer for layer in talk.layers}
    assert {f"layers.{i}.mlp.{part}" for i in range(2) for part in ("gate_up", "down")} <= set(layers)
    assert all(layer.sqnr_db >= 25 and layer.verdict == PASSED for layer in layers.values())
    decided = re.search(r"top-1 agreement ([\d.]+)% of (\d+) decided tokens", talk.note)
    assert decided and float(decided[1]) >= 99 and int(decided[2]) >= 50
    assert "routers choose experts" in talk.note and "the language model's attention" in talk.note
    facts = bundle.component("llm").facts
    assert facts["graph"]["lowered"] == ["SparseMoEFP8"] and "ming:SparseMoE" not in facts["operators"]
    # of each layer: two inputs of the shared expert's three linear layers, and two of its routed ones
    assert facts["plan"]["layers"]["QUANTIZE"] == 2 * (2 + 2)
    calibrated = facts["calibration"]
    assert calibrated["input_amax"]["layers.0.mlp.down"] > 0 and "unreached_experts" in calibrated

    (found,) = audit(bundle, mini, ("condition",))
    assert found.gate.verdict == NOT_RUN and all(output.verdict == PASSED for output in found.gate.outputs)
    assert [layer.name for layer in found.layers] == ["mlp.fc1", "mlp.fc2", "context_embedder"]
    assert all(np.isfinite(layer.sqnr_db) and layer.sqnr_db >= 25 for layer in found.layers)
    assert "compiled, not run" in found.note and "calibrated with" in found.note and "kept out" in found.note
