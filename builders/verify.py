"""The numerics gate: each built engine against its torch definition, output by output.

Nothing compared, a missing output, another shape or a value that is not finite is a failure, never a pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from builders.component import Component, Feeds
from ming_trt.bundle import FAILED, NOT_RUN, PASSED
from ming_trt.errors import EngineError
from ming_trt.presets import Thresholds

if TYPE_CHECKING:
    import torch

    from ming_trt.checkpoint import Checkpoint
    from ming_trt.config import MingConfig

Array = npt.NDArray[Any]
# Inputs of the gate are drawn from this seed, so that its verdict can be repeated.
SEED = 20250715
# An exact result has no error power; beyond this the figure means nothing in float32.
_MAX_SQNR_DB = 300.0


@dataclass(frozen=True, slots=True)
class OutputReport:
    """One output of an engine against the reference. `relative` = max_abs over the reference's largest magnitude;
    `sqnr_db` = 10·log10(signal / error power), at most 300; `compared` counts elements; `note` says why it failed."""

    name: str
    compared: int
    max_abs: float
    relative: float
    cosine: float
    sqnr_db: float
    verdict: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class ComponentReport:
    """The gate's report of one engine; `reason` says why it was not run, or what failed besides single outputs."""

    verdict: str
    outputs: tuple[OutputReport, ...] = ()
    thresholds: Thresholds | None = None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def compare(name: str, got: Array, expected: Array, thresholds: Thresholds) -> OutputReport:
    """Compares two arrays in float64. Shapes must be equal and at least one element must be there."""

    def failed(note: str, compared: int = 0) -> OutputReport:
        # JSON has no infinity; the note carries the meaning
        return OutputReport(name, compared, 0.0, 0.0, 0.0, 0.0, FAILED, note)

    if got.shape != expected.shape:
        return failed(f"shape {list(got.shape)}, expected {list(expected.shape)}")
    if got.size == 0:
        return failed("nothing to compare")
    if not np.isfinite(expected).all():
        return failed("the reference is not finite", got.size)
    if not np.isfinite(got).all():
        return failed(f"{int((~np.isfinite(got)).sum())} of {got.size} values are not finite", got.size)
    a, b = got.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    error = a - b
    signal, noise = float(b @ b), float(error @ error)
    max_abs, peak = float(np.abs(error).max()), float(np.abs(b).max())
    relative = max_abs / peak if peak else max_abs
    norms = math.sqrt(float(a @ a)) * math.sqrt(signal)
    cosine = float(a @ b) / norms if norms else float(not noise)
    if noise and signal:
        sqnr = min(_MAX_SQNR_DB, 10 * math.log10(signal / noise))
    else:
        sqnr = 0.0 if noise else _MAX_SQNR_DB
    problems = []
    if relative > thresholds.max_relative:
        problems.append(f"relative error {relative:.3g} above {thresholds.max_relative:g}")
    if cosine < thresholds.min_cosine:
        problems.append(f"cosine {cosine:.7g} below {thresholds.min_cosine:g}")
    if sqnr < thresholds.min_sqnr_db:
        problems.append(f"SQNR {sqnr:.1f} dB below {thresholds.min_sqnr_db:g}")
    verdict = FAILED if problems else PASSED
    return OutputReport(name, a.size, max_abs, relative, min(1.0, cosine), sqnr, verdict, "; ".join(problems))


def compare_all(got: Mapping[str, Array], expected: Mapping[str, Array], thresholds: Thresholds) -> ComponentReport:
    """Compares every expected output; an output that the engine did not give is a failure."""
    reports = []
    for name, reference in expected.items():
        if name in got:
            reports.append(compare(name, got[name], reference, thresholds))
        else:
            reports.append(OutputReport(name, 0, 0.0, 0.0, 0.0, 0.0, FAILED, "the engine has no such output"))
    if not reports:
        return ComponentReport(FAILED, (), thresholds, "nothing was compared")
    verdict = PASSED if all(report.verdict == PASSED for report in reports) else FAILED
    return ComponentReport(verdict, tuple(reports), thresholds)


def sample(component: Component, config: MingConfig) -> Feeds:
    """The gate's inputs of an engine."""
    return component.sample_feeds(config, np.random.default_rng(SEED))


def reference_outputs(module: torch.nn.Module, feeds: Feeds, names: list[str]) -> dict[str, Array]:
    """What the torch definition gives for `feeds`, by output name, in float32."""
    from builders.reference import run_definition

    return dict(zip(names, flatten(run_definition(module, feeds)), strict=True))


def run_engine(model: Path, name: str, feeds: Feeds, threads: int = 0) -> dict[str, Array]:
    """All outputs of a built engine, through the runtime that serving uses. Raises `EngineError`."""
    from ming_trt.runtime.engine import open_engine

    engine = open_engine(model, name, threads=threads)
    try:
        return engine.run(feeds)
    finally:
        engine.close()


def verify_component(
    component: Component,
    config: MingConfig,
    checkpoint: Checkpoint,
    model: Path,
    outputs: list[str],
    thresholds: Thresholds,
    *,
    threads: int = 0,
    memory_limit: int = 0,
) -> ComponentReport:
    """Runs engine and definition on the same inputs and compares all outputs.

    `memory_limit` bytes (0 = what the machine has free): a definition that would not fit is not run, and the report
    says so with the verdict `NOT_RUN`.
    """
    from builders.reference import reference, reference_bytes

    limit = memory_limit or available_memory()
    module = reference(component, config, checkpoint, limit)
    if module is None:
        needed = reference_bytes(component, config)[1]
        reason = f"the torch definition needs {needed / 2**20:.0f} MiB and {limit / 2**20:.0f} MiB are allowed or free"
        return ComponentReport(NOT_RUN, (), thresholds, reason)
    feeds = sample(component, config)
    try:
        got = run_engine(model, component.name, feeds, threads)
    except EngineError as error:
        return ComponentReport(FAILED, (), thresholds, str(error))
    return compare_all(got, reference_outputs(module, feeds, outputs), thresholds)


def available_memory() -> int:
    """Bytes of memory that a new process may use, as the kernel estimates it."""
    for line in Path("/proc/meminfo").read_text("ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise EngineError("/proc/meminfo does not state MemAvailable: give --max-host-memory")


def flatten(result: Any) -> list[Array]:
    """The tensors of a definition's result, in order, as arrays; floats in float32."""
    if isinstance(result, list | tuple):
        return [array for item in result for array in flatten(item)]
    if isinstance(result, Mapping):
        return [array for item in result.values() for array in flatten(item)]
    array: Array = result.detach().float().numpy() if result.is_floating_point() else result.detach().numpy()
    return [array]
