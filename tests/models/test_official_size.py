"""At the official sizes: names, shapes and parameter totals of the published checkpoint. Nothing is allocated."""

from __future__ import annotations

import json
import math

import pytest
import torch

from ming_trt.config import MingConfig, load_config
from ming_trt.models import audio, llm, vision
from ming_trt.models.weights import tensor_shapes

LLM = {
    "vocab_size": 126464,
    "hidden_size": 2048,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 64,
    "num_experts_per_tok": 6,
    "num_shared_experts": 2,
    "moe_intermediate_size": 1408,
    "eos_token_id": 126081,
    "pad_token_id": 126081,
    "image_patch_token": 126346,
    "rope_scaling": {"type": "3D", "factor": None},
}
VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "num_heads": 16,
    "intermediate_size": 3456,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "out_hidden_size": 8192,
}


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> MingConfig:
    folder = tmp_path_factory.mktemp("official")
    values = {"mlp_depth": 2, "llm_config": LLM, "vision_config": VISION}
    (folder / "config.json").write_text(json.dumps(values))
    return load_config(folder)


def test_tokens(official: MingConfig) -> None:
    tokens = official.tokens
    assert (tokens.image_start, tokens.video_start, tokens.video_end) == (126347, 126349, 126350)
    assert (tokens.audio_patch, tokens.audio_start, tokens.audio_end) == (126357, 126358, 126359)


def test_totals(official: MingConfig) -> None:
    shapes = {
        **tensor_shapes(llm.weight_map(official.llm)),
        **tensor_shapes(vision.weight_map(official.vision, official.llm)),
        **tensor_shapes(audio.weight_map(official.audio, official.llm)),
    }
    assert len(shapes) == 6544
    totals: dict[str, int] = {}
    for name, shape in shapes.items():
        part = name.partition(".")[0]
        totals[part] = totals.get(part, 0) + math.prod(shape)
    assert totals == {
        "model": 16_809_314_304,
        "vision": 704_573_696,
        "audio": 654_248_960,
        "linear_proj": 20_975_616,
        "linear_proj_audio": 12_062_720,
    }


def test_modules_match_their_maps(official: MingConfig) -> None:
    with torch.device("meta"):
        modules = (
            (llm.MingLLM(official.llm), llm.weight_map(official.llm)),
            (vision.VisionEncoder(official.vision, official.llm), vision.weight_map(official.vision, official.llm)),
            (audio.AudioEncoder(official.audio, official.llm), audio.weight_map(official.audio, official.llm)),
        )
    for module, sources in modules:
        parameters = {name: tuple(value.shape) for name, value in module.named_parameters()}
        assert parameters == {name: source.shape for name, source in sources.items()}
        assert not list(module.buffers())
