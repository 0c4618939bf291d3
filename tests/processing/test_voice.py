"""Preset voices, and what is taken from a reference clip."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ming_trt.errors import CheckpointError, InputError
from ming_trt.golden.cases import Cases
from ming_trt.processing.voice import RATE, bfloat16_rounded, check_clip, filter_bank, load_voice, speaker_features

GENERATION = Path(__file__).parents[1] / "data" / "golden" / "generation"
CASES = Cases(GENERATION)


def test_preset() -> None:
    voice = load_voice(GENERATION / "voice.pt")
    assert voice.text == "你好，很高兴。"
    for name, value in (
        ("bpe.voice.codes", voice.codes),
        ("talker.voice.vp_emb", voice.speaker),
        ("flow.voice.tokens", voice.flow_codes),
        ("flow.voice.mel", voice.flow_mel),
        ("flow.voice.embedding", voice.flow_speaker),
    ):
        assert np.array_equal(value, CASES.array(name)), name


def test_files_that_are_no_voice(tmp_path: Path) -> None:
    good = torch.load(GENERATION / "voice.pt", weights_only=True)
    for broken, message in (
        ({k: v for k, v in good.items() if k != "vp_emb"}, "vp_emb"),
        ({k: v for k, v in good.items() if k != "prompt_text"}, "prompt_text"),
        ({**good, "prompt_speech_feat": good["prompt_speech_feat"][:, :50].clone()}, "120 prompt codes"),
        ([1, 2], "no dictionary"),
    ):
        torch.save(broken, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match=message):
            load_voice(tmp_path / "x.pt")


def test_rounding_equals_torch() -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    assert np.array_equal(bfloat16_rounded(values), torch.from_numpy(values).bfloat16().float().numpy())


def test_filter_bank_of_a_tone() -> None:
    """A pure tone has its energy in the band that holds it, at every level by the same distance."""
    time = np.arange(RATE) / RATE
    tone = np.sin(2 * np.pi * 1000 * time).astype(np.float32)
    bank = filter_bank(tone)
    assert bank.shape == (98, 80)
    edges = np.linspace(*(1127 * np.log1p(np.array([20, 8000]) / 700)), 82)
    band = int(np.abs(edges[1:-1] - 1127 * np.log1p(1000 / 700)).argmin())
    assert (bank.argmax(axis=1) == band).all()
    # above the floor (float32's epsilon) energy goes with the square of the amplitude
    assert np.allclose(filter_bank(tone * 0.5)[:, band] - bank[:, band], np.log(0.25), atol=1e-4)
    assert np.abs(speaker_features(tone).mean(axis=0)).max() < 1e-4


@pytest.mark.parametrize(
    ("seconds", "level", "message"), [(0.1, 1, "lasts 0.10 s"), (60, 1, "lasts 60.00 s"), (2, 0, "silent")]
)
def test_clips_that_cannot_be_used(seconds: float, level: float, message: str) -> None:
    noise = level * np.random.default_rng(0).standard_normal(int(seconds * RATE)).astype(np.float32)
    with pytest.raises(InputError, match=message):
        check_clip(noise)
