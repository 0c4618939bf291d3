"""What can be said of a TensorRT plan's numbers without running it: its graph in ONNX Runtime, and FP8 layer by layer.

The graph is made again with the same scheme in floats that the CPU has (float16 stays, bfloat16 becomes float32), FP8
by the same Q/DQ nodes, codes, scales and ranges. So rounding to FP8 is all there, rounding to bfloat16 is not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from builders.component import Component, ExportOptions, Feeds
from builders.export import MODEL_FILE
from builders.fp8_errors import at_times, linear_errors, linears_of, read_amax
from builders.layers import LayerReport
from builders.precision import Floats, FP8PerChannel, Scheme, kept, scheme
from builders.reference import reference
from builders.tokens import all_tokens, many_tokens, token_agreement
from builders.twin import against_twin, twin_outputs
from builders.verify import Array, ComponentReport, available_memory, compare_all, reference_outputs, sample
from ming_trt.bundle import FAILED, NOT_RUN, PASSED, ComponentEntry
from ming_trt.errors import EngineError
from ming_trt.presets import Thresholds

if TYPE_CHECKING:
    from ming_trt.checkpoint import Checkpoint
    from ming_trt.config import MingConfig


def audit_graph(
    component: Component,
    config: MingConfig,
    checkpoint: Checkpoint,
    entry: ComponentEntry,
    thresholds: Thresholds,
    memory_limit: int = 0,
) -> tuple[ComponentReport, tuple[LayerReport, ...], str]:
    """The report of the graph's outputs (verdict `NOT_RUN`, or `FAILED` where an output misses its threshold), one of
    each layer in FP8, and a remark. Raises `EngineError` if ONNX Runtime cannot run the graph."""
    made = scheme(entry.target, component.name, entry.precision)
    twin, floats = _twin(made)
    module = reference(component, config, checkpoint, memory_limit or available_memory())
    if module is None:
        reason = "the torch definition does not fit into memory: give --max-host-memory, or a larger machine"
        return ComponentReport(NOT_RUN, (), thresholds, reason), (), ""
    feeds = all_tokens(sample(component, config))
    expected = reference_outputs(module, feeds, list(entry.outputs))
    calibrated = entry.facts.get("calibration", {})
    amax = read_amax(calibrated)
    options = ExportOptions("tensorrt", entry.precision, twin, ranges=tuple(sorted(amax.items())))
    with tempfile.TemporaryDirectory(prefix="ming-trt-graph-") as folder:
        component.export(config, checkpoint, Path(folder), options)
        got = run_graph(Path(folder) / MODEL_FILE, feeds)
        many = many_tokens(component, config)
        tokens = (
            token_agreement(
                run_graph(Path(folder) / MODEL_FILE, many)["logits"],
                reference_outputs(module, many, list(entry.outputs))["logits"],
            )
            if many
            else None
        )
    report = compare_all(got, expected, thresholds)
    if isinstance(made, FP8PerChannel):
        limit = memory_limit or available_memory()
        plain = twin_outputs(component, config, checkpoint, feeds, list(entry.outputs), limit)
        report = against_twin(report, got, plain, thresholds)
    reason = f"the plan was compiled, not run; these figures are of its graph in ONNX Runtime, in {floats}"
    layers: tuple[LayerReport, ...] = ()
    remark = (tokens.remark() if tokens else "") + pictures_remark(got, expected)
    if isinstance(made, FP8PerChannel):
        layers = linear_errors(module, feeds, at_times(amax, made, feeds))
        out = sorted({why for name in linears_of(module) if (why := kept(f"{name}.weight"))})
        remark += f"{len(layers)} linear layers and stacks of experts in FP8; "
        remark += f"calibrated with {calibrated.get('samples', 'unknown samples')}"
        remark += f"; kept out: {'; '.join(out)}" if out else ""
        unreached = sum(len(experts) for experts in calibrated.get("unreached_experts", {}).values())
        remark += f"; {unreached} experts that no sample chose were measured on the nearest tokens" if unreached else ""
    bad = any(layer.verdict != PASSED for layer in layers)
    problem = tokens.problem() if tokens else ""
    reason += f"; {problem}" if problem else ""
    verdict = FAILED if report.verdict == FAILED or bad or problem else NOT_RUN
    return replace(report, verdict=verdict, reason=reason), layers, remark


def _twin(made: Scheme) -> tuple[Scheme, str]:
    """The scheme in floats that ONNX Runtime has on a CPU."""
    floats = "fp16" if made.floats == "fp16" else "fp32"
    return (Floats(floats) if isinstance(made, Floats) else replace(made, floats=floats)), floats


def run_graph(model: Path, feeds: Feeds) -> dict[str, Array]:
    """All outputs of an ONNX file; feeds are cast to the types of its inputs. Q/DQ stays as it is written."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Its fusions of Q/DQ make integer operators, which do not take FP8. Its extended ones drop a Relu before a
    # QuantizeLinear whose zero point is 0, as if codes were unsigned.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    try:
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        halves = {i.name for i in session.get_inputs() if i.type == "tensor(float16)"}
        given = {name: value.astype(np.float16) if name in halves else value for name, value in feeds.items()}
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, given), strict=True))
    except Exception as error:  # ONNX Runtime raises its own classes, straight from Exception
        text = " ".join(str(error).split())[:400]
        raise EngineError(f"ONNX Runtime cannot run the graph '{model}' ({text})") from error


def psnr(got: Array, expected: Array) -> float:
    """Peak signal to noise ratio in dB of pictures in [-1, 1], both clipped to it; 300 if they are equal."""
    a, b = (np.clip(np.asarray(value, np.float64), -1, 1) for value in (got, expected))
    error = float(((a - b) ** 2).mean())
    return min(300.0, float(10 * np.log10(4 / error))) if error else 300.0


def pictures_remark(got: Mapping[str, Array], expected: Mapping[str, Array]) -> str:
    """The sentence about pictures, or "" if there are none."""
    if "image" not in got or "image" not in expected:
        return ""
    return f"PSNR {psnr(got['image'], expected['image']):.1f} dB; "
