"""Voices: who speaks. A preset is a `.pt` file; a reference clip is turned into features for two small models.

A clip gives the talker codes, a transcript and a speaker vector; the flow then gets the vector alone, as officially.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ming_trt.checkpoint import TensorInfo
from ming_trt.errors import CheckpointError, InputError
from ming_trt.torch_file import load_torch_file

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

RATE = 16000
MIN_CLIP_SECONDS, MAX_CLIP_SECONDS = 0.5, 30.0
_SILENT = 10 ** (-60 / 20)  # root mean square of a clip that holds no voice
_DTYPES = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "I32": "<i4", "I64": "<i8", "I16": "<i2"}


@dataclass(frozen=True, slots=True)
class Voice:
    """`text` is what the recording behind `codes` i64 [n] says; `speaker` f32 [192] conditions the talker.

    The flow continues `flow_codes` i64 [m] with their mel `flow_mel` f32 [m, 80], spoken by `flow_speaker` f32 [192];
    m may be 0.
    """

    text: str
    codes: Ints
    speaker: Floats
    flow_codes: Ints
    flow_mel: Floats
    flow_speaker: Floats


def bfloat16_rounded(values: Floats) -> Floats:
    """The nearest bfloat16 numbers as f32; the official model stores speaker vectors so."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def load_voice(file: Path) -> Voice:
    """A preset voice with the keys of the official `data/spks/*.pt`. Raises `CheckpointError` if it is not one."""
    content = load_torch_file(file)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"'{file}' is not a voice: it holds no dictionary")
    text = content.get("prompt_text")
    if not isinstance(text, str):
        raise CheckpointError(f"'{file}' is not a voice: it has no 'prompt_text'")
    mel = _array(content, "prompt_speech_feat", file)
    voice = Voice(
        text=text,
        codes=_array(content, "prompt_speech_token", file).reshape(-1).astype(np.int64),
        speaker=bfloat16_rounded(_array(content, "vp_emb", file).reshape(-1).astype(np.float32)),
        flow_codes=_array(content, "flow_prompt_speech_token", file).reshape(-1).astype(np.int64),
        flow_mel=mel.reshape(-1, mel.shape[-1]).astype(np.float32),
        flow_speaker=_array(content, "flow_embedding", file).reshape(-1).astype(np.float32),
    )
    if len(voice.flow_codes) != len(voice.flow_mel):
        raise CheckpointError(
            f"'{file}' has {len(voice.flow_codes)} prompt codes for {len(voice.flow_mel)} mel frames: each needs one"
        )
    return voice


def _array(content: Mapping[Any, Any], name: str, file: Path) -> npt.NDArray[Any]:
    info = content.get(name)
    if not isinstance(info, TensorInfo) or not info.shape:
        raise CheckpointError(f"'{file}' is not a voice: it has no tensor '{name}'")
    with file.open("rb") as stream:
        stream.seek(info.offset)
        data = stream.read(info.nbytes)
    if info.dtype == "BF16":
        words: npt.NDArray[Any] = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return words.view(np.float32).reshape(info.shape)
    if info.dtype not in _DTYPES:
        raise CheckpointError(f"'{name}' in '{file}' has dtype {info.dtype}: store it as float32 or int32")
    return np.frombuffer(data, _DTYPES[info.dtype]).reshape(info.shape)


def check_clip(samples: Floats) -> Floats:
    """`samples` f32 [n] at 16 kHz, if a voice can be taken from them. Raises `InputError`."""
    seconds = len(samples) / RATE
    if not MIN_CLIP_SECONDS <= seconds <= MAX_CLIP_SECONDS:
        raise InputError(
            f"the reference clip lasts {seconds:.2f} s: send {MIN_CLIP_SECONDS:g} to {MAX_CLIP_SECONDS:g} s of speech"
        )
    loudness = float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))
    if not loudness > _SILENT:
        raise InputError("the reference clip is silent: send a recording with a voice in it")
    return samples


def speaker_features(samples: Floats) -> Floats:
    """What the speaker model takes of a clip: 80 log mel energies per 10 ms, each band's mean removed. f32 [T, 80]."""
    energies = filter_bank(samples)
    return np.asarray(energies - energies.mean(axis=0, keepdims=True), np.float32)


_WINDOW, _SHIFT, _FFT, _BANDS, _LOWEST = 400, 160, 512, 80, 20.0


def filter_bank(samples: Floats) -> Floats:
    """Log mel energies as speech recognisers take them (Kaldi's defaults, no dither): f32 [T, 80] at 16 kHz.

    Windows of 25 ms every 10 ms that lie wholly inside; mean removed, pre-emphasis 0.97, Povey's window.
    """
    frames = np.lib.stride_tricks.sliding_window_view(samples.astype(np.float64), _WINDOW)[::_SHIFT]
    frames = frames - frames.mean(axis=1, keepdims=True)
    before = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / (_WINDOW - 1))
    spectrum = np.fft.rfft((frames - 0.97 * before) * hann**0.85, _FFT)
    energies = (spectrum.real**2 + spectrum.imag**2)[:, : _FFT // 2] @ _mel_bands()
    return np.asarray(np.log(np.maximum(energies, np.finfo(np.float32).eps)), np.float32)


@lru_cache(maxsize=1)
def _mel_bands() -> npt.NDArray[np.float64]:
    """Triangles on the mel scale between 20 Hz and 8 kHz, peak 1: [256, 80]."""

    def mel(hertz: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.asarray(1127.0 * np.log1p(hertz / 700.0))

    low, high = mel(np.array([_LOWEST, RATE / 2]))
    edges = np.linspace(low, high, _BANDS + 2)
    bins = mel(np.arange(_FFT // 2) * (RATE / _FFT))[:, None]
    rising = (bins - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - bins) / np.diff(edges)[1:]
    return np.asarray(np.maximum(0.0, np.minimum(rising, falling)))


def decode_clip(data: bytes) -> Floats:
    """The samples f32 [n] at 16 kHz of a reference clip's file, first channel. Raises `InputError`."""
    from ming_trt.processing.audio import decode_audio, first_channel, resample

    waveform, rate = decode_audio(data, max_seconds=10 * MAX_CLIP_SECONDS)
    return check_clip(resample(first_channel(waveform), rate))
