"""What a build will make and need, from configuration and headers alone: no weights are read, nothing is exported.

Exact: parameters, weights, KV cache. From the definitions run on tensors without data (`builders/activations.py`):
working memory, an upper bound where a back end fuses operators. Estimates, named so: base of a process, what CUDA
graphs take, peaks of the build, time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from builders import plan_serving, registry, trtllm
from builders.headers import HeaderCheckpoint, completed
from builders.plan_engine import EnginePlan, Shapes, engine_plan
from builders.plan_serving import Item, Needs, gib
from builders.skeleton import checkpoint_folder
from builders.verify import available_memory
from ming_trt.config import load_config
from ming_trt.errors import BuildError, CheckpointError, ConfigError
from ming_trt.presets import Preset

__all__ = ["EnginePlan", "Item", "Plan", "gib", "plan"]

# Resident memory of torch, onnx and ONNX Runtime in an export, before they hold a weight, and what each one leaves
# behind. Measured (benchmarks/memory.py).
_BUILD_BASE, _EXPORT_LEAVES = 430 * 2**20, 11 * 2**20
# The exporter holds the largest tensor as stored (mostly bfloat16) and as float32, a transposed one for a while twice.
_COPIES = 1.9
# Exporting to TensorRT-LLM goes matrix by matrix; calibration and gate too, measured at the official widths.
_RANKS_PEAK = 2**30
# TensorRT-LLM's builder holds a rank's weights as read and as constants of the network. Read, not measured.
_BUILDER_COPIES = 2
# Seconds on one core of a server, measured with the mini checkpoint: an export, and a compilation of TensorRT-RTX.
_EXPORT_SECONDS, _COMPILE_SECONDS = 12, 30
_DISK_BYTES_PER_SECOND = 200e6


@dataclass(frozen=True, slots=True)
class Plan:
    """A build before it is made. All sizes in bytes, `seconds` an estimate for one core and a disk of 200 MB/s.

    `run_items` make up the memory of serving on the fullest of `gpus` GPUs (on the machine, for onnxruntime), and
    `run_bytes` is their sum; `memory_limit` what it has to fit into.
    """

    checkpoint: str
    preset: str
    target: str
    steps: tuple[str, ...]
    engines: tuple[EnginePlan, ...]
    parameters: int
    source_bytes: int
    weight_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    kv_budget: int
    gpus: int
    run_items: tuple[Item, ...]
    run_bytes: int
    build_peak_bytes: int
    gate_peak_bytes: int
    disk_bytes: int
    memory_limit: int
    seconds: float
    problem: str = ""
    notes: tuple[str, ...] = field(default_factory=tuple)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def plan(
    folder: Path, preset: Preset, only: tuple[str, ...] = (), memory_limit: int = 0, gpus: int = 1, experts: int = 1
) -> Plan:
    """Plans the build of the checkpoint in `folder`, which may consist of config.json and headers, an index, or
    nothing else (then the sizes are those that it asks for); "official" stands for the sizes of the published one.

    `memory_limit` bytes of memory to fit into: 0 takes the preset's device memory or, on a CPU target, what this
    machine has free; a GPU that the preset does not describe is not compared with. `gpus`, `experts`: tensor and
    expert parallel sizes. `Plan.problem` says what does not fit; nothing is raised for that. Raises `MingError` for a
    checkpoint or selection that cannot be built.
    """
    _check_selection(preset, only, gpus, experts)
    with checkpoint_folder(folder) as place:
        # before anything else is looked for in a folder that may be anything
        load_config(place)
        with completed(place) as (whole, cut):
            try:
                made = _plan(str(folder), whole, preset, only, memory_limit, (gpus, experts))
            except (CheckpointError, ConfigError) as error:
                # the user's folder, not a stand-in for it
                raise type(error)(str(error).replace(str(whole), str(folder))) from error
            engines = (replace(e, reason=e.reason.replace(str(whole), str(folder))) for e in made.engines)
            made = replace(made, engines=tuple(engines))
    if not cut:
        return made
    note = f"{_some(cut)} cut short after the header: the sizes are right, `ming-trt build` needs the rest"
    return replace(made, notes=(*made.notes, note))


def _some(names: Sequence[str]) -> str:
    """The first name, and how many there are."""
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"


def _check_selection(preset: Preset, only: tuple[str, ...], gpus: int, experts: int) -> None:
    if preset.target == trtllm.TARGET:
        only = trtllm.others(only) if only else ()
    elif max(gpus, experts) > 1:
        raise BuildError(f"--tp {gpus} --ep {experts} need target tensorrt-llm, not {preset.target}: leave them out")
    registry.check_names(only)


def _plan(
    label: str,
    folder: Path,
    preset: Preset,
    only: tuple[str, ...],
    memory_limit: int,
    parallel: tuple[int, int],
) -> Plan:
    config, checkpoint = load_config(folder), HeaderCheckpoint(folder)
    names = list(registry.COMPONENTS)
    if preset.target == trtllm.TARGET:
        # it takes the place of the engine `llm`, and is built last
        names = [*trtllm.others(()), trtllm.NAME]
    shapes: Shapes = {}
    selected = (*only, trtllm.NAME) if trtllm.ENGINE in only else only
    engines = [engine_plan(name, config, checkpoint, preset, selected, parallel, shapes) for name in names]
    made = [engine for engine in engines if not engine.reason]
    if not made:
        raise BuildError(
            f"'{label}' holds no component that can be built ({engines[0].reason}): give a whole checkpoint"
        )
    needs = Needs.of(made, config, preset, parallel)
    # what a GPU has cannot be seen here, unless the preset says it
    limit = memory_limit or preset.device_memory or (available_memory() if preset.target == "onnxruntime" else 0)
    built = _engine_of_ranks(made, preset, only)
    build_peak, gate_peak = _peaks(made, built, preset, memory_limit or available_memory())
    weights = sum(engine.weight_bytes for engine in made)
    return Plan(
        checkpoint=label,
        preset=preset.name,
        target=preset.target,
        steps=("assets", *(step for engine in (*made, *built) for step in _steps(engine))),
        engines=(*engines, *built),
        parameters=sum(engine.parameters for engine in made),
        source_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        weight_bytes=weights,
        kv_bytes=needs.kv_bytes,
        kv_bytes_per_token=needs.kv_bytes_per_token,
        kv_budget=preset.kv_budget,
        gpus=max(parallel),
        run_items=needs.items,
        run_bytes=needs.total,
        build_peak_bytes=build_peak,
        gate_peak_bytes=gate_peak,
        disk_bytes=weights + sum(engine.weight_bytes for engine in built),
        memory_limit=limit,
        seconds=_seconds(made, preset),
        problem=plan_serving.problem(needs, made, limit, preset, config, parallel, shapes),
        notes=(*_notes(preset, limit), *_gaps(checkpoint)),
    )


def _steps(engine: EnginePlan) -> tuple[str, ...]:
    before = (trtllm.CALIBRATION,) if engine.name == trtllm.NAME and engine.precision == "fp8" else ()
    return (*before, engine.name, f"gate:{engine.name}")


def _engine_of_ranks(engines: list[EnginePlan], preset: Preset, only: tuple[str, ...]) -> tuple[EnginePlan, ...]:
    """TensorRT-LLM's engine, which has the weights of the checkpoint; nothing if it is not built."""
    if preset.target != trtllm.TARGET or not trtllm.with_engine(only):
        return ()
    found = (engine for engine in engines if engine.name == trtllm.NAME)
    return tuple(replace(engine, name=trtllm.ENGINE, inputs={}, profiles=(), parameters=0) for engine in found)


