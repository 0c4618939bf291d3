"""What the results of a build amount to: the manifest of its bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builders import trtllm, trtllm_engine
from builders.steps import Outcome, Run
from builders.unchanged import GATE
from ming_trt import __version__
from ming_trt.bundle import FAILED, MISSING, PASSED, ComponentEntry, FileEntry, Manifest, StepEntry

if TYPE_CHECKING:
    from builders.build import Construction


def manifest_of(plan: Construction, run: Run) -> Manifest:
    """What the results of a run without failures amount to."""
    steps: dict[str, StepEntry] = {}
    components: dict[str, ComponentEntry] = {}
    for name, result in run.results.items():
        record = result.record
        if record is None:
            steps[name] = StepEntry(str(Outcome.SKIPPED), "", result.reason)
            continue
        files = {f"{record.output}/{path}": FileEntry(*entry) for path, entry in record.files.items()}
        steps[name] = StepEntry(str(Outcome.OK), record.key, "", files)
        if name in plan.components:
            gate = run.results[GATE + name].record
            served = trtllm_engine.SERVED if name == trtllm.ENGINE else name
            components[served] = _entry(plan, name, record.facts, gate.facts if gate else {})
    raw = plan.config.raw
    model = {
        "name": "Ming-lite-omni v1.5",
        "type": raw.get("model_type", ""),
        "architecture": (raw.get("architectures") or [""])[0],
    }
    versions = {"ming-trt": __version__, **plan.versions}
    return Manifest(model, plan.preset.target, plan.preset, _shards(plan, components), versions, steps, components)


def _shards(plan: Construction, components: Mapping[str, ComponentEntry]) -> dict[str, dict[str, Any]]:
    """Weight file -> size, and digest of those of its tensors that the engines were made from."""
    from ming_trt.models.weights import source_names

    tensors: dict[Path, set[str]] = {}
    for name in components:
        component = plan.components.get(name, trtllm.COMPONENT)
        for tensor in source_names(component.sources(plan.config)):
            tensors.setdefault(plan.checkpoint.info(tensor).file, set()).add(tensor)
    return {
        path.relative_to(plan.checkpoint.root).as_posix(): {
            "sha256": plan.checkpoint.digest(names, plan.cache),
            "size": path.stat().st_size,
            "tensors": len(names),
        }
        for path, names in sorted(tensors.items())
    }


def _entry(plan: Construction, name: str, facts: Mapping[str, Any], gate: Mapping[str, Any]) -> ComponentEntry:
    verdict = gate.get("verdict", MISSING)
    own = ("inputs", "outputs", "precision", "weights", "model", "rung", "target")
    rest = {key: value for key, value in facts.items() if key not in own}
    return ComponentEntry(
        trtllm_engine.SERVED if name == trtllm.ENGINE else name,
        str(facts.get("target", plan.plain.target if name in plan.plain_names else plan.preset.target)),
        str(facts["precision"]),
        str(facts.get("model", f"{name}/model.onnx")),
        facts["inputs"],
        facts["outputs"],
        rest,
        gate,
        {PASSED: str(facts.get("rung", "matches")), FAILED: "ran"}.get(str(verdict), "compiled"),
        facts["weights"],
    )
