"""The numerics gate of a plan on the machine that can run it: through the runtime that serving uses.

A plan takes other sizes than the gate's sample: its caches have one capacity, and it reads one prompt at a time. So
caches are padded, rows run one by one where no profile takes them together, and what was padded is cut off again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from builders import tensorrt_build
from builders.component import Component, Feeds
from builders.reference import reference
from builders.tensorrt import PLAN_FILE
from builders.verify import Array, ComponentReport, available_memory, compare_all, reference_outputs, sample
from ming_trt.bundle import FAILED, NOT_RUN, ComponentEntry
from ming_trt.errors import EngineError
from ming_trt.presets import Preset
from ming_trt.runtime import tensorrt
from ming_trt.runtime.device_engine import DeviceEngine
from ming_trt.runtime.engine import TensorSpec

if TYPE_CHECKING:
    from ming_trt.checkpoint import Checkpoint
    from ming_trt.config import MingConfig

_ROWS = "B"


def runs_here(target: str) -> bool:
    """Whether plans of `target` can be run in this process."""
    return not tensorrt.unavailable(target)


def gate(
    component: Component,
    config: MingConfig,
    checkpoint: Checkpoint,
    folder: Path,
    preset: Preset,
    facts: Mapping[str, Any],
    memory_limit: int = 0,
) -> ComponentReport:
    """Runs the plan in `folder` and the definition on the gate's sample and compares all outputs.

    `NOT_RUN` where plans cannot run or the definition does not fit `memory_limit` (0 = what is free).
    """
    if not runs_here(preset.target):
        return tensorrt_build.not_run(preset, facts)
    thresholds = preset.thresholds(component.name)
    module = reference(component, config, checkpoint, memory_limit or available_memory())
    if module is None:
        reason = "the torch definition does not fit into memory: give --max-host-memory, or a larger machine"
        return ComponentReport(NOT_RUN, (), thresholds, reason)
    feeds = sample(component, config)
    expected = reference_outputs(module, feeds, list(facts["outputs"]))
    try:
        found = tensorrt.library(preset.target)
        plan = folder / PLAN_FILE
        engine = tensorrt.open_plan(
            found, plan, entry_of(component.name, preset, facts), tensorrt.plugin_libraries(folder)
        )
        try:
            got = run_sample(engine, feeds)
        finally:
            engine.close()
    except EngineError as error:
        return ComponentReport(FAILED, (), thresholds, str(error))
    return compare_all({name: as_reference(got[name], expected[name]) for name in expected}, expected, thresholds)


def entry_of(name: str, preset: Preset, facts: Mapping[str, Any]) -> ComponentEntry:
    """What the manifest will say of the engine."""
    described = (str(facts["model"]), facts["inputs"], facts["outputs"], facts)
    return ComponentEntry(name, preset.target, preset.precision_of(name), *described)


def run_sample(engine: DeviceEngine, feeds: Feeds) -> dict[str, Array]:
    """All outputs for the gate's sample, float32 where they are floats; caches keep the plan's capacity."""
    fitted = {name: _fitted(spec, feeds[name]) for name, spec in engine.inputs.items()}
    by_row = [name for name, spec in engine.inputs.items() if _ROWS in spec.shape]
    rows = max((value.shape[_axis(engine.inputs[name])] for name, value in fitted.items() if name in by_row), default=1)
    if rows == 1 or engine.takes({name: value.shape for name, value in fitted.items()}):
        return {name: _floats(engine.outputs[name], value) for name, value in engine.run(fitted).items()}
    parts = []
    for row in range(rows):
        alone = {name: np.take(fitted[name], [row], _axis(engine.inputs[name])) for name in by_row}
        parts.append(engine.run({**fitted, **alone}))
    return {
        name: _floats(spec, np.concatenate([part[name] for part in parts], _axis(spec)))
        for name, spec in engine.outputs.items()
    }


def as_reference(got: Array, expected: Array) -> Array:
    """`got` without the places by which a cache is longer than in the definition's sample."""
    if got.ndim != expected.ndim or any(have < want for have, want in zip(got.shape, expected.shape, strict=True)):
        return got
    return got[tuple(slice(size) for size in expected.shape)] if got.ndim == 4 else got


def _axis(spec: TensorSpec) -> int:
    return spec.shape.index(_ROWS)


def _fitted(spec: TensorSpec, value: Array) -> Array:
    """The array with the plan's type, and empty places up to the sizes that it has as numbers."""
    before = [(0, 0)] * value.ndim
    for axis, size in enumerate(spec.shape):
        if isinstance(size, int) and size > value.shape[axis]:
            before[axis] = (0, size - value.shape[axis])
    padded = np.pad(value, before)
    if spec.dtype == np.uint16 and padded.dtype == np.float32:
        # to bfloat16, to nearest even; the sample is finite
        bits = padded.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return padded.astype(spec.dtype)


def _floats(spec: TensorSpec, value: Array) -> Array:
    if spec.dtype == np.uint16:
        return (value.astype(np.uint32) << 16).view(np.float32)
    return value.astype(np.float32) if spec.dtype.kind == "f" else value
