"""Qwen2's tokenizer from `vocab.json` and `merges.txt`, for folders that come without a `tokenizer.json`.

The two files hold the vocabulary and the merges but not the rules around them: text is brought into form NFC, cut
by `SPLIT`, and each piece is written as bytes. Added tokens stand in `tokenizer_config.json` (`added_tokens_decoder`)
or in `added_tokens.json` (text -> id).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from ming_trt.errors import CheckpointError

VOCAB, MERGES = "vocab.json", "merges.txt"
_CONFIG, _ADDED = "tokenizer_config.json", "added_tokens.json"
# Contractions; a word with one sign before it; one digit; signs; line ends; blanks, the last one left to what follows.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def has_vocab_and_merges(folder: Path) -> bool:
    """Whether `folder` holds both files."""
    return (folder / VOCAB).is_file() and (folder / MERGES).is_file()


def read_vocab_and_merges(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of `folder`. Raises `CheckpointError` if a file cannot be read, or the ids of added tokens do not
    follow those of the vocabulary."""
    try:
        model = models.BPE.from_file(str(folder / VOCAB), str(folder / MERGES))
    except Exception as error:  # noqa: BLE001  (the library raises bare Exceptions)
        raise CheckpointError(
            f"{VOCAB} and {MERGES} in '{folder}' cannot be read ({error}): download them again"
        ) from None
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    # The library numbers added tokens itself, from the end of the vocabulary on.
    for number, token in sorted(_added_tokens(folder).items()):
        tokenizer.add_tokens([token]) if not token.special else tokenizer.add_special_tokens([token])
        given = tokenizer.token_to_id(token.content)
        if given != number:
            raise CheckpointError(
                f"the token '{token.content}' has the id {number} in '{folder}', but {given} comes next in its "
                f"vocabulary: take {VOCAB} and the list of added tokens from the same checkpoint"
            )
    return tokenizer


def _added_tokens(folder: Path) -> dict[int, AddedToken]:
    """By id, those of `tokenizer_config.json` before those of `added_tokens.json`."""
    found: dict[int, AddedToken] = {}
    try:
        for text, number in _read(folder / _ADDED).items():
            found[int(number)] = AddedToken(text, special=True, normalized=False)
        for number, about in (_read(folder / _CONFIG).get("added_tokens_decoder") or {}).items():
            flags = {key: bool(about.get(key, False)) for key in ("special", "single_word", "lstrip", "rstrip")}
            found[int(number)] = AddedToken(about["content"], normalized=bool(about.get("normalized", False)), **flags)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the added tokens in '{folder}' are malformed ({error!r}): download {_CONFIG} and {_ADDED} again"
        ) from None
    return found


def _read(file: Path) -> Mapping[str, Any]:
    """A JSON object; empty if the file is not there."""
    value: Mapping[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return value
