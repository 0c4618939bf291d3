"""Connector: hidden states of the 16x16 query tokens become the condition of the denoiser.

`proj_in`, a Qwen2 stack in which every token sees every other, `proj_out`, unit length. The official model runs the
causal stack with causality switched off; positions for the rotary embedding are 0 to tokens - 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ming_trt.image_config import ConnectorConfig
from ming_trt.models.by_name import by_name
from ming_trt.models.weights import Concat, WeightSource
from ming_trt.models.weights import Tensor as Stored
from ming_trt.processing.query import SCALES


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, with a scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention without a mask; [B, tokens, hidden] to the same."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden, self.heads * self.head_dim)
        self.k_proj = nn.Linear(config.hidden, self.kv_heads * self.head_dim)
        self.v_proj = nn.Linear(config.hidden, self.kv_heads * self.head_dim)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, _ = x.shape

        def split(y: Tensor, heads: int) -> Tensor:
            return y.view(batch, tokens, heads, self.head_dim).transpose(1, 2)

        query = rotate(split(self.q_proj(x), self.heads), cos, sin)
        key = rotate(split(self.k_proj(x), self.kv_heads), cos, sin)
        value = split(self.v_proj(x), self.kv_heads)
        mixed = F.scaled_dot_product_attention(query, key, value, enable_gqa=self.heads != self.kv_heads)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))


class MLP(nn.Module):
    """Gated feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.down_proj = nn.Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, config.eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Stack(nn.Module):
    """The layers and the final norm; [B, tokens, hidden] to the same. Token embeddings of the checkpoint are unused."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.theta, self.head_dim = config.rope_theta, config.head_dim
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.eps)

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = rope_table(x.shape[1], self.head_dim, self.theta, x)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class Connector(nn.Module):
    """`hidden` [B, tokens, LLM hidden] (post-norm rows of the last query scale) to `condition`, same shape, unit rows.

    Both are float32, whatever the weights are. Weights: `model.*` from `connector/`, `proj_in.*` and `proj_out.*` from
    `mlp/`, by these names.
    """

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.proj_in = nn.Linear(config.llm_hidden, config.hidden)
        self.model = Stack(config)
        self.proj_out = nn.Linear(config.hidden, config.llm_hidden)

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.proj_out(self.model(self.proj_in(hidden.to(self.proj_in.weight.dtype)))).float()
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)


def weight_map(config: ConnectorConfig) -> dict[str, WeightSource]:
    """Parameter -> checkpoint tensor."""
    return by_name(lambda: Connector(config), lambda name: "mlp" if name.startswith("proj_") else "connector")


def query_tokens(llm_hidden: int) -> WeightSource:
    """The learned rows [336, LLM hidden] that the LLM reads at the query positions, all scales in order."""
    names = ((f"mlp/query_tokens_dict.{side}x{side}", side * side) for side in SCALES)
    return Concat(tuple(Stored(name, (rows, llm_hidden)) for name, rows in names))


def rope_table(tokens: int, head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine [tokens, head_dim] of positions 0 to tokens - 1, halves repeated; computed in float32."""
    index = torch.arange(head_dim // 2, device=like.device, dtype=torch.float32)
    position = torch.arange(tokens, device=like.device, dtype=torch.float32)
    angle = position[:, None] * torch.pow(theta, index * (-2.0 / head_dim))[None, :]
    angle = torch.cat([angle, angle], -1)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [B, heads, tokens, head_dim], pairs (i, i + head_dim / 2)."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin
