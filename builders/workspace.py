"""The folder a build writes into: one builder at a time, a journal, and outputs that appear whole or not at all.

A step's output is made in `.work`, flushed to disk, recorded in the journal with its digests, and only then renamed
into place. Whatever moment the process dies at, the next builder finishes the rename or discards the work, and goes on.

    <bundle>/.lock      held while a builder runs
    <bundle>/.journal   one JSON object a line, appended and flushed; a torn last line is cut off
    <bundle>/.work/     outputs under construction
    <bundle>/.cache/    digests of files that were read before
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from builders.digests import DigestCache
from ming_trt.bundle import MANIFEST, files_below, sync_folder, write_atomically
from ming_trt.errors import BuildError

JOURNAL, LOCK, WORK, CACHE = ".journal", ".lock", ".work", ".cache"
# Called with a name before and after each change on disk; tests end the process there.
Hook = Callable[[str], None]
_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another folder",
    errno.EFBIG: "the file would exceed the size limit of this process: raise it with `ulimit -f unlimited`",
    errno.EROFS: "the file system is read-only: choose another folder",
}
# These say something about the output folder only while nothing but it is touched.
_FOLDER_REMEDIES = {
    errno.ENOENT: "it cannot be made there: choose another folder",
    errno.EACCES: "it is not writable: change its permissions or choose another folder",
    errno.EPERM: "it is not writable: change its permissions or choose another folder",
    errno.ENOTDIR: "a part of its path is a file: choose another folder",
    errno.EEXIST: "it is a file: choose another folder",
    errno.ENAMETOOLONG: "its name is too long: choose a shorter one",
    errno.EIO: "the disk reports an error: choose another one",
}


def _ignore(_: str) -> None:
    return None


@contextmanager
def disk_errors(folder: Path, *, steps: bool = False) -> Iterator[None]:
    """Turns an OSError about the disk into a `BuildError` of one sentence.

    `steps`: the block reads other places too, so only what must be about writing is turned.
    """
    remedies = _REMEDIES if steps else _REMEDIES | _FOLDER_REMEDIES
    try:
        yield
    except OSError as error:
        remedy = remedies.get(error.errno or 0)
        if remedy is None:
            raise
        place = error.filename or folder
        raise BuildError(f"cannot write '{place}', {remedy}") from error


@dataclass(frozen=True, slots=True)
class Record:
    """What the journal says of a step's last success. `files` maps paths in `output` to (sha256, size); `inputs` maps
    each needed step to the digest of what it had published; `work` is the folder the output was made in."""

    step: str
    key: str
    output: str = ""
    files: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    work: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def digest(self) -> str:
        """Stands for the published content: equal content, equal digest."""
        text = json.dumps([sorted(self.files.items()), self.facts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class Workspace:
    """A bundle folder opened for building; use as a context manager.

    Raises `BuildError`: another builder holds it, it is not a bundle, or it cannot be written.
    """

    def __init__(self, folder: Path, hook: Hook = _ignore) -> None:
        self.folder = folder
        self.records: dict[str, Record] = {}
        self.last_finished: Mapping[str, Any] | None = None
        self._hook = hook
        self._lock = -1
        self._journal = -1
        self._invalidated = False

    def __enter__(self) -> Workspace:
        with disk_errors(self.folder):
            self._refuse_foreign()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._acquire()
            try:
                self._journal = os.open(self.folder / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
                self._read_journal()
                self.digests = DigestCache(self.folder / CACHE / "files.json")
                self._recover()
            except BaseException:
                self._release()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            # After an error the cache is worth keeping too, but must not hide the error.
            with disk_errors(self.folder):
                self.digests.save()
        except BuildError:
            if kind is None:
                raise
        finally:
            self._release()

    def path(self, output: str) -> Path:
        """Where a step's output is published."""
        return self.folder / output

    def intact(self, record: Record) -> bool:
        """Whether the published files are those of the record: names, sizes, digests."""
        return self._matches(self.path(record.output), record) if record.output else True

    def begin(self, step: str) -> Path:
        """An empty folder to make the output of `step` in."""
        work = self._work(step)
        with disk_errors(self.folder):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
        self._hook(f"work:{step}")
        return work

    def abandon(self, step: str) -> None:
        """Removes an output of `step` that will not be published. By name, since an interrupt may come before `begin`
        has returned."""
        shutil.rmtree(self._work(step), ignore_errors=True)

    def _work(self, step: str) -> Path:
        return self.folder / WORK / f"{step}-{os.getpid()}"

    def publish(self, record: Record, work: Path) -> Record:
        """Journals the output in `work` and renames it into place. Returns the record with its files."""
        with disk_errors(self.folder):
            files: dict[str, tuple[str, int]] = {}
            if record.output:
                for name in files_below(work):
                    _sync_file(work / name)
                    files[name] = (self.digests.of_file(work / name), (work / name).stat().st_size)
                for root, _, _ in os.walk(work):
                    sync_folder(Path(root))
            record = replace(record, files=files, work=work.name if record.output else "")
            self._append({"event": "built", "time": _now(), **asdict(record)})
            self.records[record.step] = record
            self._invalidate()
            if record.output:
                self._move(work, self.path(record.output))
            else:
                shutil.rmtree(work, ignore_errors=True)
        return record

    def note(self, event: str, **values: Any) -> None:
        """Appends an event for people who read the journal; it has no effect on later builds."""
        with disk_errors(self.folder):
            self._append({"event": event, "time": _now(), **values})

    def drop(self, step: str) -> None:
        """Removes what `step` had published."""
        record = self.records.get(step)
        if record is None:
            return
        with disk_errors(self.folder):
            self._append({"event": "dropped", "time": _now(), "step": step})
            del self.records[step]
            self._invalidate()
            if record.output and self.path(record.output).exists():
                self._retire(self.path(record.output))

    def write_manifest(self, text: str) -> None:
        """Replaces the manifest, if it differs. It is the last thing a build writes."""
        path = self.folder / MANIFEST
        if path.exists() and path.read_text("utf-8") == text:
            return
        self._hook("manifest:before")
        with disk_errors(self.folder):
            write_atomically(path, text)
        self._hook("manifest:after")

    def _refuse_foreign(self) -> None:
        if not self.folder.exists():
            return
        present = {entry.name for entry in self.folder.iterdir()}
        if present and not present & {JOURNAL, MANIFEST, LOCK}:
            raise BuildError(
                f"'{self.folder}' is not empty and holds no bundle ({sorted(present)[0]!r} lies there): "
                "choose a new or empty folder"
            )

    def _acquire(self) -> None:
        self._lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 32, 0).decode("ascii", "replace").strip()
            os.close(self._lock)
            self._lock = -1
            who = f"process {holder}" if holder else "another process"
            raise BuildError(
                f"'{self.folder}' is being built by {who}: wait for it, or build into another folder"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _release(self) -> None:
        for handle in (self._journal, self._lock):
            if handle >= 0:
                os.close(handle)
        self._journal = self._lock = -1

    def _append(self, event: Mapping[str, Any]) -> None:
        self._hook(f"journal:{event['event']}:before")
        line = (json.dumps(event, ensure_ascii=False) + "\n").encode()
        start = os.fstat(self._journal).st_size
        try:
            while line:
                line = line[os.write(self._journal, line) :]
            os.fsync(self._journal)
        except OSError:
            # Half a line on a full disk would swallow the next one.
            os.ftruncate(self._journal, start)
            raise
        self._hook(f"journal:{event['event']}:after")

    def _read_journal(self) -> None:
        with (self.folder / JOURNAL).open("rb") as stream:
            data = stream.read()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            os.ftruncate(self._journal, end)
        for number, line in enumerate(data[:end].splitlines(), 1):
            try:
                event = json.loads(line)
                if event["event"] == "built":
                    record = _record(event)
                    self.records[record.step] = record
                elif event["event"] == "dropped":
                    self.records.pop(event["step"], None)
                self.last_finished = event if event["event"] == "finished" else None
            except (ValueError, KeyError, TypeError):
                raise BuildError(
                    f"line {number} of '{self.folder / JOURNAL}' is damaged: remove the folder and build again"
                ) from None

    def _recover(self) -> None:
        """Finishes publications that the journal promises, then clears what is left over."""
        work = self.folder / WORK
        for record in self.records.values():
            made = work / record.work
            if record.work and made.is_dir() and not self.intact(record) and self._matches(made, record):
                self._invalidate()
                self._move(made, self.path(record.output))
        if work.exists():
            shutil.rmtree(work)

    def _matches(self, folder: Path, record: Record) -> bool:
        if not folder.is_dir() or files_below(folder) != sorted(record.files):
            return False
        for name, (digest, size) in record.files.items():
            path = folder / name
            if path.stat().st_size != size or self.digests.of_file(path) != digest:
                return False
        return True

    def _invalidate(self) -> None:
        """Takes the manifest away before the first change: a bundle with a manifest is a finished one."""
        if not self._invalidated:
            (self.folder / MANIFEST).unlink(missing_ok=True)
            sync_folder(self.folder)
            self._invalidated = True
            self._hook("manifest:removed")

    def _move(self, made: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            self._retire(target)
        made.rename(target)
        self._hook("publish:renamed")
        sync_folder(target.parent)

    def _retire(self, target: Path) -> None:
        old = self.folder / WORK / f"{target.name}-{os.getpid()}.old"
        old.parent.mkdir(exist_ok=True)
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        self._hook("publish:retired")
        shutil.rmtree(old)


def _record(event: Mapping[str, Any]) -> Record:
    files = {name: (str(entry[0]), int(entry[1])) for name, entry in event["files"].items()}
    known = {name: event[name] for name in Record.__dataclass_fields__ if name in event}
    return Record(**{**known, "files": files})


def _sync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
