"""Lays several checkpoint folders over each other: one folder of symbolic links, where the later folder wins.

Root shards may share file names and still hold different tensors (`model.safetensors` of two partial checkpoints), so
they are linked under names of their own and an index is written that says which shard holds which tensor.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from ming_trt.checkpoint import Checkpoint
from ming_trt.errors import CheckpointError

_INDEX = "model.safetensors.index.json"
# Lies in every folder that is made here, which may be removed again.
MARK = ".overlay"


def overlay(folders: Sequence[Path], target: Path) -> Path:
    """Makes `target` the union of `folders`, anew if it was made before; a single folder is returned as it is.

    Raises `CheckpointError` if one of them is missing or damaged, or if `target` holds anything else.
    """
    for folder in folders:
        if not Path(folder).is_dir():
            raise CheckpointError(
                f"checkpoint folder '{folder}' does not exist: give the folder that holds config.json"
            )
    if len(folders) == 1:
        return Path(folders[0])
    held = [(folder.resolve(), _root_tensors(folder.resolve())) for folder in map(Path, folders)]
    make_folder(target)
    weight_map: dict[str, str] = {}
    for number, (folder, tensors) in enumerate(held):
        links = {file: f"model-overlay{number}-{file.name.removeprefix('model-')}" for file in tensors.values()}
        for file, name in links.items():
            (target / name).symlink_to(file)
        weight_map |= {tensor: links[file] for tensor, file in tensors.items()}
        for relative in _others(folder, set(links)):
            link = target / relative
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(folder / relative)
    (target / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target


def make_folder(target: Path) -> None:
    """Makes `target` an empty folder for links. Raises `CheckpointError` if it exists and was not made by this."""
    if target.exists():
        if not (target / MARK).is_file():
            raise CheckpointError(f"'{target}' is in the way and was not made by ming-trt: give another folder")
        shutil.rmtree(target)
    target.mkdir(parents=True)
    (target / MARK).touch()


def _root_tensors(folder: Path) -> dict[str, Path]:
    """Tensor -> shard of the folder itself; empty if its weights are in folders below only."""
    if not (folder / _INDEX).exists() and not any(folder.glob("model*.safetensors")):
        return {}
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.info(name).file for name in checkpoint.names()}


def _others(folder: Path, shards: set[Path]) -> Iterator[Path]:
    """Every other file, relative to `folder`; folders may be links."""
    for root, _, names in os.walk(folder, followlinks=True):
        for path in (Path(root) / name for name in sorted(names)):
            if path not in shards and path != folder / _INDEX:
                yield path.relative_to(folder)
