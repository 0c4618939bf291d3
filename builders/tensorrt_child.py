"""The process that a plan is built in: TensorRT may crash, and some of its errors end the process.

`python -m builders.tensorrt_child JOB.json` reads a `Job`, writes the plan and, whatever happens short of a crash, the
result file. The log file gets every message of the builder as it comes, so that a crash leaves its last words.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from builders import tensorrt_api as api
from ming_trt.errors import MingError

# An error on a machine without a GPU is often followed by this one, which says nothing about it.
_NOISE = ("catchCudaError", "cudaError 35")
# Warnings that mean another computation than the graph's: they fail the build.
FATAL_WARNINGS = (
    "Unused Input",
    "not self-consistent",
    "mask will be ignored",
    "setMask",
    "precision-lose",
    "out of range",
)
PARSING, BUILDING, WRITING = "parsing the graph", "building the plan", "writing the plan"


@dataclass(frozen=True, slots=True)
class Job:
    """What to build. `profiles` hold name -> (min, opt, max) shapes; paths are strings; `plugins` are shared libraries;
    `devices` compute capabilities of RTX; `workspace` bytes, 0 = TensorRT's choice; `memory` bytes that the process
    may allocate, 0 = no limit."""

    edition: str
    model: str
    plan: str
    log: str
    result: str
    progress: str = ""
    profiles: tuple[Mapping[str, Any], ...] = ()
    plugins: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    timing_cache: str = ""
    workspace: int = 0
    memory: int = 0
    detailed: bool = True


@dataclass
class Outcome:
    """What came of it. `errors` are {"text", "node", "operator"}; `layers` counts types before fusion; `phase` is where
    it stands; `devices` are the targets that the plan names."""

    phase: str = PARSING
    version: str = ""
    errors: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    layers: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    plan_bytes: int = 0
    peak_bytes: int = 0


class Messages:
    """Collects what the builder says, by severity, and writes it all to the log file."""

    def __init__(self, trt: Any, log: TextIO) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []
        outer = self

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, text: str) -> None:
                log.write(f"[{severity.name}] {text}\n")
                log.flush()
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    outer.errors.append(text)
                elif severity == trt.ILogger.WARNING:
                    outer.warnings.append(text)

        self.logger = Logger()

    def told(self) -> list[str]:
        """The errors without the noise of a missing GPU."""
        return [text for text in self.errors if not all(mark in text for mark in _NOISE)]


def fatal(warnings: list[str]) -> list[str]:
    """Those warnings that mean another computation than the graph's."""
    return [text for text in warnings if any(mark in text for mark in FATAL_WARNINGS)]


def build(job: Job, outcome: Outcome, log: TextIO) -> None:
    """Builds the plan; what goes wrong is in `outcome.errors`."""
    loaded = api.load(job.edition)
    trt, outcome.version = loaded.trt, loaded.version
    messages = Messages(trt, log)
    loaded.load_plugins(messages.logger, tuple(Path(path) for path in job.plugins))
    builder = trt.Builder(messages.logger)
    # Threads of the builder contend for the memory that a large graph needs once per thread.
    builder.max_threads = 1
    network = loaded.create_network(builder)
    parser = trt.OnnxParser(network, messages.logger)
    started = time.monotonic()
    parsed = parser.parse_from_file(job.model)
    outcome.seconds["parse"] = round(time.monotonic() - started, 3)
    outcome.warnings = messages.warnings
    if not parsed:
        for index in range(parser.num_errors):
            error = parser.get_error(index)
            outcome.errors.append({"text": error.desc(), "node": error.node_name(), "operator": error.node_operator()})
        return
    names = [network.get_layer(index).name for index in range(network.num_layers)]
    outcome.layers = dict(
        sorted(Counter(network.get_layer(index).type.name for index in range(network.num_layers)).items())
    )
    outcome.phase = BUILDING
    config = _config(job, loaded, builder, messages)
    started = time.monotonic()
    plan = builder.build_serialized_network(network, config)
    outcome.seconds["build"] = round(time.monotonic() - started, 3)
    if plan is None:
        texts = messages.told() or ["the builder gave no reason"]
        outcome.errors += [{"text": text, "node": node_in(text, names), "operator": ""} for text in texts]
        return
    outcome.phase = WRITING
    view = memoryview(plan)
    outcome.plan_bytes = view.nbytes
    with open(job.plan, "wb") as file:
        file.write(view)
    if job.timing_cache and not config.get_flag(trt.BuilderFlag.DISABLE_TIMING_CACHE):
        cache = config.get_timing_cache()
        if cache is not None:
            Path(job.timing_cache).write_bytes(bytes(cache.serialize()))


def _config(job: Job, loaded: api.Api, builder: Any, messages: Messages) -> Any:
    trt = loaded.trt
    config = builder.create_builder_config()
    if job.detailed:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if job.workspace:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace)
    loaded.choose_devices(config, job.devices)
    for shapes in job.profiles:
        profile = builder.create_optimization_profile()
        for name, (low, typical, high) in shapes.items():
            profile.set_shape(name, low, typical, high)
        config.add_optimization_profile(profile)
    if job.timing_cache:
        path = Path(job.timing_cache)
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    if job.progress:
        config.progress_monitor = _monitor(trt, job.progress)
    return config


def _monitor(trt: Any, path: str) -> Any:
    """A progress monitor that keeps the latest step in a file of one line."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}
            self.last = 0.0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.totals[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            now = time.monotonic()
            if now - self.last > 0.5:
                self.last = now
                Path(path).write_text(f"{phase} {step + 1}/{self.totals.get(phase, 0)}", "utf-8")
            return True

        def phase_finish(self, phase: str) -> None:
            self.totals.pop(phase, None)

    return Monitor()


def node_in(text: str, names: list[str]) -> str:
    """The longest of the layers' names (the parser calls layers after their ONNX nodes) that a message mentions."""
    return max((name for name in names if len(name) > 3 and name in text), key=len, default="")


def main(path: str) -> int:
    job = Job(**json.loads(Path(path).read_text("utf-8")))
    if job.memory:
        resource.setrlimit(resource.RLIMIT_DATA, (job.memory, job.memory))
    outcome = Outcome()
    with open(job.log, "a", encoding="utf-8") as log:
        try:
            build(job, outcome, log)
        except MingError as error:
            outcome.errors.append({"text": str(error), "node": "", "operator": "", "whole": "yes"})
        except MemoryError:
            outcome.errors.append({"text": "memory ran out", "node": "", "operator": ""})
        outcome.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        Path(job.result).write_text(json.dumps(asdict(outcome)), "utf-8")
    return 1 if outcome.errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
