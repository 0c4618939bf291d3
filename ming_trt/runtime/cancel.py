"""Cancellation that every process of a server sees: a folder with a file per request.

Triton does not tell a running step of an ensemble that the client has gone. So whoever knows (the `cancel` model)
writes it here, and the stages that loop look between two steps. A *lease* ends a request by itself unless it is
renewed. A client that listens also says how much sound it has taken.

`ID.cancel` exists once the request is cancelled; the modification time of `ID.lease` is the lease's end. Both are times
of the monotonic clock, which all processes of a machine share and nobody sets. The size of `ID.heard`, a file without
content, is the milliseconds of sound that the client has taken.
"""

from __future__ import annotations

import hashlib
import os
import time
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
        self._stamp(self._path(request_id, "cancel"), time.monotonic())

    def renew(self, request_id: str, seconds: float) -> None:
        """From now on the request ends in `seconds` unless it is renewed again. A cancelled request stays cancelled."""
        self._stamp(self._path(request_id, "lease"), time.monotonic() + seconds)

    def hear(self, request_id: str, seconds: float) -> None:
        """The client has taken `seconds` of the answer's sound in all."""
        self._stamp(self._path(request_id, "heard"), time.monotonic(), size=int(1000 * seconds))

    def heard(self, request_id: str) -> float:
        """Seconds of sound that the client has taken; 0 before it said anything."""
        try:
            return self._path(request_id, "heard").stat().st_size / 1000
        except FileNotFoundError:
            return 0.0

    def is_cancelled(self, request_id: str) -> bool:
        """Whether it was cancelled or its lease ran out. Two calls of `stat`, about 2 microseconds each."""
        if self._path(request_id, "cancel").exists():
            return True
        end = self._read(self._path(request_id, "lease"))
        return end is not None and end < time.monotonic()

    def forget(self, request_id: str) -> None:
        """Removes what is known of a request that has ended in all stages."""
        for kind in ("cancel", "lease", "heard"):
            self._path(request_id, kind).unlink(missing_ok=True)

    def sweep(self, keep_seconds: float = _KEEP_SECONDS) -> int:
        """Removes what is older than `keep_seconds`; returns the number of files. Files of the future are from before a
        restart of the machine (the clock began anew), and a lease is never that long: they go too."""
        now, removed = time.monotonic(), 0
        for path in self.folder.iterdir():
            stamp = self._read(path)
            if stamp is not None and not now - keep_seconds <= stamp <= now + 10 * 86400:
                path.unlink(missing_ok=True)
                removed += 1
        return removed

    def _path(self, request_id: str, kind: str) -> Path:
        # Ids are the clients': any length, any character.
        return self.folder / f"{hashlib.sha256(request_id.encode()).hexdigest()[:32]}.{kind}"

    def _stamp(self, path: Path, seconds: float, size: int = 0) -> None:
        # The time is set before the name appears: a lease must not look as if it had run out.
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
        temporary.touch(mode=0o600)
        if size:
            os.truncate(temporary, size)
        os.utime(temporary, (seconds, seconds))
        temporary.replace(path)

    @staticmethod
    def _read(path: Path) -> float | None:
        try:
            return path.stat().st_mtime
        except FileNotFoundError:
            return None
