"""The tokenizer of the reference cases: special tokens by name, every other UTF-8 byte as one id."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ming_trt.processing.tokenizer import TextCodec


class ByteTokenizer(TextCodec):
    """id = `byte_offset` + byte for plain text; `special_tokens` maps names to ids."""

    def __init__(self, special_tokens: Mapping[str, int], byte_offset: int = 0) -> None:
        self.special_tokens = dict(special_tokens)
        self.byte_offset = byte_offset
        self._special_ids = frozenset(special_tokens.values())
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))) + ")")

    @classmethod
    def from_cases(cls, index: Mapping[str, Any]) -> ByteTokenizer:
        """From the `tokenizer` section of `cases.json` (in the generation cases: `llm_tokens`)."""
        rule = index["tokenizer"] if "tokenizer" in index else index["llm_tokens"]
        return cls(rule["special_tokens"], rule["byte_offset"])

    def encode(self, text: str, special: bool = True) -> list[int]:
        pieces = self._split.split(text) if special else [text]
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            if i % 2:
                ids.append(self.special_tokens[piece])
            else:
                ids += [self.byte_offset + byte for byte in piece.encode()]
        return ids

    def token_bytes(self, token: int) -> bytes:
        byte = token - self.byte_offset
        return bytes([byte]) if 0 <= byte < 256 and token not in self._special_ids else b""
