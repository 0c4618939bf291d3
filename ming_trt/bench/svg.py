"""Plots as inline SVG: lines, steps and stacked bars. Colours come from the page's style, by class `s0`, `s1`, ..."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 14, 42
SERIES = 8

Point = tuple[float, float]


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
    return _figure(title, "".join(body), list(series))


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


def stacked_bars(title: str, x_label: str, bars: Mapping[str, Mapping[str, float]]) -> str:
    """One horizontal bar per entry, made of its parts in their order; parts of one name share a colour."""
    names = list(dict.fromkeys(part for parts in bars.values() for part in parts))
    x = Axis.over(x_label, (sum(parts.values()) for parts in bars.values()))
    label_width, row = 150, 26
    height = _TOP + row * len(bars) + _BOTTOM
    scale = (WIDTH - label_width - _RIGHT) / x.top
    body = []
    for tick in x.ticks:
        at, bottom = label_width + tick * scale, height - _BOTTOM
        body.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        body.append(_text("tick", at, bottom + 16, "middle", _short(tick)))
    for i, (name, parts) in enumerate(bars.items()):
        y, at = _TOP + i * row, float(label_width)
        body.append(_text("tick", label_width - 8, y + 17, "end", name))
        for part, value in parts.items():
            colour, width = f"s{names.index(part) % SERIES}", max(0.0, value * scale)
            box = f'x="{at:.1f}" y="{y + 4}" width="{width:.1f}" height="{row - 8}"'
            told = _told(f"{name}, {part}: {_short(value)} {x_label}")
            body.append(f'<rect class="bar {colour}" {box}>{told}</rect>')
            at += width
    body.append(_text("label", (WIDTH + label_width) / 2, height - 6, "middle", x_label))
    return _figure(title, "".join(body), names, height)


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
        parts.append(_text("tick", at, bottom + 16, "middle", _short(tick)))
    middle = (_TOP + bottom) / 2
    parts.append(_text("label", (WIDTH + _LEFT) / 2, HEIGHT - 6, "middle", x.label))
    parts.append(_text("label", 12, middle, "middle", y.label, f' transform="rotate(-90 12 {middle:.1f})"'))
    return "".join(parts)


def _told(text: str) -> str:
    """What a pointer over the element shows."""
    return f"<title>{escape(text)}</title>"


def _text(kind: str, x: float, y: float, anchor: str, text: str, more: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _figure(title: str, body: str, legend: Sequence[str], height: int = HEIGHT) -> str:
    keys = "".join(f'<span><i class="key s{i % SERIES}"></i>{escape(name)}</span>' for i, name in enumerate(legend))
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}">{body}</svg><div class="legend">{keys}</div></figure>'
    )


def _short(value: float) -> str:
    return f"{value:.4g}"
