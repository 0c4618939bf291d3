"""The understanding part of the small checkpoint: language model, towers, tokenizer, processor files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ming_trt.config import MingConfig, load_config
from ming_trt.mini.tensors import Array, generator, random_weight, write_shards
from ming_trt.mini.tokenizer import ADDED_TOKENS, BASE_TOKENS, write_tokenizer

HIDDEN = 256
SHARDS = 2


def _config(tokenizer: Any) -> dict[str, Any]:
    """The root configuration with the official keys. The vocabulary is padded to a multiple of 128, as officially."""
    token = tokenizer.token_to_id
    whisper = {"n_mels": 128, "n_ctx": 3000, "n_state": 128, "n_head": 2, "n_layer": 2}
    return {
        "architectures": ["BailingMMNativeForConditionalGeneration"],
        "model_type": "bailingmm",
        "mlp_depth": 2,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0",
        "llm_config": {
            "architectures": ["BailingMoeForCausalLM"],
            "model_type": "bailing_moe",
            "attention_dropout": 0.0,
            "embedding_dropout": 0.0,
            "output_dropout": 0.0,
            "eos_token_id": token("<|endoftext|>"),
            "pad_token_id": token("<|endoftext|>"),
            "first_k_dense_replace": 0,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": HIDDEN,
            "image_patch_token": token("<imagePatch>"),
            "image_start_token": token("<image>"),
            "video_start_token": token("<video>"),
            "initializer_range": 0.006,
            "intermediate_size": 704,
            "max_position_embeddings": 32768,
            "moe_intermediate_size": 128,
            "multi_gate": True,
            "norm_head": False,
            "norm_softmax": False,
            "norm_topk_prob": True,
            "num_attention_heads": 4,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "num_shared_experts": 2,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {"type": "3D", "factor": None},
            "rope_theta": 600000,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_bias": False,
            "use_cache": True,
            "use_qkv_bias": False,
            "use_sliding_window": False,
            "vocab_size": -(-(BASE_TOKENS + len(ADDED_TOKENS)) // 128) * 128,
        },
        "vision_config": {
            "model_type": "qwen2_5_vit",
            "depth": 4,
            "fullatt_block_indexes": [1, 3],
            "hidden_act": "silu",
            "hidden_size": 80,
            "in_channels": 3,
            "in_chans": 3,
            "intermediate_size": 96,
            "num_heads": 2,
            "out_hidden_size": 256,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
        },
        "audio_config": {
            "model_type": "bailingmm",
            "audio_encoder_output_size": whisper["n_state"],
            "ds_conv_type": "conv",
            "ds_kernel_size": 3,
            "ds_stride": 2,
            "norm_query_embeds": True,
            "whisper_encoder_config": whisper,
        },
        "whisper_config": {"ds_kernel_size": 3, "ds_stride": 2, "whisper_encoder_config": whisper},
    }


_PREPROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_pixels": 802816,
    "merge_size": 2,
    "min_pixels": 78400,
    "patch_size": 14,
    "processor_class": "BailingMMProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "temporal_patch_size": 2,
}


def write(folder: Path, seed: int, config: dict[str, Any]) -> None:
    """Writes the root of the checkpoint, except `config.json`, whose content goes into `config`."""
    tokenizer = write_tokenizer(folder)
    config |= _config(tokenizer)
    end = config["llm_config"]["eos_token_id"]
    generation = {"_from_model_config": True, "eos_token_id": end, "pad_token_id": end, "do_sample": False}
    for name, values in (
        ("config.json", config),
        ("preprocessor_config.json", _PREPROCESSOR),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    write_shards(folder, _weights(load_config(folder), tokenizer, seed), SHARDS)


def _weights(config: MingConfig, tokenizer: Any, seed: int) -> dict[str, Array]:
    """All tensors, in the official order: audio, projectors, language model, vision."""
    from ming_trt.models import audio, llm, vision
    from ming_trt.models.weights import tensor_shapes

    shapes = {
        **tensor_shapes(audio.weight_map(config.audio, config.llm)),
        **tensor_shapes(vision.weight_map(config.vision, config.llm)),
        **tensor_shapes(llm.weight_map(config.llm)),
    }
    rng = generator(seed, "understanding")
    weights = {name: random_weight(rng, name, shapes[name]) for name in sorted(shapes)}
    for name, values in weights.items():
        if name.endswith("gate.weight") or name == "model.lm_head.weight":
            values *= 2
        elif name == "model.model.word_embeddings.weight":
            values *= 3
    weights["model.lm_head.weight"] *= _readable(tokenizer, config.llm.vocab_size)[:, None]
    weights["audio.positional_embedding"] = _sinusoids(*shapes["audio.positional_embedding"])
    return weights


def _readable(tokenizer: Any, vocabulary: int) -> Array:
    """1 for tokens that are text of their own (and for the end token), 0.02 for all others, so that greedy answers are
    words rather than reserved tokens and parts of characters."""
    scale = np.full(vocabulary, 0.02, dtype=np.float32)
    for number in range(BASE_TOKENS):
        text = tokenizer.decode([number])
        if "\ufffd" not in text and text.isprintable():
            scale[number] = 1
    scale[tokenizer.token_to_id("<|endoftext|>")] = 1
    return scale


def _sinusoids(length: int, width: int) -> Array:
    """Whisper's position table: sines of all frequencies, then cosines."""
    frequency = np.exp(-np.arange(width // 2) * (np.log(10000.0) / (width // 2 - 1)))
    angle = np.arange(length)[:, None] * frequency
    table: Array = np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)
    return table
