"""Progress of a build on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from builders.steps import Result


class BuildProgress:
    """A `builders.steps.Progress`; use as a context manager."""

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._noted = 0.0

    def __enter__(self) -> BuildProgress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
            from rich.progress import TimeElapsedColumn as Elapsed

            columns = (
                SpinnerColumn(),
                TextColumn("{task.description:24}"),
                BarColumn(),
                MofNCompleteColumn(),
                Elapsed(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("reading the checkpoint", total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def started(self, step: str, index: int, total: int) -> None:
        """Shows the step that runs."""
        if self._bar is not None:
            self._bar.update(self._task, description=step, completed=index - 1, total=total)
        else:
            sys.stderr.write(f"[{index}/{total}] {step} ...\n")
            sys.stderr.flush()

    def finished(self, step: str, result: Result) -> None:
        """Shows how a step ended, where it took time."""
        if self._bar is not None:
            self._bar.advance(self._task)
        elif result.seconds:
            sys.stderr.write(f"      {step} {result.outcome} in {result.seconds:.1f} s\n")
            sys.stderr.flush()

    def note(self, step: str, text: str) -> None:
        """Shows how far a step is; in plain lines at most once in ten seconds."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"{step}: {text}")
        elif time.monotonic() - self._noted >= 10:
            self._noted = time.monotonic()
            sys.stderr.write(f"      {step}: {text}\n")
            sys.stderr.flush()
