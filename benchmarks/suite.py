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
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from harness import CACHE, HERE, RESULTS, host_id, show

from ming_trt.bench import svg
from ming_trt.bench.html import Cell, card, document, number, pairs, section, table
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
    "serving_overhead": Share(20, 150),
    "growth": Share(20, 150),
    "llm_decode": Share(24, 300),
    "llm_prefill": Share(24, 300),
    "batch_scaling": Share(20, 120),
    "vision": Share(20, 180),
    "audio": Share(20, 240),
    "speech": Share(10, 240, ("--steps", "30")),
    "image": Share(10, 300, ("--no-compile", "--steps", "1")),
    "llama_peer": Share(30, 180),
}
# Runs only if it can: an interpreter is named, or figures of an earlier run are kept (docs/bench.md).
_OPTIONAL = "llama_peer"
_MINUTES = 15.0


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


def page(merged: Mapping[str, Any]) -> str:
    """The results as one file: headlines, a plot of the ratios, growth, and a table for each benchmark."""
    rows = titled(merged)
    judged = [row for row in rows if row["verdict"]]
    about = merged["environment"]
    where = f"{about['processor']}, {about['cores']} cores, {about['memory_bytes'] / 2**30:.0f} GiB"
    parts = [
        f"<header><h1>Our engines against others</h1><p>{escape(merged['created'])} · {escape(where)} · "
        f"{_length(merged)}. Every ratio is within one run: same threads, same weights, candidates "
        "in turns, medians.</p></header>",
        *([f'<p class="bad">{escape(warning)}</p>'] if (warning := disturbed(merged)) else []),
        f'<div class="cards">{"".join(_card(row) for row in judged)}</div>',
        *(f'<p class="bad">{escape(name)}: {escape(why)}</p>' for name, why in merged["failures"].items()),
    ]
    if judged:
        parts.append(section("Ratios", f'<div class="plots">{ratio_plot(rows)}</div>'))
    for result in merged["results"]:
        parts.append(_section(result))
    parts.append(section("Conditions", pairs(_conditions(merged)), folded=True))
    return document("Benchmarks", "".join(parts))


# Benchmarks whose rows do not say what they are about.
_ABOUT = {
    "vision": "vision",
    "audio": "audio",
    "image": "denoiser",
    "batch_scaling": "batch",
    "llama_peer": "llama.cpp",
}


