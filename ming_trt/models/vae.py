"""The autoencoder between pictures and latents: encoder (mode of its distribution) and decoder, convolutional."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ming_trt.image_config import VAEConfig
from ming_trt.models.by_name import by_name
from ming_trt.models.weights import WeightSource

EPS = 1e-6


class ResnetBlock(nn.Module):
    """Two normalised convolutions and a shortcut; [B, inputs, H, W] to [B, outputs, H, W]."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, EPS)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, EPS)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + y


class PixelAttention(nn.Module):
    """One-head attention over all positions, with a residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        query, key, value = (layer(tokens)[:, None] for layer in (self.to_q, self.to_k, self.to_v))
        mixed = self.to_out[0](F.scaled_dot_product_attention(query, key, value)[:, 0])
        return x + mixed.transpose(1, 2).reshape(batch, channels, height, width)


class MidBlock(nn.Module):
    """Resnet, attention (if the checkpoint has it), resnet at the lowest resolution."""

    def __init__(self, channels: int, config: VAEConfig) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, config.groups) for _ in range(2))
        attentions = [PixelAttention(channels, config.groups)] if config.mid_attention else []
        self.attentions = nn.ModuleList(attentions)

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Downsample(nn.Module):
    """Halves height and width; the padding is on the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownBlock(nn.Module):
    """Resnets, then half the resolution unless this is the last block."""

    def __init__(self, inputs: int, outputs: int, config: VAEConfig, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(inputs if i == 0 else outputs, outputs, config.groups) for i in range(config.layers)
        )
        self.downsamplers = nn.ModuleList([] if last else [Downsample(outputs)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """One resnet more than a down block, then double the resolution unless this is the last block."""

    def __init__(self, inputs: int, outputs: int, config: VAEConfig, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(inputs if i == 0 else outputs, outputs, config.groups) for i in range(config.layers + 1)
        )
        self.upsamplers = nn.ModuleList([] if last else [Upsample(outputs)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Picture [B, 3, H, W] to the moments [B, 2 * latent channels, H / f, W / f]: means, then log-variances."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.picture_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(widths[max(i - 1, 0)], width, config, last=i == len(widths) - 1) for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], config)
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latent [B, latent channels, h, w] to picture [B, 3, h * f, w * f]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = tuple(reversed(config.widths))
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], config)
        self.up_blocks = nn.ModuleList(
            UpBlock(widths[max(i - 1, 0)], width, config, last=i == len(widths) - 1) for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.picture_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAEEncoder(nn.Module):
    """`image` [B, 3, H, W] in [-1, 1] to `latent` [B, C, H / f, W / f] in the denoiser's scale.

    H and W are multiples of f = 8. The latent is the mode of the encoder's distribution, so encoding is deterministic.
    Weights are in `vae/` by these names.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.shift, self.scale, self.channels = config.shift, config.scale, config.latent_channels
        self.encoder = Encoder(config)
        moments = 2 * config.latent_channels
        self.quant_conv = nn.Conv2d(moments, moments, 1) if config.quant_conv else None

    def mode(self, image: Tensor) -> Tensor:
        """Mode of the distribution, in the autoencoder's own scale."""
        moments = self.encoder(image)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return moments[:, : self.channels]

    def forward(self, image: Tensor) -> Tensor:
        mode = self.mode(image.to(self.encoder.conv_in.weight.dtype)).float()
        return (mode - self.shift) * self.scale


class VAEDecoder(nn.Module):
    """`latent` [B, C, h, w] in the denoiser's scale to `image` [B, 3, h * f, w * f], about [-1, 1], not clamped."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.shift, self.scale = config.shift, config.scale
        channels = config.latent_channels
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.post_quant_conv else None
        self.decoder = Decoder(config)

    def forward(self, latent: Tensor) -> Tensor:
        z = (latent / self.scale + self.shift).to(self.decoder.conv_in.weight.dtype)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        picture: Tensor = self.decoder(z)
        return picture.float()


def weight_map(module: type[VAEEncoder] | type[VAEDecoder], config: VAEConfig) -> dict[str, WeightSource]:
    """Parameter -> checkpoint tensor, of one half of the autoencoder."""
    return by_name(lambda: module(config), lambda name: "vae")
