"""Replays a folder of reference cases against a checkpoint and says, array by array, whether they agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from ming_trt.errors import ConfigError
from ming_trt.golden.cases import Cases
from ming_trt.golden.overlay import overlay
from ming_trt.golden.session import NotRun, Row, Session

# What can be replayed, and the module whose `replay(session)` does it.
KINDS = {
    "understanding": "ming_trt.golden.understanding",
    "image": "ming_trt.golden.image",
    "speech": "ming_trt.golden.speech",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """All lines of a replay. `uncompared` are outputs of the cases that no line compared."""

    rows: tuple[Row, ...]
    not_run: tuple[NotRun, ...]
    uncompared: tuple[str, ...]

    def failures(self, strict: bool) -> list[str]:
        """Why the replay failed, one sentence each; empty if it passed."""
        reasons = []
        failed = [row for row in self.rows if not row.result.passed]
        if failed:
            reasons.append(
                f"{len(failed)} of {len(self.rows)} comparisons failed, the first is {failed[0].result.name}"
            )
        if not self.rows:
            reasons.append("nothing was compared")
        if strict:
            unsupported = [case.case for case in self.not_run if case.unsupported]
            if unsupported:
                reasons.append(
                    f"{len(unsupported)} cases are of a kind that is not supported: {', '.join(unsupported[:5])}"
                )
            if self.uncompared:
                reasons.append(f"{len(self.uncompared)} outputs were not compared: {', '.join(self.uncompared[:5])}")
        return reasons


def kinds_in(cases: Cases) -> list[str]:
    """The kinds that a folder holds: a list of cases is the understanding set, anything else the generation set."""
    return ["understanding"] if "cases" in cases.index else ["image", "speech"]


def replay(
    checkpoints: Sequence[Path],
    folder: Path,
    work: Path,
    *,
    preset: str | None = None,
    only: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Builds what the cases need under `work` and compares. Raises `MingError` where nothing could be started."""
    cases = Cases(folder)
    held = kinds_in(cases)
    if only is not None and only not in KINDS:
        raise ConfigError(f"--only {only} is unknown: choose one of {', '.join(KINDS)}")
    chosen = [kind for kind in held if only in (None, kind)]
    if not chosen:
        raise ConfigError(f"'{folder}' holds cases of {', '.join(held)} only: leave out --only {only}")
    session = Session(cases, overlay(checkpoints, work / "checkpoint"), work, preset)
    expected: set[str] = set()
    try:
        for kind in chosen:
            progress(kind)
            module = import_module(KINDS[kind])
            module.replay(session)
            expected |= {
                name for name in cases.arrays if module.covers(name) and cases.arrays[name]["role"] == "output"
            }
    finally:
        session.close()
    compared = {row.result.name for row in session.rows}
    skipped = tuple(case.case for case in session.not_run)
    missing = sorted(n for n in expected - compared if not n.startswith(skipped) or not skipped)
    return Outcome(tuple(session.rows), tuple(session.not_run), tuple(missing))
