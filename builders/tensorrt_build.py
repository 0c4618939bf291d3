"""The part of a build that is TensorRT's: how an engine's graph must be, its plan, and what is said of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builders import fp8_ranges
from builders import tensorrt_api as api
from builders.component import Component, ExportOptions
from builders.export import DATA_FILE, MODEL_FILE
from builders.fp8_experts import SPARSE_MOE_FP8
from builders.precision import Floats, FP8PerChannel, scheme
from builders.tensorrt import PLAN_FILE, Settings, compile_plan, expect_layers
from builders.tensorrt_profiles import fixed_sizes, phases
from builders.verify import ComponentReport
from ming_trt.bundle import NOT_RUN, sha256
from ming_trt.errors import BuildError
from ming_trt.presets import Preset
from ming_trt.runtime.plan import gpu_capability
from ming_trt.runtime.tensorrt import PLUGINS_FOLDER

if TYPE_CHECKING:
    from ming_trt.checkpoint import Checkpoint
    from ming_trt.config import MingConfig

PLUGINS_VARIABLE = "MING_TRT_PLUGINS"
"""Paths of plugin libraries, joined by colons."""


def check(preset: Preset, only: tuple[str, ...] = ()) -> None:
    """Raises `MingError` if plans of the preset cannot be built on this machine."""
    api.load(preset.target)
    if preset.target == api.FULL:
        gpu_capability()
    for name, precision in preset.precision.items():
        if name != "default" and (not only or name in only):
            scheme(preset.target, name, precision)
    plugin_libraries()


def plugin_libraries() -> tuple[Path, ...]:
    """The libraries that the environment names. Raises `BuildError` for one that is missing."""
    paths = tuple(Path(part) for part in os.environ.get(PLUGINS_VARIABLE, "").split(":") if part)
    for path in paths:
        if not path.is_file():
            raise BuildError(f"{PLUGINS_VARIABLE} names '{path}', which is missing: build plugins/ with CMake")
    return paths


def export_options(preset: Preset, name: str) -> ExportOptions:
    """How the graph of engine `name` is made; without FP8 ranges, which come from `with_ranges`."""
    release = api.load(preset.target).release
    made = scheme(preset.target, name, preset.precision_of(name))
    alone = () if isinstance(made, Floats) or plugin_libraries() else (SPARSE_MOE_FP8,)
    return ExportOptions(
        "tensorrt",
        preset.precision_of(name),
        made,
        fixed=tuple(fixed_sizes(name, preset.profile).items()),
        lowered=(*api.lacking(release), *alone),
    )


def content_key(preset: Preset, name: str, calibration: Path | None, checkpoint: Path) -> list[Any]:
    """What a plan depends on beside the weights and the code, as JSON values."""
    options, loaded = export_options(preset, name), api.load(preset.target)
    samples = None if isinstance(options.scheme, Floats) else fp8_ranges.choose(name, calibration, checkpoint)
    device = gpu_capability() if preset.target == api.FULL else ""
    return [
        [preset.target, loaded.version, device],
        [str(options.scheme), options.fixed, options.lowered],
        preset.as_dict()["profile"],
        samples.digest if samples else "",
        [sha256(path) for path in plugin_libraries()],
    ]


def with_ranges(
    options: ExportOptions,
    component: Component,
    config: MingConfig,
    checkpoint: Checkpoint,
    calibration: Path | None,
    scratch: Path,
) -> tuple[ExportOptions, dict[str, Any]]:
    """The options with the ranges that FP8 needs, and what the manifest says of them."""
    if options.scheme is None or isinstance(options.scheme, Floats):
        return options, {}
    samples = fp8_ranges.choose(component.name, calibration, checkpoint.root)
    bounds = options.scheme.steps if isinstance(options.scheme, FP8PerChannel) else ()
    found = fp8_ranges.ranges(component, config, checkpoint, samples, calibration, scratch, bounds)
    facts = {"samples": samples.what, **found.facts, "input_amax": dict(found.amax)}
    return replace(options, ranges=tuple(sorted(found.amax.items()))), facts


def export_and_compile(
    component: Component,
    config: MingConfig,
    checkpoint: Checkpoint,
    folder: Path,
    preset: Preset,
    *,
    calibration: Path | None = None,
    cache: Path,
    report: Callable[[str], None] = lambda _: None,
) -> Mapping[str, Any]:
    """Writes `folder/model.plan` and its log; the graph is compiled from `folder` and then removed, its digest kept.

    Returns the facts of the export and: `model` (the plan, relative to the bundle), `scheme`, `plan` (stamp, layers,
    profiles, seconds, peak memory), `graph` (digest of the ONNX file), and `calibration` for FP8.
    """
    name = component.name
    options = export_options(preset, name)
    options, calibrated = with_ranges(options, component, config, checkpoint, calibration, cache / "calibration" / name)
    report("exporting")
    facts = component.export(config, checkpoint, folder, options)
    graph = folder / MODEL_FILE
    settings = Settings(preset.target, plugin_libraries(), cache=cache / "tensorrt")
    report("compiling")
    built = compile_plan(graph, facts["inputs"], phases(name, preset.profile, facts), folder, settings, report)
    expect_layers(built, facts["operators"], name)
    if built.stamp.plugin_abi:
        keep_plugins(folder, settings.plugins)
    made: dict[str, Any] = {
        "model": f"{name}/{PLAN_FILE}",
        "scheme": str(options.scheme),
        "graph": {"sha256": sha256(graph), "lowered": list(options.lowered)},
        "plan": built.as_dict(),
    }
    if calibrated:
        made["calibration"] = calibrated
    for file in (graph, folder / DATA_FILE):
        file.unlink(missing_ok=True)
    return {**facts, **made}


def keep_plugins(folder: Path, libraries: tuple[Path, ...]) -> None:
    """Copies the plugin libraries to beside the plan that needs them, where the runtime looks first."""
    (folder / PLUGINS_FOLDER).mkdir(exist_ok=True)
    for library in libraries:
        shutil.copy2(library, folder / PLUGINS_FOLDER / library.name)


def not_run(preset: Preset, facts: Mapping[str, Any]) -> ComponentReport:
    """The gate's report of a plan that this machine cannot run."""
    stamp = facts["plan"]["stamp"]
    reason = (
        f"compiled by {preset.target} {stamp['version']} for {', '.join(stamp['devices'])}, not run: "
        "`ming-trt verify` compares its graph in ONNX Runtime"
    )
    return ComponentReport(NOT_RUN, (), preset.thresholds(facts["model"].split("/")[0]), reason)
