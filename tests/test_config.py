"""Reading `config.json`: official keys, where settings may hide, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ming_trt.config import AudioConfig, MingConfig, load_config
from ming_trt.errors import ConfigError

SOURCE = Path(__file__).parent / "data" / "golden" / "understanding" / "checkpoint" / "config.json"
Change = Callable[[dict[str, Any]], Any]


def loaded(folder: Path, change: Change = lambda _: None) -> MingConfig:
    values = json.loads(SOURCE.read_text("utf-8"))
    change(values)
    (folder / "config.json").write_text(json.dumps(values))
    return load_config(folder)


def put(section: str, key: str, value: Any) -> Change:
    return lambda values: values[section].__setitem__(key, value)


def test_sizes(tmp_path: Path) -> None:
    config = loaded(tmp_path)
    assert (config.llm.hidden_size, config.llm.query_width, config.llm.kv_width) == (256, 512, 256)
    assert (config.llm.shared_width, config.llm.rope_sections) == (64, (16, 24, 24))
    assert (config.vision.patch_width, config.vision.window_cells, config.vision.window_patches) == (1176, 4, 64)
    assert (config.audio.max_positions, config.audio.max_frames) == (160, 320)
    assert config.raw["talker_config"]["vocab_size"] == 184445
    assert config.folder == tmp_path


def test_token_ids_by_distance(tmp_path: Path) -> None:
    """The file names three of them; the others follow `<imagePatch>` as in the official vocabulary."""
    tokens = loaded(tmp_path).tokens
    assert (tokens.image_patch, tokens.image_end, tokens.video_end) == (266, 268, 270)
    assert (tokens.audio_patch, tokens.audio_start, tokens.audio_end) == (277, 278, 279)
    assert tokens.eos == tokens.pad == 257


def test_token_ids_from_tokenizer_and_configuration(tmp_path: Path) -> None:
    added = [{"id": 300, "content": "<audioPatch>"}, {"id": 301, "content": "<audio>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    tokens = loaded(tmp_path, put("llm_config", "audio_start_token", 302)).tokens
    assert (tokens.audio_patch, tokens.audio_start, tokens.audio_end) == (300, 302, 279)


def test_token_ids_from_the_list_of_older_files(tmp_path: Path) -> None:
    """`vocab.json` and `merges.txt` come with this one."""
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<audioPatch>": 311, "<audio>": 312}))
    tokens = loaded(tmp_path).tokens
    assert (tokens.audio_patch, tokens.audio_start, tokens.audio_end) == (311, 312, 279)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"310": {"content": "<audioPatch>"}}})
    )
    tokens = loaded(tmp_path).tokens
    assert (tokens.audio_patch, tokens.audio_start) == (310, 312)


def test_token_ids_from_tokenizer_config(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"310": {"content": "<audioPatch>"}}})
    )
    assert loaded(tmp_path).tokens.audio_patch == 310


def test_audio_settings_hidden_in_whisper_config(tmp_path: Path) -> None:
    """An official release of the file has them only there, beside an older extractor's stride."""

    def change(values: dict[str, Any]) -> None:
        del values["audio_config"]["whisper_encoder_config"]
        values["audio_config"]["ds_stride"] = 1
        values["whisper_config"]["whisper_encoder_config"]["n_layer"] = 7

    assert loaded(tmp_path, change).audio.num_layers == 7


def test_audio_settings_absent_are_the_official_ones(tmp_path: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        del values["audio_config"]["whisper_encoder_config"], values["whisper_config"]

    assert loaded(tmp_path, change).audio == AudioConfig(128, 15000, 1280, 20, 32, True)


@pytest.mark.parametrize(("scaling", "kind"), [(None, "3D"), ({}, "3D"), ({"type": "video_rope"}, "video_rope")])
def test_rope_kind(tmp_path: Path, scaling: Any, kind: str) -> None:
    assert loaded(tmp_path, put("llm_config", "rope_scaling", scaling)).llm.rope_kind == kind


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("llm_config", "rope_scaling", {"type": "yarn"}), "'yarn'"),
        (put("llm_config", "norm_head", True), "norm_head"),
        (put("llm_config", "use_bias", True), "use_bias"),
        (put("llm_config", "use_qkv_bias", True), "use_qkv_bias"),
        (put("llm_config", "first_k_dense_replace", 1), "first_k_dense_replace"),
        (put("llm_config", "use_sliding_window", True), "use_sliding_window"),
        (put("llm_config", "hidden_act", "gelu"), "'gelu'"),
        (put("llm_config", "hidden_size", None), "llm_config.hidden_size"),
        (put("llm_config", "hidden_size", "256"), "expected a whole number"),
        (put("llm_config", "num_hidden_layers", 0), "at least 1"),
        (put("llm_config", "num_hidden_layers", 10**9), "at most 4096"),
        (put("llm_config", "hidden_size", 10**12), "at most 2147483647"),
        (put("llm_config", "num_experts_per_tok", 9), "9 of 8 experts"),
        (put("llm_config", "num_key_value_heads", 3), "key/value heads"),
        (put("llm_config", "head_dim", 40), "multiple of 16"),
        (put("llm_config", "rms_norm_eps", 0.0), "more than 0"),
        (put("llm_config", "image_patch_token", 319), "the vocabulary has 320"),
        (put("vision_config", "fullatt_block_indexes", [4]), "fullatt_block_indexes"),
        (put("vision_config", "num_heads", 3), "80"),
        (put("vision_config", "window_size", 14), "window_size"),
        (put("whisper_config", "ds_stride", 1), "ds_stride"),
        (lambda values: values.pop("llm_config"), "'llm_config'"),
        (lambda values: values.__setitem__("mlp_depth", 3), "mlp_depth"),
    ],
)
def test_refusals(tmp_path: Path, change: Change, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        loaded(tmp_path, change)
    assert "\n" not in str(caught.value)


def test_missing_and_malformed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match=r"no config\.json in '/dev/null'"):
        load_config(Path("/dev/null"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="not an object"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", {"added_tokens": 5}),
        ("tokenizer.json", {"added_tokens": [{"x": 1}]}),
        ("tokenizer.json", [1]),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<image>"}}}),
        ("added_tokens.json", {"<image>": "x"}),
    ],
)
def test_malformed_tokenizer_file(tmp_path: Path, name: str, content: Any) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=f"{name}' is malformed .*download"):
        loaded(tmp_path)


def test_tokenizer_file_without_added_tokens(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": null}')
    assert loaded(tmp_path).tokens.image_patch == 266
