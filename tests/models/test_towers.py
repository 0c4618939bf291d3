"""Vision and audio towers against the reference, within the tolerances that the cases state."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ming_trt.config import MingConfig
from ming_trt.golden.cases import Cases
from ming_trt.models import audio, vision
from ming_trt.processing.vision_index import vision_indices


def vision_inputs(cases: Cases, case: str, config: MingConfig) -> list[torch.Tensor]:
    indices = vision_indices(cases.array(f"{case}.grid_thw"), config.vision)
    arrays = {"patches": cases.array(f"{case}.pixel_values"), **indices}
    return [torch.from_numpy(np.array(arrays[name])) for name in vision.INPUT_NAMES]


@pytest.mark.parametrize("name", ["ragged", "video", "whole", "pair"])
@torch.no_grad()
def test_vision(cases: Cases, config: MingConfig, vision_encoder: vision.VisionEncoder, name: str) -> None:
    inputs = vision_inputs(cases, f"vision.{name}", config)
    cases.check(f"vision.{name}.tower", vision_encoder.tower(*inputs))
    cases.check(f"vision.{name}.embeds", vision_encoder(*inputs))


@pytest.mark.parametrize("name", ["clip0", "clip1"])
@torch.no_grad()
def test_audio(cases: Cases, audio_encoder: audio.AudioEncoder, name: str) -> None:
    mel = torch.from_numpy(cases.array(f"proc.audio.{name}.mel"))
    rows = audio_encoder(mel)
    cases.check(f"audio.{name}.tower", audio_encoder.tower(mel)[0])
    cases.check(f"audio.{name}.embeds", rows)
    cases.check(f"audio.{name}.length", np.int64(len(rows)))


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 8])
@torch.no_grad()
def test_audio_lengths(audio_encoder: audio.AudioEncoder, config: MingConfig, frames: int) -> None:
    rows = audio_encoder(torch.zeros(frames, config.audio.num_mels))
    assert rows.shape == (-(-frames // 4), config.llm.hidden_size)
    assert torch.isfinite(rows).all()
