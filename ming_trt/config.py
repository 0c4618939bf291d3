"""The model's configuration, read from the official `config.json` and checked.

`load_config` keeps what the engines need, under the field's usual names, and refuses settings that the project does not
implement. `MingConfig.raw` is the whole file for everything else (talker, bookkeeping).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ming_trt.errors import ConfigError
from ming_trt.json_section import MOST_LAYERS, Section, read_json

ROPE_3D = "3D"
ROPE_VIDEO = "video_rope"
ROPE_KINDS = (ROPE_3D, ROPE_VIDEO)

# Ids of the official vocabulary follow each other in this order from `<imagePatch>` on, so where a configuration names
# only some of them the others are known by their distance.
_AFTER_IMAGE_PATCH = {
    "image_start": 1,
    "image_end": 2,
    "video_start": 3,
    "video_end": 4,
    "audio_patch": 11,
    "audio_start": 12,
    "audio_end": 13,
}
_TOKEN_TEXT = {
    "image_patch": "<imagePatch>",
    "image_start": "<image>",
    "image_end": "</image>",
    "video_start": "<video>",
    "video_end": "</video>",
    "audio_patch": "<audioPatch>",
    "audio_start": "<audio>",
    "audio_end": "</audio>",
}
_OFFICIAL_WHISPER = {"n_mels": 128, "n_ctx": 15000, "n_state": 1280, "n_head": 20, "n_layer": 32}


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Ids of the tokens that the model treats specially. Images and videos share `image_patch`."""

    eos: int
    pad: int
    image_patch: int
    image_start: int
    image_end: int
    video_start: int
    video_end: int
    audio_patch: int
    audio_start: int
    audio_end: int


@dataclass(frozen=True, slots=True)
class LLMConfig:
    """The MoE decoder ("thinker"). Sizes are counts of features, heads, layers or experts; every layer is MoE.

    `shared_width` is the width of the one shared-expert MLP; `rope_sections` are the numbers of frequencies that read
    the time, height and width axis (sum = head_dim / 2); `multi_gate` says whether images and audio have own routers.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    expert_width: int
    shared_width: int
    norm_eps: float
    rope_theta: float
    rope_kind: str
    rope_sections: tuple[int, int, int]
    max_positions: int
    normalize_top_k: bool
    multi_gate: bool
    tie_embeddings: bool

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The vision tower and its projector. `window_size` is in pixels; `full_attention` lists layer numbers."""

    num_layers: int
    hidden_size: int
    num_heads: int
    mlp_width: int
    in_channels: int
    patch_size: int
    temporal_patch: int
    merge_size: int
    window_size: int
    full_attention: tuple[int, ...]
    out_size: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_width(self) -> int:
        """Numbers in one flattened patch (official: 3·2·14·14 = 1176)."""
        return self.in_channels * self.temporal_patch * self.patch_size**2

    @property
    def window_cells(self) -> int:
        """Side of an attention window in merge cells (official: 4)."""
        return self.window_size // self.patch_size // self.merge_size

    @property
    def window_patches(self) -> int:
        """Patches in a whole window (official: 64)."""
        return (self.window_cells * self.merge_size) ** 2


@dataclass(frozen=True, slots=True)
class AudioConfig:
    """The Whisper-shaped audio tower and its projector. `max_positions` is the length of the position table (frames
    after the stride-2 convolution), so a clip may have `2 * max_positions` mel frames."""

    num_mels: int
    max_positions: int
    hidden_size: int
    num_heads: int
    num_layers: int
    normalize_rows: bool

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def max_frames(self) -> int:
        """Longest clip in mel frames (100 a second)."""
        return 2 * self.max_positions


@dataclass(frozen=True, slots=True)
class MingConfig:
    """Everything that the understanding path needs to know of a checkpoint, the raw file, and the folder it came from
    (generation components read their own configuration files there)."""

    llm: LLMConfig
    vision: VisionConfig
    audio: AudioConfig
    tokens: TokenIds
    raw: Mapping[str, Any] = field(repr=False, compare=False, default_factory=dict)
    folder: Path = field(compare=False, default=Path())


