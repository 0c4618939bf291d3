"""Denoiser: a two-stream diffusion transformer (picture and prompt) with a second branch for a reference picture.

Picture tokens come first, reference tokens after them, prompt tokens in a stream of their own; the streams meet in
joint attention. What depends on the prompt alone is in `condition.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ming_trt.checkpoint import Checkpoint
from ming_trt.image_config import TABLES, DiTConfig
from ming_trt.models.by_name import by_name
from ming_trt.models.condition import TwoLayerEmbedding
from ming_trt.models.norm import RMSNorm
from ming_trt.models.weights import WeightSource

TIME_CHANNELS = 256
NORM_EPS = 1e-6


def layer_norm(x: Tensor) -> Tensor:
    """Layer norm over the last axis without scale or shift."""
    return F.layer_norm(x, (x.shape[-1],), eps=NORM_EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalised tokens [B, N, d], scaled and shifted per row of the batch [B, d]."""
    return layer_norm(x) * (1 + scale[:, None]) + shift[:, None]


class PatchEmbed(nn.Module):
    """Latent [B, C, h, w] to tokens [B, h/2 * w/2, d] with positions, in row-major order.

    `pos_embed` [1, P * P, d] holds the central P x P of the checkpoint's position table: pictures take a crop around
    the table's centre, and no bucket reaches beyond P tokens a side.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.side, self.patch = config.table_side, config.patch
        self.proj = nn.Conv2d(config.channels, config.hidden, config.patch, config.patch)
        self.pos_embed = nn.Parameter(torch.empty(1, self.side**2, config.hidden), requires_grad=False)

    def forward(self, latent: Tensor) -> Tensor:
        rows, columns = latent.shape[2] // self.patch, latent.shape[3] // self.patch
        top, left = (self.side - rows) // 2, (self.side - columns) // 2
        table = self.pos_embed.view(1, self.side, self.side, -1)
        positions = table[:, top : top + rows, left : left + columns].reshape(1, rows * columns, -1)
        return self.proj(latent).flatten(2).transpose(1, 2) + positions


class AdaNorm(nn.Module):
    """The modulation vectors of a block: Linear(SiLU(temb)) in `chunks` parts of [B, d]."""

    def __init__(self, hidden: int, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(hidden, chunks * hidden)

    def forward(self, temb: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(temb)).chunk(self.chunks, -1)


class GELU(nn.Module):
    """Linear and tanh-GELU."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden, 4 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """d to 4 d to d. Index 1 of `net` is the checkpoint's dropout."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GELU(hidden), nn.Identity(), nn.Linear(4 * hidden, hidden)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class Attention(nn.Module):
    """Attention over the tokens of one stream; `qk_norm` normalises each head's queries and keys."""

    def __init__(self, config: DiTConfig, qk_norm: bool) -> None:
        super().__init__()
        hidden = config.hidden
        self.heads, self.head_dim = config.heads, config.head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(hidden, hidden) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(hidden, hidden)])
        self.norm_q = RMSNorm(self.head_dim, NORM_EPS) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(self.head_dim, NORM_EPS) if qk_norm else nn.Identity()

    def split(self, x: Tensor) -> Tensor:
        """[B, N, d] to [B, heads, N, head dim]."""
        return x.view(x.shape[0], x.shape[1], self.heads, self.head_dim).transpose(1, 2)

    def merge(self, x: Tensor) -> Tensor:
        """[B, heads, N, head dim] to [B, N, d]."""
        return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], self.heads * self.head_dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the stream, per head."""
        return self.norm_q(self.split(self.to_q(x))), self.norm_k(self.split(self.to_k(x))), self.split(self.to_v(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out[0](self.merge(F.scaled_dot_product_attention(*self.project(x))))


class JointAttention(Attention):
    """Attention over both streams at once, picture first. Gives the context's part only where a block needs it."""

    def __init__(self, config: DiTConfig, last: bool) -> None:
        super().__init__(config, config.qk_norm)
        hidden = config.hidden
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(hidden, hidden) for _ in range(3))
        self.norm_added_q = RMSNorm(self.head_dim, NORM_EPS) if config.qk_norm else nn.Identity()
        self.norm_added_k = RMSNorm(self.head_dim, NORM_EPS) if config.qk_norm else nn.Identity()
        self.to_add_out = None if last else nn.Linear(hidden, hidden)

    def joint(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor | None]:
        """Attention of the picture stream [B, N, d] and of the context stream [B, M, d], None after the last block."""
        query, key, value = self.project(x)
        added_key = self.norm_added_k(self.split(self.add_k_proj(context)))
        added_query = self.norm_added_q(self.split(self.add_q_proj(context)))
        key = torch.cat([key, added_key], 2)
        value = torch.cat([value, self.split(self.add_v_proj(context))], 2)
        query = torch.cat([query, added_query], 2)
        mixed = self.merge(F.scaled_dot_product_attention(query, key, value))
        picture, prompt = mixed[:, : x.shape[1]], mixed[:, x.shape[1] :]
        if self.to_add_out is None:
            return self.to_out[0](picture), None
        return self.to_out[0](picture), self.to_add_out(prompt)


