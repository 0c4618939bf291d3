"""A checkpoint without weights, laid out as one on disk: every file has its header and its size, and takes no space.

`ming-trt plan official` looks at the sizes that ship with the project (`engines/official`). Files are sparse: what
stands behind a header is a hole.
"""

from __future__ import annotations

import gzip
import json
import math
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ming_trt.checkpoint import ITEM_SIZE
from ming_trt.errors import BuildError
from ming_trt.resources import shipped

OFFICIAL = "official"
HEADERS = "headers.json.gz"
# Serving needs them; their contents do not matter to a plan.
_EMPTY = ("talker/s3_bpe/tokenizer.json", "talker/s3_bpe/char_mapping.txt")
_TORCH = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# tensor -> (safetensors type, shape)
Header = Mapping[str, tuple[str, tuple[int, ...]]]


@contextmanager
def checkpoint_folder(checkpoint: Path) -> Iterator[Path]:
    """`checkpoint` itself; for the name "official", if there is no such folder, a skeleton of the official one."""
    if str(checkpoint) != OFFICIAL or checkpoint.exists():
        yield checkpoint
        return
    with TemporaryDirectory(prefix="ming-trt-official-") as folder:
        write_skeleton(shipped("engines") / OFFICIAL, Path(folder))
        yield Path(folder)


def write_skeleton(source: Path, folder: Path) -> None:
    """Lays out in `folder` what `source` describes: its configuration files, and the headers in `headers.json.gz`."""
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.name not in (HEADERS, "README.md"):
            (folder / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / path.relative_to(source))
    try:
        for name, tensors in json.loads(gzip.decompress((source / HEADERS).read_bytes())).items():
            header = {tensor: (str(dtype), tuple(shape)) for tensor, (dtype, shape) in tensors.items()}
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (_write_torch if name.endswith(".pt") else _write_shard)(folder / name, header)
        for name in _EMPTY:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    except OSError as error:
        raise BuildError(
            f"'{folder}' cannot hold files with holes ({error.strerror}): set TMPDIR to another file system"
        ) from error


def _write_shard(file: Path, header: Header) -> None:
    entries: dict[str, object] = {}
    end = 0
    for name, (dtype, shape) in header.items():
        start, end = end, end + ITEM_SIZE[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)


def _write_torch(file: Path, header: Header) -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        tensors = {name: torch.empty(shape, dtype=getattr(torch, _TORCH[t])) for name, (t, shape) in header.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(tensors, file)
