"""Pages that need nothing but themselves: style and script inside, plots as inline SVG, tables that sort and filter."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

Cell = tuple[str, float | None]  # HTML that is shown, and what it is sorted by (None: by its text)

# One policy for all: nothing may be loaded from anywhere.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_HERE = Path(__file__).parent


def document(title: str, body: str) -> str:
    """A page with our style and script; `body` is HTML."""
    style, script = ((_HERE / name).read_text("utf-8") for name in ("report.css", "report.js"))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><main>{body}</main><script>{script}</script></body></html>"
    )


def section(title: str, *parts: str, folded: bool = False) -> str:
    """A part of the page with its heading, whose first words are its id; `folded`: only that is seen at first."""
    body, name = "".join(parts), escape(title)
    if folded:
        return f"<details><summary><h2>{name}</h2></summary>{body}</details>"
    return f'<section id="{name.split(":")[0].lower().replace(" ", "-")}"><h2>{name}</h2>{body}</section>'


def card(title: str, number: str, unit: str, facts: Sequence[tuple[str, str]]) -> str:
    """A headline figure with smaller ones below; all text."""
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    big = f'<p class="big">{escape(number)} <small>{escape(unit)}</small></p>'
    return f'<article class="card"><h3>{escape(title)}</h3>{big}<dl>{rows}</dl></article>'


def table(head: Sequence[str], rows: Iterable[Sequence[str | Cell]], left: int = 1) -> str:
    """A sortable table; the first `left` columns are text. Cells that are plain text are escaped."""
    titles = "".join(f'<th scope="col"{_left(i < left)}>{escape(title)}</th>' for i, title in enumerate(head))
    body = "".join("<tr>" + "".join(_cell(cell, i < left) for i, cell in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs(values: Mapping[str, Any]) -> str:
    """A table of names and values."""
    return table(("what", "value"), [[str(key), (escape(str(value)), None)] for key, value in values.items()], 2)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by joined names; lists as text."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix} {key}".strip()
        if isinstance(value, Mapping):
            found |= flat(value, name)
        else:
            found[name] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
    return found


def number(value: float, digits: int = 3) -> str:
    """For people: so many digits that count, thousands with commas."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def _left(yes: bool) -> str:
    return ' class="left"' if yes else ""


def _cell(cell: str | Cell, left: bool) -> str:
    if isinstance(cell, str):
        return f"<td{_left(left)}>{escape(cell)}</td>"
    text, value = cell
    return f"<td{'' if value is None else f' data-v={json.dumps(str(value))}'}{_left(left)}>{text}</td>"