class RefinerBlock(nn.Module):
    """A transformer block over the tokens of one branch, modulated by the time, without the prompt."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = AdaNorm(config.hidden, 6)
        self.attn = Attention(config, qk_norm=False)
        self.ff = FeedForward(config.hidden)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.norm1(temb)
        x = x + gate_a[:, None] * self.attn(modulate(x, shift_a, scale_a))
        return x + gate_m[:, None] * self.ff(modulate(x, shift_m, scale_m))


class MMDiTBlock(nn.Module):
    """A two-stream block. `dual` adds an attention of the picture stream alone; the `last` block drops the context."""

    def __init__(self, config: DiTConfig, dual: bool, last: bool) -> None:
        super().__init__()
        self.last = last
        self.norm1 = AdaNorm(config.hidden, 9 if dual else 6)
        self.norm1_context = AdaNorm(config.hidden, 2 if last else 6)
        self.attn = JointAttention(config, last)
        self.attn2 = Attention(config, config.qk_norm) if dual else None
        self.ff = FeedForward(config.hidden)
        self.ff_context = None if last else FeedForward(config.hidden)

    def forward(self, x: Tensor, context: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m, *dual = self.norm1(temb)
        vectors = self.norm1_context(temb)
        # the last block's context modulation is (scale, shift), the others' begin with (shift, scale)
        shift_c, scale_c = (vectors[1], vectors[0]) if self.last else (vectors[0], vectors[1])
        mixed, mixed_context = self.attn.joint(modulate(x, shift_a, scale_a), modulate(context, shift_c, scale_c))
        out = x + gate_a[:, None] * mixed
        if self.attn2 is not None:
            shift_2, scale_2, gate_2 = dual
            out = out + gate_2[:, None] * self.attn2(modulate(x, shift_2, scale_2))
        out = out + gate_m[:, None] * self.ff(modulate(out, shift_m, scale_m))
        if self.ff_context is None:
            return out, context
        context = context + vectors[2][:, None] * mixed_context
        context = context + vectors[5][:, None] * self.ff_context(modulate(context, vectors[3], vectors[4]))
        return out, context


class TimeEmbed(nn.Module):
    """The time [B] (noise level times 1000) as a vector [B, d]; the sinusoid is computed in float32."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayerEmbedding(TIME_CHANNELS, config.hidden)

    def forward(self, time: Tensor, dtype: torch.dtype) -> Tensor:
        half = TIME_CHANNELS // 2
        index = torch.arange(half, device=time.device, dtype=torch.float32)
        angle = time.float()[:, None] * torch.exp(index * (-math.log(10000.0) / half))[None]
        return self.timestep_embedder(torch.cat([angle.cos(), angle.sin()], -1).to(dtype))


