"""From official tensors to the rank files of a TensorRT-LLM checkpoint, a matrix in memory for each worker."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch

from builders.trtllm_file import Entry, TensorFiles, byte_view, dtype_name
from builders.trtllm_fp8 import Quantizer, amax, scale_of
from builders.trtllm_layout import INPUT_SCALE, KV_SCALE, LAYER, WEIGHT, WEIGHT_SCALE, Kind, Layout, Matrix, Module
from ming_trt.checkpoint import Checkpoint, TensorInfo
from ming_trt.errors import BuildError
from ming_trt.models.weights import TORCH_DTYPES

FLOAT_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
# Unquantised matrices, which need no look at the whole, are copied in parts of at most about this size.
_PART = 16 << 20
# Some wait for the disk while the others convert; four gain little over three, and hold more memory.
_WORKERS = 3
# So many bytes go to the disk at a time, while the workers go on: a module of experts has hundreds of megabytes.
_SYNC = 64 << 20


@dataclass(frozen=True, slots=True)
class Moved:
    """Progress: bytes of source read and of result written so far, of how many to write, in how many seconds."""

    read: int
    written: int
    total: int
    seconds: float

    @property
    def rate(self) -> float:
        """MB of source a second (10^6 bytes)."""
        return self.read / 1e6 / self.seconds if self.seconds else 0.0


Report = Callable[[Moved], None]


def rank_file(rank: int) -> str:
    """File name of a rank's tensors."""
    return f"rank{rank}.safetensors"


def entries(layout: Layout, precision: str, rank: int, *, fp8_cache: bool = False) -> dict[str, Entry]:
    """Name, type and shape of every tensor of a rank's file, in its order."""
    plain = dtype_name(FLOAT_TYPES[precision])
    found: dict[str, Entry] = {}
    for module in layout.modules:
        quantised = precision == "fp8" and module.kind is Kind.LINEAR
        stored = "F8_E4M3" if quantised else "F32" if module.kind is Kind.ROUTER else plain
        found[module.name + WEIGHT] = Entry(stored, module.shape(rank))
        if quantised:
            found[module.name + WEIGHT_SCALE] = Entry("F32", (module.experts, 1) if module.experts else (1,))
            found[module.name + INPUT_SCALE] = Entry("F32", (1,))
            if fp8_cache and module.name.endswith("attention.qkv"):
                found[module.name.removesuffix("attention.qkv") + KV_SCALE] = Entry("F32", (1,))
    return found


def largest_part(layout: Layout, precision: str, item: int = 4) -> int:
    """Bytes of the most that is held at once: every worker has a quantised matrix (or a part of another) as read,
    converted and cut."""
    quantised = [m.rows * m.columns for g in layout.modules if g.kind is Kind.LINEAR for m in g.matrices]
    return _WORKERS * max(3 * _PART, max(quantised) * (item + 2) if precision == "fp8" else 0)


class _Scratch(threading.local):
    """A worker's memory, used again for every matrix: fresh pages cost as much as reading into them."""

    def __init__(self) -> None:
        self.quantize = Quantizer()
        self._kept: dict[torch.dtype, torch.Tensor] = {}

    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """A matrix that is the worker's until the next call with the same type."""
        count = shape[0] * shape[1]
        kept = self._kept.get(dtype)
        if kept is None or kept.numel() < count:
            self._kept[dtype] = kept = torch.empty(count, dtype=dtype)
        return kept[:count].view(shape)


