"""Configuration of the speech path: talker, flow and vocoder, from the checkpoint's `talker` folder.

The detokenizer's sizes come from the shapes of its tensors; `audio_detokenizer_stream.yaml` says what shapes cannot
(numbers of heads, rates, thresholds), and where it also states a size the two must agree. Only headers are read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ming_trt.checkpoint import TensorInfo
from ming_trt.errors import CheckpointError, ConfigError
from ming_trt.json_section import MOST_LAYERS, Section, read_json
from ming_trt.torch_file import state_dict

FOLDER = "talker"
YAML = "audio_detokenizer_stream.yaml"
FLOW_FILE = "flow_stream.pt"
HIFT_FILE = "hift_v2.pt"

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class TalkerConfig:
    """The speech language model: a Qwen2 decoder over text and audio ids.

    `text_vocab` is also the first audio id; `thinker_hidden` the width of the LLM's rows that it may be given.
    """

    vocab_size: int
    text_vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    eps: float
    theta: float
    tied: bool
    thinker_hidden: int
    speaker_dim: int


@dataclass(frozen=True, slots=True)
class FlowConfig:
    """Flow encoder and estimator. `chunk` frames see each other when streaming; `look_ahead` codes are seen ahead."""

    vocabulary: int
    width: int
    heads: int
    feed_forward: int
    encoder_layers: int
    up_layers: int
    look_ahead: int
    mel: int
    speaker_dim: int
    channels: int
    time_dim: int
    mid_stages: int
    transformers: int
    estimator_heads: int
    estimator_head_dim: int
    estimator_feed_forward: int
    chunk: int
    guidance: float


@dataclass(frozen=True, slots=True)
class HiftConfig:
    """The vocoder. `hop` samples per mel frame at `sample_rate`; `weight_norm` and `prefix` are the file's spelling."""

    mel: int
    base: int
    harmonics: int
    sample_rate: int
    f0_width: int
    up_rates: tuple[int, ...]
    up_kernels: tuple[int, ...]
    resblock_kernels: tuple[int, ...]
    source_kernels: tuple[int, ...]
    dilations: tuple[int, ...]
    n_fft: int
    istft_hop: int
    slope: float
    limit: float
    prefix: str
    weight_norm: str

    @property
    def hop(self) -> int:
        return math.prod(self.up_rates) * self.istft_hop


@dataclass(frozen=True, slots=True)
class SpeechConfig:
    talker: TalkerConfig
    flow: FlowConfig
    hift: HiftConfig


def missing_part(folder: Path) -> str | None:
    """What the checkpoint `folder` lacks of the speech path, as a sentence; None if it has it."""
    for name in ("config.json", YAML, FLOW_FILE, HIFT_FILE, "s3_bpe/tokenizer.json", "s3_bpe/char_mapping.txt"):
        if not (folder / FOLDER / name).is_file():
            return f"the checkpoint has no {FOLDER}/{name}"
    return None


def load_speech_config(folder: Path) -> SpeechConfig:
    """Reads the configuration below the checkpoint `folder`. Raises `CheckpointError` or `ConfigError`."""
    missing = missing_part(folder)
    if missing:
        raise CheckpointError(f"'{folder}' cannot speak: {missing}; download the talker folder")
    settings = _read_yaml(folder / FOLDER / YAML)
    flow = load_flow_config(folder / FOLDER / FLOW_FILE, settings)
    hift = load_hift_config(folder / FOLDER / HIFT_FILE, settings)
    if flow.mel != hift.mel:
        raise CheckpointError(
            f"{FLOW_FILE} makes {flow.mel} mel bins and {HIFT_FILE} takes {hift.mel}: download both again"
        )
    return SpeechConfig(load_talker_config(folder), flow, hift)


