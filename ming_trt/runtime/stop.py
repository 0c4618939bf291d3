"""Stop strings: holds tokens back while their text may still turn out to be the beginning of one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from ming_trt.processing.tokenizer import CONTEXT_TOKENS


class TextDecoder(Protocol):
    """The part of `ming_trt.processing.tokenizer.TextCodec` that streaming needs."""

    def decode_delta(self, context_ids: Sequence[int], new_ids: Iterable[int], final: bool) -> str:
        """The text that `new_ids` add behind `context_ids`. Unless `final`, bytes of an unfinished character wait."""
        ...


class StopMatcher:
    """Watches one answer. Text is released as whole tokens, so that it decodes the same wherever it is decoded."""

    def __init__(self, stop: Sequence[str], decoder: TextDecoder) -> None:
        self._stop = tuple(stop)
        self._decoder = decoder
        self._context: list[int] = []
        self._ids: list[int] = []
        self._ends: list[int] = []  # where each held token's text ends in _text
        self._text = ""

    def push(self, token: int) -> tuple[list[int], int | None]:
        """Takes the next token. Returns the tokens that may go out now, and None; or, when a stop string is complete,
        the last tokens of the answer and the number of characters of their text that come before the stop string."""
        self._text += self._decoder.decode_delta(self._context, [token], final=False)
        self._context = [*self._context, token][-CONTEXT_TOKENS:]
        self._ids.append(token)
        self._ends.append(len(self._text))
        found = [place for stop in self._stop if (place := self._text.find(stop)) >= 0]
        if found:
            cut = min(found)
            starts = [0, *self._ends[:-1]]
            return [token for token, start in zip(self._ids, starts, strict=True) if start < cut], cut
        sure = len(self._text) - self._held()
        count = sum(end <= sure for end in self._ends)
        out, taken = self._ids[:count], self._ends[count - 1] if count else 0
        self._ids, self._text = self._ids[count:], self._text[taken:]
        self._ends = [end - taken for end in self._ends[count:]]
        return out, None

    def flush(self) -> list[int]:
        """The tokens held back, when the answer ends without a stop string."""
        out, self._ids, self._ends, self._text = self._ids, [], [], ""
        return out

    def _held(self) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = max(map(len, self._stop)) - 1
        for size in range(min(longest, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-size:]) for stop in self._stop):
                return size
        return 0
