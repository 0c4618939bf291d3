"""The normaliser's readings: the reference's strings, one example per rule, and what must hold for any text."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ming_trt.golden.cases import Cases
from ming_trt.processing.spoken_numbers import cardinal, digit_by_digit, number
from ming_trt.processing.spoken_text import CJK, spoken_text

FRONT_END = Cases(Path(__file__).parents[1] / "data" / "golden" / "generation").index["text_front_end"]


@pytest.mark.parametrize("entry", FRONT_END, ids=range(len(FRONT_END)))
def test_reference(entry: dict[str, str]) -> None:
    assert spoken_text(entry["reply"].replace("\n", " ")) == entry["normalised"]


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("2025年7月22日", "二零二五年七月二十二日"),
        ("2025-07-22", "二零二五年七月二十二日"),
        ("2025/7/2", "二零二五年七月二日"),
        ("8:30", "八点半"),
        ("2:05:09", "两点零五分零九秒"),
        ("12:00", "十二点"),
        ("$5.50", "五点五美元"),
        ("¥2000", "两千人民币"),
        ("100rmb", "一百人民币"),
        ("-3℃", "零下三度"),
        ("36.5摄氏度", "三十六点五摄氏度"),
        ("浙A12345", "浙A幺二三四五"),
        ("3/4", "四分之三"),
        ("140/90mmHg", "一百四十每九十毫米汞柱"),
        ("-0.5%", "负百分之零点五"),
        ("13800138000", "幺三八零零幺三八零零零"),
        ("3～5天", "三至五天"),
        ("-10", "负十"),
        ("3.1400", "三点一四"),
        (".5", "零点五"),
        ("2个", "两个"),
        ("12个", "十二个"),
        ("20+人", "二十多人"),
        ("00078", "零零零七八"),
        ("12", "十二"),
        ("1,234,567元", "一百二十三万四千五百六十七元"),
        ("50㎡", "五十平方米"),
        ("x>3=y", "x大于三等于y"),
        ("250ml", "两百五十毫升"),
        ("（注）、好；吧…", "注，好。吧。"),
        ("a/b_c", "a每b c"),
        ("word-word '90", "wordword ，九十"),
        ("Ａ１！", "A一！"),
        ("😀", ""),
    ],
)
def test_reading(written: str, spoken: str) -> None:
    assert spoken_text(written) == spoken


@given(st.text(max_size=60))
def test_only_what_can_be_spoken_remains(text: str) -> None:
    assert re.fullmatch(f"[。！？，{CJK}a-zA-Z ]*", spoken_text(text))


@given(st.integers(0, 10**12 - 1))
def test_cardinals_are_read_back(value: int) -> None:
    """A reader of Chinese numerals, written the other way round, gives the number."""
    units = {"十": 10, "百": 100, "千": 1000}
    digits = {char: i for i, char in enumerate("零一二三四五六七八九")}
    spoken = cardinal(str(value))
    total = 0
    for power, name in ((10**8, "亿"), (10**4, "万"), (1, "")):
        head, mark, rest = spoken.partition(name) if name else (spoken, "x", "")
        if not mark:
            continue
        spoken, section, digit = rest, 0, 0
        for char in head:
            if char in digits:
                digit = digits[char]
            else:
                section, digit = section + (digit or 1) * units[char], 0
        total += (section + digit) * power
    assert total == value


def test_numbers() -> None:
    assert [cardinal(text) for text in ("", "0", "10", "11", "1005", "10050", "100000000")] == [
        "",
        "零",
        "十",
        "十一",
        "一千零五",
        "一万零五十",
        "一亿",
    ]
    assert number("2000") == "两千" and number("22") == "二十二" and number("0.50") == "零点五"
    assert digit_by_digit("101", telephone=True) == "幺零幺"
