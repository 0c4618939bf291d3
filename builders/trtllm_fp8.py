"""FP8 (E4M3) as TensorRT-LLM stores it: one scale a matrix, `scale = amax / 448`, `stored = round(value / scale)`.

Conversion goes through one small float32 buffer: temporaries of whole matrices, not arithmetic, are what makes the
obvious form slow. The result is bit for bit that of `(w.float() / scale).clamp(-448, 448).to(float8_e4m3fn)`.
"""

from __future__ import annotations

import torch

from ming_trt.errors import CheckpointError

MAX = 448.0
_BUFFER = 1 << 17  # elements: 512 KiB of float32 stay in a core's cache


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
    """Converts to E4M3 through one reused buffer."""

    def __init__(self) -> None:
        self._buffer = torch.empty(_BUFFER, dtype=torch.float32)

    def __call__(self, values: torch.Tensor, scale: float, out: torch.Tensor | None = None) -> torch.Tensor:
        """`values` (contiguous, any float type) as float8_e4m3fn of the same shape."""
        result = torch.empty(values.shape, dtype=torch.float8_e4m3fn) if out is None else out
        source, target = values.reshape(-1), result.reshape(-1)
        for start in range(0, source.numel(), _BUFFER):
            part = source[start : start + _BUFFER]
            buffer = self._buffer[: part.numel()]
            buffer.copy_(part)
            buffer.div_(scale).clamp_(-MAX, MAX)
            target[start : start + _BUFFER].copy_(buffer)
        return result


def dequantize(stored: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """What the engine computes with: `stored * scale` in float32."""
    return stored.float() * scale
