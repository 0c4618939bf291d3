"""Codec BPE against the reference cases, and its failures."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ming_trt.errors import CheckpointError, InputError
from ming_trt.golden.cases import Cases
from ming_trt.processing.s3_bpe import S3Bpe

GENERATION = Path(__file__).parents[1] / "data" / "golden" / "generation"
CASES = Cases(GENERATION)
ENTRIES = S3Bpe(GENERATION / "checkpoint" / "talker" / "s3_bpe")


@pytest.mark.parametrize("kind", ["voice", "unknown"])
def test_encode(kind: str) -> None:
    ids = ENTRIES.encode(CASES.array(f"bpe.{kind}.codes").tolist())
    CASES.check(f"bpe.{kind}.ids", ids)


def test_decode() -> None:
    decoded = [ENTRIES.decode([int(entry)]) for entry in CASES.array("bpe.decode.ids")]
    CASES.check("bpe.decode.counts", [len(codes) for codes in decoded])
    CASES.check("bpe.decode.codes", [code for codes in decoded for code in codes])


@given(st.lists(st.integers(5, len(ENTRIES) - 1), max_size=40))
def test_what_entries_say_is_encoded_to_the_same_codes(entries: list[int]) -> None:
    codes = ENTRIES.decode(entries)
    assert ENTRIES.decode(ENTRIES.encode(codes)) == codes


def test_codes_and_entries_out_of_range() -> None:
    with pytest.raises(InputError, match="codec code"):
        ENTRIES.encode([10**6])
    with pytest.raises(InputError, match="outside"):
        ENTRIES.decode([len(ENTRIES)])


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        S3Bpe(tmp_path)
    source = GENERATION / "checkpoint" / "talker" / "s3_bpe"
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    (tmp_path / "char_mapping.txt").write_text("0\t仼\nx\n", "utf-8")
    with pytest.raises(CheckpointError, match="line 2"):
        S3Bpe(tmp_path)
    (tmp_path / "char_mapping.txt").write_text("0\t仼\n", "utf-8")
    with pytest.raises(CheckpointError, match="does not have"):
        S3Bpe(tmp_path)
