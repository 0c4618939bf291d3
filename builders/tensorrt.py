"""TensorRT plans: profiles, a child process for each build, its errors as sentences, and the stamp of a plan.

What may crash runs in `builders/tensorrt_child.py`; TensorRT itself is imported by `builders/tensorrt_api.py` only.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from builders import tensorrt_api as api
from builders.tensorrt_child import Job, Outcome, fatal
from builders.tensorrt_profiles import Phase
from ming_trt.bundle import sha256
from ming_trt.errors import BuildError
from ming_trt.runtime.plan import PLUGIN_ABI, Stamp, gpu_capability

PLAN_FILE, LOG_FILE = "model.plan", "build.log"
# The launches of a plan, in the text that it holds; its format is private: a diagnosis, not a contract.
_ATTENTION_KERNEL = re.compile(rb"name=(\w*mha\w*)")
_ACCELERATORS = re.compile(rb"accelerators=\{([^}]*)\}")
_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Settings:
    """How plans are built. `plugins` are shared libraries, `devices` capabilities of RTX ("sm89"), `cache` the folder
    of timing caches (None = none is kept), `workspace` bytes (0 = TensorRT's choice), `memory` bytes that the child may
    allocate (0 = no limit), `timeout` seconds (0 = none)."""

    edition: str
    plugins: tuple[Path, ...] = ()
    devices: tuple[str, ...] = ()
    cache: Path | None = None
    workspace: int = 0
    memory: int = 0
    timeout: float = 0.0


@dataclass(frozen=True, slots=True)
class Built:
    """A plan: its stamp, the layers that the parser made, fused attention kernels by name, seconds of each part, and
    the peak of the child's memory in bytes."""

    stamp: Stamp
    layers: Mapping[str, int]
    attention_kernels: Mapping[str, int]
    seconds: Mapping[str, float]
    peak_bytes: int
    plan_bytes: int
    profiles: Sequence[Mapping[str, Any]] = field(default_factory=tuple)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, for the manifest."""
        return asdict(self)


def compile_plan(
    model: Path,
    inputs: Mapping[str, Mapping[str, Any]],
    phases: Sequence[Phase],
    folder: Path,
    settings: Settings,
    report: Callable[[str], None] = lambda _: None,
) -> Built:
    """Builds `folder/model.plan` from an ONNX file in a child process; `folder/build.log` keeps what it said.

    `inputs` describe the graph's inputs as in the manifest. Raises `BuildError` in one sentence: what failed, at which
    node, and where the log is; also for a warning that means another computation than the graph's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # the child has another working directory
    model, folder = model.resolve(), folder.resolve()
    shapes = [phase.shapes(inputs) for phase in phases]
    plan, log, result, progress = (folder / name for name in (PLAN_FILE, LOG_FILE, ".result.json", ".progress"))
    for stale in (plan, log, result, progress):
        stale.unlink(missing_ok=True)
    job = Job(
        settings.edition,
        str(model),
        str(plan),
        str(log),
        str(result),
        str(progress),
        tuple(s for s in shapes if s),
        tuple(str(path) for path in settings.plugins),
        settings.devices,
        _timing_cache(settings),
        settings.workspace,
        settings.memory,
    )
    file = folder / ".job.json"
    file.write_text(json.dumps(asdict(job)), "utf-8")
    try:
        code = _run(file, log, progress, settings.timeout, report)
        outcome = _outcome(result, code, model, log)
        _refuse(outcome, model, log)
    except BaseException:
        plan.unlink(missing_ok=True)
        raise
    finally:
        for scratch in (file, result, progress):
            scratch.unlink(missing_ok=True)
    kernels, devices = _look_into(plan)
    if settings.edition == api.FULL:
        devices = (gpu_capability(),)
    abi = PLUGIN_ABI if outcome.layers.get("PLUGIN_V3") else 0
    stamp = Stamp(settings.edition, outcome.version, devices, abi, sha256(plan), outcome.plan_bytes)
    described = tuple({"name": phase.name, "shapes": shape} for phase, shape in zip(phases, shapes, strict=True))
    return Built(stamp, outcome.layers, kernels, outcome.seconds, outcome.peak_bytes, outcome.plan_bytes, described)


def expect_layers(built: Built, operators: Mapping[str, int], component: str) -> None:
    """Holds the parsed network to the graph: attention native and fused, caches in place, rope native or a plugin.

    `operators` are those of the export's facts. Raises `BuildError` naming what is missing.
    """
    wanted = {
        "ATTENTION_INPUT": operators.get("ai.onnx:Attention", 0),
        "KV_CACHE_UPDATE": operators.get("ai.onnx:TensorScatter", 0),
    }
    for name, count in wanted.items():
        if (got := built.layers.get(name, 0)) < count:
            raise BuildError(
                f"the plan of {component} has {got} layers {name} where the graph has {count} such nodes: its parser "
                "took them apart; see the log"
            )
    ours = sum(count for name, count in operators.items() if name.startswith("ming:"))
    if 0 < (got := built.layers.get("PLUGIN_V3", 0)) < ours:
        raise BuildError(
            f"the plan of {component} has {got} plugin layers where the graph has {ours} nodes that plugins serve: the "
            "library lacks one; build plugins/ of this version"
        )
    ropes = 2 * operators.get("ming:MRope", 0) + operators.get("ai.onnx:RotaryEmbedding", 0)
    rotary = built.layers.get("ROTARY_EMBEDDING", 0)
    if not built.layers.get("PLUGIN_V3", 0) and rotary < ropes:
        raise BuildError(
            f"the plan of {component} has {rotary} rotary layers where the graph rotates {ropes} tensors: its parser "
            "took them apart; see the log"
        )
    fused = sum(built.attention_kernels.values())
    if built.stamp.edition == api.RTX and fused < wanted["ATTENTION_INPUT"]:
        raise BuildError(
            f"the plan of {component} launches {fused} fused attention kernels for {wanted['ATTENTION_INPUT']} "
            "attentions: the head size or a mask keeps the others from being fused"
        )


def _timing_cache(settings: Settings) -> str:
    """One file per edition, version and GPU: timings of one say nothing about another. RTX times nothing."""
    if settings.cache is None or settings.edition != api.FULL:
        return ""
    version = api.load(settings.edition).version
    settings.cache.mkdir(parents=True, exist_ok=True)
    return str(settings.cache / f"timing-{settings.edition}-{version}-{gpu_capability()}.cache")


def _run(job: Path, log: Path, progress: Path, timeout: float, report: Callable[[str], None]) -> int:
    """The child's exit code; told how far it is on the way. Raises `BuildError` when the time is up."""
    with open(log, "w", encoding="utf-8") as stream:
        child = subprocess.Popen(
            [sys.executable, "-m", "builders.tensorrt_child", str(job)],
            stdout=stream,
            stderr=stream,
            stdin=subprocess.DEVNULL,
            cwd=Path(__file__).resolve().parents[1],
        )
        started, last = time.monotonic(), ""
        try:
            while True:
                try:
                    return child.wait(min(_POLL_SECONDS, timeout or _POLL_SECONDS))
                except subprocess.TimeoutExpired:
                    if timeout and time.monotonic() - started > timeout:
                        raise BuildError(
                            f"the builder did not end within {timeout:.0f} s: give it more, or see '{log}'"
                        ) from None
                text = progress.read_text("utf-8") if progress.is_file() else ""
                if text and text != last:
                    last = text
                    report(text)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()


def _outcome(result: Path, code: int, model: Path, log: Path) -> Outcome:
    try:
        return Outcome(**json.loads(result.read_text("utf-8")))
    except (FileNotFoundError, json.JSONDecodeError):
        why = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        raise BuildError(
            f"the builder of '{model}' died with {why} ({_last_words(log)}): a node that it takes wrongly, or memory; "
            f"see '{log}'"
        ) from None


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"


def _refuse(outcome: Outcome, model: Path, log: Path) -> None:
    if outcome.errors:
        error = outcome.errors[0]
        if error.get("whole"):
            raise BuildError(error["text"])
        node = f" at node '{error['node']}'" if error["node"] else ""
        operator = f" ({error['operator']})" if error["operator"] else ""
        raise BuildError(
            f"{outcome.phase} failed{node}{operator}: {_plain(error['text'])}; graph '{model}', log '{log}'"
        )
    for text in fatal(outcome.warnings):
        raise BuildError(
            f"TensorRT would not compute what the graph says: {_plain(text)}; graph '{model}', log '{log}'"
        )


def _plain(text: str) -> str:
    """A message without source places and without the noise of a missing GPU, on one line."""
    kept = [line for line in text.splitlines() if "catchCudaError" not in line]
    line = " ".join(" ".join(kept).split())
    line = re.sub(r"\s*In \w+ at /\S+:\d+", "", line)
    return line[:400].rstrip(" .")


def _look_into(plan: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """Attention kernels that the plan launches, and the targets that it names."""
    data = plan.read_bytes()
    kernels = Counter(match.decode() for match in _ATTENTION_KERNEL.findall(data))
    named = {target for match in _ACCELERATORS.findall(data) for target in match.decode().split()}
    return dict(sorted(kernels.items())), tuple(sorted(named - {"*"}))
