"""The build graph: steps with content keys, one outcome each, run in the order of their needs.

A step's key is a digest of its own inputs and of the keys of the steps it needs, so a change rebuilds exactly what
depends on it. This module knows nothing of models; `builders/build.py` says what the steps of a build are.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Protocol

from builders.workspace import Record, Workspace, disk_errors
from ming_trt.errors import BuildError, MingError


class Outcome(StrEnum):
    """How a step ended. NOOP: what is there was made from equal inputs and is undamaged."""

    OK = "OK"
    NOOP = "NOOP"
    SKIPPED = "SKIPPED"
    FAIL = "FAIL"


class Progress(Protocol):
    """Told what happens; must not raise."""

    def started(self, step: str, index: int, total: int) -> None:
        """`step` starts to run; `index` counts from 1."""
        ...

    def finished(self, step: str, result: Result) -> None:
        """`step` ended."""
        ...

    def note(self, step: str, text: str) -> None:
        """How far a long step is."""
        ...


class Silent:
    """Progress that is not shown."""

    def started(self, step: str, index: int, total: int) -> None:
        """Nothing."""

    def finished(self, step: str, result: Result) -> None:
        """Nothing."""

    def note(self, step: str, text: str) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a running step is given: an empty folder to write into, the folders and facts of the steps it needs, and a
    way to say how far it is."""

    work: Path
    inputs: Mapping[str, Path]
    facts: Mapping[str, Mapping[str, Any]]
    report: Callable[[str], None] = lambda _: None


@dataclass(frozen=True, slots=True)
class Step:
    """One step. `key` stands for everything it depends on besides `needs`; `run` returns facts (JSON values);
    `output` is the folder it publishes, or "" if it gives facts only; `skip` is a reason not to run it."""

    name: str
    key: str
    run: Callable[[Context], Mapping[str, Any]]
    needs: tuple[str, ...] = ()
    output: str = ""
    skip: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """A step's outcome. `reason` for SKIPPED, `error` for FAIL, `record` for OK and NOOP."""

    outcome: Outcome
    key: str = ""
    reason: str = ""
    error: MingError | None = None
    record: Record | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Run:
    """What a run of the graph gave: results in the order of the graph."""

    results: Mapping[str, Result] = field(default_factory=dict)

    @property
    def failure(self) -> MingError | None:
        """The error of the step that failed, if one did."""
        return next((r.error for r in self.results.values() if r.error is not None), None)


