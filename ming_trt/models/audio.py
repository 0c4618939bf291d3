"""The audio encoder: a Whisper-shaped tower without the 30 second rule, and its projector.

`forward` is the engine contract `audio_encoder` of docs/DESIGN.md, section 4.1: one clip per call, since in the
official model the results of clips batched together depend on their padding.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from ming_trt.config import AudioConfig, LLMConfig
from ming_trt.models.weights import Tensor, WeightSource

INPUT_NAMES = ("mel",)
OUTPUT_NAMES = ("rows",)


class LayerNorm(nn.LayerNorm):
    """Float32 inside, one cast at the end; eps 1e-5."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        ).to(x.dtype)


class Attention(nn.Module):
    """Full self-attention; the key projection has no bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.attn_ln = LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.mlp_ln = LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.attn_ln(x))
        return x + self.mlp(self.mlp_ln(x))


class Projector(nn.Module):
    """Strided convolution (two tower frames per row), GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, hidden, 3, stride=2, padding=1)
        self.linear = nn.Linear(hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(functional.gelu(self.conv(x.transpose(1, 2)).transpose(1, 2)))


class AudioEncoder(nn.Module):
    """Tower and projector; rows of unit length in the language model's space."""

    def __init__(self, config: AudioConfig, llm: LLMConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.conv1 = nn.Conv1d(config.num_mels, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.positional_embedding = nn.Parameter(torch.empty(config.max_positions, width))
        self.blocks = nn.ModuleList(Block(width, config.num_heads) for _ in range(config.num_layers))
        self.ln_post = LayerNorm(width)
        self.linear_proj_audio = Projector(width, llm.hidden_size)

    def tower(self, mel: torch.Tensor) -> torch.Tensor:
        """Tower rows [1, ceil(frames / 2), n_state] for `mel` [frames, mels], 1 <= frames <= `config.max_frames`."""
        x = functional.gelu(self.conv1(mel.to(self.conv1.weight.dtype).t().unsqueeze(0)))
        x = functional.gelu(self.conv2(x)).transpose(1, 2)
        x = x + self.positional_embedding[: x.shape[1]].to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x)

    def project(self, tower: torch.Tensor) -> torch.Tensor:
        """Tower rows [1, n, n_state] -> rows [ceil(n / 2), H], of unit length if the configuration says so."""
        rows = self.linear_proj_audio(tower).squeeze(0).float()
        return functional.normalize(rows, dim=-1) if self.config.normalize_rows else rows

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        """Rows [ceil(ceil(frames / 2) / 2), H] for one clip `mel` [frames, mels]; float32, whatever the weights are."""
        return self.project(self.tower(mel))


def weight_map(config: AudioConfig, llm: LLMConfig) -> dict[str, WeightSource]:
    """Parameter of `AudioEncoder` -> official tensors (`audio.*`, `linear_proj_audio.*`)."""
    width, hidden = config.hidden_size, llm.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "conv1.weight": (width, config.num_mels, 3),
        "conv1.bias": (width,),
        "conv2.weight": (width, width, 3),
        "conv2.bias": (width,),
        "positional_embedding": (config.max_positions, width),
        "ln_post.weight": (width,),
        "ln_post.bias": (width,),
    }
    for i in range(config.num_layers):
        block = f"blocks.{i}."
        for name in ("query", "key", "value", "out"):
            shapes[f"{block}attn.{name}.weight"] = (width, width)
            if name != "key":
                shapes[f"{block}attn.{name}.bias"] = (width,)
        shapes |= {f"{block}{norm}.{part}": (width,) for norm in ("attn_ln", "mlp_ln") for part in ("weight", "bias")}
        shapes |= {f"{block}mlp.0.weight": (4 * width, width), f"{block}mlp.0.bias": (4 * width,)}
        shapes |= {f"{block}mlp.2.weight": (width, 4 * width), f"{block}mlp.2.bias": (width,)}
    sources: dict[str, WeightSource] = {name: Tensor(f"audio.{name}", shape) for name, shape in shapes.items()}
    return sources | {
        "linear_proj_audio.conv.weight": Tensor("linear_proj_audio.0.weight", (hidden, width, 3)),
        "linear_proj_audio.conv.bias": Tensor("linear_proj_audio.0.bias", (hidden,)),
        "linear_proj_audio.linear.weight": Tensor("linear_proj_audio.3.weight", (hidden, hidden)),
        "linear_proj_audio.linear.bias": Tensor("linear_proj_audio.3.bias", (hidden,)),
    }
