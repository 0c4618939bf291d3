"""The report of an audit as one HTML page without scripts, beside the same numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from ming_trt.bundle import PASSED, write_atomically

_STYLE = """body{font:14px system-ui;margin:2em;max-width:70em}table{border-collapse:collapse;margin:1em 0}
td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}.bad{color:#b00020;font-weight:600}
.bar{background:#4a7dbd;height:.7em;display:inline-block}.bar.bad{background:#b00020}"""
# An SQNR of this many decibels fills the bar: about what float32 reaches.
_FULL_BAR_DB = 140.0


def write_report(document: Mapping[str, Any], folder: Path) -> None:
    """Writes `folder/report.json` and `folder/report.html`. Raises OSError if it cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.json", json.dumps(document, indent=1) + "\n")
    write_atomically(folder / "report.html", page(document))


def page(document: Mapping[str, Any]) -> str:
    """The HTML page."""
    parts = [f"<h1>Numerics audit: {escape(str(document['verdict']))}</h1>"]
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
            parts.append("<h3>Modules</h3>" + _table(entry["layers"]))
        if entry["determinism"]:
            rows = (
                (again["condition"], "bit-equal" if again["equal"] else f"differ by {again['max_abs']:.3g}")
                for again in entry["determinism"]
            )
            parts.append("<h3>Determinism</h3><table>" + "".join(map(_row, rows)) + "</table>")
    body = "\n".join(parts)
    return f"<!doctype html><meta charset=utf-8><title>Numerics audit</title><style>{_STYLE}</style>{body}\n"


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
