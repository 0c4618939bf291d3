"""Cutting a reply into the pieces that are spoken: the reference's pieces, and what must hold for any text."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ming_trt.golden.cases import Cases
from ming_trt.processing.speech_text import LONGEST_PIECE, PieceSplitter, cut, pieces, units

FRONT_END = Cases(Path(__file__).parents[1] / "data" / "golden" / "generation").index["text_front_end"]


@pytest.mark.parametrize("entry", FRONT_END, ids=range(len(FRONT_END)))
def test_reference(entry: dict[str, str]) -> None:
    assert [{"text": p.text, "stream": p.stream} for p in pieces(entry["reply"])] == entry["pieces"]
    assert cut(entry["reply"], LONGEST_PIECE) == entry["cut_50"]


@pytest.mark.parametrize("text", ["", " ", "\n", "😀🎉", "……", "-", "，。！？", "0"])
def test_nothing_to_speak(text: str) -> None:
    assert pieces(text) == []


def test_mixed_scripts_and_long_text() -> None:
    assert "".join(p.text for p in pieces("我喜欢 machine learning 和 music。")) == "我喜欢machinelearning和music。"
    long = "这是一个没有标点的很长的句子" * 40
    parts = [p.text for p in pieces(long)]
    assert "".join(parts) == long + "。" and max(map(len, parts)) <= LONGEST_PIECE + 1


@given(st.text(alphabet="天地玄黄宇宙洪荒，。！？ab 12\n", max_size=300), st.integers(1, 20))
def test_the_pieces_do_not_depend_on_how_the_units_arrive(text: str, step: int) -> None:
    """The first piece alone is streamed; feeding in parts gives the same pieces."""
    whole = pieces(text)
    splitter, arrived, found = PieceSplitter(), units(text), []
    for start in range(0, len(arrived), step):
        found += splitter.feed(arrived[start : start + step])
    assert [*found, *splitter.finish()] == whole
    assert all(piece.text.strip() for piece in whole)