def load_config(folder: Path) -> MingConfig:
    """Reads `folder/config.json`; `folder` is a checkpoint (or anything else that holds its configuration files).

    Ids of special tokens come from `llm_config`, else from the tokenizer files beside it, else from their distance to
    `<imagePatch>` in the official vocabulary. Raises `ConfigError` for a missing, malformed or unsupported setting.
    """
    folder = Path(folder)
    file = folder / "config.json"
    root = Section(read_json(file), "config", file)
    root.refuse("mlp_depth", 2)
    return MingConfig(
        llm=_llm(Section(root.values.get("llm_config"), "llm_config", file)),
        vision=_vision(Section(root.values.get("vision_config"), "vision_config", file)),
        audio=_audio(root),
        tokens=_tokens(Section(root.values.get("llm_config"), "llm_config", file), folder),
        raw=root.values,
        folder=folder,
    )


def _llm(section: Section) -> LLMConfig:
    for key, supported in (
        ("hidden_act", "silu"),
        ("first_k_dense_replace", 0),
        ("use_bias", False),
        ("use_qkv_bias", False),
        ("norm_head", False),
        ("norm_softmax", False),
        ("use_sliding_window", False),
    ):
        section.refuse(key, supported)
    hidden, heads = section.count("hidden_size"), section.count("num_attention_heads")
    kv_heads = section.count("num_key_value_heads", heads)
    head_dim = section.count("head_dim", hidden // heads)
    if heads % kv_heads:
        raise ConfigError(f"{heads} attention heads in '{section.file}' cannot share {kv_heads} key/value heads evenly")
    experts, top_k = section.count("num_experts", most=MOST_LAYERS), section.count("num_experts_per_tok")
    if top_k > experts:
        raise ConfigError(f"llm_config chooses {top_k} of {experts} experts in '{section.file}': at most {experts}")
    width = section.count("moe_intermediate_size")
    kind, sections = _rope(section, head_dim)
    return LLMConfig(
        vocab_size=section.count("vocab_size"),
        hidden_size=hidden,
        num_layers=section.count("num_hidden_layers", most=MOST_LAYERS),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        num_experts=experts,
        top_k=top_k,
        expert_width=width,
        shared_width=width * section.count("num_shared_experts"),
        norm_eps=section.real("rms_norm_eps", 1e-5),
        rope_theta=section.real("rope_theta", 600000.0),
        rope_kind=kind,
        rope_sections=sections,
        max_positions=section.count("max_position_embeddings", 32768),
        normalize_top_k=section.flag("norm_topk_prob", True),
        multi_gate=section.flag("multi_gate", True),
        tie_embeddings=section.flag("tie_word_embeddings", False),
    )


def _rope(section: Section, head_dim: int) -> tuple[str, tuple[int, int, int]]:
    """Kind and sections. The sections are not a setting officially: a quarter of the frequencies is time, the rest is
    halved (16, 24, 24 for the official 64)."""
    scaling = section.values.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise ConfigError(
            f"'llm_config.rope_scaling' in '{section.file}' is {scaling!r}, expected an object with 'type'"
        )
    kind = scaling.get("type") or scaling.get("rope_type") or ROPE_3D
    if kind not in ROPE_KINDS:
        raise ConfigError(
            f"'llm_config.rope_scaling.type' is {kind!r} in '{section.file}': expected '3D' or 'video_rope'"
        )
    if head_dim % 16:
        raise ConfigError(f"'llm_config.head_dim' is {head_dim} in '{section.file}': expected a multiple of 16")
    quarter = head_dim // 8
    space = (head_dim // 2 - quarter) // 2
    return kind, (quarter, space, space)


def _vision(section: Section) -> VisionConfig:
    section.refuse("hidden_act", "silu")
    hidden, heads = section.count("hidden_size"), section.count("num_heads")
    if hidden % heads or hidden // heads % 4:
        raise ConfigError(
            f"vision hidden size {hidden} in '{section.file}' over {heads} heads must be a multiple of 4 per head"
        )
    depth = section.count("depth", most=MOST_LAYERS)
    full = section.values.get("fullatt_block_indexes")
    if not isinstance(full, list) or any(type(i) is not int or not 0 <= i < depth for i in full):
        raise ConfigError(
            f"'vision_config.fullatt_block_indexes' in '{section.file}' is {full!r}: expected layer numbers"
        )
    config = VisionConfig(
        num_layers=depth,
        hidden_size=hidden,
        num_heads=heads,
        mlp_width=section.count("intermediate_size"),
        in_channels=section.count("in_channels", 3),
        patch_size=section.count("patch_size", 14),
        temporal_patch=section.count("temporal_patch_size", 2),
        merge_size=section.count("spatial_merge_size", 2),
        window_size=section.count("window_size", 112),
        full_attention=tuple(full),
        out_size=section.count("out_hidden_size"),
    )
    if config.window_cells < 1:
        raise ConfigError(f"'vision_config.window_size' is {config.window_size} pixels: less than one merge cell")
    return config


def _audio(root: Section) -> AudioConfig:
    """The tower's settings stand in `audio_config` or, in some releases of the file, only in `whisper_config`."""
    candidates = [root.values.get(name) for name in ("audio_config", "whisper_config")]
    homes: list[Mapping[str, Any]] = [home for home in candidates if isinstance(home, Mapping)]
    whisper = next((h["whisper_encoder_config"] for h in homes if h.get("whisper_encoder_config")), _OFFICIAL_WHISPER)
    section = Section(whisper, "whisper_encoder_config", root.file)
    # The conversion of mel frames to tokens (two halvings) is fixed in the processor, so the projector must agree.
    # `whisper_config` decides: `audio_config.ds_stride` belonged to an older feature extractor in some releases.
    for home in reversed(homes):
        projector = Section(home, "audio_config", root.file)
        if "ds_stride" in home or "ds_kernel_size" in home:
            projector.refuse("ds_stride", 2)
            projector.refuse("ds_kernel_size", 3)
            break
    audio = root.values.get("audio_config")
    normalize = Section(audio if isinstance(audio, Mapping) else {}, "audio_config", root.file).flag(
        "norm_query_embeds", True
    )
    state, heads = section.count("n_state"), section.count("n_head")
    if state % heads:
        raise ConfigError(f"audio state size {state} in '{root.file}' does not divide into {heads} heads")
    return AudioConfig(
        num_mels=section.count("n_mels", 128),
        max_positions=section.count("n_ctx"),
        hidden_size=state,
        num_heads=heads,
        num_layers=section.count("n_layer", most=MOST_LAYERS),
        normalize_rows=normalize,
    )


def _tokens(section: Section, folder: Path) -> TokenIds:
    vocabulary = section.count("vocab_size")
    known = _added_tokens(folder)

    def configured(name: str) -> int | None:
        value = section.values.get(f"{name}_token")
        return value if type(value) is int else known.get(_TOKEN_TEXT[name])

    patch = configured("image_patch")
    if patch is None:
        raise ConfigError(
            f"'llm_config.image_patch_token' is missing in '{section.file}' and no tokenizer file names <imagePatch>: "
            "use the checkpoint's own config.json"
        )
    ids = {"image_patch": patch}
    for name, distance in _AFTER_IMAGE_PATCH.items():
        value = configured(name)
        ids[name] = patch + distance if value is None else value
    eos = section.count("eos_token_id")
    pad = section.values.get("pad_token_id")
    ids |= {"eos": eos, "pad": pad if type(pad) is int else eos}
    for name, value in ids.items():
        if not 0 <= value < vocabulary:
            raise ConfigError(
                f"the id of the {name} token is {value} in '{section.file}': the vocabulary has {vocabulary}"
            )
    return TokenIds(**ids)


def _added_tokens(folder: Path) -> dict[str, int]:
    """Text -> id of the added tokens; `tokenizer.json` counts more than `tokenizer_config.json`, and that more than
    `added_tokens.json`. Empty where there is none of them."""
    found: dict[str, int] = {}
    for name, key in (
        ("added_tokens.json", None),
        ("tokenizer_config.json", "added_tokens_decoder"),
        ("tokenizer.json", "added_tokens"),
    ):
        file = folder / name
        if not file.exists():
            continue
        values = read_json(file)
        try:
            if key is None:
                found |= {str(text): int(number) for text, number in values.items()}
                continue
            added = values.get(key) or {}
            numbered = added.items() if isinstance(added, Mapping) else [(token["id"], token) for token in added]
            found |= {str(token["content"]): int(number) for number, token in numbered}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"'{key}' in '{file}'" if key else f"'{file}'"
            raise ConfigError(f"{what} is malformed ({error!r}): download the file again") from None
    return found
