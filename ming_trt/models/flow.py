"""Codec codes to mel: the flow's encoder and its velocity estimator (causal flow matching, chunk attention).

Source: the audio detokenizer of the checkpoint (`talker/flow_stream.pt`), parameter names as there. Both modules take
their attention mask from outside (`chunk_mask`), so that one graph serves streaming and whole utterances.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ming_trt.speech_config import FlowConfig


class _Embed(nn.Module):
    """Linear, layer norm, and the scale that goes with relative positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width, eps=1e-5))
        self.scale = math.sqrt(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x) * self.scale


class _LookAhead(nn.Module):
    """Lets every position see the few codes after it; the only part of the flow that looks ahead."""

    def __init__(self, width: int, ahead: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(width, width, ahead + 1)
        self.conv2 = nn.Conv1d(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N + ahead, width] -> [B, N, width]."""
        y = functional.leaky_relu(self.conv1(x.transpose(1, 2)))
        return self.conv2(functional.pad(y, (2, 0))).transpose(1, 2)


class _UpLayer(nn.Module):
    """The encoder's up-sampling layer with stride 1: a causal convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


def relative_positions(length: int, width: int, like: Tensor) -> Tensor:
    """Sinusoids of the distances length-1 … -(length-1): [2·length - 1, width], sine and cosine interleaved."""
    steps = torch.arange(2 * length - 1, device=like.device, dtype=torch.int64)
    distance = ((length - 1) - steps).to(torch.float32)
    pair = torch.arange(0, width, 2, device=like.device, dtype=torch.float32)
    angle = distance[:, None] * torch.exp(pair * (-math.log(10000.0) / width))[None]
    return torch.stack((angle.sin(), angle.cos()), dim=-1).reshape(-1, width).to(like.dtype)


class _RelativeAttention(nn.Module):
    """Attention with Transformer-XL relative positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.linear_q = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_v = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        self.linear_pos = nn.Linear(width, width, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(heads, self.head_dim))
        self.pos_bias_v = nn.Parameter(torch.empty(heads, self.head_dim))

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        q = self.linear_q(x).view(batch, length, self.heads, self.head_dim)
        k = self.linear_k(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        v = self.linear_v(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        p = self.linear_pos(positions).view(2 * length - 1, self.heads, self.head_dim).permute(1, 2, 0)
        content = (q + self.pos_bias_u).transpose(1, 2) @ k.transpose(2, 3)
        place = self._shift((q + self.pos_bias_v).transpose(1, 2) @ p)
        scores = (content + place) * (1.0 / math.sqrt(self.head_dim))
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        return self.linear_out((weights @ v).transpose(1, 2).reshape(batch, length, width))

    @staticmethod
    def _shift(scores: Tensor) -> Tensor:
        """[B, heads, N, 2N-1] by distance -> [B, heads, N, N] by key: row i is moved left by N-1-i."""
        batch, heads, length, distances = scores.shape
        padded = functional.pad(scores, (1, 0)).reshape(batch, heads, distances + 1, length)
        return padded[:, :, 1:].reshape(batch, heads, length, distances)[..., :length]


class _FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w_1 = nn.Linear(width, inner)
        self.w_2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(functional.silu(self.w_1(x)))


class _EncoderLayer(nn.Module):
    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.self_attn = _RelativeAttention(config.width, config.heads)
        self.feed_forward = _FeedForward(config.width, config.feed_forward)
        self.norm_ff = nn.LayerNorm(config.width, eps=1e-12)
        self.norm_mha = nn.LayerNorm(config.width, eps=1e-12)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm_mha(x), positions, mask)
        return x + self.feed_forward(self.norm_ff(x))


class _Encoder(nn.Module):
    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.embed = _Embed(config.width)
        self.pre_lookahead_layer = _LookAhead(config.width, config.look_ahead)
        self.encoders = nn.ModuleList([_EncoderLayer(config) for _ in range(config.encoder_layers)])
        self.up_layer = _UpLayer(config.width)
        self.up_embed = _Embed(config.width)
        self.up_encoders = nn.ModuleList([_EncoderLayer(config) for _ in range(config.up_layers)])
        self.after_norm = nn.LayerNorm(config.width, eps=1e-5)

    def forward(self, x: Tensor, ahead: Tensor, look: Tensor, mask: Tensor) -> Tensor:
        main = self.embed(x)
        x = main + self.pre_lookahead_layer(torch.cat((main, self.embed(ahead) * look), dim=1))
        positions = relative_positions(x.shape[1], x.shape[2], x)
        for layer in self.encoders:
            x = layer(x, positions, mask)
        x = self.up_embed(self.up_layer(x))
        for layer in self.up_encoders:
            x = layer(x, positions, mask)
        return self.after_norm(x)


class FlowEncoder(nn.Module):
    """Codes -> mu, the mean that the flow starts from, and the projected speaker vector.

    Inputs: `codes` i64 [B, N]; `ahead` i64 [B, look_ahead], the codes that follow; `look` f32 [B, 1, 1], 1 if they do,
    0 if the utterance ends before them (they are then ignored); `mask` bool [1, 1, N, N]; `speaker` f32
    [B, speaker_dim], of any length. Outputs: `mu` f32 [B, mel, N], `spk` f32 [B, mel]. These types hold
    whatever the weights are.
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.input_embedding = nn.Embedding(config.vocabulary, config.width)
        self.spk_embed_affine_layer = nn.Linear(config.speaker_dim, config.mel)
        self.encoder = _Encoder(config)
        self.encoder_proj = nn.Linear(config.width, config.mel)

    def hidden(self, codes: Tensor, ahead: Tensor, look: Tensor, mask: Tensor) -> Tensor:
        """The encoder's output [B, N, width]."""
        return self.encoder(self.input_embedding(codes), self.input_embedding(ahead), look, mask)

    def forward(
        self, codes: Tensor, ahead: Tensor, look: Tensor, mask: Tensor, speaker: Tensor
    ) -> tuple[Tensor, Tensor]:
        dtype = self.encoder_proj.weight.dtype
        length = speaker.pow(2).sum(dim=1, keepdim=True).sqrt().clamp(min=1e-12)
        spk = self.spk_embed_affine_layer((speaker / length).to(dtype))
        mu = self.encoder_proj(self.hidden(codes, ahead, look.to(dtype), mask)).transpose(1, 2)
        return mu.float(), spk.float()


class _CausalConv(nn.Conv1d):
    """A convolution of width 3 that sees the present and the two frames before it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.pad(x, (2, 0)))


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, channels, N]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class _ConvBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        # index 1 of the official sequence is a transposition without parameters
        self.block = nn.ModuleDict({"0": _CausalConv(inputs, outputs), "2": _ChannelNorm(outputs)})

    def forward(self, x: Tensor) -> Tensor:
        return functional.mish(self.block["2"](self.block["0"](x)))


class _ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, time_dim: int) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"1": nn.Linear(time_dim, outputs)})  # index 0 is the activation
        self.block1 = _ConvBlock(inputs, outputs)
        self.block2 = _ConvBlock(outputs, outputs)
        self.res_conv = nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.block1(x) + self.mlp["1"](functional.mish(time))[:, :, None]
        return self.block2(h) + self.res_conv(x)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_k = nn.Linear(width, heads * head_dim, bias=False)
        self.to_v = nn.Linear(width, heads * head_dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(heads * head_dim, width)])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            project(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
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

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x), mask)
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

    def forward(self, x: Tensor, time: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """[B, inputs, N] -> the stage's output [B, channels, N], and its value before the last convolution."""
        x = self[0](x, time).transpose(1, 2)
        for block in self[1]:  # type: ignore[attr-defined]
            x = block(x, mask)
        x = x.transpose(1, 2)
        return (self[2](x), x) if len(self) == 3 else (x, x)


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
    """The flow's velocity at one time, with and without the condition.

    Inputs: `z` f32 [B, mel, N]; `mu` f32 [B, mel, N]; `spk` f32 [B, mel]; `cond` f32 [B, mel, N], the prompt's mel and
    zeros after it; `time` f32 [B]; `mask` bool [1, 1, N, N]. Output: `velocity` f32 [2B, mel, N]: B rows with the
    condition, then B rows with mu, spk and cond zero, for classifier-free guidance. These types hold whatever the
    weights are.
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

    def forward(self, z: Tensor, mu: Tensor, spk: Tensor, cond: Tensor, time: Tensor, mask: Tensor) -> Tensor:
        speaker = spk[:, :, None].expand(-1, -1, z.shape[2])
        condition = torch.cat((mu, speaker, cond), dim=1)
        x = torch.cat((torch.cat((z, condition), 1), torch.cat((z, torch.zeros_like(condition)), 1)), dim=0)
        x = x.to(self.final_proj.weight.dtype)
        t = self.time_mlp(torch.cat((time, time), dim=0))
        x, skip = self.down_blocks[0](x, t, mask)
        for stage in self.mid_blocks:
            x, _ = stage(x, t, mask)
        x, _ = self.up_blocks[0](torch.cat((x, skip), dim=1), t, mask)
        return self.final_proj(self.final_block(x)).float()
