"""Reads `.pt` files (torch's zip format) without torch and without running what is in them.

The pickle inside may name only the few things that a dictionary of tensors needs; anything else is an error. Tensors
come as `TensorInfo`: where their bytes lie in the file, so that they are read one at a time like those of a shard.
Format: <https://pytorch.org/docs/stable/notes/serialization.html>.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ming_trt.checkpoint import TensorInfo
from ming_trt.errors import CheckpointError

_STORAGES = {
    "DoubleStorage": ("F64", 8), "FloatStorage": ("F32", 4), "HalfStorage": ("F16", 2), "BFloat16Storage": ("BF16", 2),
    "LongStorage": ("I64", 8), "IntStorage": ("I32", 4), "ShortStorage": ("I16", 2), "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1), "BoolStorage": ("BOOL", 1),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    item: int
    key: str
    numel: int


class _Unpickler(pickle.Unpickler):
    """Knows tensors, dictionaries and plain values; refuses everything else."""

    def __init__(self, data: bytes, file: Path, offsets: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(io.BytesIO(data))
        self._file, self._offsets = file, offsets

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise CheckpointError(
            f"'{self._file}' asks for {module}.{name}, which a file of tensors does not need: it is not opened"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        _, (dtype, item), key, _, numel = pid
        return _Storage(dtype, item, str(key), int(numel))

    def _tensor(self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Any:
        shape: tuple[int, ...] = tuple(int(n) for n in size)
        count: int = math.prod(shape)
        nbytes = count * storage.item
        contiguous: list[int] = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        # torch ignores the strides of empty tensors and of sizes of one
        strided = any(have != want for n, have, want in zip(shape, stride, contiguous, strict=True) if n > 1)
        if strided and nbytes:
            raise CheckpointError(
                f"'{self._file}' holds a tensor {list(shape)} that is not contiguous: save a copy of it"
            )
        start, stored = self._offsets.get(storage.key, (0, -1))
        if int(offset) < 0 or int(offset) * storage.item + nbytes > stored:
            raise CheckpointError(f"'{self._file}' is cut short inside a tensor {list(shape)}: download it again")
        return TensorInfo("", shape, storage.dtype, self._file, start + int(offset) * storage.item, nbytes)


def load_torch_file(file: Path) -> Any:
    """What `torch.save` wrote, with a `TensorInfo` (without a name) for every tensor.

    Raises `CheckpointError` if the file is missing, damaged, of the old format, or holds anything but tensors,
    dictionaries, lists and plain values.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            pickles = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1:
                raise CheckpointError(f"'{file}' holds no torch data: it is another kind of archive")
            root = pickles[0].rpartition("/")[0]
            offsets = _record_offsets(file, archive, f"{root}/data/" if root else "data/")
            return _Unpickler(archive.read(pickles[0]), file, offsets).load()
    except FileNotFoundError:
        raise CheckpointError(f"'{file}' is missing: download it again") from None
    except zipfile.BadZipFile:
        raise CheckpointError(
            f"'{file}' is not a torch file of the zip format, or damaged: download it again"
        ) from None
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, KeyError, struct.error) as error:
        raise CheckpointError(f"'{file}' cannot be read ({error!r}): download it again") from None


def _record_offsets(file: Path, archive: zipfile.ZipFile, prefix: str) -> dict[str, tuple[int, int]]:
    """Storage key -> (where its bytes begin, how many there are)."""
    offsets: dict[str, tuple[int, int]] = {}
    with file.open("rb") as stream:
        for entry in archive.infolist():
            if not entry.filename.startswith(prefix):
                continue
            if entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"'{file}' is compressed inside, which torch never writes: download it again")
            stream.seek(entry.header_offset + 26)
            name, extra = struct.unpack("<HH", stream.read(4))
            offsets[entry.filename[len(prefix) :]] = (entry.header_offset + 30 + name + extra, entry.file_size)
    return offsets


def state_dict(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a saved state dict by name; one inside a dictionary under "model" counts too."""
    content = load_torch_file(file)
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not all(isinstance(value, TensorInfo) for value in content.values()):
        raise CheckpointError(f"'{file}' is not a dictionary of tensors: take it from the checkpoint's talker folder")
    return {str(name): replace(info, name=str(name)) for name, info in content.items()}
