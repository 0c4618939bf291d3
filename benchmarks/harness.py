"""What all benchmarks here share: interleaved rounds, medians, ceilings beside figures, results as JSON.

A figure is a ratio within one run: the candidates take turns, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ming_trt.bench.machine import Ceiling, environment, measure_ceiling
from ming_trt.bench.stats import Estimate, ratio_of_medians
from ming_trt.serving.programs import TUNABLES_VARIABLE, huge_pages

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
# Engines with random weights: gigabytes, made once and kept for the next run; never committed.
CACHE = HERE.parent / "engines" / "build" / "benchmarks"

# Larger than the caches of most processors.
READ_BYTES = 512 << 20

Work = Callable[[], object]


@dataclass(frozen=True)
class Measurement:
    """Seconds of every repetition of one candidate, in the order in which they ran."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def best(self) -> float:
        """The tenth percentile: what a quiet machine would show, less sensitive to one lucky reading."""
        return float(np.percentile(self.seconds, 10))

    @property
    def worst(self) -> float:
        """The 90th percentile."""
        return float(np.percentile(self.seconds, 90))

    @property
    def spread(self) -> float:
        """(90th - 10th percentile) / median."""
        return (self.worst - self.best) / self.median


@dataclass
class Row:
    """One line of a result: `ratio` is peer time / our time (above 1: we are faster), with its interval.

    `target` is the least ratio that is asked for, `goal` what it aims at, `spread` that of the times of each.
    """

    what: str
    ours_ms: float
    peer: str = ""
    peer_ms: float = 0.0
    ratio: float = 0.0
    low: float = 0.0
    high: float = 0.0
    target: float = 0.0
    note: str = ""
    more: dict[str, Any] = field(default_factory=dict)
    goal: float = 0.0
    spread: dict[str, float] = field(default_factory=dict)

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None if there is none."""
        return self.ratio >= self.target if self.target else None

    @property
    def verdict(self) -> str:
        """`reached` in words, and whether the goal is."""
        if self.reached is None:
            return ""
        return "goal reached" if self.goal and self.ratio >= self.goal else "reached" if self.reached else "not reached"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "goal": self.goal or self.target, "reached": self.reached, "verdict": self.verdict}


def interleave(
    candidates: Mapping[str, Work], seconds: float, repeats: int = 3, warmup: int = 2, settle: bool = True
) -> dict[str, Measurement]:
    """Times all candidates in turns for about `seconds` in all.

    In each round every candidate runs `repeats` times in a row, after one run that does not count (its weights and its
    threads' caches come back; `settle` False: without, for work of seconds); the order turns from round to round. At
    least three rounds.
    """
    for work in candidates.values():
        for _ in range(warmup):
            work()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names, rounds, end = list(candidates), 0, time.perf_counter() + seconds
    while rounds < 3 or time.perf_counter() < end:
        turn = rounds % len(names)
        for name in names[turn:] + names[:turn]:
            work = candidates[name]
            if settle:
                work()
            for _ in range(repeats):
                started = time.perf_counter()
                work()
                times[name].append(time.perf_counter() - started)
        rounds += 1
    return {name: Measurement(name, tuple(values)) for name, values in times.items()}


def reader(threads: int) -> Work:
    """Reads `READ_BYTES` with so many threads: a candidate, so that a bandwidth is that of the same rounds."""
    blocks = [np.ones(READ_BYTES // threads // 8, np.int64) for _ in range(threads)]
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(np.max, blocks))


def against(
    ours: Measurement, peers: Sequence[Measurement], what: str, target: float = 0.0, *, goal: float = 0.0, **more: Any
) -> Row:
    """Ours against the best of `peers`, which is named."""
    best = min(peers, key=lambda peer: peer.median)
    ratio: Estimate = ratio_of_medians(ours.seconds, best.seconds)
    # the tenth percentiles: what is left of the ratio where neighbours disturb one side more than the other
    more |= {"ratio_of_best": min(peer.best for peer in peers) / ours.best}
    more |= {"best_ms": 1000 * ours.best, "peers_ms": {peer.name: 1000 * peer.median for peer in peers}}
    return Row(
        what, 1000 * ours.median, best.name, 1000 * best.median, ratio.value, ratio.low, ratio.high, target,
        more=more, goal=goal, spread={"ours": ours.spread, "peer": best.spread},
    )  # fmt: skip


def same_memory() -> None:
    """Starts the script again unless its C library asks for huge pages, as the server's processes do: it reads that
    once. All candidates of the process get them. To be called first."""
    now = os.environ.get(TUNABLES_VARIABLE, "")
    if huge_pages(now) != now:
        os.environ[TUNABLES_VARIABLE] = huge_pages(now)
        os.execv(sys.executable, [sys.executable, *sys.argv])


def host_id() -> str:
    """A name of this kind of machine: no host name in it."""
    about = environment()
    memory = round(about["memory_bytes"] / 2**30)
    words = f"{about['processor']} {about['cores']} cores {memory} GiB"
    return re.sub(r"[^a-z0-9]+", "-", words.lower().replace("(r)", "").replace("(tm)", "")).strip("-")


def arguments(description: str, **extra: Mapping[str, Any]) -> argparse.Namespace:
    """The options of every benchmark, and `extra` ones (name -> keywords of `add_argument`)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=0, help="threads of every candidate; 0 = one per core")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for the measurement itself")
    parser.add_argument("--tiny", action="store_true", help="small widths: a check that the script runs, no figure")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    for name, keywords in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **keywords)
    return parser.parse_args()


