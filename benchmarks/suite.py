"""Runs all benchmarks one after the other, each in a process of its own, and puts their results together.

    python benchmarks/suite.py [--minutes M] [--only NAME ...] [--fresh] [--collect] [--tiny] [--out DIR]

Writes `<out>/<host>.json` and `<out>/<host>.html`; what each script wrote lies in `<out>/<host>/`. A benchmark that
fails or takes longer than it may is named with its last line and makes the exit code 1; the others still run. If no
time is left for one, its figures of an earlier run are taken and named so. A suite that was killed goes on where it
was, with the time that was left (`--fresh`: from the beginning). `--collect` measures nothing and puts together what
the scripts wrote when they ran alone.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import CACHE, HERE, RESULTS, host_id, show
from suite_page import page

from ming_trt.bench.machine import environment


@dataclass(frozen=True)
class Share:
    """`seconds` for measuring, of a suite of fifteen minutes; the rest of `limit` is for loading, for compiling the
    peers and, the first time, for making engines. `options`: of the script, where its own take too long for a suite."""

    seconds: float
    limit: float
    options: tuple[str, ...] = ()


# Cheap ones first: whatever goes wrong later, they are there.
BENCHMARKS = {
    "load_time": Share(0, 90),
    "serving_overhead": Share(14, 150),
    "growth": Share(14, 150),
    "llm_decode": Share(18, 300),
    "llm_prefill": Share(24, 300),
    "batch_scaling": Share(14, 120),
    "vision": Share(12, 180),
    "audio": Share(12, 240),
    "speech": Share(6, 240, ("--steps", "30", "--requests", "2")),
    "image": Share(10, 300, ("--no-compile", "--steps", "1")),
    "llama_peer": Share(30, 180),
}
# Runs only if it can: an interpreter is named, or figures of an earlier run are kept (docs/bench.md).
_OPTIONAL = "llama_peer"
_MINUTES = 15.0
# What the engines take that are made once (`CACHE`), with room for one that is being written.
_DISK_BYTES = 17 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=_MINUTES, help="time for all; a benchmark over it is stopped")
    parser.add_argument(
        "--only", action="append", default=[], choices=list(BENCHMARKS), help="may be given several times"
    )
    parser.add_argument("--threads", type=int, default=0, help="threads of every candidate; 0 = one per core")
    parser.add_argument("--fresh", action="store_true", help="do not go on with a suite that was killed")
    parser.add_argument("--collect", action="store_true", help="measure nothing: take the results that are there")
    parser.add_argument("--tiny", action="store_true", help="small widths: a check that the scripts run, no figures")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    if not (options.tiny or options.collect or options.only):
        _check_disk()
    names = [name for name in BENCHMARKS if name in options.only or (not options.only and _can(name, options.out))]
    merged = run_all(names, options)
    stem = options.out / (host_id() + ("-tiny" if options.tiny else ""))
    stem.with_suffix(".json").write_text(json.dumps(merged, indent=1) + "\n", "utf-8")
    stem.with_suffix(".html").write_text(page(merged), "utf-8")
    said = {key: merged[key] for key in ("host", "minutes", "failures")}
    print(json.dumps({"report": str(stem.with_suffix(".html")), **said}))
    sys.exit(1 if merged["failures"] else 0)


def _can(name: str, out: Path) -> bool:
    """Whether a benchmark that nobody named is to run."""
    kept = (out / host_id() / f"{_OPTIONAL}.json").is_file()
    return name != _OPTIONAL or bool(os.environ.get("MING_TRT_LLAMA_PYTHON")) or kept


def _check_disk() -> None:
    """Ends the program if the engines will not fit on the disk: said before a quarter of an hour is spent."""
    CACHE.mkdir(parents=True, exist_ok=True)
    made = sum(file.stat().st_size for file in CACHE.rglob("*") if file.is_file())
    free = shutil.disk_usage(CACHE).free
    if made + free < _DISK_BYTES:
        sys.exit(
            f"the disk of '{CACHE}' has {free / 1e9:.1f} GB left and the engines that are not made yet need "
            f"{(_DISK_BYTES - made) / 1e9:.1f} GB: free some, or choose benchmarks with --only"
        )


def run_all(names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Runs what the journal does not hold yet; everything together."""
    journal = Journal(options.out / f".{host_id()}.suite.json", [names, options.minutes, options.threads, options.tiny])
    if options.fresh:
        journal.forget()
    scale = min(1.0, options.minutes / _MINUTES)
    for name in names:
        if name in journal.done:
            print(f"{name}: done before the suite was killed", file=sys.stderr)
            continue
        left = 60 * options.minutes - journal.spent
        share = BENCHMARKS[name]
        made = _engines()
        started = time.monotonic()
        seconds = 1.0 if options.tiny else share.seconds * scale
        outcome = run(name, seconds, min(left, share.limit * scale), options)
        entry = {"seconds": time.monotonic() - started, "made": sorted(_engines() - made)}
        if isinstance(outcome, str):
            print(f"{name}: {outcome}", file=sys.stderr)
            journal.note(name, {**entry, "failure": outcome})
        else:
            show(outcome)
            print()
            journal.note(name, {**entry, "result": outcome})
    done = {name: journal.done[name] for name in names}
    journal.forget()
    return {
        "host": host_id(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "minutes": round(sum(entry["seconds"] for entry in done.values()) / 60, 2),
        "environment": {key: value for key, value in environment().items() if key != "host"},
        "seconds": {name: round(entry["seconds"], 1) for name, entry in done.items()},
        "made_engines": {name: entry["made"] for name, entry in done.items() if entry["made"]},
        "results": [entry["result"] for entry in done.values() if "result" in entry],
        "failures": {name: entry["failure"] for name, entry in done.items() if "failure" in entry},
    }


class Journal:
    """What a suite has done, on disk after each benchmark. That of other options (`of`) is not taken up."""

    def __init__(self, file: Path, of: Any) -> None:
        self._file, self._of = file, json.loads(json.dumps(of))
        self.done: dict[str, dict[str, Any]] = {}
        if file.is_file():
            kept = json.loads(file.read_text("utf-8"))
            self.done = kept["done"] if kept["of"] == self._of else {}

    @property
    def spent(self) -> float:
        """Seconds of all that is done."""
        return sum(float(entry["seconds"]) for entry in self.done.values())

    def note(self, name: str, entry: dict[str, Any]) -> None:
        """Keeps it, whole or not at all."""
        self.done[name] = entry
        self._file.parent.mkdir(parents=True, exist_ok=True)
        draft = self._file.with_suffix(".draft")
        draft.write_text(json.dumps({"of": self._of, "done": self.done}), "utf-8")
        draft.replace(self._file)

    def forget(self) -> None:
        """Nothing is done, here and on disk."""
        self.done = {}
        self._file.unlink(missing_ok=True)


def run(name: str, seconds: float, limit: float, options: argparse.Namespace) -> dict[str, Any] | str:
    """The result of one benchmark, or why there is none. Whatever it started ends with it."""
    share = BENCHMARKS[name]
    command = [sys.executable, str(HERE / f"{name}.py"), "--seconds", f"{seconds:g}", "--out", str(options.out)]
    command += ["--threads", str(options.threads), *share.options, *(["--tiny"] if options.tiny else [])]
    if limit <= 0:
        return earlier(name, options, "since no time was left") or "no time was left for it"
    if options.collect:
        return earlier(name, options, "measured alone") or "it has not been measured"
    # torch counts threads when it starts; the scripts set their own number afterwards
    hidden = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )
    try:
        out, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"it was stopped after {limit:.0f} s"
    lines = out.strip().splitlines()
    if process.returncode or not lines:
        said = (errors.strip() or out.strip()).splitlines()
        return f"exit code {process.returncode}: {said[-1] if said else 'it said nothing'}"
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def earlier(name: str, options: argparse.Namespace, why: str) -> dict[str, Any] | None:
    """The result of an earlier run, which says in its note that it is one; None if there is none."""
    file = options.out / host_id() / f"{name}.json"
    if options.tiny or not file.is_file():
        return None
    result: dict[str, Any] = json.loads(file.read_text("utf-8"))
    if not all("target" in row for row in result["rows"]):
        return None  # of an older form
    result["note"] = f"figures of {result['created'][:16]}, {why}; {result['note']}"
    return result


def _die_with_parent() -> None:
    """A suite that is killed leaves nothing that would disturb the next one."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _engines() -> set[str]:
    return {path.name for path in CACHE.iterdir()} if CACHE.is_dir() else set()


if __name__ == "__main__":
    main()
