"""Audio: encoded bytes to log-mel frames, as the reference makes them: first channel, 16 kHz, Whisper's features
without its 30-second rule.

Mel: Hann window of 400 samples (periodic), hop 160, centred with reflection, power spectrum without the last frame, 128
Slaney bands; log10, cut at 8 decades below the clip's maximum, scaled. 100 frames a second make 25 tokens a second.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from math import gcd

import av
import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from ming_trt.errors import InputError

Floats = npt.NDArray[np.float32]

SAMPLE_RATE = 16000
WINDOW = 400
HOP = 160
# Reflection by half a window needs one sample more than that.
MIN_SAMPLES = WINDOW // 2 + 1
MAX_FILE_BYTES = 256 << 20
MIN_RATE, MAX_RATE = 1000, 768000
# The official position table: 300 s.
MAX_FRAMES = 30000
# Above this many filter taps (rates without a large common divisor with 16 kHz) soxr resamples.
_MAX_KERNEL = 4_000_000


@dataclass(frozen=True, slots=True)
class AudioInput:
    """`mel` f32 [T, 128] of one clip and the number of its tokens in the prompt."""

    mel: Floats
    tokens: int


def audio_tokens(frames: int) -> int:
    """Tokens of a clip of `frames` mel frames: two halvings, each rounded up."""
    return (frames + 3) // 4


def process_audio(audio: bytes, *, max_frames: int = MAX_FRAMES, num_mels: int = 128) -> AudioInput:
    """An encoded clip (WAV, FLAC, OGG, MP3, or what FFmpeg reads) to features; `max_frames`: the table's length in mel
    frames. Raises `InputError`."""
    waveform, rate = decode_audio(audio, max_seconds=max_frames * HOP / SAMPLE_RATE)
    return process_waveform(waveform, rate, max_frames=max_frames, num_mels=num_mels)


def process_waveform(
    waveform: npt.NDArray[np.floating | np.signedinteger],  # type: ignore[type-arg]
    rate: int = SAMPLE_RATE,
    *,
    max_frames: int = MAX_FRAMES,
    num_mels: int = 128,
) -> AudioInput:
    """Samples [n] or [channels, n], floats or integers of full scale, to features. Raises `InputError`."""
    mono = resample(first_channel(waveform), rate)
    if len(mono) < MIN_SAMPLES:
        raise InputError(
            f"the audio lasts {len(mono) / SAMPLE_RATE:.4f} s ({len(mono)} samples at 16 kHz): send at least "
            f"{MIN_SAMPLES / SAMPLE_RATE:.4f} s ({MIN_SAMPLES} samples)"
        )
    if len(mono) // HOP > max_frames:
        raise InputError(_too_long(len(mono) / SAMPLE_RATE, max_frames * HOP / SAMPLE_RATE))
    mel = log_mel(mono, num_mels)
    return AudioInput(mel, audio_tokens(len(mel)))


def decode_audio(data: bytes, max_seconds: float | None = None) -> tuple[Floats, int]:
    """First channel f32 [n] in [-1, 1] and the sample rate. Raises `InputError`; files longer than `max_seconds` are
    refused before they are decoded as a whole."""
    if not data:
        raise InputError("the audio has 0 bytes: send the content of a WAV, FLAC, OGG or MP3 file")
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"the audio file has {len(data)} bytes, more than {MAX_FILE_BYTES}: send a shorter one")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, frames = file.samplerate, file.frames
            _check_length(frames, rate, max_seconds)
            samples = file.read(dtype="float32", always_2d=True)[:, 0]
    except soundfile.SoundFileError as first:
        samples, rate = _decode_with_ffmpeg(data, max_seconds, str(getattr(first, "error_string", first)))
    if len(samples) == 0:
        raise InputError("the audio has no samples: send a recording")
    return np.ascontiguousarray(samples), int(rate)


def first_channel(waveform: npt.NDArray[np.floating | np.signedinteger]) -> Floats:  # type: ignore[type-arg]
    """f32 [n] of samples [n] or [channels, n]; integers are divided by their full scale. Raises `InputError`."""
    samples = waveform if waveform.ndim == 1 else waveform[0]
    if np.issubdtype(samples.dtype, np.signedinteger):
        return samples.astype(np.float32) / np.float32(2.0 ** (8 * samples.dtype.itemsize - 1))
    if not np.issubdtype(samples.dtype, np.floating):
        raise InputError(f"the samples are of type {samples.dtype}: give floats or signed integers")
    if not np.isfinite(samples).all():
        raise InputError("the audio holds samples that are not finite numbers: send an intact recording")
    return samples.astype(np.float32)


def resample(samples: Floats, rate: int, target: int = SAMPLE_RATE) -> Floats:
    """f32 [n] to f32 [ceil(n · target / rate)]: the reference's windowed sinc (Hann, 6 zero crossings, roll-off 0.99).

    Rates that share no large divisor with the target would need a filter of gigabytes; soxr (HQ) resamples those.
    """
    if not MIN_RATE <= rate <= MAX_RATE:
        raise InputError(f"the audio has {rate} samples a second: send {MIN_RATE} to {MAX_RATE}")
    if rate == target:
        return samples
    before, after = rate // gcd(rate, target), target // gcd(rate, target)
    length = -(-after * len(samples) // before)
    width = _width(before, after)
    if after * (2 * width + before) > _MAX_KERNEL:
        resampled = soxr.resample(samples, rate, target, quality="HQ")
        return np.asarray(np.pad(resampled, (0, max(0, length - len(resampled))))[:length], np.float32)
    padded = np.pad(samples, (width, width + before))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * width + before)[::before]
    return np.asarray((windows @ _kernel(before, after)).reshape(-1)[:length], np.float32)


def _width(before: int, after: int) -> int:
    return int(np.ceil(6 * before / (min(before, after) * 0.99)))


@lru_cache(maxsize=16)
def _kernel(before: int, after: int) -> Floats:
    """[2·width + before, after]: one column per output sample of a period of `before` input samples."""
    cutoff, width = min(before, after) * 0.99, _width(before, after)
    time = np.arange(-width, width + before, dtype=np.float64)[:, None] / before - np.arange(after) / after
    time = np.clip(time * cutoff, -6, 6)
    window = np.cos(time * np.pi / 12) ** 2
    return np.asarray(np.sinc(time) * window * (cutoff / before), np.float32)


def log_mel(samples: Floats, num_mels: int = 128) -> Floats:
    """f32 [n] at 16 kHz to f32 [n // 160, num_mels]; n is at least `MIN_SAMPLES`."""
    padded = np.pad(samples, WINDOW // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][: len(samples) // HOP]
    hann = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)).astype(np.float32)
    filters = mel_filters(num_mels)
    mel = np.empty((len(windows), num_mels), np.float32)
    for start in range(0, len(windows), 4096):
        # in blocks, since the spectrum takes several times the memory of the result
        spectrum = np.fft.rfft(windows[start : start + 4096] * hann)
        mel[start : start + 4096] = (spectrum.real**2 + spectrum.imag**2) @ filters
    logs = np.log10(np.maximum(mel, np.float32(1e-10)))
    return np.asarray((np.maximum(logs, logs.max() - 8) + 4) / 4, np.float32)


