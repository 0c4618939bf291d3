"""How long a build takes that has nothing to do, and how long the headers of a checkpoint of published size.

    python benchmarks/build_times.py [--rounds N]

The first is the command as a user calls it, on the whole mini bundle; the second opens every shard of a checkpoint
with the published headers (36 GB in the main shards; the files are sparse) and looks every tensor up.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from harness import CACHE, Row, arguments, finish

from builders.skeleton import OFFICIAL, write_skeleton
from ming_trt.checkpoint import Checkpoint
from ming_trt.resources import shipped

NO_CHANGE_S, HEADERS_S = 2.0, 10.0


def main() -> None:
    options = arguments(str(__doc__), rounds={"type": int, "default": 5, "help": "how often each is done"})
    rounds = 1 if options.tiny else options.rounds
    rows = [
        _row("build without changes, mini bundle, 13 engines", no_change(rounds), NO_CHANGE_S),
        _row("headers of the published checkpoint", headers(rounds), HEADERS_S),
    ]
    finish("build_times", rows, options, None, "medians; start of the interpreter included")


def no_change(rounds: int) -> list[float]:
    """Seconds of `ming-trt build` on a bundle that is up to date."""
    folder = CACHE / "build-times"
    command = [sys.executable, "-m", "ming_trt"]
    if not (folder / "checkpoint").is_dir():
        subprocess.run([*command, "mini", str(folder / "checkpoint")], check=True)
    build = [*command, "build", str(folder / "checkpoint"), "-o", str(folder / "bundle"), "--preset", "mini-cpu"]
    seconds = []
    for number in range(rounds + 1):
        started = time.perf_counter()
        done = subprocess.run([*build, "--json"], check=True, capture_output=True, text=True)
        if number:
            if '"outcome": "OK"' in done.stdout:
                raise SystemExit("a step was made again, though nothing had changed")
            seconds.append(time.perf_counter() - started)
    return seconds


def headers(rounds: int) -> list[float]:
    """Seconds to open the skeleton of the published checkpoint and to look at all of its tensors."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        write_skeleton(shipped("engines") / OFFICIAL, Path(folder))
        for _ in range(rounds):
            started = time.perf_counter()
            checkpoint = Checkpoint(Path(folder))
            total = sum(checkpoint.info(name).nbytes for name in checkpoint.names())
            seconds.append(time.perf_counter() - started)
        if total < 36e9:
            raise SystemExit(f"the main shards hold {total / 1e9:.1f} GB: the skeleton is not the published model's")
    return seconds


def _row(what: str, seconds: list[float], goal: float) -> Row:
    took = median(seconds)
    more = {"seconds": took, "goal": f"at most {goal:g} s", "all": ", ".join(f"{value:.2f}" for value in seconds)}
    row = Row(what, 1000 * took, more=more)
    row.note = "reached" if took <= goal else "not reached"
    return row


if __name__ == "__main__":
    main()
