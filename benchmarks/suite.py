"""Runs all benchmarks one after the other, each in a process of its own, and puts their results together.

    python benchmarks/suite.py [--minutes M] [--only NAME ...] [--tiny] [--out DIR]

Writes `<host>.json` and `<host>.html` beside the single results. A benchmark that fails is named with its last line,
and makes the exit code 1; the others still run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from html import escape
from pathlib import Path
from typing import Any

from harness import HERE, RESULTS, host_id, show

from ming_trt.bench import svg
from ming_trt.bench.html import document, table

# Shares of the time for measuring; making engines and compiling the peers comes on top, once.
BENCHMARKS = {
    "llm_decode": 4,
    "llm_prefill": 4,
    "batch_scaling": 2,
    "vision": 3,
    "audio": 4,
    "serving_overhead": 2,
    "load_time": 0,
    "growth": 3,
}
# Of the whole time, what measuring gets.
_MEASURING = 0.45


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0, help="time for all; a benchmark over it is stopped")
    parser.add_argument(
        "--only", action="append", default=[], choices=list(BENCHMARKS), help="may be given several times"
    )
    parser.add_argument("--threads", type=int, default=0, help="threads of every candidate; 0 = one per core")
    parser.add_argument("--tiny", action="store_true", help="small widths: a check that the scripts run, no figures")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    names = [name for name in BENCHMARKS if not options.only or name in options.only]
    end = time.monotonic() + 60 * options.minutes
    shares = sum(BENCHMARKS[name] for name in names) or 1
    results, failures = [], dict[str, str]()
    for name in names:
        seconds = 60 * options.minutes * _MEASURING * BENCHMARKS[name] / shares
        outcome = run(name, 1.0 if options.tiny else seconds, end, options)
        if isinstance(outcome, str):
            failures[name] = outcome
            print(f"{name}: {outcome}", file=sys.stderr)
        else:
            results.append(outcome)
            show(outcome)
            print()
    merged = {"host": host_id(), "results": results, "failures": failures}
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / (host_id() + ("-tiny" if options.tiny else ""))
    stem.with_suffix(".json").write_text(json.dumps(merged, indent=1) + "\n", "utf-8")
    stem.with_suffix(".html").write_text(page(merged), "utf-8")
    print(json.dumps({"report": str(stem.with_suffix(".html")), "failures": failures}))
    sys.exit(1 if failures else 0)


def run(name: str, seconds: float, end: float, options: argparse.Namespace) -> dict[str, Any] | str:
    """The result of one benchmark, or why there is none."""
    command = [sys.executable, str(HERE / f"{name}.py"), "--seconds", str(seconds), "--out", str(options.out)]
    command += ["--threads", str(options.threads), *(["--tiny"] if options.tiny else [])]
    left = end - time.monotonic()
    if left <= 0:
        return "no time was left for it"
    # torch counts threads when it starts; the scripts set their own number afterwards
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return f"it was stopped after {left:.0f} s, the rest of the time"
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        return f"exit code {done.returncode}: {said[-1] if said else 'it said nothing'}"
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def page(merged: dict[str, Any]) -> str:
    """The results as one file: a plot of the ratios, and a table for each benchmark."""
    parts = [f"<h1>Benchmarks on {escape(merged['host'])}</h1>"]
    ratios = {
        f"{row['what']}": {f"times faster than {row['peer']}": row["ratio"]}
        for result in merged["results"]
        for row in result["rows"]
        if row["ratio"]
    }
    if ratios:
        parts.append(f'<div class="plots">{svg.stacked_bars("Ratios within one run", "ratio", ratios)}</div>')
    for result in merged["results"]:
        parts.append(f"<h2>{escape(result['benchmark'])}</h2>")
        if result["ceiling"]:
            ceiling = result["ceiling"]
            parts.append(
                f"<p>{ceiling['threads']} threads; this machine reads {ceiling['read_bytes_per_s'] / 1e9:.1f} GB/s and "
                f"multiplies {ceiling['float32_flops_per_s'] / 1e9:.0f} GFLOP/s in float32.</p>"
            )
        parts.append(table(_HEAD, [_cells(row) for row in result["rows"]]))
        if result["note"]:
            parts.append(f"<p>{escape(result['note'])}</p>")
    for name, why in merged["failures"].items():
        parts.append(f'<p class="bad">{escape(name)}: {escape(why)}</p>')
    return document("Benchmarks", "".join(parts))


_HEAD = ("what", "ours, ms", "peer", "its ms", "ratio", "95 %", "goal", "verdict", "beside")


def _cells(row: dict[str, Any]) -> list[str | tuple[str, float | None]]:
    beside = "; ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row["more"].items()
    )
    has = bool(row["ratio"])
    return [
        row["what"],
        (f"{row['ours_ms']:.4g}", row["ours_ms"]),
        row["peer"],
        (f"{row['peer_ms']:.4g}" if row["peer"] else "", row["peer_ms"]),
        (f"{row['ratio']:.3g}×" if has else "", row["ratio"]),
        f"{row['low']:.3g} to {row['high']:.3g}" if has else "",
        (f"{row['goal']:.3g}×" if row["goal"] else "", row["goal"]),
        row["verdict"],
        beside,
    ]


if __name__ == "__main__":
    main()
