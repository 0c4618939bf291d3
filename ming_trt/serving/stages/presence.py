"""Tells a client that waits for ever from one that waits long.

When the process of a decoupled model dies, Triton 2.51 leaves its streams open without a word. So the process notes
what it works on, and the `cancel` model looks, whenever a client renews its lease, whether that process still lives.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ming_trt.runtime.cancel import file_stem
from ming_trt.serving.supervise import alive


class Presence:
    """Notes in a folder beside the cancel board: request and model -> process that works on it. A note is a link that
    nobody follows: it appears whole, by one call."""

    def __init__(self, board: Path) -> None:
        self._folder = board.with_name(board.name + ".present")
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def enter(self, request_id: str, model: str) -> None:
        """This process, of that model, works on the request from now on."""
        path, note = self._path(request_id, model), f"{os.getpid()} {model}"
        while True:
            with contextlib.suppress(FileExistsError):  # left by a process that died, or an id in use twice
                return path.symlink_to(note)
            path.unlink(missing_ok=True)

    def leave(self, request_id: str, model: str) -> None:
        """The request has ended in that model."""
        self._path(request_id, model).unlink(missing_ok=True)

    def lost(self, request_id: str) -> str:
        """The model whose process died while it worked on the request, or ""."""
        for path in self._folder.glob(self._path(request_id, "*").name):
            try:
                process, model = str(path.readlink()).split(" ", 1)
            except FileNotFoundError:
                continue
            if not alive(int(process)):
                return model
        return ""

    def _path(self, request_id: str, model: str) -> Path:
        return self._folder / f"{file_stem(request_id)}.{model}"
