"""Numerics audit of a bundle on request: outputs, layers and determinism (`ming-trt verify`).

The gate (`builders/verify.py`) says whether an engine may be served; this says where and why it may not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from builders import registry, trtllm
from builders.component import Component, Feeds
from builders.verify import Array, ComponentReport, run_engine, sample, verify_component
from ming_trt.bundle import FAILED, NOT_RUN, PASSED, Bundle
from ming_trt.errors import BundleError

if TYPE_CHECKING:
    from builders.layers import LayerReport
    from ming_trt.checkpoint import Checkpoint
    from ming_trt.config import MingConfig

# Symbols of the axes along which requests lie beside each other (docs/DESIGN.md, section 4.1).
_BATCH_AXES = ("B", "batch")


@dataclass(frozen=True, slots=True)
class Repetition:
    """One engine run again under another `condition`: bit-equal outputs, or the largest absolute difference."""

    condition: str
    equal: bool
    max_abs: float


@dataclass(frozen=True, slots=True)
class Audit:
    """What was found about one engine; `layers` and `repetitions` are empty unless they were asked for."""

    name: str
    gate: ComponentReport
    layers: tuple[LayerReport, ...] = ()
    repetitions: tuple[Repetition, ...] = ()
    note: str = ""

    @property
    def first_divergence(self) -> str:
        """Canonical name of the first module whose output differs, "" if none does."""
        return next((layer.name for layer in self.layers if layer.verdict != PASSED), "")

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "component": self.name,
            **self.gate.as_dict(),
            "note": self.note,
            "first_divergence": self.first_divergence,
            "layers": [asdict(layer) for layer in self.layers],
            "determinism": [asdict(repetition) for repetition in self.repetitions],
        }


def audit(
    bundle: Bundle,
    folder: Path,
    names: tuple[str, ...] = (),
    *,
    layers: bool = False,
    determinism: bool = False,
    memory_limit: int = 0,
) -> list[Audit]:
    """Audits the engines `names` (all of the bundle if empty) against the checkpoint in `folder`.

    Raises `BundleError` if the bundle lacks one of them, or has none that can be compared; `CheckpointError` and
    `ConfigError` as the checkpoint is read.
    """
    from ming_trt.checkpoint import Checkpoint
    from ming_trt.config import load_config

    registry.check_names(tuple(name for name in names if name != trtllm.NAME))
    config, checkpoint = load_config(folder), Checkpoint(folder)
    known = (*registry.COMPONENTS, trtllm.NAME)
    entries = bundle.manifest.components
    # what only its executor runs was made from what is compared
    apart = {name for name in entries if entries[name].target == trtllm.TARGET} - {trtllm.NAME}
    chosen = names or tuple(name for name in entries if name in known and name not in apart)
    if not chosen:
        raise BundleError(f"bundle '{bundle.path}' has no engine to compare: build it again")
    return [_audit(bundle, config, checkpoint, name, layers, determinism, memory_limit) for name in chosen]


def _audit(
    bundle: Bundle,
    config: MingConfig,
    checkpoint: Checkpoint,
    name: str,
    layers: bool,
    determinism: bool,
    memory_limit: int,
) -> Audit:
    from builders.layers import compare_layers

    if name == trtllm.NAME:
        return _audit_checkpoint(bundle, config, checkpoint)
    component, entry = registry.component(name), bundle.component(name)
    if entry.target == trtllm.TARGET:
        why = f"it runs in TensorRT-LLM's executor only: what it was built from is compared as {trtllm.NAME}"
        return Audit(name, ComponentReport(NOT_RUN, (), bundle.preset.thresholds(trtllm.NAME), why), (), (), "")
    reason = component.needs(config, checkpoint)
    if reason:
        raise BundleError(f"{name} cannot be compared, since {reason}: give the checkpoint the bundle was built from")
    thresholds = bundle.preset.thresholds(name)
    model, threads = bundle.model_path(name), bundle.preset.threads
    if model.suffix == ".plan":
        from builders.tensorrt_audit import audit_graph

        gate, linears, note = audit_graph(component, config, checkpoint, entry, thresholds, memory_limit)
        gate = _run_plan(bundle, component, config, checkpoint, gate, memory_limit)
        origin = _provenance(bundle, checkpoint, component, config)
        return Audit(name, gate, linears, (), "; ".join(filter(None, (gate.reason, note, origin))))
    report = verify_component(
        component,
        config,
        checkpoint,
        model,
        list(entry.outputs),
        thresholds,
        threads=threads,
        memory_limit=memory_limit,
    )
    found: tuple[LayerReport, ...] = ()
    if layers and report.outputs:
        found = compare_layers(component, config, checkpoint, model, thresholds, threads, memory_limit)
    repetitions: tuple[Repetition, ...] = ()
    if determinism and report.outputs:
        repetitions = tuple(_repeat(component, config, model, entry.inputs, entry.outputs))
    return Audit(name, report, found, repetitions, _provenance(bundle, checkpoint, component, config))


def _run_plan(
    bundle: Bundle,
    component: Component,
    config: MingConfig,
    checkpoint: Checkpoint,
    graph: ComponentReport,
    memory_limit: int,
) -> ComponentReport:
    """The gate's report of the plan itself where it can run; that of its graph elsewhere, and if the graph fails."""
    from builders.tensorrt_gate import gate, runs_here

    entry = bundle.component(component.name)
    if graph.verdict == FAILED or not runs_here(entry.target):
        return graph
    preset = replace(bundle.preset, target=entry.target)
    facts = {**entry.facts, "model": entry.model, "inputs": entry.inputs, "outputs": entry.outputs}
    folder = bundle.model_path(component.name).parent
    ran = gate(component, config, checkpoint, folder, preset, facts, memory_limit)
    if not ran.outputs:
        return ran
    return replace(ran, reason="the plan ran here; layers are of its graph in ONNX Runtime")


