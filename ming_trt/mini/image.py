"""The picture part of the small checkpoint: query tokens, condition MLP, connector, denoiser, autoencoder, schedule."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ming_trt.config import load_config
from ming_trt.image_config import TABLES, condition_config, connector_config, dit_config, vae_config
from ming_trt.mini.tensors import Array, generator, random_weight, write_safetensors, write_shards

MLP_HIDDEN = 192
VOCABULARY = 64
STEM = "diffusion_pytorch_model"

_CONNECTOR = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 32768,
    "max_window_layers": 2,
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}
_TRANSFORMER = {
    "_class_name": "SD3Transformer2DModel",
    "_diffusers_version": "0.33.0",
    "attention_head_dim": 16,
    "caption_projection_dim": 64,
    "dual_attention_layers": [0, 1],
    "in_channels": 16,
    "joint_attention_dim": 256,
    "num_attention_heads": 4,
    "num_layers": 3,
    "num_refiner_layers": 2,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 128,
    # wider than the size buckets reach, as officially, so that builds cut it
    "pos_embed_max_size": 72,
    "qk_norm": "rms_norm",
    "sample_size": 128,
    "vae_ref_channel_cat": False,
}
_VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.33.0",
    "act_fn": "silu",
    "block_out_channels": [8, 16, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_size": 64,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.33.0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": False,
}
_FILES: Mapping[str, Mapping[str, Any]] = {
    "connector/config.json": _CONNECTOR,
    "transformer/config.json": _TRANSFORMER,
    "vae/config.json": _VAE,
    "scheduler/scheduler_config.json": _SCHEDULER,
}


def write(folder: Path, seed: int, config: dict[str, Any]) -> None:
    """Writes the folders `mlp`, `connector`, `transformer`, `vae` and `scheduler`; the root configuration stays."""
    for file, values in _FILES.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    (folder / "mlp").mkdir(exist_ok=True)
    tensors = _weights(folder, seed)
    write_safetensors(folder / "mlp" / "model.safetensors", tensors["mlp"])
    write_shards(folder / "connector", tensors["connector"], 2)
    write_shards(folder / "transformer", tensors["transformer"], 2, STEM)
    write_safetensors(folder / "vae" / f"{STEM}.safetensors", tensors["vae"])


def _weights(folder: Path, seed: int) -> dict[str, dict[str, Array]]:
    """Folder -> tensor name -> values."""
    from ming_trt.models import condition, connector, dit, vae
    from ming_trt.models.weights import tensor_shapes

    config = load_config(folder)
    links, told = connector_config(config), condition_config(config, MLP_HIDDEN)
    denoiser, coder = dit_config(config, stored_tables=True), vae_config(config)
    sources = [
        connector.weight_map(links),
        {"query_tokens": connector.query_tokens(links.llm_hidden)},
        condition.weight_map(told),
        {name: source for name, source in dit.weight_map(denoiser).items() if name not in TABLES},
        vae.weight_map(vae.VAEEncoder, coder),
        vae.weight_map(vae.VAEDecoder, coder),
    ]
    shapes = {name: shape for part in sources for name, shape in tensor_shapes(part).items()}
    # in the official file, unused
    shapes["connector/model.embed_tokens.weight"] = (VOCABULARY, links.hidden)
    rng = generator(seed, "image")
    tensors: dict[str, dict[str, Array]] = {"mlp": {}, "connector": {}, "transformer": {}, "vae": {}}
    for name in sorted(shapes):
        part, _, rest = name.partition("/")
        tensors[part][rest] = random_weight(rng, rest, shapes[name])
    table = dit.position_table(replace(denoiser, table_side=denoiser.table_full_side)).numpy()
    tensors["transformer"] |= dict.fromkeys(TABLES, table)
    return tensors
