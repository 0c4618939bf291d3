"""The talker's two streams."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ming_trt.errors import CheckpointError
from ming_trt.golden.cases import Cases
from ming_trt.golden.tokenizer import ByteTokenizer
from ming_trt.processing.s3_bpe import S3Bpe
from ming_trt.processing.talker_prompt import SPECIAL_TOKENS, TalkerTokens, talker_prompt
from ming_trt.processing.voice import load_voice

GENERATION = Path(__file__).parents[1] / "data" / "golden" / "generation"
CASES = Cases(GENERATION)
TALKER = CASES.index["talker"]
TOKENS = TalkerTokens.by_position(TALKER["audio_offset"])


def test_special_tokens() -> None:
    assert list(TALKER["special_tokens"]) == list(SPECIAL_TOKENS)
    codec = ByteTokenizer(TALKER["special_tokens"])
    assert TalkerTokens.of(codec, TALKER["audio_offset"]) == TOKENS
    with pytest.raises(CheckpointError, match="must lie below"):
        TalkerTokens.of(codec, 260)
    with pytest.raises(CheckpointError, match="<vp>"):
        TalkerTokens.of(ByteTokenizer({k: v for k, v in TALKER["special_tokens"].items() if k != "<vp>"}), 268)


@pytest.mark.parametrize("name", TALKER["cases"])
def test_reference(name: str) -> None:
    case = TALKER["cases"][name]
    voice = load_voice(GENERATION / "voice.pt")
    entries = S3Bpe(GENERATION / "checkpoint" / "talker" / "s3_bpe").encode(voice.codes.tolist())
    rows = 0 if not case["thinker"] else CASES.arrays[case.get("K", "talker.thinker")]["shape"][0]
    prompt = talker_prompt(TOKENS, entries, list(voice.text.encode()), list(case["text"].encode()), rows)
    CASES.check(f"talker.{name}.audio_ids", prompt.audio_ids)
    CASES.check(f"talker.{name}.text_ids", prompt.text_ids)
    assert prompt.later_text.size == 0


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30), st.integers(0, 9))
def test_texts_of_any_length(recording: int, said: int, text: int, rows: int) -> None:
    """Both streams are equally long; text that has no place follows; each row has its place."""
    prompt = talker_prompt(TOKENS, [7] * recording, list(range(said)), list(range(100, 100 + text)), rows)
    head = 7 + rows
    assert len(prompt) == len(prompt.text_ids) == len(prompt.speaker_index) == head + 1 + recording
    words = [*prompt.text_ids[head:], *prompt.later_text]
    expected = [*range(said), *range(100, 100 + text), TOKENS.text_eos]
    assert words[: len(expected)] == expected and set(words[len(expected) :]) <= {TOKENS.text_pad}
    assert prompt.audio_ids[np.flatnonzero(prompt.speaker_index == 0)[0] - 1] == TOKENS.speaker
    assert prompt.thinker_index[prompt.thinker_index >= 0].tolist() == list(range(rows))
    assert (prompt.audio_ids[prompt.thinker_index >= 0] == TOKENS.audio_pad).all()
