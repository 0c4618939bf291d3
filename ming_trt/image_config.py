"""Configuration of the picture path: connector, condition MLP, denoiser, autoencoder and schedule.

Each official folder (`connector/`, `transformer/`, `vae/`, `scheduler/`) brings its own configuration file; the width
of the condition MLP, and whether the position tables were saved, are known from the tensors' headers only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ming_trt.checkpoint import Checkpoint
from ming_trt.config import MingConfig
from ming_trt.errors import ConfigError
from ming_trt.json_section import MOST_LAYERS, Section, read_json
from ming_trt.processing.image_size import BUCKETS

MLP_WIDTH = "mlp.fc1.weight"
TABLES = ("pos_embed.pos_embed", "ref_pos_embed.pos_embed")


@dataclass(frozen=True, slots=True)
class ConnectorConfig:
    """The bidirectional Qwen2 stack and its projections from and to the LLM's hidden size."""

    llm_hidden: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    eps: float


@dataclass(frozen=True, slots=True)
class ConditionConfig:
    """LLM hidden size -> `mlp_hidden` -> `joint_dim` -> denoiser width, and the pooled vector's width."""

    llm_hidden: int
    mlp_hidden: int
    joint_dim: int
    pooled_dim: int
    dit_hidden: int


@dataclass(frozen=True, slots=True)
class DiTConfig:
    """The denoiser. `table_full_side` is the side of the checkpoint's position table, in tokens; engines hold its
    central `table_side`. `sample_size` is the latent side that the table's coordinates refer to."""

    channels: int
    patch: int
    hidden: int
    heads: int
    head_dim: int
    layers: int
    dual_layers: tuple[int, ...]
    refiners: int
    qk_norm: bool
    sample_size: int
    table_full_side: int
    table_side: int
    stored_tables: bool


@dataclass(frozen=True, slots=True)
class VAEConfig:
    """The autoencoder; `widths` from the picture inwards. The denoiser's latents are `(mode - shift) * scale`."""

    picture_channels: int
    latent_channels: int
    widths: tuple[int, ...]
    layers: int
    groups: int
    mid_attention: bool
    quant_conv: bool
    post_quant_conv: bool
    scale: float
    shift: float

    @property
    def factor(self) -> int:
        """Pixels per latent position (official: 8)."""
        return 1 << (len(self.widths) - 1)


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """The flow-match Euler schedule."""

    shift: float
    train_steps: int


def connector_config(config: MingConfig) -> ConnectorConfig:
    """From `connector/config.json`. Raises `ConfigError` for what is missing or not implemented."""
    section = _section(config, "connector/config.json", "connector")
    for key, supported in (("model_type", "qwen2"), ("hidden_act", "silu"), ("use_sliding_window", False)):
        section.refuse(key, supported)
    if section.values.get("rope_scaling") is not None:
        raise ConfigError(f"'connector.rope_scaling' in '{section.file}' is set, but only plain rotary embedding works")
    hidden, heads = section.count("hidden_size"), section.count("num_attention_heads")
    kv_heads = section.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(f"{heads} attention heads in '{section.file}' cannot share {kv_heads} key/value heads evenly")
    return ConnectorConfig(
        llm_hidden=config.llm.hidden_size,
        hidden=hidden,
        intermediate=section.count("intermediate_size"),
        layers=section.count("num_hidden_layers", most=MOST_LAYERS),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=section.head_dim(hidden, heads),
        rope_theta=section.real("rope_theta", 1e6),
        eps=section.real("rms_norm_eps", 1e-6),
    )


def condition_config(config: MingConfig, mlp_hidden: int | None = None) -> ConditionConfig:
    """From `transformer/config.json` and the header of `mlp/`, unless `mlp_hidden` is given (for a checkpoint that is
    being written). Raises `ConfigError`, `CheckpointError`."""
    section = _section(config, "transformer/config.json", "transformer")
    joint, pooled = section.count("joint_attention_dim"), section.count("pooled_projection_dim")
    if joint % pooled:
        raise ConfigError(f"{joint} condition channels in '{section.file}' cannot be pooled to {pooled} evenly")
    if mlp_hidden is None:
        shape = Checkpoint(config.folder, "mlp").info(MLP_WIDTH).shape
        if len(shape) != 2:
            raise ConfigError(f"'{MLP_WIDTH}' in '{config.folder / 'mlp'}' has shape {list(shape)}: expected a matrix")
        mlp_hidden = shape[0]
    return ConditionConfig(config.llm.hidden_size, mlp_hidden, joint, pooled, _dit_hidden(section))


def _dit_hidden(section: Section) -> int:
    heads, head_dim = section.count("num_attention_heads"), section.count("attention_head_dim")
    hidden = section.count("caption_projection_dim", heads * head_dim)
    if hidden != heads * head_dim:
        raise ConfigError(f"'caption_projection_dim' {hidden} in '{section.file}' must be {heads} heads x {head_dim}")
    return hidden