def load_talker_config(folder: Path) -> TalkerConfig:
    """From `talker/config.json` and `talker_config` of the root `config.json`, which knows the real vocabulary."""
    root_file, file = folder / "config.json", folder / FOLDER / "config.json"
    root = Section(
        Section(read_json(root_file), "config", root_file).values.get("talker_config"), "talker_config", root_file
    )
    body = Section(read_json(file), "talker/config", file)
    body.refuse("hidden_act", "silu")
    body.refuse("use_sliding_window", False)
    root.refuse("vp_kernel_size", 1)
    root.refuse("vp_stride", 1)
    hidden, heads = body.count("hidden_size"), body.count("num_attention_heads")
    kv_heads = body.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(f"{heads} attention heads in '{file}' cannot share {kv_heads} key/value heads evenly")
    text = root.count("text_vocab_size", 151677)
    vocabulary = root.count("vocab_size", text + root.count("audio_vocab_size", 32768))
    if vocabulary <= text:
        raise ConfigError(
            f"talker_config.vocab_size is {vocabulary} in '{root_file}': it must exceed text_vocab_size {text}"
        )
    return TalkerConfig(
        vocab_size=vocabulary,
        text_vocab=text,
        hidden=hidden,
        layers=body.count("num_hidden_layers", most=MOST_LAYERS),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=body.head_dim(hidden, heads),
        intermediate=body.count("intermediate_size"),
        eps=body.real("rms_norm_eps", 1e-6),
        theta=body.real("rope_theta", 1e6),
        tied=body.flag("tie_word_embeddings", False),
        thinker_hidden=root.count("qa_model_hidden_size", 2048),
        speaker_dim=root.count("vp_feature_size", 192),
    )


def load_flow_config(file: Path, settings: Mapping[str, Any]) -> FlowConfig:
    """From the shapes in `file`; `settings` is the YAML file's content."""
    shapes = _shapes(state_dict(file))
    flow = _section(settings, "flow")
    encoder, decoder = _section(flow, "encoder"), _section(flow, "decoder")
    estimator, cfm = _section(decoder, "estimator"), _section(decoder, "cfm_params")
    cfm = _section(cfm, "content") if "content" in cfm else cfm
    unsupported = [name for name in shapes if name.startswith("decoder.estimator.down_blocks.1.")]
    if unsupported:
        raise CheckpointError(
            f"'{file}' has '{unsupported[0]}', but only an estimator with one down stage is implemented"
        )
    stage = "decoder.estimator.mid_blocks.0.1.0."
    inner = _shape(shapes, f"{stage}attn1.to_q.weight", file)[0]
    heads = _whole(estimator, "num_heads", 8)
    if inner % heads:
        raise CheckpointError(
            f"the estimator's {inner} attention features in '{file}' do not divide into {heads} heads"
        )
    width, mel = _shape(shapes, "encoder_proj.weight", file)[1], _shape(shapes, "encoder_proj.weight", file)[0]
    config = FlowConfig(
        vocabulary=_shape(shapes, "input_embedding.weight", file)[0],
        width=width,
        heads=_shape(shapes, "encoder.encoders.0.self_attn.pos_bias_u", file)[0],
        feed_forward=_shape(shapes, "encoder.encoders.0.feed_forward.w_1.weight", file)[0],
        encoder_layers=_count(shapes, "encoder.encoders."),
        up_layers=_count(shapes, "encoder.up_encoders."),
        look_ahead=_shape(shapes, "encoder.pre_lookahead_layer.conv1.weight", file)[2] - 1,
        mel=mel,
        speaker_dim=_shape(shapes, "spk_embed_affine_layer.weight", file)[1],
        channels=_shape(shapes, "decoder.estimator.final_proj.weight", file)[1],
        time_dim=_shape(shapes, "decoder.estimator.time_mlp.linear_1.weight", file)[0],
        mid_stages=_count(shapes, "decoder.estimator.mid_blocks."),
        transformers=_count(shapes, "decoder.estimator.mid_blocks.0.1."),
        estimator_heads=heads,
        estimator_head_dim=inner // heads,
        estimator_feed_forward=_shape(shapes, f"{stage}ff.net.0.proj.weight", file)[0],
        chunk=_whole(encoder, "static_chunk_size", _whole(settings, "chunk_size", 50)),
        guidance=_real(cfm, "inference_cfg_rate", 0.7),
    )
    _agree(file, "token_mel_ratio", flow.get("token_mel_ratio"), 1)
    _agree(file, "t_scheduler", cfm.get("t_scheduler"), "cosine")
    _agree(file, "width of encoder.up_layer.conv", _shape(shapes, "encoder.up_layer.conv.weight", file)[2], 3)
    for section, key, needed in (
        (settings, "num_decoding_left_chunks", -1),
        (encoder, "normalize_before", True),
        (encoder, "use_cnn_module", False),
        (encoder, "macaron_style", False),
        (encoder, "selfattention_layer_type", "rel_selfattn"),
        (estimator, "act_fn", "gelu"),
        (estimator, "num_decoding_left_chunks", -1),
    ):
        _agree(file, key, section.get(key), needed)
    _agree(file, "vocab_size", flow.get("vocab_size"), config.vocabulary)
    _agree(file, "pre_lookahead_len", flow.get("pre_lookahead_len"), config.look_ahead)
    _agree(file, "encoder.output_size", encoder.get("output_size"), config.width)
    _agree(file, "encoder.attention_heads", encoder.get("attention_heads"), config.heads)
    _agree(file, "encoder.num_blocks", encoder.get("num_blocks"), config.encoder_layers)
    _agree(file, "estimator.channels", estimator.get("channels"), [config.channels])
    _agree(file, "estimator.num_mid_blocks", estimator.get("num_mid_blocks"), config.mid_stages)
    _agree(file, "estimator.n_blocks", estimator.get("n_blocks"), config.transformers)
    _agree(file, "estimator.attention_head_dim", estimator.get("attention_head_dim"), config.estimator_head_dim)
    _agree(file, "estimator.static_chunk_size", estimator.get("static_chunk_size"), config.chunk)
    return config


