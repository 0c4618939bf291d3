"""The gate of plans, with ONNX Runtime in TensorRT's place: what it makes of rows, caches, types, and its verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest

from builders import audit, tensorrt_audit, tensorrt_gate
from builders.component import ExportOptions
from builders.registry import component
from builders.tensorrt import PLAN_FILE
from builders.tensorrt_gate import as_reference, gate, run_sample
from builders.verify import ComponentReport, OutputReport
from ming_trt import presets
from ming_trt.bundle import FAILED, NOT_RUN, PASSED, Bundle
from ming_trt.checkpoint import Checkpoint
from ming_trt.config import load_config
from ming_trt.errors import EngineError
from ming_trt.models.weights import source_names
from ming_trt.runtime.device import Range
from ming_trt.runtime.engine import TensorSpec
from tests.conftest import GENERATION
from tests.runtime import tiny_llm
from tests.runtime.host_device import open_host_engine

NAME = "f0_predictor"


def test_rows_run_one_by_one_and_caches_are_padded(tmp_path: Path) -> None:
    """Five tokens after three, and five after none, by a plan that decodes rows together and reads prompts singly."""
    capacity = 32
    path = tiny_llm.write(tmp_path / "model.onnx")
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == "T":
                size.ClearField("dim_param")
                size.dim_value = capacity
    onnx.save(model, path)

    def ranges(batch: int, tokens: int) -> dict[str, Range]:
        sizes = {"B": (1, batch), "S": (1, tokens), "K": (1, 8), "R": (1, 99), "T": (capacity, capacity)}
        return {
            name: Range(*(tuple(sizes[s][end] if isinstance(s, str) else s for s in shape) for end in (0, 1)))
            for name, (_, shape) in tiny_llm.INPUTS.items()
        }

    engine = open_host_engine(path, "llm", ranges=[ranges(4, 1), ranges(1, 8)])
    rng = np.random.default_rng(0)
    written, tokens = np.array([3, 0]), 5
    place = written[:, None] + np.arange(tokens)
    feeds: dict[str, Any] = {
        "input_ids": rng.integers(0, tiny_llm.V, (2, tokens)),
        "features": rng.standard_normal((4, tiny_llm.H)).astype(np.float32),
        "feature_index": np.array([[-1, 2, -1, 0, -1], [1, -1, -1, 3, -1]]),
        "modality": rng.integers(0, 3, (2, tokens)),
        "position_ids": np.broadcast_to(place, (3, 2, tokens)),
        "write_index": written,
        "attention_mask": (np.arange(9) <= place[..., None])[:, None],
        "logit_index": np.array([[4, 0], [4, 2]]),
    }
    for name, (_, shape) in tiny_llm.INPUTS.items():
        if name.startswith("past_"):
            feeds[name] = np.zeros((2, *shape[1:2], 9, shape[3]), np.float32)
            feeds[name][0, :, :3] = rng.standard_normal((shape[1], 3, shape[3]))
    plain = open_host_engine(tiny_llm.write(tmp_path / "plain.onnx"), "llm")
    expected = plain.run(feeds)
    got = run_sample(engine, feeds)
    assert got.keys() == expected.keys() and engine.counts.runs == 2
    for name, reference in expected.items():
        np.testing.assert_allclose(as_reference(got[name], reference), reference, atol=2e-5, err_msg=name)
    with pytest.raises(EngineError, match="its plan takes"):
        run_sample(engine, {**feeds, "features": np.zeros((100, tiny_llm.H), np.float32)})


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    import torch

    values = np.concatenate([np.random.default_rng(1).standard_normal(999), [0, -0.0, 1e-30, 3e38]]).astype(np.float32)
    spec = TensorSpec("x", np.dtype(np.uint16), ("N",))
    bits = tensorrt_gate._fitted(spec, values)
    expected = torch.from_numpy(values).bfloat16()
    np.testing.assert_array_equal(bits.view(np.int16), expected.view(torch.int16).numpy())
    np.testing.assert_array_equal(tensorrt_gate._floats(spec, bits), expected.float().numpy())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder, checkpoint = tmp_path_factory.mktemp(NAME), GENERATION / "checkpoint"
    return folder, {**component(NAME).export(load_config(checkpoint), Checkpoint(checkpoint), folder, ExportOptions())}


def report_of_graph() -> tuple[OutputReport, ...]:
    return (OutputReport("f0", 1, 0.0, 0.0, 1.0, 99.0, PASSED),)


@pytest.mark.parametrize(("fault", "verdict"), [(0.0, PASSED), (0.1, FAILED)])
def test_the_verdict_is_of_the_plan_that_ran(
    fault: float,
    verdict: str,
    exported: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = GENERATION / "checkpoint"
    config, made, preset = load_config(checkpoint), component(NAME), presets.load("rtx")
    source, facts = exported[0], dict(exported[1])
    model = onnx.load(source / "model.onnx")
    bias = next(each for each in model.graph.initializer if each.name.endswith("bias") and len(each.dims) == 1)
    changed = onnx.numpy_helper.to_array(bias) + np.float32(fault)
    bias.CopyFrom(onnx.numpy_helper.from_array(changed, bias.name))
    onnx.save(model, tmp_path / PLAN_FILE)
    stamp: Mapping[str, Any] = {"version": "1.7", "devices": ["sm89"]}
    facts |= {"model": f"{NAME}/{PLAN_FILE}", "plan": {"stamp": stamp}}
    arguments = (made, config, Checkpoint(checkpoint), tmp_path, preset, facts)
    assert gate(*arguments).verdict == NOT_RUN

    class Plans:
        """A bundle with this plan."""

        path, preset = tmp_path, presets.load("rtx")

        def component(self, name: str) -> Any:
            entry = tensorrt_gate.entry_of(name, preset, facts)
            return replace(entry, weights=Checkpoint(checkpoint).digest(source_names(made.sources(config))))

        def model_path(self, name: str) -> Path:
            return tmp_path / PLAN_FILE

    graph = ComponentReport(NOT_RUN, report_of_graph(), preset.thresholds(NAME), "of its graph")
    monkeypatch.setattr(tensorrt_audit, "audit_graph", lambda *_: (graph, (), "calibrated"))
    verify = (cast(Bundle, Plans()), config, Checkpoint(checkpoint), NAME, False, False, 0)
    assert audit._audit(*verify).gate is graph, "nothing runs plans here"

    monkeypatch.setattr(tensorrt_gate.tensorrt, "unavailable", lambda target: "")
    monkeypatch.setattr(tensorrt_gate.tensorrt, "library", lambda target: None)
    opened = []

    def open_plan(found: Any, file: Path, entry: Any, libraries: Any) -> Any:
        assert entry.inputs == facts["inputs"] and entry.target == "tensorrt-rtx"
        opened.append(open_host_engine(file, entry.name))
        return opened[-1]

    monkeypatch.setattr(tensorrt_gate.tensorrt, "open_plan", open_plan)
    report = gate(*arguments)
    assert report.verdict == verdict and [each.name for each in report.outputs] == ["f0"]
    with pytest.raises(EngineError, match="closed"):
        opened[0].run({})
    found = audit._audit(*verify)
    assert found.gate.verdict == verdict and found.gate.outputs == report.outputs
    assert found.note == "the plan ran here; layers are of its graph in ONNX Runtime; calibrated"
    (tmp_path / PLAN_FILE).write_bytes(b"not a model")
    assert gate(*arguments).verdict == FAILED
    broken = audit._audit(*verify)
    assert broken.gate.verdict == FAILED and not broken.gate.outputs and PLAN_FILE in broken.gate.reason
