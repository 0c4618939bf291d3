"""One replay: the cases, the checkpoint, the engines built from it, and the table of results.

Engines are built when the first case asks for them, with the same `builders.build` that `ming-trt build` calls.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy.typing as npt

from ming_trt.config import MingConfig, load_config
from ming_trt.errors import MingError
from ming_trt.golden.cases import Cases, Comparison
from ming_trt.golden.overlay import MARK, make_folder

if TYPE_CHECKING:
    import torch

    from ming_trt.checkpoint import Checkpoint
    from ming_trt.runtime.engine import Engine

# How a value was computed: by a built engine, by the torch definition (inner values), or on the host.
Route = Literal["engine", "torch", "host"]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    case: str
    route: Route
    result: Comparison


@dataclass(frozen=True, slots=True)
class NotRun:
    """A case that could not be replayed, and why. `unsupported`: this program does not know its kind."""

    case: str
    reason: str
    unsupported: bool = False


@dataclass(slots=True)
class Session:
    """`checkpoint` is the (overlaid) folder; `work` receives bundles; `preset` is the build preset's name."""

    cases: Cases
    checkpoint: Path
    work: Path
    preset: str | None = None
    rows: list[Row] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)
    _engines: dict[tuple[str, str], Engine] = field(default_factory=dict)
    _references: dict[str, torch.nn.Module] = field(default_factory=dict)
    _config: MingConfig | None = None
    _linked: set[str] = field(default_factory=set)

    @property
    def config(self) -> MingConfig:
        """The checkpoint's configuration."""
        if self._config is None:
            self._config = load_config(self.checkpoint)
        return self._config

    def with_rope(self, kind: str) -> MingConfig:
        """The configuration with another kind of rotary embedding."""
        return replace(self.config, llm=replace(self.config.llm, rope_kind=kind))

    def open_checkpoint(self) -> Checkpoint:
        from ming_trt.checkpoint import Checkpoint

        return Checkpoint(self.checkpoint)

    def engine(self, component: str, rope: str | None = None) -> Engine:
        """The built engine; `rope` asks for one built as if the configuration named that kind."""
        from builders.build import Options, build
        from ming_trt import presets
        from ming_trt.bundle import Bundle
        from ming_trt.runtime.engine import open_engine

        kind = rope or self.config.llm.rope_kind
        key = (component, kind)
        if key not in self._engines:
            target = self.work / f"bundle-{kind}"
            preset = presets.load(self.preset or presets.default_name(None))
            build(Options(self._checkpoint_with(kind), target, preset, only=(component,)))
            self._engines[key] = open_engine(Bundle.open(target), component)
        return self._engines[key]

    def reference(self, component: str) -> torch.nn.Module:
        """The torch definition of an engine, float32, with its weights."""
        from builders.registry import component as find

        if component not in self._references:
            self._references[component] = find(component).reference(self.config, self.open_checkpoint()).eval()
        return self._references[component]

    def absent(self, component: str) -> str | None:
        """None if the checkpoint holds the component, else the reason."""
        from builders.registry import component as find

        return find(component).needs(self.config, self.open_checkpoint())

    def add(self, case: str, route: Route, name: str, value: npt.ArrayLike, tolerance: float | None = None) -> None:
        """Compares `value` with the reference array `name` and adds the line."""
        self.rows.append(Row(case, route, self.cases.compare(name, value, tolerance)))

    def add_equal(self, case: str, name: str, value: object, expected: object) -> None:
        """Compares values that are not arrays: strings, sizes, lists of numbers. They must be equal."""
        same = value == expected
        note = "" if same else f"got {_short(value)}, expected {_short(expected)}"
        limit = 0.0 if same else float("inf")
        self.rows.append(Row(case, "host", Comparison(name, 1, limit, limit, 0.0, same, note)))

    def fail(self, case: str, error: MingError) -> None:
        """Adds the line of a case that ended with an error: it counts as failed, and the others go on."""
        inf = float("inf")
        self.rows.append(Row(case, "host", Comparison(case, 0, inf, inf, 0.0, False, str(error))))

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()

    def _checkpoint_with(self, kind: str) -> Path:
        if kind == self.config.llm.rope_kind:
            return self.checkpoint
        folder = self.work / f"checkpoint-{kind}"
        if kind not in self._linked:
            make_folder(folder)
            for item in self.checkpoint.iterdir():
                if item.name not in ("config.json", MARK):
                    (folder / item.name).symlink_to(item.resolve())
            raw: dict[str, Any] = json.loads((self.checkpoint / "config.json").read_text("utf-8"))
            raw["llm_config"]["rope_scaling"] = {**(raw["llm_config"].get("rope_scaling") or {}), "type": kind}
            (folder / "config.json").write_text(json.dumps(raw))
            self._linked.add(kind)
        return folder


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
