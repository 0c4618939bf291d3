"""A tokenizer from `vocab.json` and `merges.txt` against the `tokenizer.json` of the same vocabulary."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from ming_trt.errors import CheckpointError
from ming_trt.golden.cases import Cases
from ming_trt.mini.text import TEXT
from ming_trt.processing.talker_prompt import SPECIAL_TOKENS, TalkerTokens
from ming_trt.processing.tokenizer import Tokenizer

GENERATION = Path(__file__).parents[1] / "data" / "golden" / "generation"
# As it stands in the `tokenizer.json` of Qwen2.
QWEN2 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with `tokenizer.json`, and one with the two files and the list of added tokens."""
    one, two = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("parts")
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(QWEN2), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts(), trainer)
    backend.model.save(str(two))  # vocab.json and merges.txt
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    backend.save(str(one / "tokenizer.json"))
    ids = {backend.token_to_id(text): text for text in SPECIAL_TOKENS}
    listed = {str(number): {"content": text, "special": True} for number, text in ids.items()}
    (two / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}), "utf-8")
    return one, two


def texts() -> list[str]:
    """The sentences that the reference speaks, and those of the mini checkpoint."""
    index = Cases(GENERATION).index
    found = [
        case[key]
        for case in index["talker"]["cases"].values()
        for key in ("text", "prompt_text", "reply")
        if key in case
    ]
    for case in index["text_front_end"]:
        found += [case["reply"], case["normalised"], *(piece["text"] for piece in case["pieces"])]
    assert len(found) > 10
    return [*found, *TEXT.splitlines(keepends=True)]


def test_equal_ids(folders: tuple[Path, Path]) -> None:
    whole, parts = (Tokenizer.from_checkpoint(folder) for folder in folders)
    assert whole.special_tokens == parts.special_tokens and whole.vocab_size == parts.vocab_size
    tokens = TalkerTokens.of(parts, parts.vocab_size)
    assert tokens == TalkerTokens.of(whole, whole.vocab_size)
    for text in [*texts(), "It's 12 o'clock\n\n  and WE'LL go  ", "<vp>e\u0301</vp>", " \t\r\n", "😀１２３ａｂｃ"]:
        for special in (True, False):
            ids = parts.encode(text, special)
            assert ids == whole.encode(text, special), text
            assert parts.decode(ids) == whole.decode(ids)


@settings(deadline=None)
@given(text=st.text(max_size=40))
def test_equal_ids_of_any_text(folders: tuple[Path, Path], text: str) -> None:
    whole, parts = (Tokenizer.from_checkpoint(folder) for folder in folders)
    assert parts.encode(text) == whole.encode(text)


def test_a_plain_list_of_added_tokens(folders: tuple[Path, Path], tmp_path: Path) -> None:
    whole, parts = folders
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((parts / name).read_bytes())
    ids = Tokenizer.from_checkpoint(whole).special_tokens
    (tmp_path / "added_tokens.json").write_text(json.dumps(dict(ids)), "utf-8")
    assert Tokenizer.from_checkpoint(tmp_path).special_tokens == ids


def test_files_that_do_not_fit(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_checkpoint(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folders[1] / name).read_bytes())
    (tmp_path / "added_tokens.json").write_text('{"<vp>": 900}', "utf-8")
    with pytest.raises(CheckpointError, match="has the id 900"):
        Tokenizer.from_checkpoint(tmp_path)
    (tmp_path / "added_tokens.json").write_text("[1]", "utf-8")
    with pytest.raises(CheckpointError, match="malformed"):
        Tokenizer.from_checkpoint(tmp_path)
    (tmp_path / "vocab.json").write_text("{", "utf-8")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.from_checkpoint(tmp_path)
