"""Reads a checkpoint of safetensors shards, one tensor at a time.

Opening reads headers only; `read` touches the bytes of one tensor, so the memory needed is that of the largest tensor
asked for. torch is imported only by `Checkpoint.read`. Format: <https://huggingface.co/docs/safetensors>.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ming_trt.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# safetensors name -> bytes per element
ITEM_SIZE = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_NUMPY = {
    "F64": "<f8", "I64": "<i8", "U64": "<u8", "F32": "<f4", "I32": "<i4", "U32": "<u4", "F16": "<f2", "I16": "<i2",
    "U16": "<u2", "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip
_TORCH = {
    "F64": "float64", "I64": "int64", "F32": "float32", "I32": "int32", "F16": "float16", "BF16": "bfloat16",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_MAX_HEADER = 100 << 20
_CHUNK = 8 << 20
_STEMS = ("model", "diffusion_pytorch_model")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `dtype` is the safetensors name (e.g. "BF16"), `offset` counts from the start of `file`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int
    nbytes: int


class Checkpoint:
    """The tensors of `root/subfolder` (sharded with an index, or one file; official or diffusers file names).
    A `.pt` file counts as a folder of its tensors: `talker/hift_v2.pt/conv_pre.bias`.

    Raises `CheckpointError` at once if a shard is missing, malformed or shorter than its header says. All names are
    sorted. Safe to share between threads: there is no state but the headers. A tensor of a folder below
    is named with its folder, `connector/model.norm.weight`; `names` lists this folder's own.
    """

    def __init__(self, root: Path, subfolder: str = "") -> None:
        self.root = Path(root)
        self.folder = self.root / subfolder if subfolder else self.root
        if self.folder.suffix == ".pt":
            from ming_trt.torch_file import state_dict

            self._tensors = dict(sorted(state_dict(self.folder).items()))
        elif not self.folder.is_dir():
            raise CheckpointError(f"checkpoint folder '{self.folder}' does not exist: give the folder of the download")
        else:
            self._tensors = dict(sorted(_open_folder(self.folder).items()))
        self._parts: dict[str, Checkpoint] = {}

    def names(self, prefix: str = "") -> list[str]:
        """Names of all tensors that start with `prefix`, sorted."""
        return [name for name in self._tensors if name.startswith(prefix)]

    def __contains__(self, name: object) -> bool:
        subfolder, _, rest = str(name).rpartition("/")
        if subfolder:
            path = self.folder / subfolder
            return (path.is_dir() or (path.suffix == ".pt" and path.is_file())) and rest in self.part(subfolder)
        return name in self._tensors

    def part(self, subfolder: str) -> Checkpoint:
        """The tensors of a folder below this one, opened once; known to this one as `subfolder/name`."""
        if subfolder not in self._parts:
            self._parts[subfolder] = Checkpoint(self.folder, subfolder)
        return self._parts[subfolder]

    def __len__(self) -> int:
        return len(self._tensors)

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The shards, sorted."""
        return tuple(sorted({info.file for info in self._tensors.values()}))

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and place of a tensor. Raises `CheckpointError` if there is none of that name."""
        subfolder, _, rest = name.rpartition("/")
        if subfolder:
            return replace(self.part(subfolder).info(rest), name=name)
        info = self._tensors.get(name)
        if info is None:
            raise CheckpointError(f"tensor '{name}' is not in '{self.folder}' ({self._nearest(name)})")
        return info

    def _nearest(self, name: str) -> str:
        """What there is instead: the longest dotted prefix of `name` under which there are tensors."""
        parts = name.split(".")
        for length in range(len(parts) - 1, 0, -1):
            prefix = ".".join(parts[:length]) + "."
            found = self.names(prefix)
            if found:
                return f"under '{prefix}' there are {len(found)} tensors, e.g. '{found[0]}': download the shards again"
        first = next(iter(self._tensors), None)
        return f"nothing starts with '{parts[0]}.'; the first tensor is '{first}': is this the right folder?"

    def require(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """Like `info`, and the shape must be `shape`."""
        info = self.info(name)
        if info.shape != tuple(shape):
            raise CheckpointError(
                f"tensor '{name}' in '{info.file}' has shape {list(info.shape)}, but config.json asks for "
                f"{list(shape)}: take both from the same release"
            )
        return info

    def read_bytes(self, name: str) -> bytearray:
        """The stored bytes of a tensor (little-endian, row-major)."""
        return self.read_range(name, 0, self.info(name).nbytes)

    def read_range(self, name: str, start: int, end: int) -> bytearray:
        """Bytes `start` to `end` of those of `read_bytes`; only they are read."""
        data = bytearray(max(end - start, 0))
        self.read_into(name, start, end, memoryview(data))
        return data

    def read_into(self, name: str, start: int, end: int, target: memoryview) -> None:
        """Like `read_range`, into `target` (writable bytes, `end - start` of them)."""
        info = self.info(name)
        if not 0 <= start <= end <= info.nbytes or len(target) != end - start:
            raise ValueError(f"bytes {start} to {end} of '{name}', which has {info.nbytes}, into {len(target)}")
        with _open(info.file) as file:
            file.seek(info.offset + start)
            _fill(file, target, info)

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype, on the CPU, in memory of its own."""
        import torch

        info = self.info(name)
        if info.dtype not in _TORCH:
            raise CheckpointError(
                f"tensor '{name}' has dtype {info.dtype}, which cannot be read: store it as BF16 or F32"
            )
        dtype: torch.dtype = getattr(torch, _TORCH[info.dtype])
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        return torch.frombuffer(self.read_bytes(name), dtype=dtype).reshape(info.shape)

    def read_numpy(self, name: str, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """The tensor converted to `dtype` (exact for BF16 and F16 to float32); needs no torch."""
        info = self.info(name)
        data = self.read_bytes(name)
        if info.dtype == "BF16":
            words = np.frombuffer(data, "<u2").astype(np.uint32) << 16
            return words.view(np.float32).reshape(info.shape).astype(dtype, copy=False)
        if info.dtype not in _NUMPY:
            raise CheckpointError(
                f"tensor '{name}' has dtype {info.dtype}, which numpy cannot hold: read it with torch"
            )
        return np.frombuffer(data, _NUMPY[info.dtype]).reshape(info.shape).astype(dtype, copy=False)

    def digest(self, names: Iterable[str], cache: Path | None = None) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of the tensors `names` (the order does not matter).

        With a folder `cache` the hashes of single tensors are kept there per shard, and used again while the shard's
        path, size, modification time and inode stay as they are, so that a rebuild without changes reads nothing.
        """
        wanted = [self.info(name) for name in sorted(set(names))]
        total = hashlib.sha256()
        hashes = {file: _TensorHashes(file, cache) for file in {info.file for info in wanted}}
        for info in wanted:
            content = hashes[info.file].get(info)
            total.update(json.dumps([info.name, info.dtype, list(info.shape), content]).encode())
        for entry in hashes.values():
            entry.save()
        return total.hexdigest()


class _TensorHashes:
    """SHA-256 of the tensors of one shard, remembered in a small JSON file."""

    def __init__(self, file: Path, cache: Path | None) -> None:
        self._path: Path | None = None
        self._known: dict[str, str] = {}
        self._changed = False
        if cache is None:
            return
        state = file.stat()
        self._stamp = [str(file.resolve()), state.st_size, state.st_mtime_ns, state.st_ino]
        key = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:24]
        self._path = Path(cache) / f"{key}.json"
        try:
            stored = json.loads(self._path.read_text("utf-8"))
        except (OSError, ValueError):
            return  # no cache yet, or a damaged one: hash again
        if isinstance(stored, dict) and stored.get("stamp") == self._stamp:
            self._known = dict(stored["tensors"])

    def get(self, info: TensorInfo) -> str:
        if info.name not in self._known:
            hasher = hashlib.sha256()
            with _open(info.file) as file:
                file.seek(info.offset)
                buffer = memoryview(bytearray(min(_CHUNK, info.nbytes)))
                left = info.nbytes
                while left:
                    part = buffer[: min(left, len(buffer))]
                    _fill(file, part, info)
                    hasher.update(part)
                    left -= len(part)
            self._known[info.name] = hasher.hexdigest()
            self._changed = True
        return self._known[info.name]

    def save(self) -> None:
        if self._path is None or not self._changed:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self._path.parent, suffix=".tmp", delete=False) as file:
            json.dump({"stamp": self._stamp, "tensors": self._known}, file)
        Path(file.name).replace(self._path)


def _open(file: Path) -> Any:
    try:
        return file.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"shard '{file}' cannot be opened ({error.strerror}): download it again") from None


def _fill(file: Any, target: memoryview, info: TensorInfo) -> None:
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])
        if not count:
            raise CheckpointError(f"shard '{info.file}' ends inside tensor '{info.name}': download it again")
        done += count


def tensor_headers(file: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file, in its order; reads its header. Raises `CheckpointError`."""
    return list(_read_header(file))


def _open_folder(folder: Path) -> dict[str, TensorInfo]:
    indices = [folder / f"{stem}.safetensors.index.json" for stem in _STEMS]
    index = next((path for path in indices if path.exists()), None)
    if index is None:
        tensors: dict[str, TensorInfo] = {}
        for file in _shards_without_index(folder):
            for info in _read_header(file):
                if info.name in tensors:
                    other = tensors[info.name].file.name
                    raise CheckpointError(
                        f"tensor '{info.name}' is in '{other}' and in '{file.name}': keep one of them"
                    )
                tensors[info.name] = info
        return tensors
    weight_map = _read_index(index)
    headers: dict[str, dict[str, TensorInfo]] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).exists():
            raise CheckpointError(f"shard '{shard}' named by '{index}' is missing: download it again")
        headers[shard] = {info.name: info for info in _read_header(folder / shard)}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise CheckpointError(f"'{index}' places tensor '{name}' in '{shard}', which lacks it: download both again")
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _read_index(index: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        pairs = {str(name): str(shard) for name, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"'{index}' is not a safetensors index ({error!r}): download it again") from None
    for shard in set(pairs.values()):
        if Path(shard).name != shard:
            raise CheckpointError(f"'{index}' names '{shard}', which is not a file name: download the index again")
    return pairs


def _shards_without_index(folder: Path) -> list[Path]:
    for stem in _STEMS:
        single = folder / f"{stem}.safetensors"
        if single.exists():
            return [single]
    for stem in _STEMS:
        shards = sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
        if not shards:
            continue
        total = shards[0].stem.rpartition("-of-")[2]
        if not total.isdigit() or len(shards) != int(total):
            raise CheckpointError(
                f"'{folder}' holds {len(shards)} of the {total} shards and no index: download the missing ones"
            )
        return shards
    raise CheckpointError(f"no .safetensors file of a model in '{folder}': give the folder of the download")


def _read_header(file: Path) -> Iterator[TensorInfo]:
    size = file.stat().st_size
    with _open(file) as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size + 1
        if not 2 <= length <= _MAX_HEADER:
            raise CheckpointError(f"'{file}' is not a safetensors file (its header length is wrong): download it again")
        if 8 + length > size:
            raise CheckpointError(f"'{file}' is cut short inside its header ({size} bytes): download it again")
        text = stream.read(length)
    try:
        header = json.loads(text)
        entries = [
            (name, str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), *map(int, entry["data_offsets"]))
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"'{file}' has a malformed safetensors header ({error!r}): download it again") from None
    needed = 8 + length + max((entry[4] for entry in entries), default=0)
    if needed > size:
        raise CheckpointError(
            f"'{file}' is cut short: its header promises {needed} bytes and it has {size}: download it again"
        )
    for name, dtype, shape, start, end in entries:
        expected = math.prod(shape) * ITEM_SIZE.get(dtype, 0)
        if dtype not in ITEM_SIZE or not 0 <= start <= end or end - start != expected or min(shape, default=1) < 0:
            raise CheckpointError(
                f"'{file}' describes tensor '{name}' as {dtype} {list(shape)} in {end - start} bytes, "
                "which does not fit: download it again"
            )
        yield TensorInfo(name, shape, dtype, file, 8 + length + start, end - start)
