"""The report of a benchmark as a page: headlines, tables, plots by scenario, accounting, ceilings, conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ming_trt.bench import svg
from ming_trt.bench.html import Cell, card, document, flat, number, pairs, section, table
from ming_trt.bench.load import Load
from ming_trt.bench.metrics import ImageLatency, InterTokenLatency, Metric, TimeToFirstAudio, TimeToFirstToken
from ming_trt.bench.samples import Sample

Report = Mapping[str, Any]
_LATENCY_NOTE = (
    "<p>Means, medians and tails with their 95 % bootstrap intervals, which draw whole requests. <span class=few>"
    "Slanted: fewer requests than that percentile needs.</span> Failed requests are counted and in no "
    "figure; n: requests that are.</p>"
)
_HOPS_NOTE = (
    "<p>Mean milliseconds per request. <b>Statistics</b>: what Triton counted (queue, input, compute, output of each "
    "stage) and the language model's own clock (queue, prefill, decode); what is left is Triton's scheduling, and what "
    "only the client sees. Time that two stages share counts twice there. <b>Traces</b>: further requests, each cut at "
    "the moments that the server noted, without gaps; their own end to end is in the last row.</p>"
)

_SHARES = {"mbu": "bandwidth (MBU)", "mfu": "matrix rate (MFU)"}


def page(report: Report) -> str:
    """The whole file."""
    points, environment = report["points"], report["environment"]
    scenarios = _by_scenario(points)
    server = {"server": f"{report['server']['name']} {report['server']['version']}"}
    models = {f"model {name}": model["config_sha256"] for name, model in report["server"]["models"].items()}
    where = f"{environment['processor']}, {environment['cores']} cores" if report["ceiling"] else "another machine"
    parts = [
        f"<header><h1>Latency of {escape(report['server']['url'])}</h1><p>{escape(report['created'])} · ming-trt "
        f"{escape(report['version'])} · {escape(where)} · {_objective(report)}</p>{_stopped(report)}</header>",
        f'<div class="cards">{"".join(_card(name, own) for name, own in scenarios.items())}</div>',
        section("Throughput", _throughput_table(points), f'<div class="plots">{_sweeps(points)}</div>'),
        *_errors(points),
        *(section(_heading(own), f'<div class="plots">{"".join(_plots(own))}</div>') for own in scenarios.values()),
        section("Latency", _latency_table(points), _LATENCY_NOTE),
        section("Where the time goes", _hops_table(points), _HOPS_NOTE, f"<p>Traces: {escape(report['traces'])}.</p>"),
        *_ceiling(report),
        *([section("Not measured", pairs(report["skipped"]))] if report["skipped"] else []),
        section(
            "Conditions",
            pairs(server | flat(environment)),
            *([pairs(flat(report["manifest"], "manifest"))] if report["manifest"] else []),
            pairs(flat(report["options"], "option")),
            pairs(models),
            folded=True,
        ),
    ]
    return document("Latency report", "".join(parts))


def _by_scenario(points: Sequence[Report]) -> dict[str, list[Report]]:
    found: dict[str, list[Report]] = {}
    for point in points:
        found.setdefault(point["scenario"], []).append(point)
    return found


def _heading(points: Sequence[Report]) -> str:
    name, title = points[0]["scenario"], points[0]["title"]
    return str(name) if name == title else f"{name}: {title}"


# What stands largest on a scenario's card: the first of these that it has.
_HEADLINES = ("image", "ttfa", "ttft")
_FACTS = (("itl", "between tokens"), ("rtf", "real-time factor"), ("e2e", "end to end"))


def _card(name: str, points: Sequence[Report]) -> str:
    """The headline of a scenario: medians of the first load, the best throughput of all."""
    metrics = points[0]["metrics"]
    headline = next((key for key in _HEADLINES if key in metrics), None)
    facts = [
        (label, f"{number(metrics[key]['p50']['value'])} {metrics[key]['unit']}")
        for key, label in _FACTS
        if key in metrics
    ]
    rates = {key: max(point["totals"][key] for point in points) for key in ("tokens_per_s", "images_per_minute")}
    facts += [(f"best {key.replace('_per_', '/')}", number(rate)) for key, rate in rates.items() if rate]
    failed = sum(point["totals"]["requests"] - point["totals"]["succeeded"] for point in points)
    facts.append(("errors", f"{failed} of {sum(point['totals']['requests'] for point in points)}"))
    if headline is None:
        return card(name, "–", "no request succeeded", facts)
    found = metrics[headline]
    return card(name, number(found["p50"]["value"]), f"{found['unit']}, {found['title']}", facts)


def _latency_table(points: Sequence[Report]) -> str:
    rows = []
    for point in points:
        for metric in point["metrics"].values():
            name = f'<span class="nowrap">{escape(metric["title"])}, {escape(metric["unit"])}</span>'
            cells: list[str | Cell] = [point["scenario"], str(_load(point)), (name, None)]
            cells += [_estimate(metric[name]) for name in ("mean", "p50", "p90", "p95", "p99")]
            rows.append([*cells, (number(metric["max"]), metric["max"]), (str(metric["requests"]), metric["requests"])])
    return table(("scenario", "load", "metric", "mean", "p50", "p90", "p95", "p99", "max", "n"), rows, 3)


_RATES = ("requests_per_s", "tokens_per_s", "images_per_minute", "goodput_per_s")
_RATES_HEAD = (
    "requests/s",
    "tokens/s",
    "images/min",
    "goodput/s",
    "in time",
    "errors",
    "prompt tokens",
    "answer tokens",
)


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
                *(_some(counted[key]) for key in _RATES),
                (f"{100 * counted['goodput_share']:.0f} %", counted["goodput_share"]),
                (f'<span class="{mark}" title="{reasons}">{failed} of {counted["requests"]}</span>', failed),
                *(_some(point[key]) for key in ("prompt_tokens", "completion_tokens")),
            ]
        )
    return table(("scenario", "load", *_RATES_HEAD), rows, 2)


def _some(value: float) -> Cell:
    """A scenario without pictures has no rate of pictures, which is not a rate of 0."""
    return (number(value) if value else "–", value)


def _errors(points: Sequence[Report]) -> list[str]:
    """The sentences of failed requests, in the words of the server."""
    rows: list[list[str | Cell]] = [
        [point["scenario"], str(_load(point)), (escape(sentence), None), (str(count), count)]
        for point in points
        for sentence, count in point["totals"]["errors"].items()
    ]
    return [section("Errors", table(("scenario", "load", "what was said", "requests"), rows, 3))] if rows else []


def _hops_table(points: Sequence[Report]) -> str:
    rows: list[list[str | Cell]] = []
    for point in points:
        hops, traces = point["hops"], point["traces"] or {"rows": [], "requests": 0}
        if not hops:
            continue
        counted, traced = (
            {(row["hop"], row["part"]): row["ms"] for row in rows_} for rows_ in (hops["rows"], traces["rows"])
        )
        start: list[str | Cell] = [point["scenario"], str(_load(point))]
        for key in svg.along_the_path({**counted, **traced}):
            share = counted.get(key, 0.0) / hops["total_ms"] if hops["total_ms"] else 0.0
            part = (f"{100 * share:.1f} %", share) if key in counted else ("", -1.0)
            rows.append([*start, *key, _ms(counted.get(key)), part, _ms(traced.get(key))])
        verdict = '<span class="good">adds up</span>' if hops["closes"] else '<span class="bad">does not add up</span>'
        note = "; ".join(filter(None, (hops["note"], traces.get("note", ""))))
        ratio = hops["sum_ms"] / hops["total_ms"]
        rows.append(
            [
                *start,
                "end to end",
                (verdict + escape(f"; {note}" if note else ""), None),
                _ms(hops["total_ms"]),
                (f"{100 * ratio:.1f} %", ratio),
                _ms(traces["total_ms"] if traces["requests"] else None),
            ]
        )
    return table(("scenario", "load", "hop", "part", "statistics, ms", "of end to end", "traces, ms"), rows, 4)


def _ms(value: float | None) -> Cell:
    return ("", -1.0) if value is None else (number(value), value)


def _plots(points: Sequence[Report]) -> list[str]:
    """The plots of one scenario."""
    made, own = [], [point for point in points if point["totals"]["succeeded"]]
    shown: tuple[Metric, ...] = (TimeToFirstToken(), InterTokenLatency(), TimeToFirstAudio(), ImageLatency())
    for metric in shown:
        series = {
            str(_load(point)): [v for s in point["samples"] if not s["error"] for v in metric.of(Sample.from_dict(s))]
            for point in own
        }
        if any(series.values()):
            made.append(svg.cumulative(metric.title.capitalize(), metric.unit, series))
    bars = {str(_load(point)): _by_hop(point) for point in own if point["hops"]}
    if bars:
        made.append(svg.stacked_bars("Where the time goes, means", "ms", bars))
    traced = next((point for point in own if point["traces"] and point["traces"]["timeline"]), None)
    if traced:
        line = traced["traces"]["timeline"]
        made.append(svg.timeline(f"The trace of one request, {_load(traced)}", line, line["total_ms"]))
        if len(line["tokens"]) > 1:
            made.append(svg.timeline("The same until its first token", line, 1.08 * line["tokens"][0]))
    return made


def _sweeps(points: Sequence[Report]) -> str:
    """Latency against throughput by concurrency, and against the rate at which requests arrived."""
    made = []
    for kind, title, x_label in (
        ("concurrency", "Throughput against latency, by concurrency", "requests/s"),
        ("rate", "Latency at request rates", "requests/s that arrive"),
    ):
        lines = {
            scenario: [
                (
                    point["load"]["value"] if kind == "rate" else point["totals"]["requests_per_s"],
                    point["metrics"]["e2e"]["p50"]["value"],
                )
                for point in own
                if point["load"]["kind"] == kind and "e2e" in point["metrics"]
            ]
            for scenario, own in _by_scenario(points).items()
        }
        lines = {scenario: line for scenario, line in lines.items() if len(line) > 1}
        if lines:
            made.append(svg.line_plot(title, x_label, "end to end p50, ms", lines))
    return "".join(made)


def _by_hop(point: Report) -> dict[str, float]:
    hops: dict[str, float] = {}
    for row in point["hops"]["rows"]:
        name = f"{row['hop']} {row['part']}" if row["hop"] in svg.SPLIT else row["hop"]
        hops[name] = hops.get(name, 0.0) + row["ms"]
    least = 0.01 * point["hops"]["total_ms"]
    small = sum(ms for ms in hops.values() if ms < least)
    return {name: ms for name, ms in hops.items() if ms >= least} | ({"others": small} if small else {})


def _ceiling(report: Report) -> list[str]:
    ceiling, rows = report["ceiling"], list[list[str | Cell]]()
    for point in report["points"]:
        for phase, found in (point["ceiling"] or {}).items():
            if isinstance(found, Mapping):
                precision = found.get("precision", point["ceiling"]["precision"])
                start: list[str | Cell] = [point["scenario"], str(_load(point)), phase, precision]
                share = next((share for share in _SHARES if share in found), "")
                reached = f"{100 * found[share]:.1f} % of {_SHARES[share]}" if share else "its own time is not known"
                rows.append(
                    [
                        *start,
                        (number(found["bytes"] / 1e6), found["bytes"]) if "bytes" in found else ("", 0.0),
                        (number(found["flops"] / 1e9), found["flops"]),
                        (number(found["least_ms"]), found["least_ms"]),
                        (reached, found.get(share, 0.0)),
                    ]
                )
    if not ceiling:
        return [section("Ceiling", "<p>The server is on another machine, whose ceiling is not known here.</p>")]
    text = (
        f"<p>This machine with {ceiling['threads']} threads reads {ceiling['read_bytes_per_s'] / 1e9:.1f} GB/s and "
        f"multiplies {ceiling['float32_flops_per_s'] / 1e9:.0f} GFLOP/s in float32 (measured with "
        f"{escape(ceiling['by'])})."
    )
    if not rows:
        target = (report["manifest"] or {}).get("target", "")
        why = f"The engines are for {escape(target)}, whose ceiling is not measured."
        if target in ("", "onnxruntime"):
            why = "What the model must read and multiply is known with --bundle."
        return [section("Ceiling", f"{text} {why}</p>")]
    head = ("scenario", "load", "phase", "weights", "MB read", "GFLOP", "least ms", "reached")
    note = f"{text} Figures above 100 % are quantised products, or a busy machine at the time.</p>"
    return [section("Ceiling", note, table(head, rows, 4))]


def _stopped(report: Report) -> str:
    if not report["stopped"]:
        return ""
    return f'<p class="stopped">The measurement ended early: {escape(report["stopped"])}.</p>'


def _objective(report: Report) -> str:
    slo = report["options"]["slo"]
    text = f"objective: first token within {slo['first_token_s']:g} s, then {slo['per_token_s']:g} s per token"
    text += f", first sound within {slo['first_audio_s']:g} s" if slo["first_audio_s"] else ""
    pictures = any("image" in point["metrics"] for point in report["points"])
    return text + (f", {slo['total_s']:g} s in all" if slo["total_s"] else ", pictures at any time" if pictures else "")


def _load(point: Report) -> Load:
    return Load(**point["load"])


def _estimate(estimate: Report) -> Cell:
    interval = f"95 %: {number(estimate['low'])} to {number(estimate['high'])}"
    spread = (estimate["high"] - estimate["low"]) / 2
    text = f"{number(estimate['value'])} <small>± {number(spread, 2)}</small>"
    mark = "" if estimate["enough"] else ' class="few"'
    return f'<span{mark} title="{interval}">{text}</span>', estimate["value"]
