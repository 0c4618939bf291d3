"""A checkpoint known by its headers alone: shards may be cut short after the header, or absent if an index names them.

For `ming-trt plan`, which reads no weights. A tensor that only the index names has the shape it is asked to have.
"""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

from ming_trt.checkpoint import Checkpoint, TensorInfo
from ming_trt.errors import CheckpointError

_MAX_HEADER = 100 << 20
# A shape that no tensor has: known by name only.
_UNKNOWN = (-1,)


class HeaderCheckpoint(Checkpoint):
    """A `Checkpoint` whose tensors can be looked up but not read. Raises `CheckpointError` where it finds no header."""

    def __init__(self, root: Path, subfolder: str = "") -> None:
        # whether every shard is there with all its bytes
        self.complete = True
        try:
            super().__init__(root, subfolder)
        except CheckpointError:
            # what is there may still say enough
            self.complete = False
            self._tensors = dict(sorted(_known(self.folder).items()))
            self._parts: dict[str, Checkpoint] = {}
            if not self._tensors:
                raise

    def part(self, subfolder: str) -> Checkpoint:
        """The headers of a folder below this one."""
        if subfolder not in self._parts:
            self._parts[subfolder] = HeaderCheckpoint(self.folder, subfolder)
        return self._parts[subfolder]

    def require(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """Like `Checkpoint.require`; a tensor that is known by name only counts as one of that shape."""
        info = self.info(name)
        return replace(info, shape=tuple(shape)) if info.shape == _UNKNOWN else super().require(name, shape)


def _known(folder: Path) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
            found |= {
                name: TensorInfo(name, _UNKNOWN, "BF16", folder / shard, 0, 0) for name, shard in weight_map.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"'{index}' is not a safetensors index ({error!r}): download it again") from None
    for shard in sorted(folder.glob("*.safetensors")):
        found |= {info.name: info for info in _header(shard)}
    return found


def _header(file: Path) -> list[TensorInfo]:
    try:
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            header = json.loads(stream.read(min(length, _MAX_HEADER)))
        return [
            TensorInfo(
                name,
                tuple(entry["shape"]),
                entry["dtype"],
                file,
                8 + length + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"'{file}' has no safetensors header ({error!r}): download it again") from None
