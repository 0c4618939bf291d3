"""The flow's velocity estimator: a causal U-Net with transformers that moves noise to mel, step by step.

Source: the audio detokenizer of the checkpoint (`talker/flow_stream.pt`), parameter names as there. It runs over a part
of an utterance and carries caches on, as `flow.py` says.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ming_trt.models.flow import Carry, cache_shapes
from ming_trt.speech_config import FlowConfig


class _CausalConv(nn.Conv1d):
    """A convolution of width 3 that sees the present and the two frames before it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:  # type: ignore[override]
        return super().forward(carry.frames(x))


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, channels, N]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class _ConvBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        # index 1 of the official sequence is a transposition without parameters
        self.block = nn.ModuleDict({"0": _CausalConv(inputs, outputs), "2": _ChannelNorm(outputs)})

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return functional.mish(self.block["2"](self.block["0"](x, carry)))


class _ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, time_dim: int) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"1": nn.Linear(time_dim, outputs)})  # index 0 is the activation
        self.block1 = _ConvBlock(inputs, outputs)
        self.block2 = _ConvBlock(outputs, outputs)
        self.res_conv = nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor, carry: Carry) -> Tensor:
        h = self.block1(x, carry) + self.mlp["1"](functional.mish(time))[:, :, None]
        return self.block2(h, carry) + self.res_conv(x)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_k = nn.Linear(width, heads * head_dim, bias=False)
        self.to_v = nn.Linear(width, heads * head_dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(heads * head_dim, width)])

    def forward(self, x: Tensor, mask: Tensor, carry: Carry) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            project(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        key, value = carry.cache(k), carry.cache(v)
        out = functional.scaled_dot_product_attention(q, key, value, attn_mask=mask)
        return self.to_out[0](out.transpose(1, 2).reshape(batch, length, self.heads * self.head_dim))


class _GeluIn(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(self.proj(x))


class _GeluFeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"0": _GeluIn(width, inner), "2": nn.Linear(inner, width)})

    def forward(self, x: Tensor) -> Tensor:
        return self.net["2"](self.net["0"](x))


class _Transformer(nn.Module):
    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.channels)
        self.attn1 = _Attention(config.channels, config.estimator_heads, config.estimator_head_dim)
        self.norm3 = nn.LayerNorm(config.channels)
        self.ff = _GeluFeedForward(config.channels, config.estimator_feed_forward)

    def forward(self, x: Tensor, mask: Tensor, carry: Carry) -> Tensor:
        x = x + self.attn1(self.norm1(x), mask, carry)
        return x + self.ff(self.norm3(x))


class _Stage(nn.ModuleList):
    """Residual block, transformer blocks, and at the outer stages a causal convolution."""

    def __init__(self, config: FlowConfig, inputs: int, outer: bool) -> None:
        blocks: list[nn.Module] = [
            _ResidualBlock(inputs, config.channels, config.time_dim),
            nn.ModuleList([_Transformer(config) for _ in range(config.transformers)]),
        ]
        if outer:
            blocks.append(_CausalConv(config.channels, config.channels))
        super().__init__(blocks)

    def forward(self, x: Tensor, time: Tensor, mask: Tensor, carry: Carry) -> tuple[Tensor, Tensor]:
        """[B, inputs, C] -> the stage's output [B, channels, C], and its value before the last convolution."""
        x = self[0](x, time, carry).transpose(1, 2)
        for block in self[1]:  # type: ignore[attr-defined]
            x = block(x, mask, carry)
        x = x.transpose(1, 2)
        return (self[2](x, carry), x) if len(self) == 3 else (x, x)


class _TimeMlp(nn.Module):
    """Sinusoid of the flow's time in thousandths, and two linear layers."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.linear_1 = nn.Linear(inputs, outputs)
        self.linear_2 = nn.Linear(outputs, outputs)

    def forward(self, time: Tensor) -> Tensor:
        half = self.inputs // 2
        step = torch.arange(half, device=time.device, dtype=torch.float32)
        frequency = torch.exp(step * (-math.log(10000.0) / (half - 1)))
        angle = 1000.0 * time[:, None] * frequency[None]
        signal = torch.cat((angle.sin(), angle.cos()), dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(functional.silu(self.linear_1(signal)))


class FlowEstimator(nn.Module):
    """The flow's velocity at one time.

    Inputs, for C frames after those in the caches: `z` f32 [B, mel, C]; `mu` f32 [B, mel, C]; `spk` f32 [B, mel];
    `cond` f32 [B, mel, C], the prompt's mel and zeros after it (rows without a condition, for classifier-free guidance,
    have zeros for all three); `time` f32 [B]; `write_index` i64 [B], frames before these; `mask` bool [B, 1, C, T];
    `past`, see `Carry`: one set for each time. Outputs: `velocity` f32 [B, mel, C], and the caches. These types hold
    whatever the weights are; caches have the weights'.
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.time_mlp = _TimeMlp(4 * config.mel, config.time_dim)
        self.down_blocks = nn.ModuleList([_Stage(config, 4 * config.mel, outer=True)])
        self.mid_blocks = nn.ModuleList(
            [_Stage(config, config.channels, outer=False) for _ in range(config.mid_stages)]
        )
        self.up_blocks = nn.ModuleList([_Stage(config, 2 * config.channels, outer=True)])
        self.final_block = _ConvBlock(config.channels, config.channels)
        self.final_proj = nn.Conv1d(config.channels, config.mel, 1)

        self.convolutions = sum(isinstance(module, _CausalConv) for module in self.modules())

    def forward(
        self,
        z: Tensor,
        mu: Tensor,
        spk: Tensor,
        cond: Tensor,
        time: Tensor,
        write_index: Tensor,
        mask: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:
        carry = Carry(past, self.convolutions, write_index)
        speaker = spk[:, :, None].expand(-1, -1, z.shape[2])
        x = torch.cat((z, mu, speaker, cond), dim=1).to(self.final_proj.weight.dtype)
        t = self.time_mlp(time)
        x, skip = self.down_blocks[0](x, t, mask, carry)
        for stage in self.mid_blocks:
            x, _ = stage(x, t, mask, carry)
        x, _ = self.up_blocks[0](torch.cat((x, skip), dim=1), t, mask, carry)
        return self.final_proj(self.final_block(x, carry)).float(), *carry.present


def estimator_caches(config: FlowConfig) -> dict[str, tuple[int, ...]]:
    """Name (without `past_`) and shape of `FlowEstimator`'s caches but for the batch; -1 = T."""
    c = config.channels
    channels = [4 * config.mel, c, c, *[c, c] * config.mid_stages, 2 * c, c, c, c]
    stages = config.mid_stages + 2
    return cache_shapes(channels, stages * config.transformers, config.estimator_heads, config.estimator_head_dim)
