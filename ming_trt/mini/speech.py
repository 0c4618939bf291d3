"""The speech part of the small checkpoint: talker, its tokenizer, codec BPE, detokenizer, voices, clip models.

Weights are random, but scaled so that what comes out is sound: a voiced tone that varies with the codes, neither silent
nor clipped, in pieces of a few seconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ming_trt.mini.detokenizer_yaml import detokenizer_yaml
from ming_trt.mini.tensors import Array, generator, random_weight, write_safetensors
from ming_trt.mini.text import TEXT
from ming_trt.processing.talker_prompt import SPECIAL_TOKENS
from ming_trt.speech_config import FLOW_FILE, FOLDER, HIFT_FILE, YAML, FlowConfig, HiftConfig, TalkerConfig

CODES = 256
"""Codec codes, each with a character."""
ENTRIES = 768
"""Entries of the BPE over them."""
BASE_TOKENS = 512
PROMPT_CODES = 130
PROMPTS = {"luna": "你好，很高兴。", "eng": "Good to see you."}
_FIRST_CHARACTER = 0x4E00


def talker_config(text_vocab: int, thinker_hidden: int) -> TalkerConfig:
    """The small talker."""
    return TalkerConfig(
        vocab_size=text_vocab + ENTRIES,
        text_vocab=text_vocab,
        hidden=128,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=64,
        intermediate=256,
        eps=1e-6,
        theta=1e6,
        tied=False,
        thinker_hidden=thinker_hidden,
        speaker_dim=192,
    )


FLOW = FlowConfig(
    vocabulary=CODES,
    width=64,
    heads=4,
    feed_forward=128,
    encoder_layers=2,
    up_layers=2,
    look_ahead=3,
    mel=80,
    speaker_dim=192,
    channels=64,
    time_dim=256,
    mid_stages=2,
    transformers=1,
    estimator_heads=2,
    estimator_head_dim=32,
    estimator_feed_forward=256,
    chunk=50,
    guidance=0.7,
)
HIFT = HiftConfig(
    mel=80,
    base=64,
    harmonics=8,
    sample_rate=24000,
    f0_width=48,
    up_rates=(8, 5, 3),
    up_kernels=(16, 11, 7),
    resblock_kernels=(3, 7, 11),
    source_kernels=(7, 7, 11),
    dilations=(1, 3, 5),
    n_fft=16,
    istft_hop=4,
    slope=0.1,
    limit=0.99,
    prefix="",
    weight_norm="parametrizations.weight.original1",
)


def write(folder: Path, seed: int, config: dict[str, Any]) -> None:
    """Writes `talker/`, adds a shard with the talker's tensors and `talker_config` to the configuration."""
    target = folder / FOLDER
    (target / "s3_bpe").mkdir(parents=True)
    (target / "spks").mkdir()
    text_vocab = _write_tokenizer(target)
    talker = talker_config(text_vocab, int(config["llm_config"]["hidden_size"]))
    rng = generator(seed, "speech")
    _write_codec(target / "s3_bpe", generator(0, "codec"))  # seeds change weights only
    config["talker_config"] = {
        "vocab_size": talker.vocab_size,
        "text_vocab_size": text_vocab,
        "audio_vocab_size": ENTRIES,
        "qa_model_hidden_size": talker.thinker_hidden,
        "vp_feature_size": talker.speaker_dim,
        "vp_kernel_size": 1,
        "vp_stride": 1,
        "model_type": "",
    }
    (target / "config.json").write_text(json.dumps(_body(talker), indent=2) + "\n", "utf-8")
    (target / YAML).write_text(detokenizer_yaml(FLOW, HIFT), "utf-8")
    _add_shard(folder, _talker_weights(talker, text_vocab, rng))
    _save(target / FLOW_FILE, {"model": _flow_weights(rng)})
    _save(target / HIFT_FILE, _hift_weights(rng))
    for name, text in PROMPTS.items():
        _save(target / "spks" / f"{name}.pt", _voice(rng, text))
    _write_clip_models(target, rng)