def _audit_checkpoint(bundle: Bundle, config: MingConfig, checkpoint: Checkpoint) -> Audit:
    """The TensorRT-LLM checkpoint, read back, against the official tensors in bfloat16; its modules are its layers."""
    from builders.layers import LayerReport
    from builders.trtllm_verify import verify

    component = trtllm.COMPONENT
    reason = component.needs(config, checkpoint)
    if reason:
        raise BundleError(
            f"{trtllm.NAME} cannot be compared, since {reason}: give the checkpoint the bundle was built from"
        )
    folder = bundle.model_path(trtllm.NAME).parent
    report = verify(folder, config, checkpoint, bundle.preset.thresholds(trtllm.NAME))
    # products before the blocks that they are part of: the first that differs is the one to look at
    modules = sorted(report.outputs, key=lambda output: output.name.startswith("layer "))
    layers = tuple(
        LayerReport(m.name, "read back", m.max_abs, m.relative, m.sqnr_db, m.verdict, m.note) for m in modules
    )
    return Audit(trtllm.NAME, report, layers, (), _provenance(bundle, checkpoint, component, config))


def _provenance(
    bundle: Bundle, checkpoint: Checkpoint, component: Component | trtllm.LLMCheckpoint, config: MingConfig
) -> str:
    """A remark if the weight files differ from those the bundle was built from."""
    from ming_trt.models.weights import source_names

    names = source_names(component.sources(config))
    if checkpoint.digest(names) == bundle.component(component.name).weights:
        return ""
    files = sorted({checkpoint.info(name).file.name for name in names})
    return f"the engine was built from other weights than those in {', '.join(files)}"


def _repeat(
    component: Component,
    config: MingConfig,
    model: Path,
    inputs: Mapping[str, Mapping[str, Any]],
    outputs: Mapping[str, Mapping[str, Any]],
) -> list[Repetition]:
    from ming_trt.runtime.engine import open_engine

    feeds = sample(component, config)
    engine = open_engine(model, component.name, threads=1)
    try:
        first = engine.run(feeds)
        found = [_difference("the same session again", first, engine.run(feeds))]
    finally:
        engine.close()
    found.append(_difference("a new session", first, run_engine(model, component.name, feeds, 1)))
    found.append(_difference("2 threads instead of 1", first, run_engine(model, component.name, feeds, 2)))
    alone = _alone(component.name, model, feeds, inputs, outputs)
    if alone:
        found.append(_difference("each request alone instead of in a batch", {n: first[n] for n in alone}, alone))
    return found


def _alone(
    name: str,
    model: Path,
    feeds: Feeds,
    inputs: Mapping[str, Mapping[str, Any]],
    outputs: Mapping[str, Mapping[str, Any]],
) -> dict[str, Array]:
    """Outputs with a batch axis, from one run per row; empty if the engine has no such axis."""
    axes_in, axes_out = _batch_axes(inputs), _batch_axes(outputs)
    sizes = {feeds[tensor].shape[axis] for tensor, axis in axes_in.items()}
    if len(sizes) != 1 or not axes_out:
        return {}
    rows = []
    for row in range(sizes.pop()):
        part = {
            tensor: np.ascontiguousarray(np.take(value, [row], axes_in[tensor])) if tensor in axes_in else value
            for tensor, value in feeds.items()
        }
        rows.append(run_engine(model, name, part, 1))
    return {tensor: np.concatenate([row[tensor] for row in rows], axis) for tensor, axis in axes_out.items()}


def _batch_axes(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    found = {}
    for name, spec in tensors.items():
        for axis, size in enumerate(spec["shape"]):
            if size in _BATCH_AXES:
                found[name] = axis
                break
    return found


def _difference(condition: str, first: Mapping[str, Array], second: Mapping[str, Array]) -> Repetition:
    equal = all(np.array_equal(first[name], second[name]) for name in first)
    worst = max((float(np.abs(first[n].astype(np.float64) - second[n]).max(initial=0.0)) for n in first), default=0.0)
    return Repetition(condition, equal, worst)


def report_document(audits: list[Audit]) -> dict[str, Any]:
    """The JSON document of an audit: `verdict` over all engines, and one entry per engine."""
    verdict = PASSED if audits and all(found.gate.verdict == PASSED for found in audits) else FAILED
    return {"verdict": verdict, "components": [found.as_dict() for found in audits]}
