"""How many bytes a weight takes in an engine, by target, precision, name and shape."""

from __future__ import annotations

import math
from collections.abc import Iterable

from builders.precision import kept
from builders.quantize import ACTIVATIONS_BY_BLOCK, SCHEMES, block_for

_SCALE_BYTES = 4
_PLAIN = {"fp32": 4, "fp16": 2, "bf16": 2}
_TABLES = ("word_embeddings", "embed_tokens", "positional_embedding")


def weight_bytes(
    name: str, shape: tuple[int, ...], target: str, precision: str, keep: Iterable[str] = (), by_column: bool = False
) -> int:
    """Bytes of the parameter `name` of `shape`, scales included.

    `keep` are words in the names of parameters that are not quantised; `by_column` says that int8 has one scale per
    output (dynamic quantisation) instead of one per block.
    """
    count = math.prod(shape)
    if precision in _PLAIN:
        return count * _PLAIN[precision]
    table = any(word in name for word in (*_TABLES, *keep))
    if target != "onnxruntime":
        # tables, norms, routers and the projection over the vocabulary stay in bf16, and what our map keeps
        held = "lm_head" in name or "gates" in name or (target != "tensorrt-llm" and bool(kept(name)))
        return count * (2 if table or len(shape) < 2 or held else 1)
    if precision == "w8a8":
        by_column, precision = not any(word in name for word in ACTIVATIONS_BY_BLOCK), "int8"
    elif len(shape) == 3:
        by_column = False
    if precision == "int8" and by_column and len(shape) in (2, 3) and not table:
        return count + _SCALE_BYTES * (count // shape[-1])
    # The two matrices of an expert share a block; the first has its two halves one above the other.
    widths = (shape[-1], shape[-2] // 2) if len(shape) == 3 else (shape[-1],)
    block = block_for(*widths) if len(shape) > 1 and not table else None
    if block is None:
        return 4 * count
    scheme = SCHEMES[precision]
    bits = scheme.experts if len(shape) == 3 else scheme.bits(name)
    return count * bits // 8 + _SCALE_BYTES * (count // block)
