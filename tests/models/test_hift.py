"""The vocoder's parts: Fourier transforms as convolutions, phases that carry on, and the reference's waveform."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ming_trt.checkpoint import Checkpoint
from ming_trt.golden.cases import Cases
from ming_trt.models.detokenizer_weights import f0_weights, vocoder_weights
from ming_trt.models.hift import F0Predictor, Vocoder, istft, reach, stft
from ming_trt.models.weights import load_weights
from ming_trt.speech_config import load_speech_config

GENERATION = Path(__file__).parents[1] / "data" / "golden" / "generation"
CASES = Cases(GENERATION)
CONFIG = load_speech_config(GENERATION / "checkpoint").hift


@pytest.fixture(scope="module")
def vocoder() -> Vocoder:
    with torch.device("meta"):
        module = Vocoder(CONFIG)
    return load_weights(module, Checkpoint(GENERATION / "checkpoint"), vocoder_weights(CONFIG))  # type: ignore[return-value]


@settings(deadline=None)
@given(st.integers(5, 40), st.sampled_from([8, 16, 32]), st.integers(0, 99))
def test_transforms_equal_torch(frames: int, size: int, seed: int) -> None:
    hop = size // 4
    signal = torch.randn(2, frames * hop, generator=torch.Generator().manual_seed(seed))
    window = torch.hann_window(size)
    expected = torch.stft(signal, size, hop, size, window, return_complex=True)
    got = stft(signal, size, hop)
    assert torch.allclose(got, torch.cat((expected.real, expected.imag), dim=1), atol=2e-5)
    magnitude, phase = expected.abs(), expected.angle()
    back = torch.istft(expected, size, hop, size, window)
    assert torch.allclose(istft(magnitude, phase, size, hop), back, atol=1e-5)
    assert torch.allclose(back, signal, atol=1e-5)


def test_reference(vocoder: Vocoder) -> None:
    with torch.device("meta"):
        pitch = F0Predictor(CONFIG)
    load_weights(pitch, Checkpoint(GENERATION / "checkpoint"), f0_weights(CONFIG))
    mel = torch.from_numpy(CASES.array("flow.whole.mel"))[None]
    with torch.no_grad():
        CASES.check("hift.f0", pitch(mel)[0])
        CASES.check("hift.wav", vocoder.decode(mel, torch.from_numpy(CASES.array("hift.source"))[None])[0])


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 60), st.integers(1, 59), st.integers(0, 99))
def test_phases_carry_on(vocoder: Vocoder, frames: int, cut: int, seed: int) -> None:
    """A source in two parts is that in one, but for half a frame at the join, where the parts stand still."""
    cut = min(cut, frames - 1)
    rng = np.random.default_rng(seed)
    f0 = torch.from_numpy(rng.uniform(60, 500, (1, frames)).astype(np.float32))
    noise = torch.from_numpy(rng.standard_normal((1, frames, CONFIG.hop, CONFIG.harmonics + 1)).astype(np.float32))
    start = torch.from_numpy(rng.random((1, CONFIG.harmonics + 1)).astype(np.float32))
    source = vocoder.m_source
    with torch.no_grad():
        whole, cycles = source(f0, start, noise)
        _, before = source(f0[:, :cut], start, noise[:, :cut])
        after, ends = source(f0[:, cut:], before[:, -1], noise[:, cut:])
    assert torch.equal(before, cycles[:, :cut]) and torch.equal(ends, cycles[:, cut:])
    half = CONFIG.hop // 2
    assert torch.equal(whole[:, cut:].flatten()[half:], after.flatten()[half:])


def test_reach_covers_what_a_frame_depends_on(vocoder: Vocoder) -> None:
    """Changing a frame of mel or F0 changes no audio further away than `reach` says."""
    frames, place, far = 60, 30, reach(CONFIG)
    rng = np.random.default_rng(0)
    mel = torch.from_numpy(rng.normal(-4, 2, (1, CONFIG.mel, frames)).astype(np.float32))
    f0 = torch.full((1, frames), 120.0)
    rest = (
        torch.zeros(1, CONFIG.harmonics + 1),
        torch.zeros(1, frames, CONFIG.hop, CONFIG.harmonics + 1),
        torch.zeros(1, frames, CONFIG.hop),
        torch.zeros(1, frames, dtype=torch.bool),
    )
    other = mel.clone()
    other[:, :, place] += 3
    voiced = f0.clone()
    voiced[:, place] = 0.0  # no phase is added, so that only this frame's source changes its kind
    with torch.no_grad():
        base = vocoder(mel, f0, *rest)[0].reshape(frames, -1)
        moved = vocoder(other, f0, *rest)[0].reshape(frames, -1)
        silent = vocoder(mel, voiced, *rest)[0].reshape(frames, -1)
    changed = torch.nonzero((moved - base).abs().amax(dim=1) > 0).flatten()
    assert 3 < int((changed - place).abs().max()) <= far
    earlier = torch.nonzero((silent - base).abs().amax(dim=1) > 0).flatten().min()
    assert place - int(earlier) <= far
