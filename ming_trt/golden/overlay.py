"""Lays several checkpoint folders over each other: one folder of symbolic links, where the later folder wins.

Root shards may share file names and still hold different tensors (`model.safetensors` of two partial checkpoints), so
they are linked under names of their own and an index is written that says which shard holds which tensor.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from ming_trt.errors import CheckpointError

_INDEX = "model.safetensors.index.json"


def _tensor_names(shard: Path) -> list[str]:
    try:
        with shard.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (OSError, struct.error, ValueError) as error:
        raise CheckpointError(f"'{shard}' is not a readable safetensors file ({error}): copy it again") from None
    return [name for name in header if name != "__metadata__"]


def _root_shards(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.exists():
        return [folder / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    return sorted(folder.glob("model*.safetensors"))


def _others(folder: Path) -> Iterator[Path]:
    """Every other file, relative to `folder`."""
    shards = set(_root_shards(folder)) | {folder / _INDEX}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path not in shards:
            yield path.relative_to(folder)


def overlay(folders: Sequence[Path], target: Path) -> Path:
    """Makes `target` (must not exist) the union of `folders`; a single folder is returned as it is."""
    for folder in folders:
        if not Path(folder).is_dir():
            raise CheckpointError(
                f"checkpoint folder '{folder}' does not exist: give the folder that holds config.json"
            )
    if len(folders) == 1:
        return Path(folders[0])
    target.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number, folder in enumerate(Path(f).resolve() for f in folders):
        for shard in _root_shards(folder):
            if not shard.exists():
                raise CheckpointError(f"shard '{shard.name}' named by {_INDEX} is missing in '{folder}': copy it there")
            link = target / f"model-overlay{number}-{shard.name.removeprefix('model-')}"
            link.symlink_to(shard)
            weight_map.update(dict.fromkeys(_tensor_names(shard), link.name))
        for relative in _others(folder):
            link = target / relative
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(folder / relative)
    (target / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target
