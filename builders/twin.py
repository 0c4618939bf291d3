"""An FP8 engine's bfloat16 twin: the same definition, weights and inputs, held and computed in bfloat16.

Its outputs are what the engine would give without FP8. Torch computes them on the CPU, since ONNX Runtime has no
bfloat16 there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from builders.component import Component, ExportOptions, Feeds
from builders.reference import reference
from builders.verify import Array, ComponentReport, compare_all, flatten
from ming_trt.bundle import FAILED
from ming_trt.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ming_trt.checkpoint import Checkpoint
    from ming_trt.config import MingConfig
    from ming_trt.presets import Thresholds

# What is appended to the names of outputs that are compared with the twin's.
AGAINST = " (against its bf16 twin)"


def twin_outputs(
    component: Component, config: MingConfig, checkpoint: Checkpoint, feeds: Feeds, names: list[str], memory: int
) -> dict[str, Array]:
    """The twin's outputs by name, in float32. Raises `BuildError` if `memory` bytes do not hold its largest layer."""
    import torch

    from builders.export import signature_of

    module = reference(component, config, checkpoint, memory, torch.bfloat16)
    if module is None:
        raise BuildError(f"the bf16 twin of {component.name} does not fit into memory: give --max-host-memory")
    graph = component.graph  # type: ignore[attr-defined]
    types = signature_of(lambda: graph(config, ExportOptions("onnxruntime", "bf16"))).inputs
    with torch.inference_mode():
        result = module(*(torch.from_numpy(value.copy()).to(types[name].dtype) for name, value in feeds.items()))
    return dict(zip(names, flatten(result), strict=True))


def against_twin(
    report: ComponentReport, got: Mapping[str, Array], twin: Mapping[str, Array], thresholds: Thresholds
) -> ComponentReport:
    """`report` with the comparisons of `got` and `twin` added; one that fails makes it fail."""
    found = compare_all(got, twin, thresholds)
    outputs = (*report.outputs, *(replace(output, name=output.name + AGAINST) for output in found.outputs))
    return replace(report, outputs=outputs, verdict=FAILED if found.verdict == FAILED else report.verdict)
