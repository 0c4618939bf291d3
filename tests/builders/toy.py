"""A toy build graph in a process of its own, which dies at a chosen change on disk.

python toy.py BUNDLE DEATH [TEXT]     DEATH: number of the hook call to die at, 0 = live
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builders.steps import Context, Graph, Run, Step, digest
from builders.workspace import Workspace


def toy_graph(source: str) -> Graph:
    """source → a → b (two files, one nested) → check (facts only); c stands alone."""

    def a(context: Context) -> Mapping[str, Any]:
        (context.work / "a.txt").write_text(source * 3)
        return {"length": len(source) * 3}

    def b(context: Context) -> Mapping[str, Any]:
        text = (context.inputs["a"] / "a.txt").read_text()
        (context.work / "deep").mkdir()
        (context.work / "deep" / "b.bin").write_bytes(text.encode() * 1000)
        (context.work / "b.txt").write_text(text.upper())
        return {"from": context.facts["a"]["length"]}

    def c(context: Context) -> Mapping[str, Any]:
        (context.work / "c.txt").write_text("constant")
        return {}

    def check(context: Context) -> Mapping[str, Any]:
        return {"verdict": (context.inputs["b"] / "b.txt").read_text() == source.upper() * 3}

    return Graph(
        [
            Step("a", digest(source), a, output="a"),
            Step("b", "b1", b, ("a",), output="b"),
            Step("c", "c1", c, output="c"),
            Step("check", "k1", check, ("b",)),
        ]
    )


def build(folder: Path, source: str, hook: Any = lambda _: None) -> Run:
    graph = toy_graph(source)
    with Workspace(folder, hook) as space:
        run = graph.run(space)
        if run.failure is not None:
            raise run.failure
        space.write_manifest(repr({name: graph.keys[name] for name in graph.order}))
    return run


def main() -> None:
    death = int(sys.argv[2])
    calls = 0

    def hook(_: str) -> None:
        nonlocal calls
        calls += 1
        if calls == death:
            os._exit(137)

    build(Path(sys.argv[1]), sys.argv[3] if len(sys.argv) > 3 else "one", hook)
    print(calls)


if __name__ == "__main__":
    main()
