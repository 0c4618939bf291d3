"""A text that comes in parts gives the same pieces however it is parted, and loses no words."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from ming_trt.processing.speech_text import StreamSplitter, pieces

TEXTS = st.text(st.sampled_from(list("ab c.,!-\n3。，！你好吗 ")), max_size=120)


def split(parts: list[str]) -> tuple[list[str], str]:
    splitter = StreamSplitter()
    found = [piece for part in parts for piece in splitter.feed(part)] + splitter.finish()
    return [piece.text for piece in found], splitter.opening


@given(TEXTS, st.lists(st.integers(0, 120), max_size=8))
def test_parts_do_not_matter(text: str, cuts: list[int]) -> None:
    ends = sorted({*cuts, len(text)} - {0})
    parts = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert split(parts) == split([text])


def test_same_pieces_as_of_the_whole_text() -> None:
    text = "It was a dark and stormy night, and all the people of the town slept well, except for one. She read on."
    assert split(list(text))[0] == [piece.text for piece in pieces(text)]


@given(st.lists(st.sampled_from(["red", "green", "blue", "one", "two"]), min_size=1, max_size=40))
def test_words_survive_line_ends(words: list[str]) -> None:
    spoken = " ".join(split(["\n".join(words)])[0])
    assert re.findall("[a-z]+", spoken) == words
