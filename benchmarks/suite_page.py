"""The results of `suite.py` as one HTML file: headlines, ratios and growth as plots, a table for each benchmark."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ming_trt.bench import svg
from ming_trt.bench.html import Cell, card, document, number, pairs, section, table


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
