"""Writes README.md's table of measurements and its picture from a result of `suite.py`.

    python benchmarks/readme.py [RESULT] [--check]

`--check` changes nothing and fails if README.md or the picture is not what the result says.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import HERE, RESULTS, host_id
from suite_page import disturbed, ratio_plot, titled

README, PICTURE = HERE.parent / "README.md", HERE.parent / "docs" / "images" / "benchmarks.svg"
BEGIN, END = "<!-- measured: benchmarks/readme.py writes this -->", "<!-- /measured -->"
# The page's style for light screens, since a picture of its own has no page around it.
_STYLE = (
    "text{font-family:system-ui,-apple-system,sans-serif}.grid{stroke:#e2e6ec}.tick,.label{fill:#5d6878;font-size:12.5px}"
    ".value{fill:#1a2130;font-size:12.5px;font-weight:600}.goal{stroke:#c93b3b;stroke-width:1.5;stroke-dasharray:4 3}"
    ".s1{fill:#e0852b}.s2{fill:#3f9d5d}.s7{fill:#8a94a2}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?", type=Path, default=RESULTS / f"{host_id()}.json")
    parser.add_argument("--check", action="store_true", help="fail if anything would change")
    options = parser.parse_args()
    merged = json.loads(options.result.read_text("utf-8"))
    wanted = {README: filled(README.read_text("utf-8"), section(merged, options.result)), PICTURE: picture(merged)}
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text("utf-8") != text]
    if options.check:
        sys.exit(f"not what {options.result.name} says: {', '.join(path.name for path in stale)}" if stale else 0)
    for path, text in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


def filled(readme: str, text: str) -> str:
    """`readme` with `text` between the marks. Raises ValueError if it does not have them."""
    before, mark, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise ValueError(f"README.md has no '{BEGIN}' with '{END}' behind it")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def section(merged: Mapping[str, Any], source: Path) -> str:
    """Conditions, table, picture."""
    about, rows = merged["environment"], asked(merged)
    packages = about["packages"]
    where = f"{about['processor']}, {about['cores']} cores, {about['memory_bytes'] / 2**30:.0f} GiB"
    lines = [
        f"Measured on {_plain(where)} ({merged['created'][:10]}; torch {packages['torch']}, ONNX Runtime "
        f"{packages['onnxruntime']}). Each ratio is of medians within one run: same weights, same threads, candidates "
        "in turns; the interval is a 95 % bootstrap. The peer is the best of those that "
        "[docs/bench.md](docs/bench.md) names.",
        *(["", f"**{warning}**"] if (warning := disturbed(merged)) else []),
        "",
        "| what | ours | peer | ratio | asked |",
        "| --- | --- | --- | --- | --- |",
        *(_line(row) for row in rows),
        "",
        *(["; ".join(f"{name}: {why}" for name, why in merged["failures"].items()), ""] if merged["failures"] else []),
        f"![Times faster than the best peer, and what is asked]({PICTURE.relative_to(README.parent).as_posix()})",
        "",
        f"`{source.resolve().relative_to(README.parent).as_posix()}` has every figure. The dashed marks of the picture "
        "are what is asked.",
        "",
    ]
    return "\n".join(lines)


def asked(merged: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of which something is asked."""
    return [row for row in titled(merged) if row["target"] or row["more"].get("asked")]


def _line(row: Mapping[str, Any]) -> str:
    peer, ratio, demand = "", "", row["more"].get("asked", "")
    if row["peer"]:
        peer = f"{_time(row['peer_ms'])}, {row['peer']}"
        ratio = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
    if row["target"]:
        more = f", goal {row['goal']:.3g}" if row["goal"] > row["target"] else ""
        demand = f"{row['target']:.3g}{more}: {row['verdict']}"
    return f"| {row['what']} | {_time(row['ours_ms'])} | {peer} | {ratio} | {demand} |"


def _time(ms: float) -> str:
    return f"{ms / 1000:.3g} s" if ms >= 1000 else f"{ms:.3g} ms"


def _plain(text: str) -> str:
    return text.replace("(R)", "").replace("(TM)", "")


def picture(merged: Mapping[str, Any]) -> str:
    """The bars of the report as a file of its own, on white."""
    drawn = ratio_plot(titled(merged))
    found = re.search(r'<svg viewBox="0 0 (\d+) (\d+)"([^>]*)>(.*?)</svg>', drawn, re.S)
    if found is None:
        raise ValueError("the result has no ratio of which something is asked")
    width, height, more, body = found.groups()
    back = f'<rect width="{width}" height="{height}" rx="8" fill="#fff"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"{more}>'
    return f"{head}<style>{_STYLE}</style>{back}{body}</svg>\n"


if __name__ == "__main__":
    main()
