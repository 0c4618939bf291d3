"""Connector: hidden states of the 16x16 query tokens become the condition of the denoiser.

`proj_in`, a Qwen2 stack in which every token sees every other, `proj_out`, unit length. The official model runs the
causal stack with causality switched off; positions for the rotary embedding are 0 to tokens - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ming_trt.image_config import ConnectorConfig
from ming_trt.models import qwen2
from ming_trt.models.by_name import by_name
from ming_trt.models.norm import RMSNorm
from ming_trt.models.weights import Concat, WeightSource
from ming_trt.models.weights import Tensor as Stored
from ming_trt.processing.query import SCALES


class Stack(nn.Module):
    """The layers and the final norm; [B, tokens, hidden] to the same. Token embeddings of the checkpoint are unused."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.theta, self.head_dim = config.rope_theta, config.head_dim
        self.layers = nn.ModuleList(qwen2.Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.eps)

    def forward(self, x: Tensor) -> Tensor:
        table = qwen2.rope_table(torch.arange(x.shape[1], device=x.device), self.head_dim, self.theta)
        for layer in self.layers:
            x, _, _ = layer(x, table)
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
