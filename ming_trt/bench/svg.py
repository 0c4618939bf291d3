"""Plots as inline SVG: lines, steps, bars, timelines. Colours come from the page's style, by class `s0`, `s1`, ..."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 14, 14, 44
_DIGIT = 8  # width of one at the size of `.tick`, with some room
SERIES = 10
# Hops whose parts are what one wants to tell apart: each has its colour.
SPLIT = ("llm", "image", "speech")

Point = tuple[float, float]

# The hops in the order of a request's path, and the colours that they have in every plot.
PATH = (
    "client", "client and network", "scheduling and python", "preprocess", "vision_encoder", "audio_encoder", "llm",
    "postprocess", "image", "speech",
)  # fmt: skip
_PARTS = (
    "started late", "queue", "input", "prefill", "condition", "encode", "denoise", "decode", "compute", "output",
    "voice", "text", "talker", "flow", "vocoder", "listener",
)  # fmt: skip
_COLOURS = {
    "preprocess": 0, "vision_encoder": 1, "audio_encoder": 6, "llm queue": 8, "llm input": 15, "llm prefill": 3,
    "llm decode": 4, "postprocess": 5, "image": 2, "image denoise": 2, "image decode": 10, "image encode": 11,
    "image condition": 12, "image by difference": 13, "speech": 2, "speech flow": 2,
    "speech vocoder": 10, "speech talker": 11, "speech voice": 12, "speech by difference": 13,
    "speech listener": 15, "client": 7, "client and network": 7,
    "scheduling and python": 9, "others": 14,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear axis from 0 to `top`, with `ticks` at round numbers."""

    label: str
    top: float
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, label: str, values: Iterable[float]) -> Axis:
        """From 0 to a little above the largest of `values`."""
        largest = max(values, default=0.0) or 1.0
        raw = largest / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
        count = math.ceil(largest / step - 1e-9)
        return cls(label, count * step, tuple(i * step for i in range(count + 1)))


def line_plot(title: str, x_label: str, y_label: str, series: Mapping[str, Sequence[Point]], marks: bool = True) -> str:
    """Lines through the points of each series, in their order; with `marks`, a dot at each that tells its values."""
    points = [point for line in series.values() for point in line]
    x, y = Axis.over(x_label, (p[0] for p in points)), Axis.over(y_label, (p[1] for p in points))
    body = [_axes(x, y)]
    for number, (name, line) in enumerate(series.items()):
        colour = f"s{number % SERIES}"
        at = [(_across(x, a), _up(y, b)) for a, b in line]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
        body.append(f'<polyline class="line {colour}" points="{path}"/>')
        for (a, b), (first, second) in zip(at, line, strict=True) if marks else ():
            told = _told(f"{name}: {_short(first)} {x_label}, {_short(second)} {y_label}")
            body.append(f'<circle class="dot {colour}" cx="{a:.1f}" cy="{b:.1f}" r="3.5">{told}</circle>')
    return _figure(title, "".join(body), {name: i % SERIES for i, name in enumerate(series)})


def cumulative(title: str, x_label: str, series: Mapping[str, Sequence[float]]) -> str:
    """For each series, the share of its numbers that are at most x."""
    lines: dict[str, list[Point]] = {}
    for name, numbers in series.items():
        ordered, line = sorted(numbers), list[Point]()
        for i, value in enumerate(ordered):
            line += [(value, 100 * i / len(ordered)), (value, 100 * (i + 1) / len(ordered))]
        if line:
            lines[name] = line
    return line_plot(title, x_label, "% of requests", lines, marks=False)


def along_the_path(keys: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """(hop, part) pairs in the order in which a request meets them; hops that are not known come last."""

    def place(key: tuple[str, str]) -> tuple[int, int]:
        hop, part = key
        parts = ("input", "queue", *_PARTS[3:]) if hop == "llm" else _PARTS
        return (
            PATH.index(hop) if hop in PATH else len(PATH),
            parts.index(part) if part in parts else len(parts),
        )

    return sorted(keys, key=place)


def stacked_bars(title: str, x_label: str, bars: Mapping[str, Mapping[str, float]]) -> str:
    """One horizontal bar per entry, made of its parts in their order; parts of one name share a colour, hops have
    theirs."""
    names = list(dict.fromkeys(part for parts in bars.values() for part in parts))
    colours = _colours(names)
    x = Axis.over(x_label, (sum(parts.values()) for parts in bars.values()))
    label_width, row = 116, 30
    height = _TOP + row * len(bars) + _BOTTOM
    scale = (WIDTH - label_width - _RIGHT) / x.top
    body = _verticals(x, label_width, scale, height)
    for i, (name, parts) in enumerate(bars.items()):
        y, at = _TOP + i * row, float(label_width)
        body.append(_text("tick", label_width - 8, y + 19, "end", name))
        for part, value in parts.items():
            width = max(0.0, value * scale)
            body.append(_bar(colours[part], at, y + 4, width, row - 8, f"{name}, {part}: {_short(value)} {x_label}"))
            at += width
    body.append(_text("label", (WIDTH + label_width) / 2, height - 6, "middle", x_label))
    return _figure(title, "".join(body), {name: colours[name] for name in names}, height)


def goal_bars(title: str, x_label: str, bars: Sequence[tuple[str, float, float, str]]) -> str:
    """One horizontal bar per (name, value, goal, what a pointer shows), with a mark at its goal (0: none)."""
    x = Axis.over(x_label, [v for _, value, goal, _ in bars for v in (value, goal)])
    label_width, row = 245, 26
    height = _TOP + row * len(bars) + _BOTTOM
    scale = (WIDTH - label_width - 3 * _RIGHT) / x.top
    body = _verticals(x, label_width, scale, height)
    for i, (name, value, goal, told) in enumerate(bars):
        y = _TOP + i * row
        colour = 7 if not goal else 2 if value >= goal else 1
        body.append(_text("tick", label_width - 8, y + 17, "end", name))
        body.append(_bar(colour, label_width, y + 4, value * scale, row - 8, told))
        body.append(_text("value", label_width + max(value, goal) * scale + 6, y + 17, "start", f"{value:.3g}"))
        if goal:
            at = label_width + goal * scale
            body.append(f'<line class="goal" x1="{at:.1f}" x2="{at:.1f}" y1="{y + 1}" y2="{y + row - 1}"/>')
    body.append(_text("label", (WIDTH + label_width) / 2, height - 6, "middle", x_label))
    return _figure(title, "".join(body), {"reached": 2, "not reached": 1}, height)


def log_plot(title: str, x_label: str, y_label: str, series: Mapping[str, Sequence[Point]]) -> str:
    """Like `line_plot` with both axes logarithmic, so that a power is a straight line; all values above 0."""
    points = [point for line in series.values() for point in line]
    x, y = (_Log.over(point[i] for point in points) for i in (0, 1))
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    body = []
    for value in y.ticks:
        at = bottom - y.place(value) * (bottom - _TOP)
        body.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        body.append(_text("tick", _LEFT - 6, at + 4, "end", _short(value)))
    for value in x.ticks:
        at = _LEFT + x.place(value) * (right - _LEFT)
        body.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        body.append(_text("tick", at, bottom + 16, "middle", _short(value)))
    for number, (name, line) in enumerate(series.items()):
        places = [(_LEFT + x.place(a) * (right - _LEFT), bottom - y.place(b) * (bottom - _TOP)) for a, b in line]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        body.append(f'<polyline class="line s{number}" points="{path}"/>')
        for (a, b), (first, second) in zip(places, line, strict=True):
            told = _told(f"{name}: {_short(first)} {x_label}, {_short(second)} {y_label}")
            body.append(f'<circle class="dot s{number}" cx="{a:.1f}" cy="{b:.1f}" r="3.5">{told}</circle>')
    middle = (_TOP + bottom) / 2
    body.append(_text("label", (WIDTH + _LEFT) / 2, HEIGHT - 6, "middle", x_label))
    body.append(_text("label", 12, middle, "middle", y_label, f' transform="rotate(-90 12 {middle:.1f})"'))
    return _figure(title, "".join(body), {name: i for i, name in enumerate(series)})


@dataclass(frozen=True, slots=True)
class _Log:
    """A logarithmic axis between two numbers above 0."""

    low: float
    high: float

    @classmethod
    def over(cls, values: Iterable[float]) -> _Log:
        numbers = list(values)
        return cls(min(numbers) / 1.15, max(numbers) * 1.15)

    @property
    def ticks(self) -> list[float]:
        """Round numbers, about five."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5)):
            found = [f * 10.0**p for p in powers for f in factors if self.low <= f * 10.0**p <= self.high]
            if len(found) >= 4:
                break
        return found

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        return math.log(value / self.low) / math.log(self.high / self.low)


def timeline(title: str, line: Mapping[str, Any], until: float) -> str:
    """One request as its server traced it (`traces.timeline`), up to `until` ms: a lane per model, and one of the
    client with a stroke at each message that brought tokens. Waiting and copying are faint."""
    lanes = [
        "client",
        *sorted({span["model"] for span in line["spans"]}, key=lambda m: PATH.index(m) if m in PATH else 99),
    ]
    label_width, row = 116, 24
    height = _TOP + row * len(lanes) + _BOTTOM
    scale = (WIDTH - label_width - _RIGHT) / until
    x = Axis.over("ms", [until])
    body = _verticals(Axis("ms", until, tuple(t for t in x.ticks if t <= until)), label_width, scale, height)
    for i, lane in enumerate(lanes):
        body.append(_text("tick", label_width - 8, _TOP + i * row + 16, "end", lane))
    ours = [("client and network", "waits", 0.0, min(line["total_ms"], until))]
    spans = ours + [(s["model"], s["part"], s["start"], s["end"]) for s in line["spans"]]
    used: dict[str, int] = {}
    for model, part, start, end in spans:
        end = min(end, until)
        if end <= start:
            continue
        name = f"{model} {part}" if model in SPLIT else model
        colour = used.setdefault(name, _COLOURS.get(name, 7))
        y = _TOP + row * (0 if model == "client and network" else lanes.index(model))
        faint = " faint" if part in ("queue", "input", "output", "waits") else ""
        told = f"{model}, {part}: {_short(end - start)} ms from {_short(start)} ms on"
        width = max(0.6, (end - start) * scale)
        body.append(_bar(colour, label_width + start * scale, y + 4, width, row - 8, told, faint))
    for at in (at for at in line["tokens"] if at <= until):
        place = label_width + at * scale
        body.append(f'<line class="mark" x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP + 4}" y2="{_TOP + row - 4}"/>')
    body.append(_text("label", (WIDTH + label_width) / 2, height - 6, "middle", "ms since it was due"))
    return _figure(title, "".join(body), {name: used[name] for name in used}, height)


def _colours(names: Sequence[str]) -> dict[str, int]:
    """Names of hops have their colours; other names get one after the other."""
    known = all(name in _COLOURS or name.split(" + ")[0] in _COLOURS for name in names)
    return {
        name: _COLOURS.get(name, _COLOURS.get(name.split(" + ")[0], 7)) if known else i % SERIES
        for i, name in enumerate(names)
    }


def _verticals(x: Axis, left: float, scale: float, height: int) -> list[str]:
    body, bottom = [], height - _BOTTOM
    for tick in x.ticks:
        at = left + tick * scale
        body.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        body.append(_x_tick(at, bottom, tick))
    return body


def _bar(colour: int, x: float, y: float, width: float, height: float, told: str, more: str = "") -> str:
    box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" rx="1.5"'
    return f'<rect class="bar s{colour}{more}" {box}>{_told(told)}</rect>'


def _across(axis: Axis, value: float) -> float:
    return _LEFT + value / axis.top * (WIDTH - _LEFT - _RIGHT)


def _up(axis: Axis, value: float) -> float:
    return HEIGHT - _BOTTOM - value / axis.top * (HEIGHT - _TOP - _BOTTOM)


def _axes(x: Axis, y: Axis) -> str:
    parts = []
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    for tick in y.ticks:
        at = _up(y, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text("tick", _LEFT - 6, at + 4, "end", _short(tick)))
    for tick in x.ticks:
        at = _across(x, tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(_x_tick(at, bottom, tick))
    middle = (_TOP + bottom) / 2
    parts.append(_text("label", (WIDTH + _LEFT) / 2, HEIGHT - 6, "middle", x.label))
    parts.append(_text("label", 12, middle, "middle", y.label, f' transform="rotate(-90 12 {middle:.1f})"'))
    return "".join(parts)


def _x_tick(at: float, bottom: float, value: float) -> str:
    """A number below an axis; a long one at the right edge ends there."""
    text = _short(value)
    wide = _DIGIT * len(text) / 2 > WIDTH - at
    return _text("tick", WIDTH if wide else at, bottom + 16, "end" if wide else "middle", text)


def _told(text: str) -> str:
    """What a pointer over the element shows."""
    return f"<title>{escape(text)}</title>"


def _text(kind: str, x: float, y: float, anchor: str, text: str, more: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _figure(title: str, body: str, legend: Mapping[str, int], height: int = HEIGHT) -> str:
    """`legend`: name -> colour."""
    keys = "".join(f'<span><i class="key s{colour}"></i>{escape(name)}</span>' for name, colour in legend.items())
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}">{body}</svg><div class="legend">{keys}</div></figure>'
    )


def _short(value: float) -> str:
    return f"{value:.4g}"
