"""What a build of a checkpoint consists of: its steps, its manifest, and the shortcut when nothing changed.

assets                configuration and tokenizer files, copied
<engine>              export, lowering and weights, one step per engine of `builders/registry.py`
gate:<engine>         the engine against its torch definition

For target tensorrt-llm the language model's steps are those of `builders/trtllm.py`, and the other engines TensorRT's.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builders import registry, trtllm
from builders.build_manifest import manifest_of
from builders.code import code_version, tool_versions
from builders.steps import Context, Graph, Outcome, Progress, Result, Step, digest, peak_memory
from builders.unchanged import (
    COMPILED,
    EXPORT_TOOLS,
    GATE,
    RUN_TOOLS,
    TENSORRT,
    checkpoint_files,
    fingerprint_of,
    unchanged_since,
)
from builders.workspace import CACHE, Hook, Workspace
from ming_trt.bundle import (
    ASSETS,
    NOT_RUN,
    PASSED,
    sha256,
)
from ming_trt.errors import BuildError
from ming_trt.presets import Preset

if TYPE_CHECKING:
    from builders.component import Component
    from ming_trt.checkpoint import Checkpoint
    from ming_trt.config import MingConfig


@dataclass(frozen=True, slots=True)
class Options:
    """What to build. `only` names engines (all if empty); `max_host_memory` bytes, 0 = no limit but the machine's."""

    checkpoint: Path
    bundle: Path
    preset: Preset
    only: tuple[str, ...] = ()
    max_host_memory: int = 0
    calibration: Path | None = None
    tensor_parallel: int = 1
    expert_parallel: int = 1


@dataclass(frozen=True, slots=True)
class Report:
    """How a build ended. `verdict` is the gate's over all engines; `peak_bytes` the highest of the steps that ran."""

    bundle: Path
    results: Mapping[str, Result]
    verdict: str
    seconds: float
    peak_bytes: int = 0
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def ok(self) -> bool:
        """Whether the bundle may be used: every engine passed the gate, or cannot be run here."""
        return self.verdict in (PASSED, NOT_RUN)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        steps = {
            name: {"outcome": str(r.outcome), "reason": r.reason, "seconds": round(r.seconds, 3), "key": r.key}
            for name, r in self.results.items()
        }
        return {
            "bundle": str(self.bundle),
            "ok": self.ok,
            "gate": self.verdict,
            "seconds": round(self.seconds, 3),
            "peak_bytes": self.peak_bytes,
            "steps": steps,
        }


def build(options: Options, progress: Progress | None = None, hook: Hook = lambda _: None) -> Report:
    """Brings the bundle up to date with the checkpoint and the preset, and ends with the gate.

    Everything is checked before anything is written. Raises `MingError`: the first failure, in one sentence; what was
    finished before stays, and the same call continues there. `hook` is for tests (`builders.workspace`).
    """
    started = time.monotonic()
    check(options)
    # Options are good; now the checkpoint, still before the output folder is touched.
    files = checkpoint_files(options.checkpoint)
    with Workspace(options.bundle, hook) as space:
        fingerprint = fingerprint_of(options, files)
        unchanged = unchanged_since(space, fingerprint)
        if unchanged is not None:
            return Report(options.bundle, unchanged[0], unchanged[1], time.monotonic() - started)
        for name, record in list(space.records.items()):
            if record.facts.get("verdict") == NOT_RUN and options.preset.target not in COMPILED:
                del space.records[name]
        plan = Construction(options, space)
        graph = plan.graph()
        run = graph.run(space, plan.selection(), progress)
        if run.failure is not None:
            raise run.failure
        for name, step in graph.steps.items():
            if step.skip:
                space.drop(name)
        for name in set(space.records) - set(graph.steps):
            space.drop(name)
        manifest = manifest_of(plan, run)
        text = manifest.to_json()
        space.write_manifest(text)
        space.digests.save()
        space.note("finished", fingerprint=fingerprint, manifest=digest(text), gate=manifest.gate)
    ran = [r.record.peak_bytes for r in run.results.values() if r.record and r.outcome is Outcome.OK]
    return Report(options.bundle, run.results, manifest.gate, time.monotonic() - started, max(ran, default=0))


