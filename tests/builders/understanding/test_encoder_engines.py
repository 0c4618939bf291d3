"""Vision and audio engines in ONNX Runtime against the reference, at other sizes than they were exported with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from builders.registry import component
from ming_trt.checkpoint import Checkpoint
from ming_trt.config import MingConfig
from ming_trt.golden.cases import Cases
from ming_trt.processing.vision_index import vision_indices
from ming_trt.runtime.onnxruntime import OnnxRuntimeEngine

OpenEngine = Callable[..., OnnxRuntimeEngine]


@pytest.mark.parametrize("name", ["ragged", "video", "whole", "pair"])
def test_vision(cases: Cases, config: MingConfig, open_engine: OpenEngine, name: str) -> None:
    indices = vision_indices(cases.array(f"vision.{name}.grid_thw"), config.vision)
    feeds = {"patches": cases.array(f"vision.{name}.pixel_values"), **indices}
    cases.check(f"vision.{name}.embeds", open_engine("vision_encoder").run(feeds)["rows"])


@pytest.mark.parametrize("grid", [[[1, 2, 2]], [[3, 2, 4], [1, 2, 2]]])
def test_smallest_pictures(
    config: MingConfig, checkpoint: Checkpoint, open_engine: OpenEngine, grid: list[list[int]]
) -> None:
    feeds = {"patches": np.zeros((0, 0), np.float32), **vision_indices(grid, config.vision)}
    count = len(feeds["patch_position"])
    feeds["patches"] = np.random.default_rng(count).standard_normal((count, config.vision.patch_width), np.float32)
    module = component("vision_encoder").reference(config, checkpoint)
    with torch.no_grad():
        expected = module(*(torch.from_numpy(np.array(value)) for value in feeds.values()))
    # the tolerance that the cases state for these rows of unit length
    np.testing.assert_allclose(open_engine("vision_encoder").run(feeds)["rows"], expected.numpy(), atol=5e-6)


@pytest.mark.parametrize("name", ["clip0", "clip1"])
def test_audio(cases: Cases, open_engine: OpenEngine, name: str) -> None:
    rows = open_engine("audio_encoder").run({"mel": cases.array(f"proc.audio.{name}.mel")})["rows"]
    cases.check(f"audio.{name}.embeds", rows)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 61, "longest"])
def test_clips_of_all_lengths(
    config: MingConfig, checkpoint: Checkpoint, open_engine: OpenEngine, frames: int | str
) -> None:
    count = config.audio.max_frames if frames == "longest" else int(frames)
    mel = np.random.default_rng(count).uniform(-1, 1, (count, config.audio.num_mels)).astype(np.float32)
    with torch.no_grad():
        expected = component("audio_encoder").reference(config, checkpoint)(torch.from_numpy(mel))
    got = open_engine("audio_encoder").run({"mel": mel})["rows"]
    assert got.shape == (-(-count // 4), config.llm.hidden_size)
    np.testing.assert_allclose(got, expected.numpy(), atol=3e-6)
