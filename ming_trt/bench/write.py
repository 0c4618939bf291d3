"""A report on disk and on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ming_trt.bench.compare import REPORT, Comparison
from ming_trt.bench.html import number
from ming_trt.bench.load import Load
from ming_trt.bench.page import page
from ming_trt.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

HTML = "report.html"


def write(report: Mapping[str, Any], folder: Path) -> tuple[Path, Path]:
    """Writes `report.json` and `report.html` into `folder`; both paths. Raises `InputError` if it cannot be written."""
    data, html = folder / REPORT, folder / HTML
    try:
        folder.mkdir(parents=True, exist_ok=True)
        data.write_text(json.dumps(report, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
        html.write_text(page(report), "utf-8")
    except OSError as error:
        raise InputError(f"'{folder}' cannot be written ({error.strerror}): give another folder by -o") from None
    return data, html


def check_place(folder: Path) -> None:
    """Raises `InputError` before anything is measured if `folder` cannot hold a report."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"'{folder}' cannot be made ({error.strerror}): give another folder by -o") from None


# Metrics of the terminal's table and of the last line, by name; rates by name and title.
_SHOWN = ("ttft", "itl", "e2e", "ttfa", "rtf", "image")
_RATES = {"tokens_per_s": "tokens/s", "images_per_minute": "images/min", "goodput_per_s": "goodput/s"}


def latency_table(report: Mapping[str, Any]) -> Table:
    """Median and tail of each scenario and load; columns in which something stands."""
    from rich.table import Table

    shown = [name for name in _SHOWN if any(name in point["metrics"] for point in report["points"])]
    rates = [name for name in _RATES if any(point["totals"][name] for point in report["points"])]
    table = Table("scenario", box=None)
    table.add_column("load", no_wrap=True)
    for title in (*shown, *(_RATES[name] for name in rates)):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("in time", "errors", "hops"):
        table.add_column(title, justify="right")
    for point in report["points"]:
        counted, metrics = point["totals"], point["metrics"]
        cells = [_both(metrics[name]) if name in metrics else "-" for name in shown]
        cells += [number(counted[name]) if counted[name] else "-" for name in rates]
        hops = point["hops"]
        cells += [
            f"{100 * counted['goodput_share']:.0f} %",
            str(counted["requests"] - counted["succeeded"]),
            "-" if not hops else "add up" if hops["closes"] else f"{100 * hops['sum_ms'] / hops['total_ms']:.0f} %",
        ]
        table.add_row(point["scenario"], str(Load(**point["load"])), *cells)
    return table


def _both(metric: Mapping[str, Any]) -> str:
    return " / ".join(number(metric[part]["value"]) for part in ("p50", "p95"))


def comparison_table(comparison: Comparison) -> Table:
    """One row per metric and load."""
    from rich.table import Table

    table = Table("scenario", "load", "metric", box=None)
    for title in ("A", "B", "unit", "B / A", "95 %", "p", "verdict"):
        table.add_column(title, justify="right")
    for c in comparison.changes:
        interval = f"{c.low:.3f} to {c.high:.3f}"
        numbers = (f"{c.a:.4g}", f"{c.b:.4g}", c.unit, f"{c.ratio:.3f}", interval, f"{c.p:.2g}")
        table.add_row(c.scenario, c.load, c.metric, *numbers, c.verdict)
    return table


def summary(report: Mapping[str, Any], files: tuple[Path, Path]) -> dict[str, Any]:
    """What the last line of stdout says."""
    return {
        "report": str(files[0]),
        "html": str(files[1]),
        "requests": sum(point["totals"]["requests"] for point in report["points"]),
        "errors": sum(point["totals"]["requests"] - point["totals"]["succeeded"] for point in report["points"]),
        "points": [
            {
                "scenario": point["scenario"],
                "load": point["load"],
                **{
                    f"{name}_p50{'' if name == 'rtf' else '_ms'}": point["metrics"][name]["p50"]["value"]
                    for name in _SHOWN
                    if name in point["metrics"]
                },
                "tokens_per_s": point["totals"]["tokens_per_s"],
                "goodput_share": point["totals"]["goodput_share"],
                "errors": point["totals"]["requests"] - point["totals"]["succeeded"],
                "hops_add_up": bool(point["hops"] and point["hops"]["closes"]),
            }
            for point in report["points"]
        ],
        "skipped": report["skipped"],
        "stopped": report["stopped"],
    }