def check(options: Options) -> None:
    """Raises `MingError` if the options cannot be built here. Reads nothing."""
    if options.preset.target == trtllm.TARGET:
        trtllm.check_selection(options.only)
        if others := trtllm.others(options.only):
            from builders import tensorrt_build

            tensorrt_build.check(trtllm.beside(options.preset), others)
    else:
        registry.check_names(options.only)
        if options.preset.target in TENSORRT:
            from builders import tensorrt_build

            tensorrt_build.check(options.preset, options.only)
    if max(options.tensor_parallel, options.expert_parallel) > 1 and options.preset.target != "tensorrt-llm":
        raise BuildError(
            f"--tp {options.tensor_parallel} --ep {options.expert_parallel} need target tensorrt-llm, "
            f"not {options.preset.target}: leave them out"
        )
    if options.calibration is not None and not options.calibration.is_dir():
        raise BuildError(f"there is no calibration folder '{options.calibration}': give the folder of the samples")
    if options.calibration is not None and "fp8" not in options.preset.precision.values():
        raise BuildError("calibration is for fp8, which this preset does not use: leave --calibration out")
    for name in options.preset.precision:
        if name not in ("default", *trtllm.PRECISIONS):
            registry.check_names((name,))


class Construction:
    """A build of one checkpoint: what its steps are, and what they need."""

    def __init__(self, options: Options, space: Workspace) -> None:
        from ming_trt.checkpoint import Checkpoint
        from ming_trt.config import load_config

        self.options = options
        self.space = space
        self.preset = options.preset
        self.cache = space.folder / CACHE
        self.config: MingConfig = load_config(options.checkpoint)
        self.checkpoint: Checkpoint = Checkpoint(options.checkpoint)
        # how the engines other than TensorRT-LLM's are built
        self.plain = self.preset
        self.components: dict[str, Component | trtllm.Made] = {}
        names: tuple[str, ...] = tuple(registry.COMPONENTS)
        if self.preset.target == trtllm.TARGET:
            self.plain = trtllm.beside(self.preset)
            self.components = trtllm.components()
            wanted = trtllm.others(options.only) or any("plan" in record.facts for record in space.records.values())
            names = trtllm.others(()) if wanted else ()
        self.plain_names = names
        self.components |= {name: registry.component(name) for name in names}
        self.versions = tool_versions((*EXPORT_TOOLS, *RUN_TOOLS))

    def selection(self) -> list[str] | None:
        """The steps to bring up to date, or None for all."""
        if not self.options.only:
            return None
        return [ASSETS, *self.options.only, *(GATE + name for name in self.options.only)]

    def graph(self) -> Graph:
        """The steps. Reads headers, and the bytes of tensors that were never digested before."""
        steps = [self._assets()]
        if self.preset.target == trtllm.TARGET:
            trtllm.check_bundle(self.space.folder, self.space.records)
            first = self._trtllm()
            for name in self.plain_names:
                steps += self._engine(name, registry.component(name))
            return Graph([*steps, *first])
        for name in self.plain_names:
            steps += self._engine(name, registry.component(name))
        if all(step.skip for step in steps[1::2]):
            raise BuildError(
                f"'{self.options.checkpoint}' holds no component that can be built ({steps[1].skip}): "
                "give the folder of a whole checkpoint"
            )
        return Graph(steps)

    def _trtllm(self) -> list[Step]:
        return trtllm.steps(
            self.preset,
            self.config,
            self.checkpoint,
            self.cache,
            tensor_parallel=self.options.tensor_parallel,
            expert_parallel=self.options.expert_parallel,
            calibration=self.options.calibration,
            max_host_memory=self.options.max_host_memory,
            engine=trtllm.with_engine(self.options.only) or trtllm.ENGINE in self.space.records,
        )

    def _assets(self) -> Step:
        source = self.options.checkpoint
        names = sorted({p.relative_to(source).as_posix() for pattern in registry.ASSETS for p in source.glob(pattern)})

        def run(context: Context) -> Mapping[str, Any]:
            for name in names:
                (context.work / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, context.work / name)
            return {"files": names}

        key = digest([(name, sha256(source / name)) for name in names])
        return Step(ASSETS, key, run, output=ASSETS)

    def _engine(self, name: str, component: Component) -> list[Step]:
        # not at the top: a build without changes imports neither torch nor onnx
        from builders import tensorrt_build
        from builders.component import ExportOptions
        from builders.verify import SEED, verify_component
        from ming_trt.models.weights import check_sources, source_names
        from ming_trt.runtime.tensorrt import unavailable

        reason = component.needs(self.config, self.checkpoint)
        if not reason and self.options.only and name not in self.options.only and name not in self.space.records:
            # Its key is not worth reading its weights for.
            reason = "not selected"
        if reason:
            return [
                Step(name, "", _never, output=name, skip=reason),
                Step(GATE + name, "", _never, (name,), skip=f"there is no {name} to check"),
            ]
        precision = self.plain.precision_of(name)
        tensorrt = self.plain.target in TENSORRT
        options = ExportOptions(self.plain.target, precision)
        if tensorrt:
            options = tensorrt_build.export_options(self.plain, name)
        sources = component.sources(self.config)
        check_sources(sources, self.checkpoint)
        thresholds = self.plain.thresholds(name)
        module = registry.module_of(name)
        weights = self.checkpoint.digest(source_names(sources), self.cache)
        key = digest(
            {
                "config": component.config_key(self.config),
                "weights": weights,
                "options": [options.target, options.precision],
                "code": code_version(module),
                "tools": tool_versions(EXPORT_TOOLS),
                **self._tensorrt_key(name),
            }
        )
        gate_key = digest(
            {
                "thresholds": [thresholds.max_relative, thresholds.min_cosine, thresholds.min_sqnr_db],
                "seed": SEED,
                "code": [code_version(module), code_version("builders.verify")],
                "tools": tool_versions((*RUN_TOOLS, "torch")),
                "memory": self.options.max_host_memory,
                **({"runs": not unavailable(self.plain.target)} if tensorrt else {}),
            }
        )

        def export(context: Context) -> Mapping[str, Any]:
            if tensorrt:
                facts = tensorrt_build.export_and_compile(
                    component,
                    self.config,
                    self.checkpoint,
                    context.work,
                    self.plain,
                    calibration=self.options.calibration,
                    cache=self.cache,
                    report=context.report,
                )
            else:
                facts = component.export(self.config, self.checkpoint, context.work, options)
            self._check_memory(name)
            return {"precision": precision, "weights": weights, **facts}

        def gate(context: Context) -> Mapping[str, Any]:
            if tensorrt:
                from builders.tensorrt_gate import gate as tensorrt_gate

                facts, limit = context.facts[name], self.options.max_host_memory
                folder = context.inputs[name]
                return tensorrt_gate(
                    component, self.config, self.checkpoint, folder, self.plain, facts, limit
                ).as_dict()
            report = verify_component(
                component,
                self.config,
                self.checkpoint,
                context.inputs[name] / "model.onnx",
                list(context.facts[name]["outputs"]),
                thresholds,
                threads=self.plain.threads,
                memory_limit=self.options.max_host_memory,
            )
            return report.as_dict()

        return [Step(name, key, export, output=name), Step(GATE + name, gate_key, gate, (name,))]

    def _tensorrt_key(self, name: str) -> dict[str, Any]:
        """What a plan depends on beside what a graph does; nothing for other targets."""
        if self.plain.target not in TENSORRT:
            return {}
        from builders import tensorrt_build

        settings = tensorrt_build.content_key(self.plain, name, self.options.calibration, self.options.checkpoint)
        return {"tensorrt": settings, "compiler": code_version("builders.tensorrt_build")}

    def _check_memory(self, name: str) -> None:
        peak, limit = peak_memory(), self.options.max_host_memory
        if limit and peak > limit:
            raise BuildError(
                f"building {name} took {peak / 2**20:.0f} MiB of memory, above --max-host-memory "
                f"{limit / 2**20:.0f} MiB: raise the limit"
            )


def _never(_: Context) -> Mapping[str, Any]:
    raise AssertionError("a skipped step ran")
