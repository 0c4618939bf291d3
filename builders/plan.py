"""What a build will make and need, from configuration and headers alone: no weights are read, nothing is exported.

Sizes of weights and of the KV cache are exact. Working memory is an estimate: a base for the libraries, and a few
times the largest tensor while exporting.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from builders import registry
from builders.component import Component
from builders.headers import HeaderCheckpoint
from builders.reference import reference_bytes
from builders.sizes import weight_bytes
from builders.verify import available_memory
from ming_trt import presets
from ming_trt.config import MingConfig, load_config
from ming_trt.errors import BuildError
from ming_trt.presets import Preset

_CACHE_BYTES = {"fp16": 2, "bf16": 2, "fp8": 1}
# Resident memory of torch, onnx and ONNX Runtime before they hold a weight, measured.
_BUILD_BASE = 480 * 2**20
# Resident memory of one serving process (Python, numpy, ONNX Runtime), measured.
_SERVE_BASE = 130 * 2**20
# The exporter holds a tensor as read, as converted, and as written.
_COPIES = 3
_DISK_BYTES_PER_SECOND = 200e6


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """One engine, or the `reason` why there is none. Sizes in bytes; `reference_bytes` is what its torch definition
    holds at least while the gate compares with it."""

    name: str
    precision: str = ""
    parameters: int = 0
    weight_bytes: int = 0
    largest_tensor: int = 0
    largest_tensor_bytes: int = 0
    reference_bytes: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """A build before it is made. All sizes in bytes, `seconds` an estimate for a disk of 200 MB/s."""

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
    run_bytes: int
    build_peak_bytes: int
    gate_peak_bytes: int
    disk_bytes: int
    memory_limit: int
    seconds: float
    problem: str = ""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def plan(folder: Path, preset: Preset, only: tuple[str, ...] = (), memory_limit: int = 0) -> Plan:
    """Plans the build of the checkpoint in `folder`, which may consist of config.json and headers (or an index) alone.

    `memory_limit` bytes of memory to fit into: 0 takes the preset's device memory or, on a CPU target, what this
    machine has free. `Plan.problem` says what does not fit; nothing is raised for that.
    """
    registry.check_names(only)
    config, checkpoint = load_config(folder), HeaderCheckpoint(folder)
    engines = [_engine(name, config, checkpoint, preset, only) for name in registry.COMPONENTS]
    made = [engine for engine in engines if not engine.reason]
    if not made:
        raise BuildError(
            f"'{folder}' holds no component that can be built ({engines[0].reason}): give a whole checkpoint"
        )
    per_token = _kv_bytes_per_token(config, preset) if any(engine.name == "llm" for engine in made) else 0
    kv = per_token * preset.profile.slots * min(preset.profile.max_seq_len, config.llm.max_positions)
    weights = sum(engine.weight_bytes for engine in made)
    largest = max(engine.largest_tensor_bytes for engine in made)
    reference = max(engine.reference_bytes + engine.weight_bytes for engine in made)
    limit = memory_limit or preset.device_memory or available_memory()
    run = weights + kv + _SERVE_BASE * len(made)
    return Plan(
        checkpoint=str(folder),
        preset=preset.name,
        target=preset.target,
        steps=("assets", *(step for engine in made for step in (engine.name, f"gate:{engine.name}"))),
        engines=tuple(engines),
        parameters=sum(engine.parameters for engine in made),
        source_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        weight_bytes=weights,
        kv_bytes=kv,
        kv_bytes_per_token=per_token,
        kv_budget=preset.kv_budget,
        run_bytes=run,
        build_peak_bytes=_BUILD_BASE + _COPIES * largest,
        gate_peak_bytes=_BUILD_BASE + reference,
        disk_bytes=weights,
        memory_limit=limit,
        seconds=round(15 * len(made) + 2 * weights / _DISK_BYTES_PER_SECOND, 1),
        problem=_problem(made, kv, run, limit, preset, config),
    )


def _engine(
    name: str, config: MingConfig, checkpoint: HeaderCheckpoint, preset: Preset, only: tuple[str, ...]
) -> EnginePlan:
    from ming_trt.models.weights import check_sources

    component = registry.component(name)
    reason = "not selected" if only and name not in only else component.needs(config, checkpoint)
    if reason:
        return EnginePlan(name, reason=reason)
    sources = component.sources(config)
    check_sources(sources, checkpoint)
    precision = preset.precision_of(name)
    sizes = [math.prod(source.shape) for source in sources.values()]
    # what is read at once is one tensor of the checkpoint, not the stack that it becomes part of
    read = {n: info for source in sources.values() for n in source.names for info in (checkpoint.info(n),)}
    largest = max((math.prod(info.shape) for info in read.values() if min(info.shape, default=0) >= 0), default=0)
    largest = largest or max(sizes)
    total = sum(sizes)
    weights, held = _weights(component, config, preset), reference_bytes(component, config)[1]
    return EnginePlan(name, precision, total, weights, largest, 4 * largest, held)


def _weights(component: Component, config: MingConfig, preset: Preset) -> int:
    """Bytes of the engine's weights as the preset stores them."""
    precision = preset.precision_of(component.name)
    keep, by_column = getattr(component, "keep_float", ()), getattr(component, "many_rows", False)
    return sum(
        weight_bytes(name, source.shape, preset.target, precision, keep, by_column)
        for name, source in component.sources(config).items()
    )


def _kv_bytes_per_token(config: MingConfig, preset: Preset) -> int:
    llm = config.llm
    if preset.target == "onnxruntime":
        number = 4
    else:
        number = _CACHE_BYTES.get(preset.precision.get("kv_cache", preset.precision_of("llm")), 4)
    return 2 * llm.num_layers * llm.num_kv_heads * llm.head_dim * number


def _problem(engines: list[EnginePlan], kv: int, run: int, limit: int, preset: Preset, config: MingConfig) -> str:
    """Why the plan cannot be built or served, in one sentence, or ""."""
    if kv > preset.kv_budget:
        return (
            f"the KV cache of {preset.profile.slots} slots of {preset.profile.max_seq_len} tokens needs {gib(kv)}, "
            f"above the preset's kv_budget of {gib(preset.kv_budget)}: lower max_seq_len or slots, or raise kv_budget"
        )
    if run <= limit:
        return ""
    items = {f"the weights of {engine.name}": engine.weight_bytes for engine in engines} | {"the KV cache": kv}
    largest = max(items, key=lambda item: items[item])
    fitting = _nearest_fitting(engines, limit, preset, config)
    remedy = f"take preset {fitting}" if fitting else "no shipped preset fits; take a larger machine"
    return (
        f"serving needs {gib(run)} and {gib(limit)} are there; the largest item is {largest} with "
        f"{gib(items[largest])}: {remedy}"
    )


def _nearest_fitting(engines: list[EnginePlan], limit: int, preset: Preset, config: MingConfig) -> str:
    """The shipped preset with the same target that uses most of `limit` and fits, or ""."""
    best, best_bytes = "", 0
    for name in presets.names():
        other = presets.load(name)
        if other.target != preset.target or other.name == preset.name:
            continue
        weights = sum(_weights(registry.component(engine.name), config, other) for engine in engines)
        length = min(other.profile.max_seq_len, config.llm.max_positions)
        needed = weights + _kv_bytes_per_token(config, other) * other.profile.slots * length
        needed += _SERVE_BASE * len(engines)
        if best_bytes < needed <= limit:
            best, best_bytes = name, needed
    return best


def gib(size: float) -> str:
    """A size for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
