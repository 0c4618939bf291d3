"""Numbers as Chinese speech says them: the readings that the text normaliser is made of.

All functions take strings of ASCII digits (a sign or a point only where said), since leading zeros matter.
"""

from __future__ import annotations

_DIGITS = "零一二三四五六七八九"
_UNITS = ((8, "亿"), (4, "万"), (3, "千"), (2, "百"), (1, "十"))


def digit_by_digit(digits: str, *, telephone: bool = False) -> str:
    """ "105" -> "一零五"; one is said 幺 in telephone and other identifying numbers."""
    spoken = "".join(_DIGITS[int(digit)] for digit in digits)
    return spoken.replace("一", "幺") if telephone else spoken


def cardinal(digits: str) -> str:
    """ "1050" -> "一千零五十", "12" -> "十二", "000" -> "零", "" -> ""."""
    if not digits:
        return ""
    spoken = _spell(digits.lstrip("0"))
    if not spoken:
        return _DIGITS[0]
    return spoken[1:] if spoken.startswith("一十") else spoken


def number(text: str) -> str:
    """ "2000" -> "两千", "3.20" -> "三点二", ".5" -> "零点五". Zeros at the end of a fraction are not said."""
    whole, _, fraction = text.partition(".")
    spoken = cardinal(whole)
    if spoken[:1] == "二" and spoken[1:2] in tuple("亿万千百"):
        spoken = "两" + spoken[1:]
    fraction = fraction.rstrip("0")
    return f"{spoken or _DIGITS[0]}点{digit_by_digit(fraction)}" if fraction else spoken


def signed(sign: str, text: str) -> str:
    """`number` with 负 in front where `sign` is not empty."""
    return ("负" if sign else "") + number(text)


def clock_part(digits: str) -> str:
    """Minutes or seconds: "05" -> "零五", "15" -> "十五"."""
    return (_DIGITS[0] if digits.startswith("0") else "") + number(digits.lstrip("0"))


def _spell(digits: str) -> str:
    """Splits at the largest unit below the number's magnitude; a gap of zeros before a lone digit is said once."""
    value = digits.lstrip("0")
    if not value:
        return ""
    if len(value) == 1:
        return ("零" if len(digits) > 1 else "") + _DIGITS[int(value)]
    power, name = next(unit for unit in _UNITS if unit[0] < len(value))
    return _spell(digits[:-power]) + name + _spell(digits[-power:])
