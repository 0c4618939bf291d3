"""What the denoiser is told of the prompt, from the condition; the same for all steps, so it runs once per picture."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ming_trt.image_config import ConditionConfig
from ming_trt.models.by_name import by_name
from ming_trt.models.weights import WeightSource


class ConditionMLP(nn.Module):
    """LN2(fc2(relu(LN1(fc1(c))))): [B, tokens, LLM hidden] to [B, tokens, joint dim]."""

    def __init__(self, config: ConditionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.llm_hidden, config.mlp_hidden)
        self.layer_norm1 = nn.LayerNorm(config.mlp_hidden, eps=1e-5)
        self.fc2 = nn.Linear(config.mlp_hidden, config.joint_dim)
        self.layer_norm2 = nn.LayerNorm(config.joint_dim, eps=1e-5)

    def forward(self, condition: Tensor) -> Tensor:
        return self.layer_norm2(self.fc2(F.relu(self.layer_norm1(self.fc1(condition)))))


class TwoLayerEmbedding(nn.Module):
    """Linear, SiLU, Linear: the embedding of the time and of the pooled vector."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, outputs)
        self.linear_2 = nn.Linear(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class TextEmbed(nn.Module):
    """Holds the embedding of the pooled vector under its official name."""

    def __init__(self, config: ConditionConfig) -> None:
        super().__init__()
        self.text_embedder = TwoLayerEmbedding(config.pooled_dim, config.dit_hidden)


class Condition(nn.Module):
    """`condition` [B, tokens, LLM hidden] to `context` [B, tokens, d] and `pooled` [B, d], d = denoiser width.

    The reference runs this inside the denoiser at every step; nothing in it depends on the step. Inputs and outputs are
    float32, whatever the weights are. Weights: `mlp.*` from `mlp/`, the rest from `transformer/`, by these names.
    """

    def __init__(self, config: ConditionConfig) -> None:
        super().__init__()
        self.pooled_dim = config.pooled_dim
        self.mlp = ConditionMLP(config)
        self.context_embedder = nn.Linear(config.joint_dim, config.dit_hidden)
        self.time_text_embed = TextEmbed(config)

    def pool(self, tokens: Tensor) -> Tensor:
        """Mean over tokens, then over equal neighbouring groups of channels: [B, tokens, joint] to [B, pooled dim]."""
        mean = tokens.mean(1)
        return mean.view(mean.shape[0], self.pooled_dim, -1).mean(-1)

    def forward(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.mlp(condition.to(self.context_embedder.weight.dtype))
        pooled = self.time_text_embed.text_embedder(self.pool(tokens))
        return self.context_embedder(tokens).float(), pooled.float()


def weight_map(config: ConditionConfig) -> dict[str, WeightSource]:
    """Parameter -> checkpoint tensor."""
    return by_name(lambda: Condition(config), lambda name: "mlp" if name.startswith("mlp.") else "transformer")
