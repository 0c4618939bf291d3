"""From `ming-trt serve` to readiness, with the mini checkpoint's bundle: the whole command, Python's start included.

python benchmarks/load_time.py [--starts N]
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from harness import Row, arguments, finish
from mini_server import mini_bundle

from ming_trt.serving.assemble import assemble
from ming_trt.serving.launch import Ports

GOAL_S = 8.0


def main() -> None:
    options = arguments(str(__doc__), starts={"type": int, "default": 3, "help": "how often it is started"})
    bundle = mini_bundle()
    repository = bundle.parent / "bundle-repo"
    assemble(bundle, repository)
    starts = [serve(repository) for _ in range(1 if options.tiny else options.starts)]
    took, loading = (median(values) for values in zip(*starts, strict=True))
    reached = "reached" if took <= GOAL_S else "not reached"
    more = {
        "seconds": took,
        "of these Triton": loading,
        "asked": f"at most {GOAL_S:g} s: {reached}",
        "all": ", ".join(f"{whole:.2f}" for whole, _ in starts),
    }
    row = Row("start to ready, mini checkpoint", 1000 * took, note=str(more["asked"]), more=more)
    finish("load_time", [row], options, None, str(more["asked"]))


def serve(repository: Path) -> tuple[float, float]:
    """Seconds from the start of the command until it says that it is ready, and those of them that Triton loaded."""
    ports = Ports.free()
    command = [sys.executable, "-m", "ming_trt", "serve", str(repository), "--json", "--grpc-port", str(ports.grpc)]
    command += ["--http-port", str(ports.http), "--metrics-port", str(ports.metrics)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        took = time.perf_counter() - started
        if not line:
            raise SystemExit(f"the server did not start: {process.stderr.read().strip().splitlines()[-1:]}")
        return took, float(json.loads(line)["ready_s"])
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.communicate()


if __name__ == "__main__":
    main()
