"""A reply's text into the pieces that are spoken one after the other.

A piece ends at a mark once it is long enough, so that speaking starts early; the first piece of a reply is streamed,
the later ones are decoded whole while earlier audio plays. The rules are those of the official model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ming_trt.errors import InputError
from ming_trt.processing.spoken_text import CJK, spoken_text

LONGEST_PIECE = 50
"""Characters of a spoken piece; the talker's prompt has no room for more than a sentence."""
MAX_TEXT = 5000
"""Characters of a text that is read at once."""

_FIRST_UNITS, _LATER_UNITS = 12, 8  # units before the first mark that ends a piece, and before later ones
_HAS_CJK = re.compile("[\u4e00-\u9fff]")
_SPEAKABLE = re.compile("[a-zA-Z\u4e00-\u9fff1-9]")
_COUNTED = re.compile(f"[{CJK}]")


@dataclass(frozen=True, slots=True)
class Piece:
    """One spoken piece. `stream`: its audio is sent while it is made. `tail`: the reply ends with this flush."""

    text: str
    stream: bool


def has_cjk(text: str) -> bool:
    return _HAS_CJK.search(text) is not None


def units(text: str) -> list[str]:
    """Characters if the text has CJK, else words."""
    text = text.replace("-", "")
    return list(text) if has_cjk(text) else text.split()


class PieceSplitter:
    """Collects units as they come and gives the pieces that are complete.

    `feed` takes units (`units` of a whole text, or of the part of it that has arrived); `finish` gives what is left.
    """

    def __init__(self, longest: int = LONGEST_PIECE) -> None:
        self._longest = longest
        self._held: list[str] = []
        self._flushed = 0

    def feed(self, arrived: Iterable[str]) -> Iterator[Piece]:
        for unit in arrived:
            if self._take(unit):
                yield from self._flush()

    def finish(self) -> Iterator[Piece]:
        if self._held and _SPEAKABLE.search("".join(self._held)):
            yield from self._flush()
        self._held = []

    def _ready(self) -> bool:
        return len(self._held) >= (_LATER_UNITS if self._flushed else _FIRST_UNITS)

    def _take(self, unit: str) -> bool:
        """Adds a unit; true if the piece ends with it."""
        ready, last = self._ready(), unit[-1]
        if ready and (last in "！？，。!?," or (last == "." and not re.match("[0-9]", self._held[-1][-1]))):
            self._held.append(unit)
            return True
        if last == "\n":
            self._end_line(unit)
            return self._ready()
        if unit != " ":
            self._held.append(unit)
        return False

    def _end_line(self, unit: str) -> None:
        """A line end is a pause: a comma after a CJK character, a full stop after an English word."""
        word = unit[:-1]
        if has_cjk("".join(self._held)):
            if has_cjk(self._held[-1][-1]):
                self._held.append("，")
        elif word:
            self._held.append(word + "." if re.search("[a-zA-Z]$", word) else word)

    def _flush(self) -> Iterator[Piece]:
        text = "".join(self._held)
        if not has_cjk(text):
            text = " ".join(self._held)
        stream = self._flushed == 0
        self._held = []
        self._flushed += 1
        for part in cut(text, self._longest):
            part = part.removeprefix("，")
            if _SPEAKABLE.search(part):
                yield Piece(part, stream)


class StreamSplitter:
    """The pieces of a text that comes in parts. They depend on the whole text alone, not on how it was parted.

    Unlike in `units`, where the whole text is known, each character of CJK is a unit and each word between them is one.
    """

    def __init__(self) -> None:
        self._splitter = PieceSplitter()
        self._word = ""
        self._cjk = self._begun = False
        self.opening = ""
        """The text up to the end of the first piece: its language decides on the voice."""

    def feed(self, part: str) -> list[Piece]:
        """The pieces that are complete with this part of the text."""
        found: list[Piece] = []
        for unit in self._units(part):
            found += self._splitter.feed([unit])
            self._begun = self._begun or bool(found)
        return found

    def finish(self) -> list[Piece]:
        """The pieces of what is left."""
        return [*self._splitter.feed(self._end_word()), *self._splitter.finish()]

    def _units(self, part: str) -> Iterator[str]:
        for character in part:
            if not self._begun:
                self.opening += character
            self._cjk = self._cjk or has_cjk(character)
            if character == "\n" and not self._cjk:
                if self._word:
                    self._word += character
                    yield from self._end_word()
            elif character == "\n" or has_cjk(character) or character in "！？，。":
                yield from self._end_word()
                yield character
            elif character.isspace():
                yield from self._end_word()
            elif character != "-":
                self._word += character

    def _end_word(self) -> list[str]:
        word, self._word = self._word, ""
        return [word] if word else []


def pieces_to_read(text: str) -> list[Piece]:
    """The pieces of a text that is read aloud. Raises `InputError` if nothing in it can be spoken, or if it is too
    long."""
    if len(text) > MAX_TEXT:
        raise InputError(f"the text has {len(text)} characters, more than {MAX_TEXT} to be read at once: split it")
    found = pieces(text)
    if not found:
        raise InputError("the text holds nothing that can be spoken: send words or numbers")
    return found


def pieces(text: str, longest: int = LONGEST_PIECE) -> list[Piece]:
    """All pieces of a whole text. Empty if nothing in it can be spoken."""
    splitter = PieceSplitter(longest)
    return [*splitter.feed(units(text)), *splitter.finish()]


def cut(text: str, longest: int) -> list[str]:
    """The reading of `text`, in parts of at most about `longest` characters, cut at 。 then ，."""
    text = spoken_text(text.replace("\n", " ")).replace("。，", "。")
    if len(text) <= longest:
        return [text]
    parts: list[str] = []
    for sentence in _split_keeping(text.replace(".", "。").replace(",", "，"), "。"):
        for clause in _split_keeping(sentence, "，"):
            clause = clause.replace("。，", "。")
            if _counted(clause) > longest:
                slices = [clause[start : start + longest] for start in range(0, len(clause), longest)]
            else:
                slices = [clause]
            for part in slices:
                _join(parts, part, longest)
    return parts


def _counted(text: str) -> int:
    return len(_COUNTED.findall(text))


def _split_keeping(text: str, mark: str) -> Iterator[str]:
    """Splits at `mark`; a part that ends without any mark gets this one back."""
    for part in map(str.strip, text.split(mark)):
        if part:
            yield part if part[-1] in "！？，。!?,." else part + mark


def _join(parts: list[str], part: str, longest: int) -> None:
    """Adds to the last part while it stays short; a few characters after a full stop begin a new one."""
    if not parts:
        parts.append(part)
    elif len(parts[-1]) + _counted(part) > longest or (parts[-1].endswith("。") and _counted(part) < 5):
        parts.append(part.lstrip("，"))
    else:
        parts[-1] += part
