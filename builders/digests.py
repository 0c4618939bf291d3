"""SHA-256 of files, remembered by the file's identity so that nothing is read twice.

An entry is believed only while size, times and inode are those that were seen when it was computed; a file whose folder
was renamed keeps its entry. A file that changed a moment before it was read, or whose time lies in the future, is not
remembered: its next change could leave the same times behind.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ming_trt.bundle import sha256, write_atomically

# Kernels stamp files with the time of their last tick, at most 10 ms ago.
_TICK_NS = 50_000_000


class DigestCache:
    """Digests by file, kept in the JSON file `path` between runs. A lost or damaged `path` costs time only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, dict[str, Any]] = {}
        self._dirty = False
        self._used: set[str] = set()
        self.bytes_read = 0
        try:
            entries = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            entries = {}
        if isinstance(entries, dict):
            self._entries = {key: value for key, value in entries.items() if isinstance(value, dict)}

    def of_file(self, path: Path) -> str:
        """Hex SHA-256 of the whole file. Raises OSError if it cannot be read."""
        identity = _identity(path)
        key = f"{identity[4]}:{identity[3]}"
        entry = self._entries.get(key)
        if entry is not None and entry.get("identity") == identity:
            self._used.add(key)
            return str(entry["sha256"])
        value = sha256(path)
        self.bytes_read += identity[0]
        settled = max(identity[1], identity[2]) < time.time_ns() - _TICK_NS
        if settled and _identity(path) == identity:
            self._entries[key] = {"identity": identity, "sha256": value}
            self._used.add(key)
            self._dirty = True
        return value

    def save(self) -> None:
        """Writes the cache if it changed; entries that this run did not use are left out."""
        if self._dirty:
            self._entries = {key: entry for key, entry in self._entries.items() if key in self._used}
            self.path.parent.mkdir(exist_ok=True)
            write_atomically(self.path, json.dumps(self._entries))
            self._dirty = False


def _identity(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_dev]
