"""The reference checkpoint and its modules in float32."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ming_trt.checkpoint import Checkpoint
from ming_trt.config import MingConfig, load_config
from ming_trt.golden.cases import Cases
from ming_trt.models import audio, llm, vision
from ming_trt.models.weights import load_weights

DATA = Path(__file__).parent.parent / "data" / "golden" / "understanding"
# Another folder of the same form (e.g. untrimmed cases, another seed) can be checked with the same tests.
FOLDER = Path(os.environ.get("MING_TRT_TEST_UNDERSTANDING", DATA))


@pytest.fixture(scope="session")
def cases() -> Cases:
    return Cases(FOLDER)


@pytest.fixture(scope="session")
def config() -> MingConfig:
    return load_config(FOLDER / "checkpoint")


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    return Checkpoint(FOLDER / "checkpoint")


@pytest.fixture(scope="session")
def make_llm(config: MingConfig, checkpoint: Checkpoint) -> Callable[[str], llm.MingLLM]:
    made: dict[str, llm.MingLLM] = {}

    def make(rope: str) -> llm.MingLLM:
        if rope not in made:
            sizes = dataclasses.replace(config.llm, rope_kind=rope)
            with torch.device("meta"):
                made[rope] = llm.MingLLM(sizes)
            load_weights(made[rope], checkpoint, llm.weight_map(sizes))
        return made[rope]

    return make


@pytest.fixture(scope="session")
def vision_encoder(config: MingConfig, checkpoint: Checkpoint) -> vision.VisionEncoder:
    with torch.device("meta"):
        module = vision.VisionEncoder(config.vision, config.llm)
    load_weights(module, checkpoint, vision.weight_map(config.vision, config.llm))
    return module


@pytest.fixture(scope="session")
def audio_encoder(config: MingConfig, checkpoint: Checkpoint) -> audio.AudioEncoder:
    with torch.device("meta"):
        module = audio.AudioEncoder(config.audio, config.llm)
    load_weights(module, checkpoint, audio.weight_map(config.audio, config.llm))
    return module
