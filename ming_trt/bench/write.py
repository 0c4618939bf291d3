"""A report on disk and on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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


# Metrics of the last line, by name; those of the terminal's table, where a picture's time is its end to end; rates by
# name and title.
_SHOWN = ("ttft", "itl", "e2e", "ttfa", "rtf", "image")
_ON_TERMINAL = _SHOWN[:-1]
_RATES = {"tokens_per_s": "tokens/s", "images_per_minute": "images/min", "goodput_per_s": "goodput/s"}


def latency_table(report: Mapping[str, Any]) -> Table:
    """Median and tail of each scenario and load; columns in which something stands."""
    shown = [name for name in _ON_TERMINAL if any(name in point["metrics"] for point in report["points"])]
    table = _by_load(shown)
    for point in report["points"]:
        metrics = point["metrics"]
        table.add_row(*_load(point), *(_both(metrics[name]) if name in metrics else "-" for name in shown))
    return table


def throughput_table(report: Mapping[str, Any]) -> Table:
    """Rates of each scenario and load, the share within the objective, errors, and whether the hops add up."""
    rates = [name for name in _RATES if any(point["totals"][name] for point in report["points"])]
    table = _by_load([*(_RATES[name] for name in rates), "in time", "errors", "hops"])
    for point in report["points"]:
        counted, hops = point["totals"], point["hops"]
        table.add_row(
            *_load(point),
            *(number(counted[name]) if counted[name] else "-" for name in rates),
            f"{100 * counted['goodput_share']:.0f} %",
            str(counted["requests"] - counted["succeeded"]),
            "-" if not hops else "add up" if hops["closes"] else f"{100 * hops['sum_ms'] / hops['total_ms']:.0f} %",
        )
    return table


def _by_load(titles: Sequence[str]) -> Table:
    """On a narrow terminal figures break into lines; nothing is left out."""
    from rich.table import Table

    table = Table("scenario", "load", box=None, padding=(0, 1, 0, 0))
    for title in titles:
        table.add_column(title, justify="right", overflow="fold")
    return table


def _load(point: Mapping[str, Any]) -> tuple[str, str]:
    load = Load(**point["load"])
    return point["scenario"], str(load) if load.kind == "concurrency" else f"{load.value:.3g}/s"


def _both(metric: Mapping[str, Any]) -> str:
    return " / ".join(number(metric[part]["value"]) for part in ("p50", "p95"))


def comparison_table(comparison: Comparison) -> Table:
    """One row per metric and load."""
    table = _by_load(("metric", "A", "B", "B / A (95 %)", "p", "verdict"))
    for c in comparison.changes:
        metric = c.metric.removesuffix("_tokens_per_s")
        ratio = f"{c.ratio:.2f} ({c.low:.2f} to {c.high:.2f})"
        table.add_row(
            c.scenario, c.load, f"{metric}, {c.unit}", f"{c.a:.4g}", f"{c.b:.4g}", ratio, f"{c.p:.2g}", c.verdict
        )
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
