"""The flow's encoder: codec codes to the mean that the mel is drawn around (causal, attention in chunks).

Source: the audio detokenizer of the checkpoint (`talker/flow_stream.pt`), parameter names as there. It and the
estimator run over a part of an utterance: what the parts before left (keys, values, the last frames before each
convolution) goes in and comes out as caches that the caller owns, and the mask says who sees whom. One graph serves
streaming, part by part, and whole utterances, which are one part after nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ming_trt.models import ops
from ming_trt.speech_config import FlowConfig

PAST_FRAMES = 2
"""Frames that a causal convolution of width 3 sees before its own."""


class Carry:
    """What the parts before left, handed out in the order of use, and what this part leaves.

    `past`: for each causal convolution its last frames [B, channels, 2], then for each attention keys and values
    [B, heads, T, head_dim]; `write_index` i64 [B] counts the frames before this part.
    """

    def __init__(self, past: Sequence[Tensor], convolutions: int, write_index: Tensor) -> None:
        self._frames, self._caches = list(past[:convolutions]), list(past[convolutions:])
        self._write_index = write_index
        self._next_frames: list[Tensor] = []
        self._next_caches: list[Tensor] = []

    def frames(self, x: Tensor) -> Tensor:
        """[B, channels, C] -> [B, channels, 2 + C], the frames before in front."""
        joined = torch.cat((self._frames[len(self._next_frames)], x), dim=2)
        self._next_frames.append(joined[:, :, -PAST_FRAMES:])
        return joined

    def cache(self, new: Tensor) -> Tensor:
        """[B, heads, C, head_dim] -> [B, heads, T, head_dim], the new rows in their place."""
        whole = ops.kv_update(self._caches[len(self._next_caches)], new, self._write_index)
        self._next_caches.append(whole)
        return whole

    @property
    def present(self) -> list[Tensor]:
        """As `past`, after this part."""
        return [*self._next_frames, *self._next_caches]


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

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        """[B, C + ahead, width] -> [B, C, width]."""
        y = functional.leaky_relu(self.conv1(x.transpose(1, 2)))
        return self.conv2(carry.frames(y)).transpose(1, 2)


class _UpLayer(nn.Module):
    """The encoder's up-sampling layer with stride 1: a causal convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return self.conv(carry.frames(x.transpose(1, 2))).transpose(1, 2)


def relative_positions(first: Tensor, count: int, width: int) -> Tensor:
    """Sinusoids of the distances first, first - 1, … (`count` of them): [B, count, width], sine and cosine interleaved.

    `first` i64 [B].
    """
    distance = (first[:, None] - torch.arange(count, device=first.device)).to(torch.float32)
    pair = torch.arange(0, width, 2, device=first.device, dtype=torch.float32)
    angle = distance[:, :, None] * torch.exp(pair * (-math.log(10000.0) / width))
    return torch.stack((angle.sin(), angle.cos()), dim=-1).reshape(distance.shape[0], count, width)


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

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor, carry: Carry) -> Tensor:
        """`x` [B, C, width]; `positions` [B, C + T - 1, width], the distances from the last query to the first key, to
        those from the first query to the last key; `mask` [B, 1, C, T]."""
        batch, length, width = x.shape
        q = self.linear_q(x).view(batch, length, self.heads, self.head_dim)
        k = carry.cache(self.linear_k(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2))
        v = carry.cache(self.linear_v(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2))
        p = self.linear_pos(positions).view(batch, -1, self.heads, self.head_dim).permute(0, 2, 3, 1)
        content = (q + self.pos_bias_u).transpose(1, 2) @ k.transpose(2, 3)
        place = self._shift((q + self.pos_bias_v).transpose(1, 2) @ p, k.shape[2])
        scores = (content + place) * (1.0 / math.sqrt(self.head_dim))
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        return self.linear_out((weights @ v).transpose(1, 2).reshape(batch, length, width))

    @staticmethod
    def _shift(scores: Tensor, keys: int) -> Tensor:
        """[B, heads, C, C + T - 1] by distance -> [B, heads, C, T] by key: row i is moved left by C - 1 - i."""
        batch, heads, length, distances = scores.shape
        padded = functional.pad(scores, (1, 0)).reshape(batch, heads, distances + 1, length)
        return padded[:, :, 1:].reshape(batch, heads, length, distances)[..., :keys]


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

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor, carry: Carry) -> Tensor:
        x = x + self.self_attn(self.norm_mha(x), positions, mask, carry)
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

    def forward(
        self, x: Tensor, ahead: Tensor, look: Tensor, write_index: Tensor, mask: Tensor, carry: Carry
    ) -> Tensor:
        main = self.embed(x)
        x = main + self.pre_lookahead_layer(torch.cat((main, self.embed(ahead) * look), dim=1), carry)
        length, width = x.shape[1], x.shape[2]
        positions = relative_positions(write_index + (length - 1), length + mask.shape[3] - 1, width).to(x.dtype)
        for layer in self.encoders:
            x = layer(x, positions, mask, carry)
        x = self.up_embed(self.up_layer(x, carry))
        for layer in self.up_encoders:
            x = layer(x, positions, mask, carry)
        return self.after_norm(x)


