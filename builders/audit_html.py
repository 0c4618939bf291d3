"""The report of an audit as one HTML page without scripts, beside the same numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ming_trt.bundle import PASSED, write_atomically

_STYLE = """body{font:14px system-ui;margin:2em;max-width:70em}table{border-collapse:collapse;margin:1em 0}
td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd;white-space:nowrap}
td:last-child{white-space:normal}.bad{color:#b00020;font-weight:600}
.bar{background:#4a7dbd;height:.7em;display:inline-block}.bar.bad{background:#b00020}
svg{display:block;margin:1em 0}svg text{font:11px system-ui;fill:#555}figure{margin:0}figcaption{color:#555}"""
# An SQNR of this many decibels fills the bar: about what float32 reaches.
_FULL_BAR_DB = 140.0
# What equal outputs are given (`builders/verify.py`): no error at all.
_EXACT_DB = 300.0
_WIDTH, _HEIGHT, _LEFT, _TOP = 860, 200, 44, 12


def write_report(document: Mapping[str, Any], folder: Path) -> None:
    """Writes `folder/report.json` and `folder/report.html`. Raises OSError if it cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.json", json.dumps(document, indent=1) + "\n")
    write_atomically(folder / "report.html", page(document))


def page(document: Mapping[str, Any]) -> str:
    """The HTML page."""
    parts = [f"<h1>Numerics audit: {escape(str(document['verdict']))}</h1>", _summary(document["components"])]
    for entry in document["components"]:
        parts.append(f"<h2>{escape(entry['component'])}: {escape(entry['verdict'])}</h2>")
        for text in (entry["reason"], entry["note"]):
            if text:
                parts.append(f"<p>{escape(text)}</p>")
        if entry["outputs"]:
            parts.append("<h3>Outputs</h3>" + _table(entry["outputs"]))
        if entry["layers"]:
            where = entry["first_divergence"]
            parts.append(f"<p>{'First divergence: ' + escape(where) if where else 'All modules match.'}</p>")
            floor = (entry["thresholds"] or {}).get("min_sqnr_db", 0.0)
            parts.append(_plot(entry["layers"], floor) + "<h3>Modules</h3>" + _table(entry["layers"]))
        if entry["determinism"]:
            rows = (
                (again["condition"], "bit-equal" if again["equal"] else f"differ by {again['max_abs']:.3g}")
                for again in entry["determinism"]
            )
            parts.append("<h3>Determinism</h3><table>" + "".join(map(_row, rows)) + "</table>")
    body = "\n".join(parts)
    return f"<!doctype html><meta charset=utf-8><title>Numerics audit</title><style>{_STYLE}</style>{body}\n"


def _summary(components: Iterable[Mapping[str, Any]]) -> str:
    """One line per engine: its worst figures, its verdict, and where it leaves its definition."""
    head = "<tr><th>engine<th>compared<th>worst relative<th>least SQNR dB<th>verdict<th>first divergence</tr>"
    rows = []
    for entry in components:
        outputs = entry["outputs"]
        figures = ("0", "", "")
        if outputs:
            relative, least = max(o["relative"] for o in outputs), min(o["sqnr_db"] for o in outputs)
            figures = (str(sum(o["compared"] for o in outputs)), f"{relative:.3g}", f"{least:.1f}")
        rows.append(_row((entry["component"], *figures, entry["verdict"], entry["first_divergence"])) + "</tr>")
    return f"<table>{head}{''.join(rows)}</table>"


def _plot(layers: Sequence[Mapping[str, Any]], floor: float) -> str:
    """SQNR over the modules in the order in which they finish, with the threshold: an error shows as a step down."""
    top = max(_FULL_BAR_DB, *(layer["sqnr_db"] for layer in layers if layer["sqnr_db"] < _EXACT_DB), 1.0)
    step = (_WIDTH - _LEFT - 10) / max(1, len(layers) - 1)

    def y(decibels: float) -> float:
        return _TOP + _HEIGHT * (1 - min(max(decibels, 0.0), top) / top)

    points = [(_LEFT + index * step, y(layer["sqnr_db"])) for index, layer in enumerate(layers)]
    line = " ".join(f"{x:.1f},{height:.1f}" for x, height in points)
    dots = []
    for (x, height), layer in zip(points, layers, strict=True):
        colour = "#4a7dbd" if layer["verdict"] == PASSED else "#b00020"
        title = f"{layer['name']}: {layer['sqnr_db']:.1f} dB, relative {layer['relative']:.3g}"
        dots.append(f"<circle cx={x:.1f} cy={height:.1f} r=3 fill='{colour}'><title>{escape(title)}</title></circle>")
    grid = []
    for decibels in range(0, int(top) + 1, 40):
        grid.append(f"<line x1={_LEFT} x2={_WIDTH} y1={y(decibels):.1f} y2={y(decibels):.1f} stroke='#eee'/>")
        grid.append(f"<text x={_LEFT - 6} y={y(decibels) + 4:.1f} text-anchor=end>{decibels}</text>")
    limit = (
        f"<line x1={_LEFT} x2={_WIDTH} y1={y(floor):.1f} y2={y(floor):.1f} stroke='#b00020' stroke-dasharray='4 3'/>"
        f"<text x={_WIDTH} y={y(floor) - 4:.1f} text-anchor=end>threshold {floor:g} dB</text>"
    )
    drawn = f"<polyline points='{line}' fill=none stroke='#4a7dbd'/>"
    size = f"viewBox='0 0 {_WIDTH + 10} {_HEIGHT + 2 * _TOP}' width={_WIDTH + 10} role=img"
    caption = "SQNR (dB) of each module's output, from the input (left) to the output; point at a dot for its name"
    return (
        f"<figure><svg {size}>{''.join(grid)}{limit}{drawn}{''.join(dots)}</svg>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _table(entries: Iterable[Mapping[str, Any]]) -> str:
    head = "<tr><th>name<th>max abs<th>relative<th>SQNR dB<th><th>verdict</tr>"
    rows = []
    for entry in entries:
        bad = "" if entry["verdict"] == PASSED else " bad"
        width = max(0.0, min(1.0, entry["sqnr_db"] / _FULL_BAR_DB)) * 200
        rows.append(
            f"<tr><td>{escape(entry['name'])}<td>{entry['max_abs']:.3g}<td>{entry['relative']:.3g}"
            f"<td>{entry['sqnr_db']:.1f}<td><span class='bar{bad}' style='width:{width:.0f}px'></span>"
            f"<td class='{bad.strip()}'>{escape(entry['note'] or entry['verdict'])}</tr>"
        )
    return f"<table>{head}{''.join(rows)}</table>"


def _row(cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<td>{escape(cell)}" for cell in cells) + "</tr>"