def load_hift_config(file: Path, settings: Mapping[str, Any]) -> HiftConfig:
    """From the shapes in `file`; `settings` is the YAML file's content."""
    stored = _shapes(state_dict(file))
    prefix = "generator." if any(name.startswith("generator.") for name in stored) else ""
    shapes = {name.removeprefix(prefix): shape for name, shape in stored.items()}
    norm = next(
        (norm for norm in ("parametrizations.weight.original1", "weight_v", "weight") if f"conv_pre.{norm}" in shapes),
        None,
    )
    if norm is None:
        raise CheckpointError(f"'{file}' has no 'conv_pre' in any known spelling of weight norm: download it again")
    hift = _section(settings, "hift")
    istft, f0 = _section(hift, "istft_params"), _section(hift, "f0_predictor")
    pre = _shape(shapes, f"conv_pre.{norm}", file)
    stages = _count(shapes, "ups.")
    rates = _wholes("upsample_rates", hift.get("upsample_rates", [8, 5, 3]))
    _agree(file, "number of upsample_rates", len(rates), stages)
    branches = _count(shapes, "resblocks.") // stages
    dilations = []
    for key, default in (("resblock_dilation_sizes", [[1, 3, 5]] * branches), ("source_resblock_dilation_sizes", [])):
        listed = hift.get(key, default)
        if not isinstance(listed, list):
            raise _malformed(key, listed, "a list of lists")
        dilations += [_wholes(key, each) for each in listed]
    if len(set(dilations)) != 1:
        raise ConfigError(f"the dilations {dilations} of the vocoder differ, but only equal ones are implemented")
    config = HiftConfig(
        mel=pre[1],
        base=pre[0],
        harmonics=_shape(shapes, "m_source.l_linear.weight", file)[1] - 1,
        sample_rate=_whole(settings, "sample_rate", 24000),
        f0_width=_shape(shapes, f"f0_predictor.condnet.0.{norm}", file)[0],
        up_rates=rates,
        up_kernels=tuple(_shape(shapes, f"ups.{i}.{norm}", file)[2] for i in range(stages)),
        resblock_kernels=tuple(_shape(shapes, f"resblocks.{i}.convs1.0.{norm}", file)[2] for i in range(branches)),
        source_kernels=tuple(_shape(shapes, f"source_resblocks.{i}.convs1.0.{norm}", file)[2] for i in range(stages)),
        dilations=dilations[0],
        n_fft=_shape(shapes, f"conv_post.{norm}", file)[0] - 2,
        istft_hop=_whole(istft, "hop_len", 4),
        slope=_real(hift, "lrelu_slope", 0.1),
        limit=_real(hift, "audio_limit", 0.99),
        prefix=prefix,
        weight_norm=norm,
    )
    for i in range(stages):
        stride = math.prod(rates[i + 1 :])
        expected = 1 if stride == 1 else 2 * stride
        _agree(file, f"width of source_downs.{i}", _shape(shapes, f"source_downs.{i}.weight", file)[2], expected)
    _agree(file, "sampling_rate", hift.get("sampling_rate"), config.sample_rate)
    _agree(file, "istft_params.n_fft", istft.get("n_fft"), config.n_fft)
    _agree(file, "nb_harmonics", hift.get("nb_harmonics"), config.harmonics)
    _agree(file, "base_channels", hift.get("base_channels"), config.base)
    _agree(file, "upsample_kernel_sizes", hift.get("upsample_kernel_sizes"), list(config.up_kernels))
    _agree(file, "f0_predictor.cond_channels", f0.get("cond_channels"), config.f0_width)
    for key, number in (("nsf_alpha", 0.1), ("nsf_sigma", 0.003), ("nsf_voiced_threshold", 10)):
        _agree(file, key, hift.get(key), number)
    return config


