"""The plan's memory against measured memory: serving processes and the steps of a build.

    python benchmarks/memory.py [--bundle DIR --checkpoint DIR] [--stage NAME ...]

Without `--bundle` a checkpoint of the published widths with few layers is written and built in float32 first (minutes,
6 GB of disk), each engine in a process of its own, and the peaks that its steps noted in the journal are compared too.
Serving processes open their engines as the stages do and run them at the plan's typical sizes. Memory is what the
kernel counts (VmHWM), so a busy machine does not change it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import wide_checkpoint
from harness import CACHE, HERE, RESULTS, host_id
from rich.console import Console
from rich.table import Table

from builders import registry
from builders.plan import plan
from builders.plan_engine import EnginePlan
from builders.plan_serving import PROCESSES, SHRINKING, engines_of, gib, process_bytes
from ming_trt.bench.machine import environment
from ming_trt.bundle import Bundle

CHILD = HERE.parent / "tests" / "builders" / "process_memory.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="a bundle that is there")
    parser.add_argument("--checkpoint", type=Path, help="what it was built from")
    parser.add_argument("--stage", action="append", choices=[*PROCESSES], help="this process only")
    parser.add_argument("--name", default="memory", help="of the result's file")
    options = parser.parse_args()
    checkpoint, folder = options.checkpoint, options.bundle
    if folder is None:
        checkpoint, folder = wide_checkpoint.write(CACHE / "wide"), CACHE / "wide-bundle"
        for name in registry.COMPONENTS:
            # each in a process of its own, so that nothing that others left behind is measured
            command = ["build", str(checkpoint), "-o", str(folder), "--preset", "cpu-fp32", "--only", name]
            subprocess.run([sys.executable, "-m", "ming_trt", *command], check=True)
    bundle = Bundle.open(folder)
    made = plan(checkpoint, bundle.preset)
    engines = [engine for engine in made.engines if bundle.has(engine.name)]
    rows = [serving(bundle, stage, engines) for stage in options.stage or PROCESSES if engines_of(stage, engines)]
    if options.bundle is None:
        rows += steps(folder, checkpoint, bundle)
    table = Table("what", "planned", "measured", "planned is", box=None)
    for row in rows:
        share = float(row["planned"]) / float(row["measured"]) - 1  # type: ignore[arg-type]
        table.add_row(str(row["what"]), gib(row["planned"]), gib(row["measured"]), f"{share:+.1%}")  # type: ignore[arg-type]
    Console().print(table)
    path = RESULTS / host_id() / f"{options.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"checkpoint": checkpoint.name, "environment": environment(), "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def serving(bundle: Bundle, stage: str, engines: list[EnginePlan]) -> dict[str, object]:
    """The process of `stage`: what it takes without weights is the plan's figure, the rest is measured."""
    own, profile = engines_of(stage, engines), bundle.preset.profile
    sizes = {
        engine.name: [
            {"T": profile.max_seq_len, **{symbol: typical for symbol, (_, typical, _) in way.sizes.items()}}
            for way in engine.profiles
        ]
        for engine in own
    }
    job = json.dumps({"bundle": str(bundle.path), "shrink": stage in SHRINKING, "engines": sizes})
    done = subprocess.run([sys.executable, str(CHILD), job], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{stage}: {done.stderr}")
    found = json.loads(done.stdout)
    measured = found["peak"] - (found["ready"] - found["weights"]) + PROCESSES[stage]
    planned = process_bytes(stage, own, found["caches"])
    return {"what": f"process {stage}", "planned": planned, "measured": measured, **found}


def steps(folder: Path, checkpoint: Path, bundle: Bundle) -> list[dict[str, object]]:
    """Export and gate of each engine, built alone."""
    events = [json.loads(line) for line in (folder / ".journal").read_text("utf-8").splitlines()]
    peaks = {event["step"]: event["peak_bytes"] for event in events if event["event"] == "built"}
    rows: list[dict[str, object]] = []
    for name in bundle.manifest.components:
        alone = plan(checkpoint, bundle.preset, (name,))
        rows.append({"what": f"gate of {name}", "planned": alone.gate_peak_bytes, "measured": peaks[f"gate:{name}"]})
        rows.append({"what": f"export of {name}", "planned": alone.build_peak_bytes, "measured": peaks[name]})
    return rows


if __name__ == "__main__":
    main()