def _peaks(engines: list[EnginePlan], built: tuple[EnginePlan, ...], preset: Preset, memory: int) -> tuple[int, int]:
    """Peak of host memory of the build's steps, and of its gates in `memory` bytes; `built` are the engines of
    TensorRT-LLM."""
    exported = [engine for engine in engines if engine.name != trtllm.NAME]
    base = _BUILD_BASE + _EXPORT_LEAVES * len(exported)
    peaks = [base + int(_COPIES * engine.largest_tensor_bytes) for engine in exported]
    if preset.target == trtllm.TARGET:
        peaks += [_RANKS_PEAK, *(_BUILDER_COPIES * engine.weight_bytes_per_gpu for engine in built)]
        return max(peaks), _RANKS_PEAK
    if preset.target != "onnxruntime":
        return max(peaks), base
    # The definition in float32 is there while the engine runs, on inputs that are small beside the weights. Only one
    # that does not fit is read layer by layer.
    wholes = ((engine, 4 * engine.parameters) for engine in engines)
    held = ((engine, whole if whole <= memory else engine.reference_bytes) for engine, whole in wholes)
    return max(peaks), base + max(size + engine.weight_bytes for engine, size in held)


def _seconds(engines: list[EnginePlan], preset: Preset) -> float:
    """Exports and compilations one after the other; weights are read, written and digested."""
    each = _EXPORT_SECONDS + (_COMPILE_SECONDS if preset.target != "onnxruntime" else 0)
    exported = sum(engine.name != trtllm.NAME for engine in engines)
    moved = sum(4 * engine.parameters + 2 * engine.weight_bytes for engine in engines)
    return round(each * exported + moved / _DISK_BYTES_PER_SECOND, 1)


def _gaps(checkpoint: HeaderCheckpoint) -> tuple[str, ...]:
    """What is not there, and what stands in for it."""
    if checkpoint.guessed:
        return ("there are no shards and no index: sizes follow from config.json, and nothing was compared with them",)
    if checkpoint.missing:
        return (f"{_some(checkpoint.missing)} missing: the sizes of its tensors follow from config.json",)
    return ()


def _notes(preset: Preset, limit: int) -> tuple[str, ...]:
    found = []
    if not limit:
        found.append(f"preset {preset.name} does not state device_memory: the sum was compared with nothing")
    if preset.target == trtllm.TARGET:
        found.append("time is without calibration and without the engine's build on the GPU machine: not measured")
    elif preset.target == "tensorrt":
        found.append("time to compile is what TensorRT-RTX took; TensorRT measures kernels on the GPU and takes longer")
    return tuple(found)
