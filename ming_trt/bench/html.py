"""The report as one HTML file that needs nothing else: plots are inline SVG, tables sort by a few lines of script."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ming_trt.bench import svg
from ming_trt.bench.load import Load
from ming_trt.bench.metrics import InterTokenLatency, TimeToFirstToken
from ming_trt.bench.samples import Sample

Report = Mapping[str, Any]
Cell = tuple[str, float | None]  # what is shown, and what it is sorted by (None: by its text)

# One policy for all: nothing may be loaded from anywhere.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_HERE = Path(__file__).parent


def page(report: Report) -> str:
    """The whole file."""
    points = report["points"]
    parts = [
        f"<h1>Latency of {escape(report['server']['url'])}</h1>",
        f"<p>{escape(report['created'])} · ming-trt {escape(report['version'])} · {_objective(report)}</p>",
        "<h2>Latency</h2>",
        _latency_table(points),
        "<p>Medians and tails with their 95 % bootstrap intervals, which draw whole requests. <span class=few>Slanted: "
        "fewer requests than that percentile needs.</span> Failed requests are counted and in no figure.</p>",
        "<h2>Throughput</h2>",
        _throughput_table(points),
        "<h2>Plots</h2>",
        f'<div class="plots">{"".join(_plots(points))}</div>',
        "<h2>Where the time goes</h2>",
        _hops_table(points),
        "<p>Mean milliseconds per request. Triton's statistics give queue, input, compute and output of each stage, "
        "the language model's own clock its queue, prefill and decoding; what is left is Triton's scheduling, and what "
        "only the client sees. The encoders run side by side: the slower one is listed.</p>",
        *_ceiling(report),
        "<h2>Not measured</h2>",
        _pairs(report["skipped"]),
        "<h2>Conditions</h2>",
        _pairs({"server": f"{report['server']['name']} {report['server']['version']}"} | _flat(report["environment"])),
        *([_pairs(_flat(report["manifest"], "manifest"))] if report["manifest"] else []),
        _pairs(_flat(report["options"], "option")),
        _pairs({f"model {name}": model["config_sha256"] for name, model in report["server"]["models"].items()}),
    ]
    return document("Latency report", "".join(parts))


def document(title: str, body: str) -> str:
    """A page with our style and script; `body` is HTML."""
    style, script = ((_HERE / name).read_text("utf-8") for name in ("report.css", "report.js"))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>{body}<script>{script}</script></body></html>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str | Cell]], left: int = 1) -> str:
    """A sortable table; the first `left` columns are text. Cells that are plain text are escaped."""
    titles = "".join(f'<th scope="col"{_left(i < left)}>{escape(title)}</th>' for i, title in enumerate(head))
    body = "".join("<tr>" + "".join(_cell(cell, i < left) for i, cell in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def _left(yes: bool) -> str:
    return ' class="left"' if yes else ""


def _cell(cell: str | Cell, left: bool) -> str:
    if isinstance(cell, str):
        return f"<td{_left(left)}>{escape(cell)}</td>"
    text, value = cell
    return f"<td{'' if value is None else f' data-v={json.dumps(str(value))}'}{_left(left)}>{text}</td>"


def _latency_table(points: Sequence[Report]) -> str:
    rows = []
    for point in points:
        for metric in point["metrics"].values():
            cells: list[str | Cell] = [point["scenario"], str(_load(point)), metric["title"], metric["unit"]]
            cells += [_estimate(metric[name]) for name in ("mean", "p50", "p90", "p95", "p99")]
            rows.append(
                [*cells, (_number(metric["max"]), metric["max"]), (str(metric["requests"]), metric["requests"])]
            )
    return table(("scenario", "load", "metric", "unit", "mean", "p50", "p90", "p95", "p99", "max", "requests"), rows, 4)


def _throughput_table(points: Sequence[Report]) -> str:
    rows: list[list[str | Cell]] = []
    for point in points:
        counted = point["totals"]
        failed = counted["requests"] - counted["succeeded"]
        mark = "bad" if failed else "good"
        reasons = escape("; ".join(f"{n} × {sentence}" for sentence, n in counted["errors"].items()))
        rows.append(
            [
                point["scenario"],
                str(_load(point)),
                *(
                    (_number(counted[key]), counted[key])
                    for key in ("requests_per_s", "tokens_per_s", "images_per_minute", "goodput_per_s")
                ),
                (f"{100 * counted['goodput_share']:.0f} %", counted["goodput_share"]),
                (f'<span class="{mark}" title="{reasons}">{failed} of {counted["requests"]}</span>', failed),
                *((_number(point[key]), point[key]) for key in ("prompt_tokens", "completion_tokens")),
            ]
        )
    head = (
        "scenario",
        "load",
        "requests/s",
        "tokens/s",
        "images/min",
        "goodput/s",
        "in time",
        "errors",
        "prompt tokens",
        "answer tokens",
    )
    return table(head, rows, 2)


def _hops_table(points: Sequence[Report]) -> str:
    rows: list[list[str | Cell]] = []
    for point in points:
        hops = point["hops"]
        if not hops:
            continue
        for row in hops["rows"]:
            share = row["ms"] / hops["total_ms"] if hops["total_ms"] else 0.0
            start: list[str | Cell] = [point["scenario"], str(_load(point)), row["hop"], row["part"]]
            rows.append([*start, (_number(row["ms"]), row["ms"]), (f"{100 * share:.1f} %", share)])
        verdict = '<span class="good">adds up</span>' if hops["closes"] else '<span class="bad">does not add up</span>'
        note = f"; {hops['note']}" if hops["note"] else ""
        rows.append(
            [
                point["scenario"],
                str(_load(point)),
                "end to end",
                (verdict + escape(note), None),
                (_number(hops["total_ms"]), hops["total_ms"]),
                (f"{100 * hops['sum_ms'] / hops['total_ms']:.1f} %", hops["sum_ms"] / hops["total_ms"]),
            ]
        )
    return table(("scenario", "load", "hop", "part", "ms", "of end to end"), rows, 4)


def _plots(points: Sequence[Report]) -> list[str]:
    made = []
    for scenario in dict.fromkeys(point["scenario"] for point in points):
        own = [point for point in points if point["scenario"] == scenario and point["totals"]["succeeded"]]
        for metric in (TimeToFirstToken(), InterTokenLatency()):
            series = {
                str(_load(point)): [
                    v for s in point["samples"] if not s["error"] for v in metric.of(Sample.from_dict(s))
                ]
                for point in own
            }
            if any(series.values()):
                made.append(svg.cumulative(f"{scenario}: {metric.title}", metric.unit, series))
        bars = {str(_load(point)): _by_hop(point) for point in own if point["hops"]}
        if bars:
            made.append(svg.stacked_bars(f"{scenario}: where the time goes", "ms", bars))
    sweep = {
        scenario: [
            (point["totals"]["tokens_per_s"], point["metrics"]["e2e"]["p50"]["value"])
            for point in points
            if point["scenario"] == scenario and point["load"]["kind"] == "concurrency" and "e2e" in point["metrics"]
        ]
        for scenario in dict.fromkeys(point["scenario"] for point in points)
    }
    if any(len(line) > 1 for line in sweep.values()):
        made.append(
            svg.line_plot("Throughput against latency, by concurrency", "tokens/s", "end to end p50, ms", sweep)
        )
    return made


def _by_hop(point: Report) -> dict[str, float]:
    hops: dict[str, float] = {}
    for row in point["hops"]["rows"]:
        # the language model's three phases are what one wants to tell apart
        name = f"llm {row['part']}" if row["hop"] == "llm" else row["hop"]
        hops[name] = hops.get(name, 0.0) + row["ms"]
    total = point["hops"]["total_ms"]
    small = {name for name, ms in hops.items() if ms < 0.01 * total}
    return {name: ms for name, ms in hops.items() if name not in small}


def _ceiling(report: Report) -> list[str]:
    ceiling, rows = report["ceiling"], list[list[str | Cell]]()
    for point in report["points"]:
        for phase, share in (("decode", "mbu"), ("prefill", "mfu")):
            found = (point["ceiling"] or {}).get(phase)
            if found:
                start: list[str | Cell] = [point["scenario"], str(_load(point)), phase, point["ceiling"]["precision"]]
                rows.append(
                    [
                        *start,
                        (_number(found.get("bytes", 0) / 1e6), found.get("bytes", 0)),
                        (_number(found["flops"] / 1e9), found["flops"]),
                        (_number(found["least_ms"]), found["least_ms"]),
                        (
                            f"{100 * found[share]:.0f} % of {'bandwidth' if share == 'mbu' else 'matrix rate'}",
                            found[share],
                        ),
                    ]
                )
    if not ceiling:
        return ["<h2>Ceiling</h2><p>The server is on another machine, whose ceiling is not known here.</p>"]
    text = (
        f"<h2>Ceiling</h2><p>This machine with {ceiling['threads']} threads reads "
        f"{ceiling['read_bytes_per_s'] / 1e9:.1f} GB/s and multiplies "
        f"{ceiling['float32_flops_per_s'] / 1e9:.0f} GFLOP/s in float32 (measured with {escape(ceiling['by'])})."
    )
    if not rows:
        return [f"{text} What the model must read and multiply is known with --bundle.</p>"]
    head = ("scenario", "load", "phase", "weights", "MB read", "GFLOP", "least ms", "reached")
    return [
        f"{text} Figures above 100 % are quantised products, or a busy machine at the time.</p>",
        table(head, rows, 4),
    ]


def _objective(report: Report) -> str:
    slo = report["options"]["slo"]
    text = f"objective: first token within {slo['first_token_s']:g} s, then {slo['per_token_s']:g} s per token"
    return text + (f", {slo['total_s']:g} s in all" if slo["total_s"] else "")


def _load(point: Report) -> Load:
    return Load(**point["load"])


def _estimate(estimate: Report) -> Cell:
    interval = f"95 %: {_number(estimate['low'])} to {_number(estimate['high'])}"
    spread = (estimate["high"] - estimate["low"]) / 2
    text = f"{_number(estimate['value'])} <small>± {_number(spread)}</small>"
    mark = "" if estimate["enough"] else ' class="few"'
    return f'<span{mark} title="{interval}">{text}</span>', estimate["value"]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _pairs(values: Mapping[str, Any]) -> str:
    return table(("what", "value"), [[str(key), (escape(str(value)), None)] for key, value in values.items()], 2)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix} {key}".strip()
        if isinstance(value, Mapping):
            found |= _flat(value, name)
        else:
            found[name] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
    return found
