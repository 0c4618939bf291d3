"""Weight quantisation for ONNX Runtime's CPU kernels: block-wise 8 and 4 bits, and per-column int8.

Block-wise (`MatMulNBits`, `QMoE`): each run of `block` weights of a row shares a float32 scale; codes are unsigned with
the zero point 2^(bits-1), `weight = (code - zero) * scale`; two 4-bit codes share a byte, the first in its low half.
Per column (`DynamicQuantizeMatMul`): one scale per output, signed codes.
All functions take one matrix [rows, width] at a time, so that a stack of experts streams through.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from builders.tensors import Array

BLOCKS = (128, 64, 32, 16)
# Weights that are quantised at a time.
_PART = 1 << 19


@dataclass(frozen=True, slots=True)
class WeightOnly:
    """Bits of the experts' matrices, of attention's, of other linear layers and of the projection to the vocabulary.

    Activations stay float32 between operators. Attention is a ninth of what a step reads of Ming-lite-omni's experts
    and linear layers, and by far the most sensitive: on random weights 4 bits there cost 5 dB of the logits' SQNR, on
    the shared expert 1 dB. The projection decides which token is chosen.
    """

    experts: int
    attention: int
    linears: int
    head: int = 8

    def bits(self, name: str) -> int:
        """Bits of the linear layer whose weight is called `name`."""
        parts = name.split(".")
        if "lm_head" in parts:
            return self.head
        return self.attention if "attention" in parts or "attn" in parts else self.linears


SCHEMES = {
    "int8": WeightOnly(experts=8, attention=8, linears=8),
    "int4": WeightOnly(experts=4, attention=8, linears=4),
}
# Linear layers that keep a scale per block in "w8a8": attention, by far the most sensitive (one scale for all rows
# costs 3 dB of the logits' SQNR on random weights), and the projection to the vocabulary, which chooses the token.
ACTIVATIONS_BY_BLOCK = ("attention.", "lm_head.")


def block_for(*widths: int) -> int | None:
    """The largest block that divides all `widths`, None if there is none."""
    return next((block for block in BLOCKS if all(width % block == 0 for width in widths)), None)


def _blocks(matrix: Array, block: int) -> torch.Tensor:
    """[rows, blocks, block] float32; a last block that is not full is filled with zeros."""
    weight = torch.from_numpy(np.asarray(matrix, np.float32))
    missing = -weight.shape[1] % block
    if missing:
        weight = torch.nn.functional.pad(weight, (0, missing))
    return weight.reshape(len(weight), -1, block)


def quantize_blocks(matrix: Array, bits: int, block: int) -> tuple[Array, Array]:
    """Codes uint8 [rows, ceil(width / block), block * bits / 8] and scales float32 [rows, ceil(width / block)].

    The value of a block that is largest in magnitude becomes the code farthest from zero, -2^(bits-1), so scales may be
    negative.
    """
    rows, width = matrix.shape
    count = -(-width // block)
    codes, scales = np.empty((rows, count, block * bits // 8), np.uint8), np.empty((rows, count), np.float32)
    # a part at a time stays in the processor's cache; intermediate arrays of a whole matrix are new memory every time
    step = max(1, _PART // width)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        codes[part], scales[part] = _quantize(_blocks(matrix[part], block), bits)
    return codes, scales


def _quantize(blocks: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    zero = 1 << (bits - 1)
    high, low = blocks.amax(dim=-1), blocks.amin(dim=-1)
    scales = torch.where(-low > high, low, high) / -float(zero)
    # a block of zeros has the scale 0: any code is right, take the zero point
    inverse = torch.where(scales == 0, torch.zeros_like(scales), 1 / scales).unsqueeze(-1)
    codes = (blocks * inverse).round_().add_(zero).clamp_(0, 2 * zero - 1).to(torch.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return codes, scales


def dequantized(codes: Array, scales: Array, bits: int, width: int) -> Array:
    """The float32 matrix [rows, width] that codes [rows, blocks, bytes] and scales [rows, blocks] stand for."""
    if bits == 4:
        codes = np.stack((codes & 15, codes >> 4), axis=-1).reshape(*codes.shape[:2], -1)
    values = (codes.astype(np.float32) - (1 << (bits - 1))) * scales[..., None]
    matrix: Array = values.reshape(len(codes), -1)[:, :width]
    return matrix


def column_scales(matrix: Array) -> Array:
    """Scales float32 [rows] of `matrix` [rows, width]; never 0."""
    extreme = np.abs(np.asarray(matrix, np.float32)).max(axis=1)
    scales: Array = np.where(extreme == 0, np.float32(1), extreme / np.float32(127)).astype(np.float32)
    return scales


def column_codes(matrix: Array) -> Array:
    """Signed codes int8 [width, rows], transposed as the kernel wants them."""
    weight = torch.from_numpy(np.asarray(matrix, np.float32))
    scales = torch.from_numpy(column_scales(matrix))
    codes: Array = (weight / scales[:, None]).round_().to(torch.int8).T.contiguous().numpy()
    return codes


def quantize_columns(matrix: Array) -> tuple[Array, Array]:
    """`column_codes` and `column_scales`."""
    return column_codes(matrix), column_scales(matrix)
