"""Stop strings on pieces of UTF-8: exactly the text before the first stop string goes out, as early as it can."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from ming_trt.processing.tokenizer import TextCodec
from ming_trt.runtime.stop import StopMatcher

# Pieces of one to three bytes: parts of "é", "语" and "😀" among them.
PIECES = [b"a", b"b", b"ab", b"ba", b"\xc3", b"\xa9", b"\xe8\xaf", b"\xad", b"\xf0", b"\x9f\x98", b"\x80", b""]


class Pieces(TextCodec):
    special_tokens = {"<end>": PIECES.index(b"")}  # noqa: RUF012

    def encode(self, text: str, special: bool = True) -> list[int]:
        raise NotImplementedError

    def token_bytes(self, token: int) -> bytes:
        return PIECES[token]


CODEC = Pieces()


def stream(tokens: Iterable[int], stop: Sequence[str]) -> tuple[list[tuple[list[int], int | None]], str, list[int]]:
    """The chunks that go out, their text as a receiver decodes it, and the tokens held back at the end."""
    matcher, chunks, text, sent = StopMatcher(stop, CODEC), [], "", []
    for token in tokens:
        out, cut = matcher.push(token)
        chunks.append((out, cut))
        text += CODEC.decode_delta(sent[-3:], out, final=False)[:cut]
        sent += out
        if cut is not None:
            return chunks, text, []
    return chunks, text, matcher.flush()


ids = st.lists(st.integers(0, len(PIECES) - 1), max_size=40)
stops = st.lists(st.text("abé语😀", min_size=1, max_size=4), min_size=1, max_size=3)


@given(ids, stops)
def test_the_text_ends_before_the_first_stop_string(tokens: list[int], stop: list[str]) -> None:
    chunks, text, held = stream(tokens, stop)
    whole = CODEC.decode_delta([], tokens, final=False)
    places = [place for each in stop if (place := whole.find(each)) >= 0]
    if not places:
        sent = [token for out, _ in chunks for token in out]
        assert sent + held == tokens
        assert text + CODEC.decode_delta(sent[-3:], held, final=False) == whole
        return
    # The stop string that is complete first wins; where several complete with one token, the one that begins first.
    for count in range(len(tokens) + 1):
        part = CODEC.decode_delta([], tokens[:count], final=False)
        found = [place for each in stop if (place := part.find(each)) >= 0]
        if found:
            assert chunks[-1][1] is not None and len(chunks) == count
            assert text == part[: min(found)]
            return


@given(ids, stops)
def test_text_is_held_back_only_while_it_may_begin_a_stop_string(tokens: list[int], stop: list[str]) -> None:
    matcher, sent = StopMatcher(stop, CODEC), []
    for count, token in enumerate(tokens, 1):
        out, cut = matcher.push(token)
        if cut is not None:
            return
        sent += out
        text = CODEC.decode_delta([], tokens[:count], final=False)
        suspect = max((size for each in stop for size in range(1, len(each)) if text.endswith(each[:size])), default=0)
        # whole tokens: the next one would bring the first suspect character
        more = CODEC.decode_delta([], tokens[: len(sent) + 1], final=False)
        assert len(sent) == count or len(more) > len(text) - suspect
        assert len(CODEC.decode_delta([], sent, final=False)) <= len(text) - suspect


def test_a_stop_string_inside_a_token_cuts_its_text() -> None:
    matcher = StopMatcher(["b"], CODEC)
    assert matcher.push(0) == ([0], None)
    assert matcher.push(2) == ([2], 1)
    assert StopMatcher(["a"], CODEC).push(2) == ([], 0)
