"""The small checkpoint speaks: every voice, a reference clip, and audio that keeps the contract."""

from __future__ import annotations

import numpy as np
import pytest

from ming_trt import presets
from ming_trt.bundle import Bundle
from ming_trt.mini import write_mini
from ming_trt.processing.speech_text import pieces
from ming_trt.runtime.detokenizer import Detokenizer
from ming_trt.runtime.speech import Speech, open_speech
from ming_trt.runtime.voices import Voices

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Speech, Voices]:
    from builders.build import Options, build

    folder = tmp_path_factory.mktemp("mini")
    write_mini(folder / "checkpoint")
    only = ("talker", *Detokenizer.ENGINES)
    report = build(Options(folder / "checkpoint", folder / "bundle", presets.load("mini-cpu"), only=only))
    assert report.ok, report.as_dict()
    return open_speech(Bundle.open(folder / "bundle"))


@pytest.mark.parametrize("text", ["Tyler, Lucy, Michelle, we're going to space!", "今天是2025年7月22日，气温25℃。"])
@pytest.mark.parametrize("voice", [None, "luna", "eng"])
def test_reads(opened: tuple[Speech, Voices], text: str, voice: str | None) -> None:
    speech, voices = opened
    chunks = list(speech.read(text, voices.named(voice, text), seed=1))
    assert [chunk.text for chunk in chunks if chunk.last] == [piece.text for piece in pieces(text)]
    audio = np.concatenate([chunk.audio for chunk in chunks])
    assert np.isfinite(audio).all() and 0.01 < np.sqrt(np.mean(audio**2)) < 0.5 and np.abs(audio).max() < 0.99


def test_reference_clip(opened: tuple[Speech, Voices]) -> None:
    speech, voices = opened
    time = np.arange(3 * 16000) / 16000
    clip = (0.3 * np.sin(2 * np.pi * 200 * time * (1 + 0.1 * time))).astype(np.float32)
    voice = voices.from_clip(clip, "hello there")
    assert len(voice.codes) == 150, "50 codes a second"
    assert voice.speaker.shape == (192,) and len(voice.flow_codes) == 0
    assert sum(chunk.audio.size for chunk in speech.read("Good to see you again.", voice)) > 4800
