"""Mel to waveform: F0, harmonic source and the iSTFT vocoder (HiFT).

Source: `talker/hift_v2.pt` of the checkpoint, parameter names as there, weight norm folded. The Fourier transforms
are written as convolutions, so that no graph holds complex numbers; random draws come from outside.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ming_trt.speech_config import HiftConfig

_TURN = 1 << 24
"""Parts of a cycle: as many as float32 holds exactly."""


_SNAKE_SCALE = 2.0**30


class _Snake(nn.Module):
    """x + sin(alpha x)^2 / (alpha + 1e-9) for x [B, channels, T]; x where alpha is 0. In float32 in every precision: in
    float16 the small number is 0, and so are products that alpha divides.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        wide, alpha = x.float(), self.alpha[:, None].float()
        wave = (wide * alpha).sin()
        # The exporter's optimiser takes 1e-9 for 0 and drops a plain sum. Powers of two leave every bit as it is.
        divisor = (alpha * _SNAKE_SCALE + 1e-9 * _SNAKE_SCALE) / _SNAKE_SCALE
        return (wide + wave * wave / divisor).to(x.dtype)


class _ResBlock(nn.Module):
    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(
            [nn.Conv1d(channels, channels, kernel, dilation=d, padding=(kernel - 1) * d // 2) for d in dilations]
        )
        self.convs2 = nn.ModuleList(
            [nn.Conv1d(channels, channels, kernel, padding=(kernel - 1) // 2) for _ in dilations]
        )
        self.activations1 = nn.ModuleList([_Snake(channels) for _ in dilations])
        self.activations2 = nn.ModuleList([_Snake(channels) for _ in dilations])

    def forward(self, x: Tensor) -> Tensor:
        for act1, conv1, act2, conv2 in zip(
            self.activations1, self.convs1, self.activations2, self.convs2, strict=True
        ):
            x = x + conv2(act2(conv1(act1(x))))
        return x


class F0Predictor(nn.Module):
    """Input `mel` f32 [B, mel, T] -> output `f0` f32 [B, T], Hz; a few Hz where the voice rests.

    A module of its own, since a streaming caller runs it on other frames than the vocoder.
    """

    LAYERS = 5

    def __init__(self, config: HiftConfig) -> None:
        super().__init__()
        width = config.f0_width
        convs = [nn.Conv1d(width if i else config.mel, width, 3, padding=1) for i in range(self.LAYERS)]
        self.condnet = nn.ModuleDict({str(2 * i): conv for i, conv in enumerate(convs)})  # odd indices: activations
        self.classifier = nn.Linear(width, 1)

    def forward(self, mel: Tensor) -> Tensor:
        x = mel.to(self.classifier.weight.dtype)
        for conv in self.condnet.values():
            x = functional.elu(conv(x))
        return self.classifier(x.transpose(1, 2)).squeeze(-1).abs().float()


class HarmonicSource(nn.Module):
    """F0 -> the excitation: sines of its harmonics where voiced, noise elsewhere.

    The official model also draws a start phase for every harmonic, but adds it to a sample that its down-sampling never
    reads; the phases here are those that carry on from the frames before.
    """

    AMPLITUDE, VOICED_NOISE, VOICED_ABOVE = 0.1, 0.003, 10.0

    def __init__(self, config: HiftConfig) -> None:
        super().__init__()
        self.harmonics, self.hop, self.rate = config.harmonics + 1, config.hop, config.sample_rate
        self.l_linear = nn.Linear(self.harmonics, 1)

    def forward(self, f0: Tensor, phase: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """`f0` [B, T] Hz, `phase` [B, harmonics] in cycles, `noise` [B, T, hop, harmonics] normal draws.

        Gives the source [B, T, hop] and the cycles after each frame, modulo 1: [B, T, harmonics]. A frame's cycles are
        reached at its middle and go linearly from middle to middle; at both ends they stand still. Phases are summed as
        whole numbers, so that no rounding adds up and a chunk continues exactly where the one before ended; the rest is
        float32 in every precision.
        """
        dtype = self.l_linear.weight.dtype
        multiple = torch.arange(1, self.harmonics + 1, device=f0.device, dtype=torch.float32)
        advance = torch.remainder(f0[:, :, None] * multiple / self.rate, 1.0) * self.hop
        steps = torch.cumsum((torch.remainder(advance, 1.0) * _TURN).round().to(torch.int64), dim=1)
        steps = steps + (phase * _TURN).round().to(torch.int64)[:, None]
        cycles = torch.remainder(steps, _TURN).to(torch.float32) / _TURN
        inner = functional.pad(advance[:, 1:], (0, 0, 1, 1))
        place = (torch.arange(self.hop, device=f0.device, dtype=torch.float32) + 0.5) / self.hop - 0.5
        before, after = place.clamp(max=0.0)[:, None], place.clamp(min=0.0)[:, None]
        angle = cycles[:, :, None] + inner[:, :-1, None] * before + inner[:, 1:, None] * after
        voiced = (f0 > self.VOICED_ABOVE).to(torch.float32)[:, :, None, None]
        loudness = voiced * self.VOICED_NOISE + (1.0 - voiced) * (self.AMPLITUDE / 3.0)
        waves = (angle * (2.0 * math.pi)).sin() * (self.AMPLITUDE * voiced) + loudness * noise
        source = self.l_linear(waves.to(dtype)).float().tanh().squeeze(-1)
        return source, cycles


def fourier_rows(size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and -sin of 2·pi·k·n/size for k = 0 … size/2, n = 0 … size-1: each [size/2 + 1, size]."""
    k = torch.arange(size // 2 + 1, device=like.device)
    n = torch.arange(size, device=like.device)
    angle = torch.remainder(k[:, None] * n[None], size).to(torch.float32) * (2.0 * math.pi / size)
    return angle.cos().to(like.dtype), -angle.sin().to(like.dtype)


def hann(size: int, like: Tensor) -> Tensor:
    """The periodic Hann window [size]."""
    n = torch.arange(size, device=like.device, dtype=torch.float32)
    return (0.5 - 0.5 * (n * (2.0 * math.pi / size)).cos()).to(like.dtype)


def stft(signal: Tensor, size: int, hop: int) -> Tensor:
    """[B, n] -> [B, size + 2, n/hop + 1], real parts then imaginary parts, as a convolution (centred, reflected)."""
    real, imaginary = fourier_rows(size, signal)
    kernel = torch.cat((real, imaginary)) * hann(size, signal)
    padded = functional.pad(signal[:, None], (size // 2, size // 2), mode="reflect")
    return functional.conv1d(padded, kernel[:, None], stride=hop)


def istft(magnitude: Tensor, phase: Tensor, size: int, hop: int) -> Tensor:
    """The inverse of `stft` for spectra [B, size/2 + 1, frames] in polar form: [B, hop·(frames - 1)]."""
    real, imaginary = fourier_rows(size, magnitude)
    window = hann(size, magnitude)
    k = torch.arange(size // 2 + 1, device=magnitude.device)
    twice = torch.where((k == 0) | (k == size // 2), 1.0, 2.0).to(magnitude.dtype)[:, None] / size  # k and size-k
    kernel = torch.cat((real * twice, imaginary * twice)) * window
    spectrum = torch.cat((magnitude * phase.cos(), magnitude * phase.sin()), dim=1)
    signal = functional.conv_transpose1d(spectrum, kernel[:, None], stride=hop)
    overlap = functional.conv_transpose1d(torch.ones_like(magnitude[:1, :1]), window.square()[None, None], stride=hop)
    return (signal / overlap.clamp(min=1e-11))[:, 0, size // 2 : -(size // 2)]


class Vocoder(nn.Module):
    """A chunk of mel -> its waveform, in one run.

    Inputs, T mel frames of `hop` samples each: `mel` f32 [B, mel, T]; `f0` f32 [B, T] in Hz; `phase` f32
    [B, harmonics + 1], cycles of each harmonic before the first frame; `noise` f32 [B, T, hop, harmonics + 1], normal
    draws; `source_given` f32 [B, T, hop] with `source_keep` bool [B, T]: frames of the source that are already known.
    Outputs: `audio` f32 [B, hop·T] within ±limit; `source` f32 [B, T, hop]; `cycles` f32 [B, T, harmonics + 1], the
    phase after each frame. These types hold whatever the weights are.
    """

    def __init__(self, config: HiftConfig) -> None:
        super().__init__()
        self.config = config
        self.m_source = HarmonicSource(config)
        self.conv_pre = nn.Conv1d(config.mel, config.base, 7, padding=3)
        self.ups, self.source_downs = nn.ModuleList(), nn.ModuleList()
        self.source_resblocks, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for i, (rate, kernel) in enumerate(zip(config.up_rates, config.up_kernels, strict=True)):
            channels = config.base >> (i + 1)
            self.ups.append(
                nn.ConvTranspose1d(2 * channels, channels, kernel, stride=rate, padding=(kernel - rate) // 2)
            )
            stride = math.prod(config.up_rates[i + 1 :])
            width, pad = (1, 0) if stride == 1 else (2 * stride, stride // 2)
            self.source_downs.append(nn.Conv1d(config.n_fft + 2, channels, width, stride=stride, padding=pad))
            self.source_resblocks.append(_ResBlock(channels, config.source_kernels[i], config.dilations))
            for size in config.resblock_kernels:
                self.resblocks.append(_ResBlock(channels, size, config.dilations))
        self.conv_post = nn.Conv1d(config.base >> len(config.up_rates), config.n_fft + 2, 7, padding=3)

    def decode(self, mel: Tensor, source: Tensor) -> Tensor:
        """Mel [B, mel, T] and source [B, n] -> waveform [B, n]; both transforms are float32 in every precision."""
        config, dtype = self.config, self.conv_pre.weight.dtype
        spectrum = stft(source, config.n_fft, config.istft_hop).to(dtype)
        branches = len(config.resblock_kernels)
        x = self.conv_pre(mel.to(dtype))
        for i, up in enumerate(self.ups):
            x = up(functional.leaky_relu(x, config.slope))
            if i == len(self.ups) - 1:
                x = functional.pad(x, (1, 0), mode="reflect")
            x = x + self.source_resblocks[i](self.source_downs[i](spectrum))
            blocks = self.resblocks[i * branches : (i + 1) * branches]
            x = torch.stack([block(x) for block in blocks]).sum(dim=0) / branches
        x = self.conv_post(functional.leaky_relu(x)).float()
        bins = config.n_fft // 2 + 1
        magnitude = x[:, :bins].exp().clamp(max=100.0)
        audio = istft(magnitude, x[:, bins:].sin(), config.n_fft, config.istft_hop)
        return audio.clamp(-config.limit, config.limit)

    def forward(
        self,
        mel: Tensor,
        f0: Tensor,
        phase: Tensor,
        noise: Tensor,
        source_given: Tensor,
        source_keep: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        source, cycles = self.m_source(f0, phase, noise)
        source = torch.where(source_keep[:, :, None], source_given, source)
        return self.decode(mel, source.flatten(1)), source, cycles


def reach(config: HiftConfig) -> int:
    """Frames of mel and F0 on either side that a frame's audio can depend on."""
    samples = 3.0 * config.hop  # conv_pre
    scale = float(config.hop)
    for i, (rate, kernel) in enumerate(zip(config.up_rates, config.up_kernels, strict=True)):
        samples += math.ceil(kernel / rate) * scale  # transposed convolution
        scale /= rate
        widest = max(*config.resblock_kernels, config.source_kernels[i])
        samples += scale * sum((widest - 1) * (d + 1) / 2 for d in config.dilations)
    samples += 3.0 * scale + config.n_fft  # conv_post, iSTFT
    between = config.hop  # the phase goes from the middle of a frame to that of the next
    source = math.prod(config.up_rates[1:]) * config.istft_hop + config.n_fft  # its strided convolutions and STFT
    inner = samples - 3.0 * config.hop + source + between
    return math.ceil(max(samples, inner) / config.hop)