def titled(merged: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All rows, each with a title that can stand alone."""
    return [
        {**row, "what": f"{_ABOUT[name]}: {row['what']}"} if (name := result["benchmark"]) in _ABOUT else row
        for result in merged["results"]
        for row in result["rows"]
    ]


def disturbed(merged: Mapping[str, Any]) -> str:
    """What to know before the figures are quoted, or nothing: others used the machine. A benchmark alone loads its
    cores, and for a while one more."""
    loads = [result["environment"]["load_average"][0] for result in merged["results"]]
    cores = merged["environment"]["cores"]
    if max(loads, default=0.0) <= cores + 1:
        return ""
    span = f"{min(loads):.1f} to {max(loads):.1f}"
    return f"The machine was not quiet: load average {span} with {cores} cores. Measure again."


def _length(merged: Mapping[str, Any]) -> str:
    return f"{merged['minutes']:g} minutes in all" if merged["minutes"] >= 0.1 else "put together from single runs"


def ratio_plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """A bar for each ratio that something is asked of, with a mark where that is."""
    bars = [
        (
            row["what"],
            row["ratio"],
            row["target"],
            f"{row['what']}: {row['ratio']:.3g} × {row['peer']} ({row['verdict']})",
        )
        for row in rows
        if row["target"]
    ]
    return svg.goal_bars("Times faster than the best peer of the same run", "ratio", bars)


def _card(row: Mapping[str, Any]) -> str:
    asked = f"{row['target']:g}×" + (f", goal {row['goal']:g}×" if row["goal"] > row["target"] else "")
    facts = [("asked", asked), ("95 %", f"{row['low']:.3g} to {row['high']:.3g}"), ("", row["verdict"])]
    return card(row["what"], f"{row['ratio']:.2f}×", row["peer"], facts)


def _section(result: Mapping[str, Any]) -> str:
    parts = []
    if result["ceiling"]:
        ceiling = result["ceiling"]
        parts.append(
            f"<p>{ceiling['threads']} threads; this machine reads {ceiling['read_bytes_per_s'] / 1e9:.1f} GB/s and "
            f"multiplies {ceiling['float32_flops_per_s'] / 1e9:.0f} GFLOP/s in float32.</p>"
        )
    plots = "".join(_growth(row) for row in result["rows"] if "ms" in row["more"] and "model_ms" in row["more"])
    grown = [row for row in result["rows"] if "k_of_model" in row["more"]]
    if grown:
        parts.append(table(_GROWTH_HEAD, [_growth_cells(row) for row in grown]))
    others = [_cells(row) for row in result["rows"] if row not in grown]
    if others:
        # columns in which no row has anything are left out
        kept = [i for i in range(len(_HEAD)) if any(_shown(cells[i]) for cells in others)]
        parts.append(table([_HEAD[i] for i in kept], [[cells[i] for i in kept] for cells in others]))
    if plots:
        parts.append(f'<div class="plots">{plots}</div>')
    if result["note"]:
        parts.append(f"<p>{escape(result['note'])}</p>")
    return section(result["benchmark"], *parts)


_GROWTH_HEAD = ("what", "k", "the model's k", "grows", "why", "ms")


def _growth_cells(row: Mapping[str, Any]) -> list[str | Cell]:
    more = row["more"]
    mark = "good" if more["k"] <= more["k_of_model"] or more["grows"] == "as the model" else "bad"
    times = ", ".join(f"{size}: {number(value)}" for size, value in more["ms"].items())
    return [
        row["what"],
        (f"{more['k']:.2f}", more["k"]),
        (f"{more['k_of_model']:.2f}", more["k_of_model"]),
        (f'<span class="{mark}">{escape(more["grows"])}</span>', None),
        *((f'<span class="wrap">{escape(text)}</span>', None) for text in (more["why"], times)),
    ]


def _shown(cell: str | Cell) -> str:
    return re.sub(r"<[^>]*>", "", cell if isinstance(cell, str) else cell[0])


def _growth(row: Mapping[str, Any]) -> str:
    """Measured times, and the model's own arithmetic moved to meet them at the largest size."""
    more = row["more"]
    ours, model = ([(float(size), value) for size, value in more[key].items()] for key in ("ms", "model_ms"))
    factor = ours[-1][1] / model[-1][1]
    bound = [(size, value * factor) for size, value in model]
    lines = {"measured": ours, "the least that the model allows, scaled": bound}
    return svg.log_plot(
        f"{row['what']}: k {more['k']:.2f}, the model's {more['k_of_model']:.2f}", row["what"], "ms", lines
    )


def _conditions(merged: Mapping[str, Any]) -> dict[str, Any]:
    made = {f"engines made, {name}": ", ".join(names) for name, names in merged["made_engines"].items()}
    spent = {f"seconds, {name}": value for name, value in merged["seconds"].items()}
    about = {key: value for key, value in merged["environment"].items() if key != "packages"}
    return {**about, **merged["environment"]["packages"], **spent, **made}


_HEAD = ("what", "ours, ms", "peer", "its ms", "ratio", "95 %", "at least", "goal", "verdict", "beside")


def _cells(row: Mapping[str, Any]) -> list[str | Cell]:
    beside = "; ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row["more"].items()
        if not isinstance(value, dict)
    )
    has = bool(row["ratio"])
    mark = {"": "", "not reached": "bad"}.get(row["verdict"], "good")
    return [
        row["what"],
        (number(row["ours_ms"], 4), row["ours_ms"]),
        row["peer"],
        (number(row["peer_ms"], 4) if row["peer"] else "", row["peer_ms"]),
        (f"{row['ratio']:.3g}×" if has else "", row["ratio"]),
        f"{row['low']:.3g} to {row['high']:.3g}" if has else "",
        (f"{row['target']:.3g}×" if row["target"] else "", row["target"]),
        (f"{row['goal']:.3g}×" if row["goal"] else "", row["goal"]),
        (f'<span class="{mark}">{escape(row["verdict"])}</span>', None),
        (f'<span class="wrap">{escape(beside)}</span>', None),
    ]


if __name__ == "__main__":
    main()
