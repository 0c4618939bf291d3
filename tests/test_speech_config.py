"""The speech configuration comes from shapes; what the YAML states must agree with them."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ming_trt.errors import CheckpointError, ConfigError
from ming_trt.models.detokenizer_weights import vocoder_weights
from ming_trt.speech_config import FLOW_FILE, HIFT_FILE, YAML, load_speech_config, missing_part

CHECKPOINT = Path(__file__).parent / "data" / "golden" / "generation" / "checkpoint"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The parts of the checkpoint that the configuration is read from."""
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(CHECKPOINT / name, tmp_path / name)
    shutil.copytree(CHECKPOINT / "talker", tmp_path / "talker")
    return tmp_path


def test_golden() -> None:
    config = load_speech_config(CHECKPOINT)
    assert (config.talker.vocab_size, config.talker.text_vocab) == (428, 268), "the root configuration counts"
    assert (config.flow.width, config.flow.look_ahead, config.flow.chunk, config.flow.channels) == (48, 3, 50, 48)
    assert (config.hift.hop, config.hift.base, config.hift.harmonics) == (480, 32, 8)
    assert missing_part(CHECKPOINT) is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_blocks: 2", "num_blocks: 3", "num_blocks"),
        ("channels: [48]", "channels: [48, 48]", "channels"),
        ("vocab_size: 320", "vocab_size: 321", "vocab_size"),
        ("upsample_rates: [8, 5, 3]", "upsample_rates: [8, 3, 5]", "source_downs.1"),
        ("n_fft: 16", "n_fft: 32", "n_fft"),
        ("nsf_sigma: 0.003", "nsf_sigma: 0.01", "nsf_sigma"),
        ("use_cnn_module: False", "use_cnn_module: True", "use_cnn_module"),
        ("act_fn: 'gelu'", "act_fn: 'snake'", "act_fn"),
        ("t_scheduler: 'cosine'", "t_scheduler: 'linear'", "t_scheduler"),
        ("attention_head_dim: 16", "attention_head_dim: 8", "attention_head_dim"),
    ],
)
def test_disagreement_is_an_error(copy: Path, old: str, new: str, message: str) -> None:
    file = copy / "talker" / YAML
    text = file.read_text("utf-8")
    assert old in text
    file.write_text(text.replace(old, new), "utf-8")
    with pytest.raises(CheckpointError, match=message):
        load_speech_config(copy)


def test_another_estimator_is_refused(copy: Path) -> None:
    file = copy / "talker" / FLOW_FILE
    weights = torch.load(file, weights_only=True)
    weights["model"]["decoder.estimator.down_blocks.1.0.mlp.1.weight"] = torch.ones(1)
    torch.save(weights, file)
    with pytest.raises(CheckpointError, match="one down stage"):
        load_speech_config(copy)


def test_missing_and_broken_files(copy: Path) -> None:
    (copy / "talker" / YAML).write_text("flow: [", "utf-8")
    with pytest.raises(ConfigError, match="YAML"):
        load_speech_config(copy)
    (copy / "talker" / YAML).unlink()
    assert YAML in (missing_part(copy) or "")
    with pytest.raises(CheckpointError, match="cannot speak"):
        load_speech_config(copy)


@pytest.mark.parametrize("spelling", ["weight_g", "generator", "plain"])
def test_spellings_of_the_vocoder(copy: Path, spelling: str) -> None:
    """Every spelling gives the same weights."""
    from ming_trt.checkpoint import Checkpoint

    file = copy / "talker" / HIFT_FILE
    weights = torch.load(file, weights_only=True)
    if spelling == "weight_g":
        old, new = ".parametrizations.weight.original", (".weight_g", ".weight_v")
        weights = {(k[: k.index(old)] + new[int(k[-1])] if old in k else k): v for k, v in weights.items()}
    elif spelling == "generator":
        weights = {f"generator.{k}": v for k, v in weights.items()}
    else:
        kept = {}
        for name, value in weights.items():
            if name.endswith("original0"):
                direction = weights[name[:-1] + "1"]
                norm = direction.flatten(1).norm(dim=1).reshape(value.shape)
                kept[name.removesuffix(".parametrizations.weight.original0") + ".weight"] = value * direction / norm
            elif not name.endswith("original1"):
                kept[name] = value
        weights = kept
    torch.save(weights, file)
    sources = vocoder_weights(load_speech_config(copy).hift)
    expected = vocoder_weights(load_speech_config(CHECKPOINT).hift)
    here, there = Checkpoint(copy), Checkpoint(CHECKPOINT)
    for name in (
        "conv_pre.weight",
        "ups.1.weight",
        "resblocks.5.convs2.1.weight",
        "source_downs.0.weight",
        "m_source.l_linear.bias",
    ):
        assert torch.allclose(sources[name].load(here), expected[name].load(there), atol=1e-7), name


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_heads: 4", "num_heads: 0", r"'num_heads' in .* is \[0\], expected whole numbers of at least 1"),
        ("num_heads: 4", "num_heads: four", "'num_heads' in .* expected whole numbers"),
        ("upsample_rates: [8, 5, 3]", "upsample_rates: 120", "'upsample_rates' in .* is 120, expected whole numbers"),
        ("inference_cfg_rate: 0.7", "inference_cfg_rate: [0.7]", "'inference_cfg_rate' in .* expected a number"),
        ("hop_len: 4", "hop_len: 4.5", "'hop_len' in .* expected whole numbers"),
    ],
)
def test_malformed_values_are_sentences(copy: Path, old: str, new: str, message: str) -> None:
    file = copy / "talker" / YAML
    text = file.read_text("utf-8")
    assert old in text
    file.write_text(text.replace(old, new), "utf-8")
    with pytest.raises(ConfigError, match=message):
        load_speech_config(copy)


def test_talker_heads_must_be_shared_evenly(copy: Path) -> None:
    file = copy / "talker" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_attention_heads": 3, "num_key_value_heads": 2}))
    with pytest.raises(ConfigError, match=r"3 attention heads in '.*config\.json' cannot share 2"):
        load_speech_config(copy)
