"""Operators that back ends replace, as torch custom operators of namespace `ming` with a reference in plain torch.

An exporter meets exactly these and translates them one to one; everything else in the modules is standard.

`ming::mrope(q, k, position_ids, theta, kind, sections) -> (q_rotated, k_rotated)`
    q [B, heads, S, D], k [B, kv_heads, S, D], position_ids int64 [3, B, S]. D = 2 * sum(sections). Angles, cosines and
    sines in float32, the rotation too, one rounding to the dtype of q and k. No 1/sqrt(D). See `rope.py`.

`ming::sparse_moe(x, router_logits, gate_up, down, top_k, normalize) -> y`
    x [N, H], router_logits [N, E], gate_up [E, 2I, H] (rows: I gate, then I up), down [E, H, I], y [N, H] in x's dtype.
    p = softmax over all E experts in float32; w, e = the top_k largest of p (ties: lower expert first);
    if normalize: w = w / sum(w). y = sum over k of float32(w_k) * float32(expert_{e_k}(x)), accumulated in float32 and
    rounded once. expert(x) = (silu(x @ gate.T) * (x @ up.T)) @ down.T in x's dtype. No shared expert in it.

`ming::kv_update(cache, update, write_index) -> cache'`
    cache [B, kv_heads, T, D], update [B, kv_heads, S, D], write_index int64 [B]. A copy of cache whose rows
    write_index[b] .. write_index[b] + S - 1 of batch entry b are those of update; write_index[b] + S <= T.
    ONNX: TensorScatter(mode="linear", axis=-2). Back ends may bind input and output to the same memory.

Attention is `torch.nn.functional.scaled_dot_product_attention` with a bool mask (true = attend) and `enable_gqa`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from ming_trt.models import rope

Pair = tuple[torch.Tensor, torch.Tensor]


@torch.library.custom_op("ming::mrope", mutates_args=())
def mrope(
    q: torch.Tensor, k: torch.Tensor, position_ids: torch.Tensor, theta: float, kind: str, sections: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the module's docstring."""
    cos, sin = (table.unsqueeze(1) for table in rope.cos_sin(position_ids, theta, kind, sections))
    return rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)


@mrope.register_fake
def _mrope_fake(
    q: torch.Tensor, k: torch.Tensor, position_ids: torch.Tensor, theta: float, kind: str, sections: Sequence[int]
) -> Pair:
    return torch.empty_like(q), torch.empty_like(k)


def route(router_logits: torch.Tensor, top_k: int, normalize: bool) -> Pair:
    """Expert ids int64 [..., top_k], best first, and their weights float32 [..., top_k] for logits [..., E].

    Among equals the lower expert comes first, as in ONNX's `TopK`: a stable sort says so, `torch.topk` does not.
    """
    weights, experts = router_logits.float().softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    weights, experts = weights[..., :top_k], experts[..., :top_k]
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return experts, weights


@torch.library.custom_op("ming::sparse_moe", mutates_args=())
def sparse_moe(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k: int,
    normalize: bool,
) -> torch.Tensor:
    """See the module's docstring."""
    experts, weights = route(router_logits, top_k, normalize)
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in torch.unique(experts).tolist():
        token, place = (experts == expert).nonzero(as_tuple=True)
        gate, up = functional.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        out = functional.linear(functional.silu(gate) * up, down[expert])
        total.index_add_(0, token, out.float() * weights[token, place].unsqueeze(-1))
    return total.to(x.dtype)


@sparse_moe.register_fake
def _sparse_moe_fake(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k: int,
    normalize: bool,
) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("ming::kv_update", mutates_args=())
def kv_update(cache: torch.Tensor, update: torch.Tensor, write_index: torch.Tensor) -> torch.Tensor:
    """See the module's docstring."""
    slots = write_index.unsqueeze(1) + torch.arange(update.shape[2], device=cache.device)
    index = slots[:, None, :, None].expand(-1, cache.shape[1], -1, cache.shape[3])
    return cache.scatter(2, index, update)


@kv_update.register_fake
def _kv_update_fake(cache: torch.Tensor, update: torch.Tensor, write_index: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(cache)
