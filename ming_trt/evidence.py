"""What is known of each engine on each target, from one data file (`evidence.toml`)."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ming_trt.bundle import RUNGS
from ming_trt.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Evidence:
    """Of one target: component -> one of `ming_trt.bundle.RUNGS`, and by what that is known."""

    target: str
    by: str
    components: Mapping[str, str]

    @property
    def weakest(self) -> str:
        """The rung that every component of the target has reached."""
        return min(self.components.values(), key=RUNGS.index)


@cache
def evidence() -> Mapping[str, Evidence]:
    """Target -> what is known of it. Raises `ConfigError` if the data file is wrong."""
    file = Path(__file__).with_suffix(".toml")
    found = {}
    for target, table in tomllib.loads(file.read_text("utf-8")).items():
        for component, rung in table["components"].items():
            if rung not in RUNGS:
                raise ConfigError(f"{component} of {target} is '{rung}' in '{file}': choose from {', '.join(RUNGS)}")
        found[target] = Evidence(target, table["by"], table["components"])
    return found


def table() -> list[tuple[str, ...]]:
    """Rows for people: a heading of targets, then each component with its rungs, "" where there is no such engine."""
    known = evidence()
    names = list(dict.fromkeys(name for found in known.values() for name in found.components))
    rows = [("component", *known)]
    rows += [(name, *(found.components.get(name, "") for found in known.values())) for name in names]
    return rows


def markdown() -> str:
    """The table as README.md has it."""
    head, *rows = table()
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
