"""The small checkpoint: layout, determinism, a tokenizer of the official form, and modules that run on it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

from ming_trt.checkpoint import Checkpoint
from ming_trt.config import load_config
from ming_trt.errors import ConfigError
from ming_trt.mini import write_mini
from ming_trt.mini.tensors import to_bfloat16
from ming_trt.models import audio, llm, vision
from ming_trt.models.weights import check_sources


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mini") / "checkpoint"
    assert write_mini(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(mini: Path) -> Tokenizer:
    return Tokenizer.from_file(str(mini / "tokenizer.json"))


def test_official_layout(mini: Path) -> None:
    checkpoint, config = Checkpoint(mini), load_config(mini)
    assert [file.name for file in checkpoint.files] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    for sources in (
        llm.weight_map(config.llm),
        vision.weight_map(config.vision, config.llm),
        audio.weight_map(config.audio, config.llm),
    ):
        check_sources(sources, checkpoint)
    assert {checkpoint.info(name).dtype for name in checkpoint.names()} == {"BF16"}
    for name in ("preprocessor_config.json", "generation_config.json", "tokenizer_config.json"):
        assert json.loads((mini / name).read_text("utf-8"))
    assert config.audio.max_frames >= 3000, "a clip of 30 seconds must fit"


def test_the_library_reads_the_same(mini: Path) -> None:
    checkpoint = Checkpoint(mini)
    for file in checkpoint.files:
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a dictionary
                assert torch.equal(shard.get_tensor(name), checkpoint.read(name))


def test_same_seed_same_bytes_in_another_process(mini: Path, tmp_path: Path) -> None:
    code = f"from pathlib import Path; from ming_trt.mini import write_mini; print(write_mini(Path({str(mini)!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False", "a second run finds the same checkpoint"
    assert [path.name for path in mini.parent.iterdir()] == [mini.name], "nothing is left beside it"


def test_another_seed_changes_weights_only(mini: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_mini(other, seed=1)
    files = [path.relative_to(other) for path in other.rglob("*") if path.is_file()]
    changed = {name.as_posix() for name in files if (other / name).read_bytes() != (mini / name).read_bytes()}
    assert changed == {name.as_posix() for name in files if name.suffix in (".safetensors", ".pt", ".onnx")}


def test_refuses_to_overwrite(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        write_mini(tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        write_mini(tmp_path / "note.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_special_tokens(mini: Path, tokenizer: Tokenizer) -> None:
    """Order and distances of the official ids (126080 is the first added token, 126346 `<imagePatch>`)."""
    first = tokenizer.token_to_id("<|startoftext|>")
    for text, official in (
        ("<|endoftext|>", 126081),
        ("<|reserved_token_0|>", 126084),
        ("<|reserved_token_255|>", 126339),
        ("<role>", 126340),
        ("<imagePatch>", 126346),
        ("</video>", 126350),
        ("<audioPatch>", 126357),
        ("<audioHere>", 126363),
        ("<tts>", 126367),
    ):
        assert tokenizer.token_to_id(text) - first == official - 126080, text
    assert tokenizer.get_vocab_size() == first + 288
    tokens, vocabulary = load_config(mini).tokens, load_config(mini).llm.vocab_size
    assert tokens.audio_patch == tokenizer.token_to_id("<audioPatch>")
    assert vocabulary % 128 == 0 and vocabulary >= tokenizer.get_vocab_size()
    assert tokenizer.encode("<role>HUMAN</role>").ids[0] == tokenizer.token_to_id("<role>")
    assert tokenizer.decode(tokenizer.encode("a<image>b").ids, skip_special_tokens=True) == "ab"


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_tokenizer_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_tokenizer_splits_as_officially(tokenizer: Tokenizer) -> None:
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("it's 12, ok!!\n x")]
    assert pieces == ["it", "'s", "Ġ", "1", "2", ",", "Ġok", "!!Ċ", "Ġx"]


@settings(max_examples=100)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_bfloat16_rounding_is_that_of_torch(values: list[float]) -> None:
    array = np.array(values, dtype=np.float32)
    expected = torch.from_numpy(array).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(to_bfloat16(array), expected)


def test_command(mini: Path, tmp_path: Path) -> None:
    import typer
    from typer.testing import CliRunner

    from ming_trt.cli.mini import command

    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, [str(mini), "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {
        "directory": str(mini),
        "seed": 0,
        "written": False,
        "bytes": sum(path.stat().st_size for path in mini.rglob("*") if path.is_file()),
    }
    done = CliRunner().invoke(app, [str(tmp_path / "new"), "--seed", "3"])
    assert done.exit_code == 0 and "seed 3" in done.stdout
    assert load_config(tmp_path / "new") == load_config(mini)