def _body(c: TalkerConfig) -> dict[str, Any]:
    """`talker/config.json` as officially; its vocabulary is the text's alone, and the root configuration's counts."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": c.hidden,
        "initializer_range": 0.02,
        "intermediate_size": c.intermediate,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "model_type": "qwen2",
        "num_attention_heads": c.heads,
        "num_hidden_layers": c.layers,
        "num_key_value_heads": c.kv_heads,
        "rms_norm_eps": c.eps,
        "rope_theta": c.theta,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": c.text_vocab,
    }


def _write_tokenizer(target: Path) -> int:
    """A byte-level BPE with the talker's special tokens last. Returns the size of the vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_TOKENS,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    tokenizer.save(str(target / "tokenizer.json"))
    (target / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}\n', "utf-8")
    return int(tokenizer.get_vocab_size(with_added_tokens=True))


def _write_codec(folder: Path, rng: np.random.Generator) -> None:
    """`char_mapping.txt` and a BPE learned from codes that repeat as those of speech do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    characters = [chr(_FIRST_CHARACTER + code) for code in range(CODES)]
    (folder / "char_mapping.txt").write_text("".join(f"{i}\t{c}\n" for i, c in enumerate(characters)), "utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=ENTRIES,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        initial_alphabet=characters,
        show_progress=False,
    )
    texts = ["".join(characters[code] for code in _speech_codes(rng, 200)) for _ in range(40)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def _speech_codes(rng: np.random.Generator, count: int) -> list[int]:
    """Codes of which some follow each other often."""
    codes = [int(rng.integers(CODES))]
    while len(codes) < count:
        step = int(rng.choice([0, 1, 7, 40], p=[0.35, 0.3, 0.2, 0.15]))
        codes.append((codes[-1] + step) % CODES if rng.random() < 0.8 else int(rng.integers(CODES)))
    return codes


def _talker_weights(config: TalkerConfig, text_vocab: int, rng: np.random.Generator) -> dict[str, Array]:
    from ming_trt.models.talker import weight_map
    from ming_trt.models.weights import tensor_shapes

    shapes = tensor_shapes(weight_map(config))
    weights = {name: random_weight(rng, name, shapes[name]) for name in sorted(shapes)}
    weights["talker.model.model.embed_tokens.weight"] *= np.float32(3)
    # The end must be likely now and then, but not at once.
    end = text_vocab - len(SPECIAL_TOKENS) + SPECIAL_TOKENS.index("<audio_eos>")
    weights["talker.model.lm_head.weight"][end] *= np.float32(2)
    return weights


def _flow_weights(rng: np.random.Generator) -> dict[str, Array]:
    from ming_trt.models.detokenizer_weights import encoder_weights, estimator_weights
    from ming_trt.models.weights import tensor_shapes

    shapes = tensor_shapes({**encoder_weights(FLOW), **estimator_weights(FLOW)})
    start = f"{FOLDER}/{FLOW_FILE}/"
    return {name.removeprefix(start): random_weight(rng, name, shapes[name]) for name in sorted(shapes)}


def _hift_weights(rng: np.random.Generator) -> dict[str, Array]:
    """In the file's spelling: direction and length of every normalised weight."""
    from ming_trt.models.detokenizer_weights import f0_weights, vocoder_weights
    from ming_trt.models.weights import tensor_shapes

    shapes = tensor_shapes(vocoder_weights(HIFT)) | tensor_shapes(f0_weights(HIFT))
    start = f"{FOLDER}/{HIFT_FILE}/"
    weights = {name.removeprefix(start): random_weight(rng, name, shapes[name]) for name in sorted(shapes)}
    for name, values in weights.items():
        if name.endswith(".original0"):
            direction = weights[name.replace("original0", "original1")]
            values[:] = np.sqrt(np.square(direction).sum(axis=tuple(range(1, direction.ndim)), keepdims=True))
    weights["f0_predictor.classifier.weight"] *= np.float32(30)
    weights["f0_predictor.classifier.bias"][:] = 170.0
    # exp of this is the spectrum's magnitude
    weights["conv_post.parametrizations.weight.original0"] *= np.float32(0.3)
    weights["conv_post.bias"][: HIFT.n_fft // 2 + 1] = -1.6
    return weights


def _voice(rng: np.random.Generator, text: str) -> dict[str, Any]:
    codes = np.array([_speech_codes(rng, PROMPT_CODES)], np.int32)
    speaker = rng.standard_normal((1, FLOW.speaker_dim), np.float32)
    mel = rng.normal(-4.0, 2.0, (1, PROMPT_CODES, FLOW.mel)).astype(np.float32)
    length = np.array([PROMPT_CODES], np.int32)
    return {
        "prompt_text": text,
        "prompt_speech_token": codes,
        "prompt_speech_token_len": length,
        "flow_prompt_speech_token": codes,
        "flow_prompt_speech_token_len": length,
        "prompt_speech_feat": mel,
        "prompt_speech_feat_len": length,
        "vp_emb": speaker,
        "flow_embedding": speaker,
    }


def _save(file: Path, content: dict[str, Any]) -> None:
    """`torch.save` of arrays as tensors."""
    import torch

    def tensors(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: tensors(item) for name, item in value.items()}
        return torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value

    torch.save(tensors(content), file)


def _add_shard(folder: Path, tensors: dict[str, Array]) -> None:
    """Puts `tensors` into one more shard beside those that are there."""
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text("utf-8"))
    old = sorted(set(index["weight_map"].values()))
    total = len(old) + 1
    names = {file: f"model-{number:05d}-of-{total:05d}.safetensors" for number, file in enumerate(old, 1)}
    for file, name in names.items():
        (folder / file).rename(folder / name)
    last = f"model-{total:05d}-of-{total:05d}.safetensors"
    written = write_safetensors(folder / last, tensors)
    index["weight_map"] = {tensor: names[file] for tensor, file in index["weight_map"].items()}
    index["weight_map"] = dict(sorted({**index["weight_map"], **dict.fromkeys(tensors, last)}.items()))
    index["metadata"]["total_size"] += written
    index_file.write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _write_clip_models(target: Path, rng: np.random.Generator) -> None:
    """Stand-ins of the speaker model (fbank [1, T, 80] to [1, 192]) and the codec (log mel [1, 128, T] to codes)."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def model(name: str, nodes: list[Any], inputs: list[Any], output: Any, constants: dict[str, Any]) -> None:
        graph = helper.make_graph(
            nodes, name, inputs, [output], [numpy_helper.from_array(v, k) for k, v in constants.items()]
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(made, str(target / f"{name}.onnx"))

    floats, ints = TensorProto.FLOAT, TensorProto.INT32
    model(
        "campplus",
        [
            helper.make_node("ReduceMax", ["input"], ["most"], axes=[1], keepdims=0),
            helper.make_node("MatMul", ["most", "weight"], ["output"]),
        ],
        [helper.make_tensor_value_info("input", floats, [1, "T", 80])],
        helper.make_tensor_value_info("output", floats, [1, FLOW.speaker_dim]),
        {"weight": 0.2 * rng.standard_normal((80, FLOW.speaker_dim), np.float32)},
    )
    model(
        "speech_tokenizer_v1",
        [
            helper.make_node("AveragePool", ["feats"], ["halved"], kernel_shape=[2], strides=[2]),
            helper.make_node("Transpose", ["halved"], ["frames"], perm=[0, 2, 1]),
            helper.make_node("MatMul", ["frames", "weight"], ["scores"]),
            helper.make_node("ArgMax", ["scores"], ["best"], axis=2, keepdims=0),
            helper.make_node("Cast", ["best"], ["all"], to=ints),
            helper.make_node("Squeeze", ["all", "first"], ["codes"]),
        ],
        [
            helper.make_tensor_value_info("feats", floats, [1, 128, "T"]),
            helper.make_tensor_value_info("feats_length", ints, [1]),
        ],
        helper.make_tensor_value_info("codes", ints, ["N"]),
        {"weight": rng.standard_normal((128, CODES), np.float32), "first": np.array([0], np.int64)},
    )