class Exporter:
    """Writes all rank files of one layout. `scales` maps a module to the amax of its input, from calibration.

    Workers read, convert and write whole matrices; the caller's thread syncs and notes what they have finished.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        precision: str,
        scales: Mapping[str, float] | None = None,
        *,
        fp8_cache: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.layout = layout
        self.precision = precision
        self.scales = scales or {}
        self.fp8_cache = fp8_cache
        self.dtype = FLOAT_TYPES[precision]
        self._scratch = _Scratch()

    def plans(self) -> list[dict[str, Entry]]:
        """`entries` of every rank."""
        ranks = range(self.layout.parallel.ranks)
        return [entries(self.layout, self.precision, rank, fp8_cache=self.fp8_cache) for rank in ranks]

    def run(self, folder: Path, key: str, report: Report = lambda _: None) -> Moved:
        """Fills `folder` with the rank files, going on where a run with the same `key` ended."""
        started = time.monotonic()
        plans = self.plans()
        names = [rank_file(rank) for rank in range(len(plans))]
        inputs = {module.name: self._input_scales(module) for module in self.layout.modules}
        read = written = unsynced = 0
        with TensorFiles(folder, names, plans, key) as files, ThreadPoolExecutor(_WORKERS, "export") as pool:
            modules = [module for module in self.layout.modules if module.name not in files.done]
            moves = [[pool.submit(self._matrix, files, matrix) for matrix in module.matrices] for module in modules]
            try:
                for module, pending in zip(modules, moves, strict=True):
                    for rank, name, scale in inputs[module.name]:
                        written += _put(files, rank, name, 0, torch.tensor([scale]))
                    for move in pending:
                        count, size = move.result()
                        read, written, unsynced = read + count, written + size, unsynced + size
                        if unsynced >= _SYNC:
                            files.sync()
                            unsynced = 0
                    files.finish(module.name)
                    report(Moved(read, written, files.bytes_total, time.monotonic() - started))
            finally:
                # after an error nothing new is begun; what is under way ends before the files are closed
                pool.shutdown(cancel_futures=True)
        return Moved(read, written, files.bytes_total, time.monotonic() - started)

    def _quantised_kind(self, kind: Kind) -> bool:
        return self.precision == "fp8" and kind is Kind.LINEAR

    def _input_scales(self, module: Module) -> list[tuple[int, str, float]]:
        """Rank, name and value of the module's scales that come from calibration."""
        if not self._quantised_kind(module.kind):
            return []
        scales = {module.name + INPUT_SCALE: self._input_amax(module.name)}
        if self.fp8_cache and module.name.endswith("attention.qkv"):
            name = module.name.removesuffix("attention.qkv") + KV_SCALE
            scales[name] = self._input_amax(name)
        ranks = range(self.layout.parallel.ranks)
        return [(rank, name, scale_of(value)) for name, value in scales.items() for rank in ranks]

    def _input_amax(self, name: str) -> float:
        value = self.scales.get(name, 0.0)
        if not value > 0:
            raise BuildError(f"calibration gave no range for '{name}': calibrate with more samples")
        return value

    def _matrix(self, files: TensorFiles, matrix: Matrix) -> tuple[int, int]:
        """Moves one matrix, in a worker; bytes read and written."""
        return self._quantised(files, matrix) if self._quantised_kind(matrix.kind) else self._plain(files, matrix)

    def _quantised(self, files: TensorFiles, matrix: Matrix) -> tuple[int, int]:
        """One scale for the whole matrix, whatever part of it a rank holds: ranks agree with the unsplit result."""
        whole = self._rows(matrix, 0, matrix.rows)
        scale = scale_of(amax(whole, matrix.sources[0]))
        out = self._scratch.empty((matrix.rows, matrix.columns), torch.float8_e4m3fn)
        stored = self._scratch.quantize(whole, scale, out)
        written = 0
        for rank, block in matrix.blocks.items():
            slot = matrix.slots[rank] if matrix.slots else 0
            rows, columns = block.shape
            place = slot * rows * columns
            for start, end in block.rows:
                part = stored[start:end, slice(*block.columns)].contiguous()
                written += _put(files, rank, matrix.module + WEIGHT, place, part)
                place += part.numel()
            written += _put(files, rank, matrix.module + WEIGHT_SCALE, slot, torch.tensor([scale]))
        return whole.numel() * whole.itemsize, written

    def _plain(self, files: TensorFiles, matrix: Matrix) -> tuple[int, int]:
        target = torch.float32 if matrix.kind is Kind.ROUTER else self.dtype
        step = max(1, _PART // (4 * matrix.columns))
        read = written = 0
        for start in range(0, matrix.rows, step):
            end = min(matrix.rows, start + step)
            whole = self._rows(matrix, start, end)
            read += whole.numel() * whole.itemsize
            part = whole.to(target)
            for rank, block in matrix.blocks.items():
                written += _copy(files, matrix, rank, start, end, part)
                if end == matrix.rows and block.pad:
                    rows, columns = block.shape
                    zeros = torch.zeros(block.pad, columns, dtype=target)
                    written += _put(files, rank, matrix.module + WEIGHT, (rows - block.pad) * columns, zeros)
        return read, written

    def _rows(self, matrix: Matrix, start: int, end: int) -> torch.Tensor:
        """Rows of the stacked sources, [end - start, columns], in their stored type. Reads only those bytes.

        The result is in the worker's memory and holds until its next matrix.
        """
        infos = [self.checkpoint.info(name) for name in matrix.sources]
        dtypes = {TORCH_DTYPES[info.dtype] for info in infos}
        whole = self._scratch.empty((end - start, matrix.columns), reduce(torch.promote_types, dtypes))
        first = 0
        for info in infos:
            rows = info.shape[0]
            a, b = max(start - first, 0), min(end - first, rows)
            if a < b:
                self._read(info, a, b, whole[first + a - start : first + b - start])
            first += rows
        if first != matrix.rows:
            raise BuildError(f"{matrix.sources} have {first} rows, not {matrix.rows}: take another config.json")
        return whole

    def _read(self, info: TensorInfo, start: int, end: int, target: torch.Tensor) -> None:
        dtype, columns = TORCH_DTYPES[info.dtype], target.shape[1]
        # sources of different types: each is read for itself and widened
        raw = target if dtype == target.dtype else torch.empty(target.shape, dtype=dtype)
        size = columns * dtype.itemsize
        self.checkpoint.read_into(info.name, start * size, end * size, byte_view(raw))
        if raw is not target:
            target.copy_(raw)


def _copy(files: TensorFiles, matrix: Matrix, rank: int, start: int, end: int, part: torch.Tensor) -> int:
    """Writes rows `start` to `end` of the matrix, as far as the rank holds them; how many bytes."""
    block = matrix.blocks[rank]
    rows, columns = block.shape
    place = (matrix.slots[rank] if matrix.slots else 0) * rows
    written = 0
    for first, last in block.rows:
        a, b = max(first, start), min(last, end)
        if a < b:
            cut = part[a - start : b - start, slice(*block.columns)].contiguous()
            written += _put(files, rank, matrix.module + WEIGHT, (place + a - first) * columns, cut)
        place += last - first
    return written


def _put(files: TensorFiles, rank: int, name: str, at: int, values: torch.Tensor) -> int:
    files.write(rank, name, at, values)
    return values.numel() * values.itemsize


def layer_prefixes(layout: Layout) -> list[str]:
    """`transformer.layers.0.`, ... of a layout."""
    return [LAYER.format(i) for i in range(layout.num_layers)]
