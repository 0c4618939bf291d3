"""Codes of the speech codec (50 a second) to and from the talker's audio vocabulary.

The talker speaks a byte-pair code over codec codes: `char_mapping.txt` gives every code a CJK character, and
`tokenizer.json` is an ordinary BPE over those characters. The audio id of an entry is `text vocabulary size + entry`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from ming_trt.errors import CheckpointError, InputError


class S3Bpe:
    """The codec's BPE: `tokenizer.json` and `char_mapping.txt` in `folder`. `CheckpointError` if one is unusable."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = _read_tokenizer(folder / "tokenizer.json")
        self._char_of = _read_mapping(folder / "char_mapping.txt")
        code_of = {char: code for code, char in self._char_of.items()}
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        self._codes: list[tuple[int, ...]] = [()] * self._tokenizer.get_vocab_size()
        for token, entry in self._tokenizer.get_vocab().items():
            if token not in special:
                unknown = [char for char in token if char not in code_of]
                if unknown:
                    raise CheckpointError(
                        f"entry {entry} of '{folder}/tokenizer.json' holds '{unknown[0]}', which char_mapping.txt "
                        "does not have: copy both files from the same checkpoint"
                    )
                self._codes[entry] = tuple(code_of[char] for char in token)

    def __len__(self) -> int:
        """Entries of the vocabulary, special ones included."""
        return len(self._codes)

    def encode(self, codes: Sequence[int]) -> list[int]:
        """Codec codes -> BPE entries. A code whose character the BPE does not know is dropped, as officially.

        Raises `InputError` for a code that has no character at all.
        """
        try:
            text = "".join([self._char_of[int(code)] for code in codes])
        except KeyError as error:
            raise InputError(f"codec code {error} is not one of the {len(self._char_of)} known codes") from None
        entries: list[int] = self._tokenizer.encode(text).ids
        return entries

    def decode(self, entries: Sequence[int]) -> list[int]:
        """BPE entries -> codec codes; special entries give nothing. Raises `InputError` for an entry out of range."""
        codes: list[int] = []
        for entry in entries:
            if not 0 <= entry < len(self._codes):
                raise InputError(
                    f"audio entry {entry} is outside the {len(self._codes)} entries of the speech vocabulary"
                )
            codes.extend(self._codes[entry])
        return codes


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"'{path}' is missing: speech needs the folder talker/s3_bpe of the checkpoint") from None
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception
        raise CheckpointError(f"'{path}' is not a tokenizer ({error}): copy it again") from None


def _read_mapping(path: Path) -> dict[int, str]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise CheckpointError(f"'{path}' is missing: speech needs the folder talker/s3_bpe of the checkpoint") from None
    mapping: dict[int, str] = {}
    for number, line in enumerate(lines, 1):
        fields = line.strip().split("\t")
        if len(fields) != 2 or not fields[0].isdigit() or len(fields[1]) != 1:
            raise CheckpointError(f"line {number} of '{path}' is not 'CODE<TAB>CHARACTER': copy the file again")
        mapping[int(fields[0])] = fields[1]
    return mapping
