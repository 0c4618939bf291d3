"""Pictures and sound that a command writes: whole files or none, and progress on stderr."""

from __future__ import annotations

import os
import sys
import wave
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ming_trt.errors import InputError

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


def check_place(path: Path, option: str) -> None:
    """Refuses a place that cannot be written before anything is computed for it. Raises `InputError`."""
    folder = path.parent
    if path.is_dir():
        raise InputError(f"{option} '{path}' is a folder: give the name of a file")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"{option} '{path}': the folder '{folder}' cannot be written; make it, or choose another")


class WholeFile:
    """A file that appears under its name when it is complete; use as a context manager. Leaving with an exception, or
    without `finish`, leaves nothing behind."""

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, path.with_name(f".{path.name}.{os.getpid()}")
        self.stream = self._temporary.open("wb")

    def __enter__(self) -> WholeFile:
        return self

    def finish(self) -> None:
        """The content is complete."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        self._temporary.replace(self._path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stream.close()
        self._temporary.unlink(missing_ok=True)


class PictureFile:
    """A PNG file that may show previews while it is drawn; use as a context manager. Leaving before the picture itself
    was written removes the preview."""

    def __init__(self, path: Path) -> None:
        self._path, self._preview = path, False

    def __enter__(self) -> PictureFile:
        return self

    def write(self, data: bytes, preview: bool) -> None:
        """Replaces the file by one of these bytes."""
        with WholeFile(self._path) as file:
            file.stream.write(data)
            file.finish()
        self._preview = preview

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._preview:
            self._path.unlink(missing_ok=True)


class SoundFile:
    """A WAV file, 16 bit, mono, written as the sound comes; use as a context manager."""

    def __init__(self, path: Path) -> None:
        self._file = WholeFile(path)
        self._wave: wave.Wave_write | None = None
        self._rate = 0
        self.samples = 0

    def __enter__(self) -> SoundFile:
        return self

    @property
    def seconds(self) -> float:
        """Length so far."""
        return self.samples / self._rate if self._rate else 0.0

    def write(self, audio: bytes, sample_rate: int) -> None:
        """Adds 16-bit samples."""
        if self._wave is None:
            self._rate = sample_rate
            self._wave = wave.Wave_write(self._file.stream)
            self._wave.setnchannels(1)
            self._wave.setsampwidth(2)
            self._wave.setframerate(sample_rate)
        self._wave.writeframesraw(audio)
        self.samples += len(audio) // 2

    def finish(self) -> None:
        """The sound is complete: states its length in the header and gives the file its name."""
        if self._wave is not None:
            self._wave.close()
            self._file.finish()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._wave is not None:
            self._wave.close()
        self._file.__exit__(kind, error, traceback)


class StepProgress:
    """Denoising steps on stderr: a bar on a terminal, every tenth of them as a line elsewhere."""

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._told = 0.0

    def __enter__(self) -> StepProgress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("denoising"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=None)
        return self

    def show(self, done: int, steps: int) -> None:
        """`done` of `steps` are made."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=steps)
        elif done == steps or done / steps >= self._told + 0.1:
            self._told = done / steps
            sys.stderr.write(f"step {done} of {steps}\n")
            sys.stderr.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