@lru_cache(maxsize=4)
def mel_filters(num_mels: int) -> Floats:
    """Slaney's triangular filters of unit area between 0 and 8 kHz, [201, num_mels]."""
    edges = _mel_to_hertz(np.linspace(0, _hertz_to_mel(SAMPLE_RATE / 2), num_mels + 2))
    bins = np.arange(WINDOW // 2 + 1)[:, None] * (SAMPLE_RATE / WINDOW)
    rising = (bins - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - bins) / np.diff(edges)[1:]
    return np.asarray(np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2])), np.float32)


# Slaney's scale: linear up to 1 kHz (15 mels), then 27 mels for a factor of 6.4.
def _hertz_to_mel(hertz: float) -> float:
    return float(15 + np.log(hertz / 1000) * 27 / np.log(6.4))


def _mel_to_hertz(mel: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))


def _check_length(frames: int, rate: int, max_seconds: float | None) -> None:
    # One hop more than the limit still makes the same number of frames.
    if max_seconds is not None and rate > 0 and frames / rate >= max_seconds + HOP / SAMPLE_RATE:
        raise InputError(_too_long(frames / rate, max_seconds))


def _too_long(seconds: float, limit: float) -> str:
    return f"the audio lasts {seconds:.2f} s, longer than the {limit:.2f} s that the model has positions for: cut it"


def _decode_with_ffmpeg(data: bytes, max_seconds: float | None, reason: str) -> tuple[Floats, int]:
    chunks: list[Floats] = []
    rate = total = 0
    try:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.audio:
                raise InputError("the file has no audio stream: send a recording")
            if container.streams.audio[0].codec_context is None:
                raise InputError("the audio's codec is not known here: send WAV, FLAC, OGG or MP3")
            resampler = av.AudioResampler(format="fltp")
            for frame in container.decode(container.streams.audio[0]):
                rate = frame.sample_rate
                total += frame.samples
                _check_length(total, rate, max_seconds)
                chunks += [piece.to_ndarray()[0] for piece in resampler.resample(frame)]
            chunks += [piece.to_ndarray()[0] for piece in resampler.resample(None)] if rate else []
    except (av.FFmpegError, ValueError, OSError):
        raise InputError(
            f"the audio of {len(data)} bytes cannot be decoded ({reason.strip().rstrip('.')}): "
            "send an intact WAV, FLAC, OGG or MP3 file"
        ) from None
    return (np.concatenate(chunks) if chunks else np.zeros(0, np.float32)), rate
