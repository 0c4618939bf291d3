"""From official tensors to the rank files of a TensorRT-LLM checkpoint, one matrix in memory at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from builders.trtllm_file import Entry, TensorFiles, dtype_name
from builders.trtllm_fp8 import Quantizer, amax, scale_of
from builders.trtllm_layout import INPUT_SCALE, KV_SCALE, LAYER, WEIGHT, WEIGHT_SCALE, Kind, Layout, Matrix, Module
from ming_trt.checkpoint import Checkpoint, TensorInfo
from ming_trt.errors import BuildError
from ming_trt.models.weights import TORCH_DTYPES

FLOAT_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
# Unquantised matrices, which need no look at the whole, are copied in parts of about this size.
_PART = 32 << 20


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
    """Bytes of the most that is held at once: a quantised matrix (or a part of another) as read, cut and converted."""
    quantised = [m.rows * m.columns for g in layout.modules if g.kind is Kind.LINEAR for m in g.matrices]
    return max(_PART, max(quantised) if precision == "fp8" else 0) * (2 * item + 1)


class Exporter:
    """Writes all rank files of one layout. `scales` maps a module to the amax of its input, from calibration."""

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
        self._quantize = Quantizer()
        self._read = 0
        self._written = 0

    def plans(self) -> list[dict[str, Entry]]:
        """`entries` of every rank."""
        ranks = range(self.layout.parallel.ranks)
        return [entries(self.layout, self.precision, rank, fp8_cache=self.fp8_cache) for rank in ranks]

    def run(self, folder: Path, key: str, report: Report = lambda _: None) -> Moved:
        """Fills `folder` with the rank files, going on where a run with the same `key` ended."""
        started = time.monotonic()
        plans = self.plans()
        names = [rank_file(rank) for rank in range(len(plans))]
        with TensorFiles(folder, names, plans, key) as files:
            total = files.bytes_total
            for module in self.layout.modules:
                if module.name not in files.done:
                    self._module(files, module)
                    files.finish(module.name)
                    report(Moved(self._read, self._written, total, time.monotonic() - started))
        return Moved(self._read, self._written, total, time.monotonic() - started)

    def _module(self, files: TensorFiles, module: Module) -> None:
        quantised = self.precision == "fp8" and module.kind is Kind.LINEAR
        for matrix in module.matrices:
            if quantised:
                self._quantised(files, matrix)
            else:
                self._plain(files, matrix)
        if quantised:
            scale = torch.tensor([scale_of(self._input_amax(module.name))])
            for rank in range(self.layout.parallel.ranks):
                self._put(files, rank, module.name + INPUT_SCALE, 0, scale)
                if self.fp8_cache and module.name.endswith("attention.qkv"):
                    name = module.name.removesuffix("attention.qkv") + KV_SCALE
                    self._put(files, rank, name, 0, torch.tensor([scale_of(self._input_amax(name))]))

    def _input_amax(self, name: str) -> float:
        value = self.scales.get(name, 0.0)
        if not value > 0:
            raise BuildError(f"calibration gave no range for '{name}': calibrate with more samples")
        return value

    def _quantised(self, files: TensorFiles, matrix: Matrix) -> None:
        """One scale for the whole matrix, whatever part of it a rank holds: ranks agree with the unsplit result."""
        whole = self._rows(matrix, 0, matrix.rows)
        scale = scale_of(amax(whole, matrix.sources[0]))
        stored = self._quantize(whole, scale)
        del whole
        for rank, block in matrix.blocks.items():
            slot = matrix.slots[rank] if matrix.slots else 0
            rows, columns = block.shape
            place = slot * rows * columns
            for start, end in block.rows:
                part = stored[start:end, slice(*block.columns)].contiguous()
                self._put(files, rank, matrix.module + WEIGHT, place, part)
                place += part.numel()
            self._put(files, rank, matrix.module + WEIGHT_SCALE, slot, torch.tensor([scale]))

    def _plain(self, files: TensorFiles, matrix: Matrix) -> None:
        target = torch.float32 if matrix.kind is Kind.ROUTER else self.dtype
        step = max(1, _PART // (4 * matrix.columns))
        for start in range(0, matrix.rows, step):
            end = min(matrix.rows, start + step)
            part = self._rows(matrix, start, end).to(target)
            for rank, block in matrix.blocks.items():
                self._copy(files, matrix, rank, start, end, part)
                if end == matrix.rows and block.pad:
                    rows, columns = block.shape
                    zeros = torch.zeros(block.pad, columns, dtype=target)
                    self._put(files, rank, matrix.module + WEIGHT, (rows - block.pad) * columns, zeros)

    def _copy(self, files: TensorFiles, matrix: Matrix, rank: int, start: int, end: int, part: torch.Tensor) -> None:
        """Rows `start` to `end` of the matrix, as far as the rank holds them."""
        block = matrix.blocks[rank]
        rows, columns = block.shape
        place = (matrix.slots[rank] if matrix.slots else 0) * rows
        for first, last in block.rows:
            a, b = max(first, start), min(last, end)
            if a < b:
                cut = part[a - start : b - start, slice(*block.columns)].contiguous()
                self._put(files, rank, matrix.module + WEIGHT, (place + a - first) * columns, cut)
            place += last - first

    def _rows(self, matrix: Matrix, start: int, end: int) -> torch.Tensor:
        """Rows of the stacked sources, [end - start, columns], in their stored type. Reads only those bytes."""
        infos = [self.checkpoint.info(name) for name in matrix.sources]
        parts, first = [], 0
        for info in infos:
            rows = info.shape[0]
            a, b = max(start - first, 0), min(end - first, rows)
            if a < b:
                parts.append(self._slice(info, matrix.columns, a, b))
            first += rows
        if first != matrix.rows:
            raise BuildError(f"{matrix.sources} have {first} rows, not {matrix.rows}: take another config.json")
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _slice(self, info: TensorInfo, columns: int, start: int, end: int) -> torch.Tensor:
        dtype = TORCH_DTYPES[info.dtype]
        size = columns * dtype.itemsize
        data = self.checkpoint.read_range(info.name, start * size, end * size)
        self._read += len(data)
        return torch.frombuffer(data, dtype=dtype).view(end - start, columns)

    def _put(self, files: TensorFiles, rank: int, name: str, at: int, values: torch.Tensor) -> None:
        files.write(rank, name, at, values)
        self._written += values.numel() * values.itemsize


def layer_prefixes(layout: Layout) -> list[str]:
    """`transformer.layers.0.`, ... of a layout."""
    return [LAYER.format(i) for i in range(layout.num_layers)]