def _shapes(tensors: Mapping[str, TensorInfo]) -> Shapes:
    return {name: info.shape for name, info in tensors.items()}


def _shape(shapes: Shapes, name: str, file: Path) -> tuple[int, ...]:
    if name not in shapes:
        raise CheckpointError(f"'{file}' has no tensor '{name}': it is not the file of Ming-lite-omni v1.5")
    return shapes[name]


def _count(shapes: Shapes, prefix: str) -> int:
    """How many numbers follow `prefix`, which must be 0, 1, 2, …"""
    found = {int(match[1]) for name in shapes if (match := re.match(re.escape(prefix) + r"(\d+)\.", name))}
    if found != set(range(len(found))) or not found:
        raise CheckpointError(f"tensors '{prefix}N' are numbered {sorted(found)}: download the file again")
    return len(found)


def _agree(file: Path, what: str, stated: Any, found: Any) -> None:
    """Raises if `stated` is given and differs from what the tensors show, or from the one value that is implemented."""
    if stated is not None and stated != found:
        raise CheckpointError(
            f"{what} is {stated!r} beside '{file}', but {found!r} is needed there: take both from one release"
        )


def _malformed(key: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"'{key}' in {YAML} is {value!r}, expected {expected}: use the checkpoint's own file")


def _whole(values: Mapping[str, Any], key: str, default: int) -> int:
    (value,) = _wholes(key, [values.get(key, default)])
    return value


def _wholes(key: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(value) is not int or value < 1 for value in values):
        raise _malformed(key, values, "whole numbers of at least 1")
    return tuple(values)


def _real(values: Mapping[str, Any], key: str, default: float) -> float:
    value = values.get(key, default)
    try:
        return float(value)  # YAML takes 1e-2 for a word
    except (TypeError, ValueError):
        raise _malformed(key, value, "a number") from None


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name, {})
    if not isinstance(section, Mapping):
        raise ConfigError(f"'{name}' in {YAML} is {section!r}, expected a mapping: use the checkpoint's own file")
    return section


def _read_yaml(file: Path) -> Mapping[str, Any]:
    """The file without its construction tags: `!new:CLASS` is its mapping, `!ref <a> * <b>` the product."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        pass

    def plain(loader: Loader, _suffix: str, node: yaml.Node) -> Any:
        if isinstance(node, yaml.MappingNode):
            return loader.construct_mapping(node, deep=True)
        if isinstance(node, yaml.SequenceNode):
            return loader.construct_sequence(node, deep=True)
        return loader.construct_scalar(node) if isinstance(node, yaml.ScalarNode) else None

    Loader.add_multi_constructor("!", plain)
    try:
        content = yaml.load(file.read_text("utf-8"), Loader)  # a SafeLoader that builds mappings only
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"'{file}' cannot be read as YAML ({error}): download it again") from None
    if not isinstance(content, Mapping):
        raise ConfigError(f"'{file}' is not a mapping: download it again")
    resolved: dict[str, Any] = {name: _resolve(value, content, 0) for name, value in content.items()}
    return resolved


def _resolve(value: Any, root: Mapping[str, Any], depth: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _resolve(item, root, depth) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, root, depth) for item in value]
    if not isinstance(value, str) or not re.fullmatch(r"\s*<\w+>(\s*\*\s*<\w+>)*\s*", value) or depth > 8:
        return value
    factors = [_resolve(root.get(name), root, depth + 1) for name in re.findall(r"<(\w+)>", value)]
    if len(factors) == 1:
        return factors[0]
    if not all(isinstance(factor, int | float) for factor in factors):
        raise ConfigError(f"'{value}' in {YAML} does not refer to numbers: use the checkpoint's own file")
    return math.prod(factors)