class DiT(nn.Module):
    """The velocity of a noisy latent: one evaluation of the denoiser.

    latent [B, C, h, w]; time [B] float32; context [B, T, d] and pooled [B, d] from `Condition`; reference
    [B, C, hr, wr], the reference picture's latent, of the latent's size, or any small latent (2 x 2) if there is none;
    token_index i64 [M]: which of the latent's and then the reference's tokens the blocks see: 0..N-1 without a
    reference, 0..2N-1 with one, N = h/2 * w/2. Gives velocity [B, C, h, w]. h and w are even. Inputs and
    outputs are float32, whatever the weights are; these are in `transformer/` by these names.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.patch, self.channels = config.patch, config.channels
        self.pos_embed = PatchEmbed(config)
        self.ref_pos_embed = PatchEmbed(config)
        self.time_text_embed = TimeEmbed(config)
        self.noise_refiner = nn.ModuleList(RefinerBlock(config) for _ in range(config.refiners))
        self.ref_image_refiner = nn.ModuleList(RefinerBlock(config) for _ in range(config.refiners))
        self.transformer_blocks = nn.ModuleList(
            MMDiTBlock(config, dual=i in config.dual_layers, last=i == config.layers - 1) for i in range(config.layers)
        )
        self.norm_out = AdaNorm(config.hidden, 2)
        self.proj_out = nn.Linear(config.hidden, config.patch**2 * config.channels)

    def forward(
        self, latent: Tensor, time: Tensor, context: Tensor, pooled: Tensor, reference: Tensor, token_index: Tensor
    ) -> Tensor:
        batch, _, height, width = latent.shape
        rows, columns = height // self.patch, width // self.patch
        dtype = self.proj_out.weight.dtype
        temb = self.time_text_embed(time, dtype) + pooled.to(dtype)
        context = context.to(dtype)
        x = self.pos_embed(latent.to(dtype))
        for refiner in self.noise_refiner:
            x = refiner(x, temb)
        r = self.ref_pos_embed(reference.to(dtype))
        for refiner in self.ref_image_refiner:
            r = refiner(r, temb)
        x = torch.cat([x, r], 1).index_select(1, token_index)
        for block in self.transformer_blocks:
            x, context = block(x, context, temb)
        scale, shift = self.norm_out(temb)
        x = self.proj_out(modulate(x[:, : rows * columns], shift, scale))
        x = x.reshape(batch, rows, columns, self.patch, self.patch, self.channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, self.channels, height, width).float()


def position_table(config: DiTConfig) -> Tensor:
    """The central `table_side` rows and columns of the position table [1, side * side, d], float32.

    The table is stored in official checkpoints; this is its formula, for a checkpoint that was saved without it. The
    first half of the channels encodes the column, the second the row; each is [sin, cos] of coordinate * 10000^(-k).
    """
    side, full = config.table_side, config.table_full_side
    first = (full - side) // 2
    unit = (config.sample_size // config.patch) / full
    coordinate = torch.arange(first, first + side, dtype=torch.float32).double() * unit
    quarter = config.hidden // 4
    omega = 1.0 / 10000.0 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = coordinate[:, None] * omega[None]
    half = torch.cat([angle.sin(), angle.cos()], -1)
    columns = half[None].expand(side, side, -1)
    rows = half[:, None].expand(side, side, -1)
    return torch.cat([columns, rows], -1).reshape(1, side * side, config.hidden).float()


@dataclass(frozen=True, slots=True)
class CentralTable(WeightSource):
    """The central part of a stored position table, or of its formula where the checkpoint has none."""

    name: str
    config: DiTConfig

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,) if self.config.stored_tables else ()

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, self.config.table_side**2, self.config.hidden)

    def check(self, checkpoint: Checkpoint) -> None:
        if self.config.stored_tables:
            checkpoint.require(self.name, (1, self.config.table_full_side**2, self.config.hidden))

    def fill(self, target: Tensor, checkpoint: Checkpoint) -> None:
        self.check(checkpoint)
        if not self.config.stored_tables:
            target.copy_(position_table(self.config))
            return
        full, side = self.config.table_full_side, self.config.table_side
        first = (full - side) // 2
        table = checkpoint.read(self.name).view(full, full, -1)
        target.copy_(table[first : first + side, first : first + side].reshape(self.shape))


def weight_map(config: DiTConfig) -> dict[str, WeightSource]:
    """Parameter -> checkpoint tensor; the position tables are cut to what the pictures can reach."""
    sources = by_name(lambda: DiT(config), lambda name: "transformer")
    for name in TABLES:
        sources[name] = CentralTable(f"transformer/{name}", config)
    return sources
