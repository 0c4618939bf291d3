import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from ming_trt.errors import CheckpointError, InputError
from ming_trt.golden.tokenizer import ByteTokenizer
from ming_trt.processing.tokenizer import StreamDecoder, TextCodec, Tokenizer

SPECIAL = ["<|endoftext|>", "<role>", "</role>", "<imagePatch>", "<image>", "</image>"]
CORPUS = [
    "the cat sat on the mat, 12 + 39 = 51",
    "中国的首都是北京。鹦鹉的生活习性",
    "émigré naïve 🦊🦊 fox",
    "def f(x):\n  return x",
]


def train() -> tokenizers.Tokenizer:
    """A small byte-level BPE, so small that most characters beyond ASCII are split between tokens."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return backend


BPE = Tokenizer(train())
BYTES = ByteTokenizer({text: 300 + i for i, text in enumerate(SPECIAL)}, byte_offset=3)
codecs = pytest.mark.parametrize("codec", [BPE, BYTES], ids=["bpe", "bytes"])


@codecs
def test_special_tokens_are_recognised_on_request_only(codec: TextCodec) -> None:
    text = "<role>HUMAN</role><image>?"
    special = {codec.special_id(token) for token in ("<role>", "</role>", "<image>")}
    assert special <= set(codec.encode(text))
    plain = codec.encode(text, special=False)
    assert not set(plain) & set(codec.special_tokens.values())
    assert codec.decode(plain) == text
    assert codec.decode(codec.encode(text)) == "HUMAN?"
    assert codec.decode(codec.encode(text), skip_special=False) == text


@codecs
@given(text=st.text())
def test_any_text_survives_the_round_trip(codec: TextCodec, text: str) -> None:
    assert codec.decode(codec.encode(text, special=False)) == text


@given(st.text())
def test_bytes_of_tokens_join_to_the_text(text: str) -> None:
    assert b"".join(map(BPE.token_bytes, BPE.encode(text, special=False))).decode() == text


@codecs
@given(data=st.data())
def test_any_split_of_any_tokens_streams_to_the_same_text(codec: TextCodec, data: st.DataObject) -> None:
    # 340 lies beyond both vocabularies: an id without text
    token = st.integers(0, 340) | st.sampled_from([codec.encode(char)[0] for char in "中🦊é"])
    ids = data.draw(st.lists(token, max_size=24))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=8)))
    stream, pieces = StreamDecoder(codec), []
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        pieces.append(stream.push(ids[start:end], final=False))
    pieces.append(stream.push([], final=True))
    assert "".join(pieces) == codec.decode(ids)
    stateless = "".join(
        codec.decode_delta(ids[max(0, i - 3) : i], [ids[i]], i + 1 == len(ids)) for i in range(len(ids))
    )
    assert stateless == codec.decode(ids)


@given(st.lists(st.integers(0, 319), max_size=24))
def test_decoding_equals_the_library_s(ids: list[int]) -> None:
    # without special tokens, which end a character here and are transparent there
    ids = [i for i in ids if i not in BPE.special_tokens.values()]
    assert BPE.decode(ids) == BPE._backend.decode(ids)


@given(st.text(min_size=1, alphabet=st.characters(min_codepoint=0x80, exclude_categories=["Cs"])))
def test_a_character_appears_with_its_last_byte(text: str) -> None:
    stream = StreamDecoder(BYTES)
    seen = ""
    for token in BYTES.encode(text):
        seen += stream.push([token])
        assert text.startswith(seen)
    assert seen == text


def test_a_broken_character_is_replaced_when_it_is_known_to_be_broken() -> None:
    stream = StreamDecoder(BYTES)
    e4, b8 = (3 + byte for byte in "中".encode()[:2])
    assert stream.push([e4]) == ""
    assert stream.push([b8]) == ""
    assert stream.push([BYTES.special_id("<role>")]) == "�"
    assert stream.push([e4]) == ""
    assert stream.push([], final=True) == "�"


def test_from_checkpoint(tmp_path: Path) -> None:
    BPE._backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.from_checkpoint(tmp_path)
    assert loaded.encode(CORPUS[1]) == BPE.encode(CORPUS[1])
    assert loaded.vocab_size == BPE.vocab_size
    with pytest.raises(CheckpointError, match="<tts>"):
        loaded.special_id("<tts>")


def test_a_missing_damaged_or_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_checkpoint(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.from_checkpoint(tmp_path)
    state = json.loads(BPE._backend.to_str())
    state["model"]["vocab"]["▁the"] = 999
    file.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="byte-level"):
        Tokenizer.from_checkpoint(tmp_path)


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(InputError, match="surrogate"):
        BPE.encode("\ud800")
