"""FP8 (E4M3) as TensorRT-LLM stores it: one scale a matrix, `scale = amax / 448`, `stored = round(value / scale)`.

Conversion goes through small buffers: temporaries of whole matrices make the obvious form slow. Types of 16 bits are
converted by a table of all their values, which takes half the time of arithmetic. The result is bit for bit that of
`(w.float() / scale).clamp(-448, 448).to(float8_e4m3fn)`.
"""

from __future__ import annotations

import torch

from ming_trt.errors import CheckpointError

MAX = 448.0
# Elements: 128 KiB of float32 stay in a core's cache, and torch starts no threads of its own for so few.
_BUFFER = 1 << 15
_PATTERNS = 1 << 16


def amax(values: torch.Tensor, name: str) -> float:
    """Largest magnitude. Raises `CheckpointError` if a value is not finite."""
    if values.numel() == 0:
        return 0.0
    low, high = torch.aminmax(values)
    result = max(abs(float(low)), abs(float(high)))
    # aminmax gives NaN if any value is one
    if not result < float("inf"):
        raise CheckpointError(f"tensor '{name}' holds values that are not finite: download its shard again")
    return result


def scale_of(largest: float) -> float:
    """The float32 scale for that largest magnitude; 1 for zeros, which any scale represents."""
    return float(torch.tensor(largest if largest else MAX, dtype=torch.float32) / MAX)


class Quantizer:
    """Converts to E4M3 through small reused buffers, by one thread."""

    def __init__(self) -> None:
        self._floats = torch.empty(_BUFFER, dtype=torch.float32)
        self._indices = torch.empty(_BUFFER, dtype=torch.int32)

    def __call__(self, values: torch.Tensor, scale: float, out: torch.Tensor | None = None) -> torch.Tensor:
        """`values` (contiguous, any float type) as float8_e4m3fn of the same shape, in `out` if given."""
        result = torch.empty(values.shape, dtype=torch.float8_e4m3fn) if out is None else out
        source, target = values.reshape(-1), result.view(-1)
        if values.itemsize == 2 and values.numel() > _PATTERNS:
            self._look_up(source, scale, target)
        else:
            self._compute(source, scale, target)
        return result

    def _compute(self, source: torch.Tensor, scale: float, target: torch.Tensor) -> None:
        for start in range(0, source.numel(), _BUFFER):
            part = source[start : start + _BUFFER]
            buffer = self._floats[: part.numel()]
            buffer.copy_(part)
            buffer.div_(scale).clamp_(-MAX, MAX)
            target[start : start + _BUFFER].copy_(buffer)

    def _look_up(self, source: torch.Tensor, scale: float, target: torch.Tensor) -> None:
        """A matrix has more elements than a 16-bit type has values: each value is converted once."""
        patterns = torch.arange(_PATTERNS, dtype=torch.int32).to(torch.uint16).view(source.dtype)
        table = torch.empty(_PATTERNS, dtype=torch.float8_e4m3fn)
        self._compute(patterns, scale, table)
        table, bits, found = table.view(torch.uint8), source.view(torch.uint16), target.view(torch.uint8)
        for start in range(0, bits.numel(), _BUFFER):
            part = bits[start : start + _BUFFER]
            indices = self._indices[: part.numel()]
            indices.copy_(part)
            torch.index_select(table, 0, indices, out=found[start : start + _BUFFER])


def dequantize(stored: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """What the engine computes with: `stored * scale` in float32."""
    return stored.float() * scale
