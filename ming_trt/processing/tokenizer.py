"""The checkpoint's byte-level tokenizer, and text from tokens that may end in the middle of a character.

Special tokens: `encode(text)` recognises them in the text, as the reference does. `encode(text, special=False)` reads
the same words as plain text; that is how the words of a user are encoded (`prepare.py`), so that nobody can write
`<role>` or `<imagePatch>` into a prompt.

Decoding: special tokens give no text and end the character before them. A character whose bytes are not complete is
held back until they are; what can never become complete is given as U+FFFD.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import tokenizers

from ming_trt.errors import CheckpointError, InputError
from ming_trt.processing.qwen_files import VOCAB, has_vocab_and_merges, read_vocab_and_merges

# A character has at most 4 bytes, so no more than this many tokens before the new ones can belong to it.
CONTEXT_TOKENS = 3


class TextCodec(ABC):
    """Text to ids and back. Ids that are no token (padding rows of the vocabulary) give no text."""

    #: text -> id of every special token
    special_tokens: Mapping[str, int]

    @abstractmethod
    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text; nothing is added at its ends. With `special` false, special tokens are read as plain text."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The raw bytes of a token; none for special tokens and unknown ids."""

    def special_id(self, token: str) -> int:
        """The id of a special token. Raises `CheckpointError` where the vocabulary lacks it."""
        try:
            return self.special_tokens[token]
        except KeyError:
            raise CheckpointError(
                f"the tokenizer has no token '{token}': use the tokenizer files of a Ming-lite-omni v1.5 checkpoint"
            ) from None

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of all ids at once."""
        if skip_special:
            return self.decode_delta([], ids, final=True)
        names = {number: text for text, number in self.special_tokens.items()}
        text, run = [], list[int]()
        for token in ids:
            if token in names:
                text += [self.decode(run), names[token]]
                run = []
            else:
                run.append(token)
        return "".join([*text, self.decode(run)])

    def decode_delta(self, context_ids: Sequence[int], new_ids: Iterable[int], final: bool) -> str:
        """The text that `new_ids` add after `context_ids` (the last tokens before them; 3 are enough).

        Without `final` a character that is not complete is held back: it comes with the call that completes it, to
        which these ids must then be the context. With `final` it is given as U+FFFD.
        """
        before = b""
        for token in context_ids[-CONTEXT_TOKENS:]:
            piece = self.token_bytes(token)
            before = before + piece if piece else b""
        pending = before[len(before) - _incomplete(before) :]
        text = []
        for token in new_ids:
            piece = self.token_bytes(token)
            if piece:
                pending += piece
            else:
                text.append(pending.decode("utf-8", "replace"))
                pending = b""
        keep = 0 if final else _incomplete(pending)
        text.append(pending[: len(pending) - keep].decode("utf-8", "replace"))
        return "".join(text)


class Tokenizer(TextCodec):
    """A checkpoint's `tokenizer.json` (byte-level BPE)."""

    def __init__(self, backend: tokenizers.Tokenizer, source: str = "tokenizer") -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        # A second one with the switch set: setting it at every call would not be safe between threads.
        self._plain = tokenizers.Tokenizer.from_str(backend.to_str())
        self._plain.encode_special_tokens = True
        added = backend.get_added_tokens_decoder()
        self.special_tokens = {token.content: number for number, token in added.items() if token.special}
        self._bytes = _vocabulary_bytes(backend, set(added), source)
        self._bytes |= {number: token.content.encode() for number, token in added.items() if not token.special}

    @classmethod
    def from_checkpoint(cls, folder: Path) -> Tokenizer:
        """Reads `folder/tokenizer.json`, or `vocab.json` and `merges.txt` where that is missing (`qwen_files.py`).

        Raises `CheckpointError` where there is neither, or a file is damaged or of another kind.
        """
        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            if has_vocab_and_merges(Path(folder)):
                return cls(read_vocab_and_merges(Path(folder)), str(Path(folder) / VOCAB))
            raise CheckpointError(f"no tokenizer.json in '{folder}': copy the checkpoint's tokenizer files there")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # noqa: BLE001  (the library raises bare Exceptions)
            raise CheckpointError(f"'{file}' cannot be read ({error}): download it again") from None
        return cls(backend, str(file))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included; the model's embedding may have more rows."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, special: bool = True) -> list[int]:
        backend = self._backend if special else self._plain
        try:
            return list(backend.encode(text, add_special_tokens=False).ids)
        except (UnicodeEncodeError, TypeError):
            raise InputError(
                "the text holds half of a surrogate pair, which is no character: send valid text"
            ) from None

    def token_bytes(self, token: int) -> bytes:
        return self._bytes.get(token, b"")


class StreamDecoder:
    """Text of a growing list of tokens: the pieces of `push`, joined, equal `decode` of all ids."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._context: list[int] = []

    def push(self, ids: Sequence[int], final: bool = False) -> str:
        """The text that these ids complete; `final` with the last ones (or none) gives what is still held back."""
        text = self._codec.decode_delta(self._context, ids, final)
        self._context = [*self._context, *ids][-CONTEXT_TOKENS:]
        return text


def _incomplete(data: bytes) -> int:
    """Number of bytes (0..3) at the end that are the beginning of a character and not yet the whole of it."""
    for back in range(1, min(3, len(data)) + 1):
        if data[-back] & 0xC0 != 0x80:
            # Not a continuation: the last character begins here, or it is broken already.
            tail = data[-back:]
            try:
                tail.decode("utf-8")
            except UnicodeDecodeError as error:
                return back if error.reason == "unexpected end of data" and error.start == 0 else 0
            return 0
    return 0


@lru_cache(maxsize=1)
def _byte_of_symbol() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable symbol: itself where it is one, else from U+0100 on in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return symbols | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _vocabulary_bytes(backend: tokenizers.Tokenizer, special: set[int], source: str) -> dict[int, bytes]:
    symbols = _byte_of_symbol()
    result: dict[int, bytes] = {}
    for symbol_text, number in backend.get_vocab(with_added_tokens=True).items():
        if number in special:
            continue
        try:
            result[number] = bytes(symbols[symbol] for symbol in symbol_text)
        except KeyError:
            raise CheckpointError(
                f"the token '{symbol_text}' of '{source}' is not of a byte-level tokenizer: use the checkpoint's own"
            ) from None
    return result
