"""Whether inputs of certain shapes lie in a profile, and an engine that insists on it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from builders.tensorrt_profiles import Phase
from ming_trt.runtime.engine import Array, Arrays, Engine

Shapes = Mapping[str, Sequence[int | str | None]]


def in_a_profile(
    ways: Sequence[Phase], fixed: Mapping[str, int], symbols: Shapes, shapes: Mapping[str, Sequence[int]]
) -> bool:
    """Whether one of `ways` takes inputs of `shapes`, whose sizes `symbols` names; caches have `fixed` sizes, which
    hold at least as many places."""
    sizes = [
        (symbol, size)
        for name, given in shapes.items()
        for symbol, size in zip(symbols[name], given, strict=True)
        if isinstance(symbol, str)
    ]
    return any(
        all(
            size <= fixed[symbol] if symbol in fixed else way.sizes[symbol][0] <= size <= way.sizes[symbol][2]
            for symbol, size in sizes
        )
        for way in ways
    )


class Profiled:
    """An engine that asserts that each of its runs lies in a profile; `sizes` are those of every run."""

    def __init__(self, engine: Engine, ways: Sequence[Phase], fixed: Mapping[str, int]) -> None:
        self.engine, self.ways, self.fixed = engine, ways, fixed
        self.name, self.inputs, self.outputs = engine.name, engine.inputs, engine.outputs
        self.runs: list[dict[str, tuple[int, ...]]] = []

    def run(
        self,
        feeds: Mapping[str, Array],
        outputs: Collection[str] | None = None,
        into: Mapping[str, Array] | None = None,
    ) -> Arrays:
        shapes = {name: value.shape for name, value in feeds.items()}
        symbols = {name: spec.shape for name, spec in self.inputs.items()}
        assert in_a_profile(self.ways, self.fixed, symbols, shapes), f"{self.name} was given {shapes}"
        self.runs.append(shapes)
        return self.engine.run(feeds, outputs, into)

    def close(self) -> None:
        self.engine.close()
