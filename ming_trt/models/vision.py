"""The vision encoder: a window-attention ViT, its merger, and the projector into the language model's space.

`forward` is the engine contract `vision_encoder` of docs/DESIGN.md, section 4.1; its index inputs are made by
`ming_trt.processing.vision_index`. Patches stay in the processor's order: attention gathers windows or frame pairs, so
nothing has to be permuted back.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from ming_trt.config import LLMConfig, VisionConfig
from ming_trt.models import rope
from ming_trt.models.weights import Reshape, Tensor, WeightSource

INPUT_NAMES = (
    "patches",
    "patch_position",
    "window_index",
    "window_length",
    "window_slot",
    "frame_index",
    "frame_length",
    "frame_slot",
)
OUTPUT_NAMES = ("rows",)


class RMSNorm(nn.Module):
    """`weight * cast(x32 / sqrt(mean(x32^2) + eps))`: here the cast comes before the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Groups:
    """Sets of patches that attend to each other: padded indices [G, L], places [N] and the mask [G, 1, L, L]."""

    def __init__(self, index: torch.Tensor, length: torch.Tensor, slot: torch.Tensor) -> None:
        self.index, self.slot = index, slot
        size = index.shape[1]
        valid = torch.arange(size, device=index.device) < length.unsqueeze(1)
        # The query dimension is written out: ONNX Runtime's Attention does not broadcast it.
        self.mask = valid[:, None, None, :].expand(-1, 1, size, -1)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[N, heads, D] -> [G, heads, L, D]; padded places repeat patch 0 and are masked as keys."""
        rows = x.index_select(0, self.index.flatten())
        return rows.view(*self.index.shape, *x.shape[1:]).transpose(1, 2)

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        """[G, heads, L, D] -> [N, heads * D]; padded places are dropped."""
        return x.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, self.slot)


class Attention(nn.Module):
    """Bidirectional attention inside each group."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, groups: Groups) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
        q, k, v = (groups.gather(part) for part in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=groups.mask)
        return self.proj(groups.scatter(out))


class MLP(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width)
        self.up_proj = nn.Linear(hidden, width)
        self.down_proj = nn.Linear(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config.hidden_size, config.mlp_width)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, groups: Groups) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, groups)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """Joins the patches of a merge cell (they are adjacent) into one row of `out_size`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.width = config.hidden_size * config.merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = nn.Sequential(nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, config.out_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.width))


class VisionEncoder(nn.Module):
    """Tower, merger, projector; rows of unit length in the language model's space."""

    def __init__(self, config: VisionConfig, llm: LLMConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Linear(config.patch_width, config.hidden_size, bias=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.merger = Merger(config)
        self.linear_proj = nn.Sequential(
            nn.Linear(config.out_size, llm.hidden_size), nn.GELU(), nn.Linear(llm.hidden_size, llm.hidden_size)
        )

    def tower(
        self,
        patches: torch.Tensor,
        patch_position: torch.Tensor,
        window_index: torch.Tensor,
        window_length: torch.Tensor,
        window_slot: torch.Tensor,
        frame_index: torch.Tensor,
        frame_length: torch.Tensor,
        frame_slot: torch.Tensor,
    ) -> torch.Tensor:
        """The merger's output [N / merge^2, out_size], before the projector. Inputs as of `forward`."""
        windows = Groups(window_index, window_length, window_slot)
        frames = Groups(frame_index, frame_length, frame_slot)
        tables = rope.vision_cos_sin(patch_position, self.config.head_dim, self.config.rope_theta)
        cos, sin = (table.unsqueeze(1) for table in tables)
        x = self.patch_embed(patches.to(self.patch_embed.weight.dtype))
        for number, block in enumerate(self.blocks):
            x = block(x, cos, sin, frames if number in self.config.full_attention else windows)
        return self.merger(x)

    def project(self, tower: torch.Tensor) -> torch.Tensor:
        """Tower rows -> rows [., H] of unit length."""
        return functional.normalize(self.linear_proj(tower).float(), dim=-1)

    def forward(
        self,
        patches: torch.Tensor,
        patch_position: torch.Tensor,
        window_index: torch.Tensor,
        window_length: torch.Tensor,
        window_slot: torch.Tensor,
        frame_index: torch.Tensor,
        frame_length: torch.Tensor,
        frame_slot: torch.Tensor,
    ) -> torch.Tensor:
        """Rows [N / merge^2, H] for `patches` [N, patch_width]; the indices are int64, see `vision_indices`.

        Both are float32, whatever the weights are.
        """
        return self.project(
            self.tower(
                patches,
                patch_position,
                window_index,
                window_length,
                window_slot,
                frame_index,
                frame_length,
                frame_slot,
            )
        )


def _linear(name: str, official: str, out: int, width: int) -> dict[str, WeightSource]:
    return {
        f"{name}.weight": Tensor(f"{official}.weight", (out, width)),
        f"{name}.bias": Tensor(f"{official}.bias", (out,)),
    }


def weight_map(config: VisionConfig, llm: LLMConfig) -> dict[str, WeightSource]:
    """Parameter of `VisionEncoder` -> official tensors (`vision.*`, `linear_proj.*`)."""
    c, hidden = config, config.hidden_size
    kernel = (hidden, c.in_channels, c.temporal_patch, c.patch_size, c.patch_size)
    sources: dict[str, WeightSource] = {
        "patch_embed.weight": Reshape(Tensor("vision.patch_embed.proj.weight", kernel), (hidden, c.patch_width)),
        "merger.ln_q.weight": Tensor("vision.merger.ln_q.weight", (hidden,)),
    }
    cell = hidden * c.merge_size**2
    sources |= _linear("merger.mlp.0", "vision.merger.mlp.0", cell, cell)
    sources |= _linear("merger.mlp.2", "vision.merger.mlp.2", c.out_size, cell)
    sources |= _linear("linear_proj.0", "linear_proj.0", llm.hidden_size, c.out_size)
    sources |= _linear("linear_proj.2", "linear_proj.2", llm.hidden_size, llm.hidden_size)
    for i in range(c.num_layers):
        block = f"blocks.{i}"
        sources[f"{block}.norm1.weight"] = Tensor(f"vision.{block}.norm1.weight", (hidden,))
        sources[f"{block}.norm2.weight"] = Tensor(f"vision.{block}.norm2.weight", (hidden,))
        for name, out, width in (
            ("attn.qkv", 3 * hidden, hidden),
            ("attn.proj", hidden, hidden),
            ("mlp.gate_proj", c.mlp_width, hidden),
            ("mlp.up_proj", c.mlp_width, hidden),
            ("mlp.down_proj", hidden, c.mlp_width),
        ):
            sources |= _linear(f"{block}.{name}", f"vision.{block}.{name}", out, width)
    return sources