def cores(threads: int) -> int:
    """The number of threads that 0 stands for."""
    return threads or int(environment()["cores"])


def finish(
    name: str, rows: Sequence[Row], options: argparse.Namespace, ceiling: Ceiling | None, note: str = ""
) -> None:
    """Prints the table, writes `<host>/<name>.json`, and prints the result as the last line."""
    result = {
        "benchmark": name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": host_id(),
        "tiny": options.tiny,
        "threads": cores(options.threads),
        "environment": {key: value for key, value in environment().items() if key != "host"},
        "ceiling": ceiling.as_dict() if ceiling else None,
        "note": note,
        "rows": [row.as_dict() for row in rows],
    }
    show(result)
    if not options.tiny:
        folder = options.out / host_id()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result))


def show(result: Mapping[str, Any]) -> None:
    """The result as a table."""
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 200)
    ceiling = result["ceiling"]
    rates = ""
    if ceiling:
        rates = (
            f", reads {ceiling['read_bytes_per_s'] / 1e9:.1f} GB/s, "
            f"multiplies {ceiling['float32_flops_per_s'] / 1e9:.0f} GFLOP/s in float32"
        )
    console.print(f"{result['benchmark']}: {result['threads']} threads{rates}")
    table = Table("what", "ours, ms", "peer", "its ms", "ratio", "95 %", "at least", "goal", "", "beside", box=None)
    for row in result["rows"]:
        shown = {key: value for key, value in row["more"].items() if isinstance(value, float | int | str)}
        table.add_row(
            row["what"],
            f"{row['ours_ms']:.4g}",
            row["peer"],
            f"{row['peer_ms']:.4g}" if row["peer"] else "",
            f"{row['ratio']:.3g}×" if row["ratio"] else "",
            f"{row['low']:.3g} to {row['high']:.3g}" if row["ratio"] else "",
            f"{row['target']:g}×" if row["target"] else "",
            f"{row['goal']:g}×" if row["goal"] else "",
            row["verdict"],
            ", ".join(
                f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
            ),
        )
    console.print(table)
    if result["note"]:
        console.print(result["note"])


__all__ = ["CACHE", "Measurement", "Row", "against", "arguments", "cores", "finish", "interleave", "measure_ceiling"]
