"""Cancellation that every process of a server sees: a folder with a few notes per request.

Triton does not tell a running step of an ensemble that the client has gone. So whoever knows (the `cancel` model)
writes it here, and the stages that loop look between two steps. A *lease* ends a request by itself unless it is
renewed. A client that listens also says how much sound it has taken.

A note is a link that nobody follows: it appears whole, by one call, and is read by one. `ID.cancel` tells when the
request was cancelled, `ID.lease` when its lease ends, `ID.heard` when its client last said how many milliseconds of
sound it has taken, and how many. The times are of the monotonic clock, which all processes of a machine share and
nobody sets.
"""

# The LLM looks here between any two tokens, and on cold caches pathlib takes longer than the calls themselves.
# ruff: noqa: PTH105, PTH108, PTH115, PTH211

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from functools import lru_cache
from pathlib import Path

from ming_trt.errors import ServeError

# Nobody looks at a request's files this long after its cancellation, or after its lease ran out.
_KEEP_SECONDS = 3600.0


class CancelBoard:
    """The board in `folder`, which is made if it is absent, for this user alone. Raises `ServeError` if it cannot be
    used."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = self.folder.stat().st_uid
        except OSError as error:
            raise ServeError(
                f"the cancel board '{folder}' cannot be made ({error.strerror}): set MING_TRT_BOARD"
            ) from None
        if owner != os.geteuid() or not os.access(self.folder, os.W_OK | os.X_OK):
            raise ServeError(
                f"the cancel board '{folder}' belongs to another user: set MING_TRT_BOARD to a folder of yours"
            )

    def cancel(self, request_id: str) -> None:
        """Cancels the request, also one that has not begun. Its later requests of the same id, too, until `forget`."""
        self._note(self._path(request_id, "cancel"), time.monotonic())

    def renew(self, request_id: str, seconds: float) -> None:
        """From now on the request ends in `seconds` unless it is renewed again. A cancelled request stays cancelled."""
        self._note(self._path(request_id, "lease"), time.monotonic() + seconds)

    def hear(self, request_id: str, seconds: float) -> None:
        """The client has taken `seconds` of the answer's sound in all."""
        self._note(self._path(request_id, "heard"), time.monotonic(), milliseconds=int(1000 * seconds))

    def heard(self, request_id: str) -> float:
        """Seconds of sound that the client has taken; 0 before it said anything."""
        found = _read(self._path(request_id, "heard"))
        return 0.0 if found is None else found[1] / 1000

    def is_cancelled(self, request_id: str) -> bool:
        """Whether it was cancelled or its lease ran out. Two system calls, a few microseconds together."""
        if _read(self._path(request_id, "cancel")) is not None:
            return True
        lease = _read(self._path(request_id, "lease"))
        return lease is not None and lease[0] < time.monotonic()

    def forget(self, request_id: str) -> None:
        """Removes what is known of a request that has ended in all stages."""
        for kind in ("cancel", "lease", "heard"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(request_id, kind))

    def sweep(self, keep_seconds: float = _KEEP_SECONDS) -> int:
        """Removes what is older than `keep_seconds`; returns the number of notes. Notes of the future are from before a
        restart of the machine (the clock began anew), and a lease is never that long: they go too."""
        now, removed = time.monotonic(), 0
        for path in self.folder.iterdir():
            found = _read(str(path))
            if found is not None and not now - keep_seconds <= found[0] <= now + 10 * 86400:
                path.unlink(missing_ok=True)
                removed += 1
        return removed

    def _path(self, request_id: str, kind: str) -> str:
        return f"{self.folder}/{file_stem(request_id)}.{kind}"

    def _note(self, path: str, seconds: float, milliseconds: int = 0) -> None:
        note = f"{seconds} {milliseconds}"
        try:
            os.symlink(note, path)
        except FileExistsError:
            folder, name = os.path.split(path)
            temporary = f"{folder}/.{name}.{os.getpid()}.{time.monotonic_ns()}"
            os.symlink(note, temporary)
            os.replace(temporary, path)


@lru_cache(maxsize=4096)
def file_stem(request_id: str) -> str:
    """A name for files of a request. Ids are the clients': any length, any character. The same in every process; kept,
    as it is asked for between any two tokens."""
    return hashlib.blake2b(request_id.encode(), digest_size=16).hexdigest()


def _read(path: str) -> tuple[float, int] | None:
    """Time and milliseconds of a note; None if there is none."""
    try:
        seconds, milliseconds = os.readlink(path).split(" ")
    except FileNotFoundError:
        return None
    return float(seconds), int(milliseconds)