class FlowEncoder(nn.Module):
    """Codes -> mu, the mean that the flow starts from, and the projected speaker vector.

    Inputs, for C codes after those in the caches: `codes` i64 [B, C]; `ahead` i64 [B, look_ahead], the codes that
    follow; `look` f32 [B, look_ahead, 1], 1 for each that does, 0 where the utterance has ended (it is then ignored);
    `write_index` i64 [B], codes before these; `mask` bool [B, 1, C, T]; `speaker` f32 [B, speaker_dim], of any length;
    `past`, see `Carry`. Outputs: `mu` f32 [B, mel, C], `spk` f32 [B, mel], and the caches. These types hold whatever
    the weights are; caches have the weights'.
    """

    CONVOLUTIONS = 2

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.input_embedding = nn.Embedding(config.vocabulary, config.width)
        self.spk_embed_affine_layer = nn.Linear(config.speaker_dim, config.mel)
        self.encoder = _Encoder(config)
        self.encoder_proj = nn.Linear(config.width, config.mel)

    def hidden(
        self, codes: Tensor, ahead: Tensor, look: Tensor, write_index: Tensor, mask: Tensor, carry: Carry
    ) -> Tensor:
        """The encoder's output [B, C, width]."""
        rows = self.input_embedding(codes), self.input_embedding(ahead)
        return self.encoder(*rows, look.to(rows[0].dtype), write_index, mask, carry)

    def forward(
        self,
        codes: Tensor,
        ahead: Tensor,
        look: Tensor,
        write_index: Tensor,
        mask: Tensor,
        speaker: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:
        carry = Carry(past, self.CONVOLUTIONS, write_index)
        length = speaker.pow(2).sum(dim=1, keepdim=True).sqrt().clamp(min=1e-12)
        spk = self.spk_embed_affine_layer((speaker / length).to(self.encoder_proj.weight.dtype))
        mu = self.encoder_proj(self.hidden(codes, ahead, look, write_index, mask, carry)).transpose(1, 2)
        return mu.float(), spk.float(), *carry.present


def encoder_caches(config: FlowConfig) -> dict[str, tuple[int, ...]]:
    """Name (without `past_`) and shape of `FlowEncoder`'s caches but for the batch; -1 = T."""
    head_dim = config.width // config.heads
    return cache_shapes(
        [config.width] * FlowEncoder.CONVOLUTIONS, config.encoder_layers + config.up_layers, config.heads, head_dim
    )


def cache_shapes(channels: Sequence[int], attentions: int, heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the caches of a module with these convolutions (their input channels) and attentions."""
    shapes: dict[str, tuple[int, ...]] = {f"frames_{i}": (count, PAST_FRAMES) for i, count in enumerate(channels)}
    for i in range(attentions):
        shapes |= {f"key_{i}": (heads, -1, head_dim), f"value_{i}": (heads, -1, head_dim)}
    return shapes