def digest(value: Any) -> str:
    """Hex SHA-256 of a JSON value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Graph:
    """Steps in the order of their needs. Raises `BuildError` on a duplicate, an unknown need or a cycle."""

    def __init__(self, steps: Iterable[Step]) -> None:
        self.steps: dict[str, Step] = {}
        for step in steps:
            if step.name in self.steps:
                raise BuildError(f"two build steps are named '{step.name}': rename one")
            self.steps[step.name] = step
        for step in self.steps.values():
            for need in step.needs:
                if need not in self.steps:
                    raise BuildError(f"build step '{step.name}' needs '{need}', which does not exist: add it")
        try:
            TopologicalSorter({name: step.needs for name, step in self.steps.items()}).prepare()
        except CycleError as error:
            raise BuildError(f"build steps need each other in a circle: {' -> '.join(error.args[1])}") from None
        self.order: tuple[str, ...] = tuple(self._in_order())
        self.keys: dict[str, str] = {}
        for name in self.order:
            step = self.steps[name]
            self.keys[name] = digest([name, step.key, step.output, [self.keys[need] for need in step.needs]])

    def _in_order(self) -> Iterator[str]:
        """As given, except that a step comes after what it needs."""
        done: set[str] = set()

        def visit(name: str) -> Iterator[str]:
            if name not in done:
                done.add(name)
                for need in self.steps[name].needs:
                    yield from visit(need)
                yield name

        for name in self.steps:
            yield from visit(name)

    def with_needs(self, names: Iterable[str]) -> set[str]:
        """`names` and everything they need, directly or not."""
        selected: set[str] = set()
        pending = list(names)
        while pending:
            name = pending.pop()
            if name not in selected:
                selected.add(name)
                pending += self.steps[name].needs
        return selected

    def run(self, space: Workspace, only: Iterable[str] | None = None, progress: Progress | None = None) -> Run:
        """Brings every step (or `only` those, with what they need) up to date.

        Stops at the first failure: the steps after it are SKIPPED, those before it stay. Unselected steps that are up
        to date are NOOP. Raises nothing for a failed step; look at `Run.failure`.
        """
        shown = progress or Silent()
        selected = set(self.order) if only is None else self.with_needs(only)
        results: dict[str, Result] = {}
        failed = ""
        for index, name in enumerate(self.order, 1):
            step = self.steps[name]
            result = self._settle(space, step, results, selected, failed)
            if result is None:
                shown.started(name, index, len(self.order))
                result = self._execute(space, step, results, shown)
                if result.outcome is Outcome.FAIL:
                    failed = name
            results[name] = result
            shown.finished(name, result)
        return Run(results)

    def _settle(
        self, space: Workspace, step: Step, results: Mapping[str, Result], selected: set[str], failed: str
    ) -> Result | None:
        """The result of a step that need not run, or None if it must."""
        key = self.keys[step.name]
        if step.skip:
            return Result(Outcome.SKIPPED, key, step.skip)
        for need in step.needs:
            if results[need].outcome is Outcome.SKIPPED and not failed:
                return Result(Outcome.SKIPPED, key, f"needs {need}, which was skipped: {results[need].reason}")
        record = space.records.get(step.name)
        if record is not None and record.key == key and record.inputs == _inputs(step, results):
            if space.intact(record):
                return Result(Outcome.NOOP, key, record=record)
            stale = "what is there is damaged"
        else:
            stale = "it was never built" if record is None else "what is there was made from other inputs"
        if failed:
            return Result(Outcome.SKIPPED, key, f"not reached, since {failed} failed")
        if step.name not in selected:
            return Result(Outcome.SKIPPED, key, f"not selected, and {stale}")
        return None

    def _execute(self, space: Workspace, step: Step, results: Mapping[str, Result], shown: Progress) -> Result:
        key = self.keys[step.name]
        started = time.monotonic()
        try:
            with disk_errors(space.folder, steps=True):
                space.note("started", step=step.name, key=key)
                work = space.begin(step.name)
                _reset_peak()
                records = {need: results[need].record for need in step.needs}
                context = Context(
                    work,
                    {need: space.path(r.output) for need, r in records.items() if r is not None},
                    {need: r.facts for need, r in records.items() if r is not None},
                    lambda text: shown.note(step.name, text),
                )
                facts = json.loads(json.dumps(step.run(context)))
            seconds = time.monotonic() - started
            record = Record(
                step.name,
                key,
                step.output,
                inputs=_inputs(step, results),
                facts=facts,
                seconds=round(seconds, 3),
                peak_bytes=peak_memory(),
            )
            return Result(Outcome.OK, key, record=space.publish(record, work), seconds=seconds)
        except Exception as problem:  # noqa: BLE001 - a library's exception becomes the step's failure, chained for --debug
            error = problem if isinstance(problem, MingError) else _sentence(step.name, problem)
            space.abandon(step.name)
            _note_failure(space, step.name, error)
            return Result(Outcome.FAIL, key, error=error, seconds=time.monotonic() - started)
        except BaseException:
            # interrupted: the next builder would clear this away, but it may be large
            space.abandon(step.name)
            raise


def _inputs(step: Step, results: Mapping[str, Result]) -> dict[str, str]:
    records = {need: results[need].record for need in step.needs}
    return {need: record.digest for need, record in records.items() if record is not None}


def _sentence(step: str, problem: Exception) -> BuildError:
    text = " ".join(str(problem).split()) or "no message"
    error = BuildError(f"build step {step} failed ({type(problem).__name__}: {text}): see it with --debug")
    error.__cause__ = problem
    return error


def _note_failure(space: Workspace, step: str, error: MingError) -> None:
    try:
        space.note("failed", step=step, error=str(error))
    except (BuildError, OSError) as second:
        # The disk may be the reason of the failure; the user sees the first error.
        error.add_note(f"the journal could not be written either: {second}")


def _reset_peak() -> None:
    """Makes the kernel measure the peak of resident memory from now on."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        # Without it the peak is that of the process so far: an upper bound.
        return


def peak_memory() -> int:
    """Peak of this process's resident memory since the running step began, bytes; 0 where the kernel does not tell."""
    try:
        status = Path("/proc/self/status").read_text("ascii")
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