def dit_config(config: MingConfig, stored_tables: bool | None = None) -> DiTConfig:
    """From `transformer/config.json` and the headers of `transformer/`, unless `stored_tables` is given (for a
    checkpoint that is being written). Raises `ConfigError`, `CheckpointError`."""
    section = _section(config, "transformer/config.json", "transformer")
    section.refuse("vae_ref_channel_cat", False)
    section.refuse("patch_size", 2)
    channels, layers = section.count("in_channels"), section.count("num_layers", most=MOST_LAYERS)
    section.refuse("out_channels", channels)
    norm = section.values.get("qk_norm")
    if norm not in (None, "rms_norm"):
        raise ConfigError(f"'transformer.qk_norm' is {norm!r} in '{section.file}': expected 'rms_norm' or null")
    dual = section.values.get("dual_attention_layers") or []
    if not isinstance(dual, list) or any(type(i) is not int or not 0 <= i < layers for i in dual):
        raise ConfigError(
            f"'transformer.dual_attention_layers' in '{section.file}' is {dual!r}: expected layer numbers"
        )
    table = section.count("pos_embed_max_size")
    patch = section.count("patch_size")
    hidden = _dit_hidden(section)
    if hidden % 4:
        raise ConfigError(f"denoiser width {hidden} in '{section.file}': expected a multiple of 4")
    if stored_tables is None:
        tensors = Checkpoint(config.folder, "transformer")
        stored_tables = all(name in tensors for name in TABLES)
    reach = max(max(height, width) for _, height, width in BUCKETS) // vae_config(config).factor // patch
    return DiTConfig(
        channels=channels,
        patch=patch,
        hidden=hidden,
        heads=section.count("num_attention_heads"),
        head_dim=section.count("attention_head_dim"),
        layers=layers,
        dual_layers=tuple(dual),
        refiners=section.count("num_refiner_layers", 2, MOST_LAYERS),
        qk_norm=norm is not None,
        sample_size=section.count("sample_size"),
        table_full_side=table,
        # of the table's parity, so that a crop of the centre has the same centre
        table_side=min(table, reach + (table - reach) % 2),
        stored_tables=stored_tables,
    )


def vae_config(config: MingConfig) -> VAEConfig:
    """From `vae/config.json`. Raises `ConfigError` for what is missing or not implemented."""
    section = _section(config, "vae/config.json", "vae")
    section.refuse("act_fn", "silu")
    for key in ("latents_mean", "latents_std"):
        if section.values.get(key) is not None:
            raise ConfigError(f"'vae.{key}' in '{section.file}' is set, but only a scale and a shift are implemented")
    widths = section.values.get("block_out_channels")
    if not isinstance(widths, list) or not widths or any(type(width) is not int or width < 1 for width in widths):
        raise ConfigError(f"'vae.block_out_channels' in '{section.file}' is {widths!r}: expected a list of widths")
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        section.refuse(key, [kind] * len(widths))
    groups = section.count("norm_num_groups", 32)
    odd = next((width for width in widths if width % groups), None)
    if odd is not None:
        raise ConfigError(f"a width of {odd} channels in '{section.file}' does not divide into {groups} norm groups")
    return VAEConfig(
        picture_channels=section.count("in_channels", 3),
        latent_channels=section.count("latent_channels"),
        widths=tuple(widths),
        layers=section.count("layers_per_block", 1, MOST_LAYERS),
        groups=groups,
        mid_attention=section.flag("mid_block_add_attention", True),
        quant_conv=section.flag("use_quant_conv", True),
        post_quant_conv=section.flag("use_post_quant_conv", True),
        scale=section.real("scaling_factor", 0.18215),
        shift=section.real("shift_factor", 0.0, above=-math.inf),
    )


def schedule_config(config: MingConfig) -> ScheduleConfig:
    """From `scheduler/scheduler_config.json`. Raises `ConfigError` for another class or an option not implemented."""
    section = _section(config, "scheduler/scheduler_config.json", "scheduler")
    section.refuse("_class_name", "FlowMatchEulerDiscreteScheduler")
    switches = ("dynamic_shifting", "karras_sigmas", "exponential_sigmas", "beta_sigmas")
    for key in (*(f"use_{name}" for name in switches), "invert_sigmas", "stochastic_sampling"):
        section.refuse(key, False)
    if section.values.get("shift_terminal") is not None:
        raise ConfigError(f"'scheduler.shift_terminal' in '{section.file}' is set, which is not implemented")
    return ScheduleConfig(section.real("shift", 1.0), section.count("num_train_timesteps", 1000))


def _section(config: MingConfig, file: str, name: str) -> Section:
    path = config.folder / file
    return Section(read_json(path), name, path)
