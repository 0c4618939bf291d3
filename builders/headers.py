"""A checkpoint known by its headers alone, by an index that names its tensors, or by its configuration only.

For `ming-trt plan`, which reads no weights. A tensor that no header describes has the shape it is asked to have.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from ming_trt.checkpoint import Checkpoint, TensorInfo, tensor_headers
from ming_trt.errors import CheckpointError

_MAX_HEADER = 100 << 20
# A shape that no tensor has: known by name only.
_UNKNOWN = (-1,)
_SHARDS, _INDEX = "*.safetensors", "*.safetensors.index.json"


class HeaderCheckpoint(Checkpoint):
    """A `Checkpoint` whose tensors can be looked up but not read.

    `missing`: shards that an index names and that are not there. `guessed`: the folder has neither shards nor an index,
    and every tensor of the main model counts as one of it. Raises `CheckpointError` where what is there is damaged.
    """

    def __init__(self, root: Path, subfolder: str = "") -> None:
        self.missing: tuple[str, ...] = ()
        self.guessed = False
        try:
            super().__init__(root, subfolder)
        except CheckpointError:
            # what is there may still say enough
            tensors, self.missing = _known(self.folder)
            self._tensors = dict(sorted(tensors.items()))
            self._parts: dict[str, Checkpoint] = {}
            self.guessed = not subfolder and self.folder.is_dir() and not _any_weights(self.folder)
            if not tensors and not self.guessed:
                raise

    @property
    def complete(self) -> bool:
        """Whether headers describe every tensor."""
        return not self.missing and not self.guessed

    def part(self, subfolder: str) -> Checkpoint:
        """The headers of a folder below this one."""
        if subfolder not in self._parts:
            part = HeaderCheckpoint(self.folder, subfolder)
            self.missing += tuple(f"{subfolder}/{shard}" for shard in part.missing)
            self._parts[subfolder] = part
        return self._parts[subfolder]

    def __contains__(self, name: object) -> bool:
        return (self.guessed and "/" not in str(name)) or super().__contains__(name)

    def info(self, name: str) -> TensorInfo:
        """Shape and type as far as they are known."""
        if self.guessed and "/" not in name:
            return TensorInfo(name, _UNKNOWN, "BF16", self.folder / "config.json", 0, 0)
        return super().info(name)

    def require(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """Like `Checkpoint.require`; a tensor that is known by name only counts as one of that shape."""
        info = self.info(name)
        return replace(info, shape=tuple(shape)) if info.shape == _UNKNOWN else super().require(name, shape)


def _any_weights(folder: Path) -> bool:
    return any(folder.glob(_SHARDS)) or any(folder.glob(_INDEX))


def _known(folder: Path) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """The tensors that headers or an index name, and the shards that are not there."""
    found: dict[str, TensorInfo] = {}
    shards: set[str] = set()
    for index in sorted(folder.glob(_INDEX)):
        try:
            weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
            found |= {
                name: TensorInfo(name, _UNKNOWN, "BF16", folder / shard, 0, 0) for name, shard in weight_map.items()
            }
            shards |= set(weight_map.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"'{index}' is not a safetensors index ({error!r}): download it again") from None
    for file in sorted(folder.glob(_SHARDS)):
        found |= {info.name: info for info in tensor_headers(file)}
    return found, tuple(sorted(shard for shard in shards if not (folder / shard).is_file()))


@contextmanager
def completed(folder: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """`folder` with every shard as long as its header says, and the names of those that are not.

    Where some are cut short after their headers this is a copy made of links, with sparse files in their places.
    """
    # the main model's shards, and those of the folders beside them
    shards = [path for pattern in (_SHARDS, f"*/{_SHARDS}") for path in sorted(folder.glob(pattern))]
    cut = [path for path in shards if path.is_file() and path.stat().st_size < _promised(path)]
    if not cut:
        yield folder, ()
        return
    names = tuple(path.relative_to(folder).as_posix() for path in cut)
    with TemporaryDirectory(prefix="ming-trt-headers-") as scratch:
        copy = Path(scratch)
        for root, _, files in os.walk(folder):
            place = copy / Path(root).relative_to(folder)
            place.mkdir(exist_ok=True)
            for name in files:
                path = Path(root) / name
                if path in cut:
                    (place / name).write_bytes(_header_bytes(path))
                    os.truncate(place / name, _promised(path))
                else:
                    (place / name).symlink_to(path.absolute())
        yield copy, names


def _header_bytes(file: Path) -> bytes:
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        return prefix + stream.read(min(length, _MAX_HEADER))


def _promised(file: Path) -> int:
    """Bytes that the header speaks of; 0 where there is no whole one, which whoever opens the file says."""
    data = _header_bytes(file)
    try:
        header = json.loads(data[8:])
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return 0
    return len(data) + max(ends, default=0)
