"""Step `llm-engine`: the TensorRT-LLM engine of the exported checkpoint, a file a rank, on the machine that serves it.

Each rank is built by a child process (`ming_trt/trtllm/engine.py`), whose log stays beside the engines. A rank that is
done is kept in the bundle's cache, so that a build that was killed goes on with the next one. The manifest lists the
result as component `llm`, which is what `ming-trt repo` and `ming-trt serve` look for.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from builders.code import code_version
from builders.steps import Context, Step, digest
from builders.verify import ComponentReport
from ming_trt.bundle import NOT_RUN
from ming_trt.errors import BuildError, UnavailableError
from ming_trt.presets import Preset
from ming_trt.trtllm import signatures
from ming_trt.trtllm.engine import CONFIG, Job, Outcome, build_settings, engine_file, plugin_settings
from ming_trt.trtllm.stamp import EngineStamp, here

NAME, SERVED = "llm-engine", "llm"
GATE = f"gate:{NAME}"
_LOG, _CHECKPOINT = "build.log", "llm-checkpoint"
_POLL_SECONDS = 1.0


def check() -> None:
    """Raises `UnavailableError`, in one sentence, if no engine can be built on this machine."""
    try:
        here(1)
    except UnavailableError as error:
        raise UnavailableError(
            f"the language model's engine cannot be built here ({error}); --only {_CHECKPOINT} works on any machine"
        ) from None


def steps(preset: Preset, config: Mapping[str, Any], cache: Path) -> list[Step]:
    """The step and its gate. `config` is the checkpoint's config.json. The key holds everything that the engine depends
    on beside the checkpoint: the stamp, what the builder is told, and the code of the network."""
    stamp = _stamp(config["mapping"]["world_size"])
    settings, plugins = build_settings(config, preset.profile), plugin_settings(config)
    key = digest([stamp.as_dict() if stamp else None, settings, plugins, code_version("ming_trt.trtllm.engine")])

    def run(context: Context) -> Mapping[str, Any]:
        if stamp is None:
            check()
            raise AssertionError("without a stamp the check refuses")
        return _build(context, stamp, settings, plugins, cache / NAME, key)

    def gate(context: Context) -> Mapping[str, Any]:
        made = context.facts[NAME]["engine"]["stamp"]
        reason = (
            f"built by TensorRT-LLM {made['tensorrt_llm']} for {made['device']}, not run: compare answers as in "
            "docs/gpu-first-run.md"
        )
        return ComponentReport(NOT_RUN, (), preset.thresholds(_CHECKPOINT), reason).as_dict()

    gate_key = digest([preset.thresholds(_CHECKPOINT).min_cosine])
    # after the checkpoint's gate: an engine takes minutes of a GPU
    needs = (_CHECKPOINT, f"gate:{_CHECKPOINT}")
    return [Step(NAME, key, run, needs, output=NAME), Step(GATE, gate_key, gate, (NAME,))]


def _stamp(ranks: int) -> EngineStamp | None:
    """None where no engine can be built; then an engine that is there already counts as made elsewhere."""
    try:
        return here(ranks)
    except UnavailableError:
        return None


def _build(
    context: Context,
    stamp: EngineStamp,
    settings: Mapping[str, Any],
    plugins: Mapping[str, Any],
    folder: Path,
    key: str,
) -> Mapping[str, Any]:
    """Builds the ranks that the cache lacks, then moves all of them into the step's folder."""
    checkpoint = context.inputs[_CHECKPOINT]
    marker, whole = folder / "key", _whole_key(checkpoint, key)
    if not marker.is_file() or marker.read_text("utf-8") != whole:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        marker.write_text(whole, "utf-8")
    seconds: dict[str, Any] = {}
    for rank in range(stamp.ranks):
        done = folder / f"rank{rank}.done"
        if not done.is_file():
            outcome = _build_rank(checkpoint, folder, rank, settings, plugins, context.report)
            # the outcome's rename is what says that the engine is whole
            scratch = done.with_suffix(".new")
            scratch.write_text(json.dumps(asdict(outcome)), "utf-8")
            scratch.replace(done)
        seconds[f"rank{rank}"] = json.loads(done.read_text("utf-8"))
    for name in (CONFIG, _LOG, *(engine_file(rank) for rank in range(stamp.ranks))):
        if not (folder / name).is_file():
            raise BuildError(f"the builder gave no '{name}': see '{folder / _LOG}'")
        (folder / name).replace(context.work / name)
    shutil.rmtree(folder)
    made = context.facts[_CHECKPOINT]
    sizes = {engine_file(r): (context.work / engine_file(r)).stat().st_size for r in range(stamp.ranks)}
    return {
        "precision": made["precision"],
        "weights": made["weights"],
        "inputs": {},
        "outputs": {},
        "model": NAME,
        "engine": {"stamp": stamp.as_dict(), "settings": dict(settings), "sizes": sizes, "ranks": seconds},
    }


def _whole_key(checkpoint: Path, key: str) -> str:
    """Ranks in the cache belong to one checkpoint, told by the sizes and times of its files."""
    files = sorted(checkpoint.glob("*.safetensors"))
    return digest([key, [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]])


def _build_rank(
    checkpoint: Path,
    folder: Path,
    rank: int,
    settings: Mapping[str, Any],
    plugins: Mapping[str, Any],
    report: Callable[[str], None],
) -> Outcome:
    """One child process. Raises `BuildError` in one sentence; the log has the rest."""
    result, job_file, log = folder / ".result.json", folder / ".job.json", folder / _LOG
    result.unlink(missing_ok=True)
    job = Job(
        str(checkpoint.resolve()),
        str(folder.resolve()),
        rank,
        settings,
        plugins,
        str((folder / "timing.cache").resolve()),
        str(result.resolve()),
    )
    job_file.write_text(json.dumps(asdict(job)), "utf-8")
    started = time.monotonic()
    with open(log, "a", encoding="utf-8") as stream:
        child = subprocess.Popen(
            [sys.executable, "-m", "ming_trt.trtllm.engine", str(job_file.resolve())],
            stdout=stream,
            stderr=stream,
            stdin=subprocess.DEVNULL,
            cwd=folder,
        )
        try:
            while True:
                try:
                    code = child.wait(_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    report(f"rank {rank}, {time.monotonic() - started:.0f} s; log: {log}")
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    outcome = _outcome(result, code, log)
    if outcome.error:
        raise BuildError(f"{outcome.error} (rank {rank}; see '{log}')")
    return outcome


def _outcome(result: Path, code: int, log: Path) -> Outcome:
    try:
        return Outcome(**json.loads(result.read_text("utf-8")))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        why = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        words = [line.strip() for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
        raise BuildError(
            f"TensorRT-LLM {signatures.VERSION}'s builder died with {why} ({words[-1][:200] if words else 'silent'}): "
            f"see '{log}'"
        ) from None
