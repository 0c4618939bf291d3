"""Which versions go together (`compatibility.toml`, docs/compatibility.md), compared with what is installed."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of software and the versions that work; "" = no such bound. `targets` cannot do without it."""

    name: str
    packages: tuple[str, ...]
    why: str
    targets: tuple[str, ...]
    at_least: str = ""
    below: str = ""
    exactly: str = ""

    def problem(self, version: str) -> str:
        """Why `version` does not fit, in one sentence, or ""."""
        if self.exactly and _compare(version, self.exactly) != 0:
            return f"{self.name} {version}, needs {self.exactly}: {self.why}"
        if self.at_least and _compare(version, self.at_least) < 0:
            return f"{self.name} {version}, needs {self.at_least} or newer: {self.why}"
        if self.below and _compare(version, self.below) >= 0:
            return f"{self.name} {version}, needs one below {self.below}: {self.why}"
        return ""


@cache
def parts() -> tuple[Part, ...]:
    """The table."""
    data = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
    return tuple(
        Part(
            entry["name"],
            tuple(entry["packages"]),
            entry["why"],
            tuple(entry["targets"]),
            *(entry.get(bound, "") for bound in ("at_least", "below", "exactly")),
        )
        for entry in data["part"]
    )


def _compare(first: str, second: str) -> int:
    """-1, 0 or 1, by the numbers at the start of both ("2.13.0+cpu" is 2.13.0); missing ones are zero."""
    for a, b in zip_longest(_numbers(first), _numbers(second), fillvalue=0):
        if a != b:
            return -1 if a < b else 1
    return 0


def _numbers(version: str) -> Iterator[int]:
    match = re.match(r"\d+(\.\d+)*", version)
    return map(int, match[0].split(".")) if match else iter(())
