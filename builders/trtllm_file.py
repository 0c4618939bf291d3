"""Safetensors files whose header is written first and whose tensors are filled in later, in any order, and resumably.

Every size is known from configuration alone, so the whole layout of a file is fixed before a weight is read. What was
filled is noted in a journal beside the files; a writer that starts again over the same plan continues there, and the
files end up byte for byte the same.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from ming_trt.checkpoint import ITEM_SIZE

JOURNAL = "written.jsonl"
# Data starts at a multiple of this, so that a reader may map it as any type.
_ALIGN = 64
_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file: safetensors dtype name and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return ITEM_SIZE[self.dtype] * math.prod(self.shape)


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a type that this exporter writes."""
    return _NAMES[dtype]


def byte_view(values: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy; writing to them writes to it."""
    return memoryview(values.view(-1).view(torch.uint8).numpy().data)


class TensorFiles:
    """Files `names` in `folder`, with the tensors `plans[i]`; use as a context manager.

    `key` stands for everything that the content depends on: files that were begun for another key are begun again.
    Threads may `write` at the same time, to different places; one thread calls `sync` and `finish`.
    """

    def __init__(self, folder: Path, names: Sequence[str], plans: Sequence[Mapping[str, Entry]], key: str) -> None:
        self.folder = folder
        self.paths = [folder / name for name in names]
        self.plans = plans
        self.done: set[str] = set()
        self.bytes_total = sum(entry.nbytes for plan in plans for entry in plan.values())
        self._key = key
        self._handles: list[int] = []
        self._offsets: list[dict[str, int]] = []
        self._journal = -1

    def __enter__(self) -> TensorFiles:
        self.folder.mkdir(parents=True, exist_ok=True)
        resumed = self._read_journal()
        for path, plan in zip(self.paths, self.plans, strict=True):
            header, offsets, size = _header(plan)
            self._offsets.append(offsets)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | (0 if resumed else os.O_TRUNC), 0o644)
            self._handles.append(handle)
            if resumed and os.fstat(handle).st_size == size:
                continue
            self.done.clear()
            os.ftruncate(handle, size)
            os.pwrite(handle, header, 0)
        self._begin_journal()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in (*self._handles, self._journal):
            if handle >= 0:
                os.close(handle)

    def write(self, file: int, name: str, at: int, values: torch.Tensor) -> None:
        """Puts contiguous `values` into tensor `name` of file number `file`, from its element number `at` on."""
        entry = self.plans[file][name]
        if _NAMES.get(values.dtype) != entry.dtype or at + values.numel() > math.prod(entry.shape):
            raise ValueError(f"{values.dtype}[{values.numel()}] at {at} does not fit into {name}, {entry}")
        data = byte_view(values)
        offset = self._offsets[file][name] + at * ITEM_SIZE[entry.dtype]
        while data:
            count = os.pwrite(self._handles[file], data, offset)
            data, offset = data[count:], offset + count

    def sync(self) -> None:
        """What is written so far reaches the disk. Threads may go on writing."""
        for handle in self._handles:
            os.fdatasync(handle)

    def finish(self, group: str) -> None:
        """Notes that all of `group` is written. After that, and a crash, it is not written again."""
        self.sync()
        self._note({"group": group})
        self.done.add(group)

    def _note(self, line: Mapping[str, str]) -> None:
        os.write(self._journal, (json.dumps(line) + "\n").encode())
        os.fdatasync(self._journal)

    def _read_journal(self) -> bool:
        """Whether there is work of the same key to continue; fills `done`."""
        try:
            lines = (self.folder / JOURNAL).read_bytes().split(b"\n")[:-1]
            events = [json.loads(line) for line in lines]
        except (FileNotFoundError, ValueError):
            return False
        if not events or events[0].get("key") != self._key:
            return False
        self.done = {event["group"] for event in events[1:]}
        return True

    def _begin_journal(self) -> None:
        path = self.folder / JOURNAL
        if not self.done:
            path.unlink(missing_ok=True)
        self._journal = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if not self.done:
            for handle in self._handles:
                os.fdatasync(handle)
            self._note({"key": self._key})
            return
        # The last line may have been torn: start after the last whole one.
        data = path.read_bytes()
        os.ftruncate(self._journal, data.rfind(b"\n") + 1)


def _header(plan: Mapping[str, Entry]) -> tuple[bytes, dict[str, int], int]:
    """Bytes of the header, place of each tensor in the file, size of the file."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    places: dict[str, int] = {}
    for name, entry in plan.items():
        places[name] = end
        entries[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [end, end + entry.nbytes]}
        end += entry.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    start = 8 + len(text)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: start + place for name, place in places.items()}, start + end
