"""Layers of Qwen2 as the connector and the talker have them: grouped-query attention with biases on queries, keys and
values, a gated feed-forward, norms before both. Parameters carry the official names.

With a `Cache` a layer reads and writes keys and values that the caller owns, like the LLM's; without one every token
sees every other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional

from ming_trt.models import ops
from ming_trt.models.norm import RMSNorm
from ming_trt.models.rope import inverse_frequencies, rotate

Table = tuple[Tensor, Tensor]


class Sizes(Protocol):
    """Of one layer: features, query heads, key heads, features of a head and of the feed-forward; the norms' eps."""

    @property
    def hidden(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def intermediate(self) -> int: ...
    @property
    def eps(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values [B, kv_heads, T, head_dim] of a step; `write_index` i64 [B] is where its tokens go, `mask` bool
    [B, 1, S, T] says which places each of them sees."""

    key: Tensor
    value: Tensor
    write_index: Tensor
    mask: Tensor


class Attention(nn.Module):
    """[B, S, hidden] to the same, and the keys and values that were seen."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = sizes.heads, sizes.kv_heads, sizes.head_dim
        self.q_proj = nn.Linear(sizes.hidden, self.heads * self.head_dim)
        self.k_proj = nn.Linear(sizes.hidden, self.kv_heads * self.head_dim)
        self.v_proj = nn.Linear(sizes.hidden, self.kv_heads * self.head_dim)
        self.o_proj = nn.Linear(self.heads * self.head_dim, sizes.hidden, bias=False)

    def forward(self, x: Tensor, table: Table, cache: Cache | None = None) -> tuple[Tensor, Tensor, Tensor]:
        query = rotate(self.q_proj(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2), *table)
        key = rotate(self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2), *table)
        value = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        if cache is not None:
            key = ops.kv_update(cache.key, key, cache.write_index)
            value = ops.kv_update(cache.value, value, cache.write_index)
        mask = None if cache is None else cache.mask
        # The exporter takes the flag only where query heads do share key heads.
        shared = self.heads != self.kv_heads
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=shared)
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), key, value


class MLP(nn.Module):
    """Gated feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.hidden, sizes.intermediate, bias=False)
        self.up_proj = nn.Linear(sizes.hidden, sizes.intermediate, bias=False)
        self.down_proj = nn.Linear(sizes.intermediate, sizes.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """[B, S, hidden] to the same, and the keys and values that were seen."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(sizes.hidden, sizes.eps)
        self.self_attn = Attention(sizes)
        self.post_attention_layernorm = RMSNorm(sizes.hidden, sizes.eps)
        self.mlp = MLP(sizes)

    def forward(self, x: Tensor, table: Table, cache: Cache | None = None) -> tuple[Tensor, Tensor, Tensor]:
        attended, key, value = self.self_attn(self.input_layernorm(x), table, cache)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), key, value


def rope_table(position: Tensor, head_dim: int, theta: float) -> Table:
    """Cosines and sines float32 [..., S, head_dim / 2] of the positions [..., S]."""
    angle = position.unsqueeze(-1).float() * inverse_frequencies(head_dim, theta, position.device)
    return angle.cos(), angle.sin()
