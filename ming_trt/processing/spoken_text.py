"""Written text to the text that the talker reads: numbers, dates, units and symbols in Chinese words.

The talker was trained on the output of a Chinese normaliser that was applied to English too ("$5" is 五美元 in an
English sentence), so this one keeps that normaliser's readings, its order and its gaps. What remains is CJK, Latin
letters, blanks and the four marks ，。！？.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from ming_trt.processing.spoken_numbers import cardinal, clock_part, digit_by_digit, number, signed

CJK = "\u4e00-\u4e27\u4e29-\u4e3e\u4e42-\u9fa4"
"""Character class of the CJK that is kept; the gaps are four strokes that are no characters."""

_Match = re.Match[str]
_Rule = tuple[re.Pattern[str], Callable[[_Match], str]]


def spoken_text(text: str) -> str:
    """The text as it is read aloud. May be empty: an emoji has no reading."""
    text = _expand_symbols(text)
    text = _apply(_DATES, text)
    text = re.sub(r"(?<=[0-9%])[-~](?=[0-9])", "至", text)  # after the dates, whose marks are no ranges
    return _keep_speakable(_apply(_NUMBERS, text))


def _half_width(char: str) -> str:
    code = ord(char)
    if code == 0x3000:
        return " "
    return chr(code - 0xFEE0) if 0x20 <= code - 0xFEE0 <= 0x7E else char


def _expand_symbols(text: str) -> str:
    text = "".join(map(_half_width, text))
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3})", "", text)  # digit groups
    text = re.sub(r"[\t\n\r\f]", "，", text)
    text = text.replace("㎡", "m²").replace("cm²", "平方厘米").replace("m²", "平方米")
    text = re.sub(r">(?=[0-9])", "大于", text)
    text = re.sub(r"<(?=[0-9])", "小于", text)
    text = text.replace("=", "等于")
    text = re.sub(r"(?<=[0-9])ml(?![a-zA-Z])", "毫升", text)
    text = re.sub(r"(?<=[0-9])mmHg(?![a-zA-Z])", "毫米汞柱", text)
    return re.sub(r"([0-9.]+元)-([0-9.]+元)", r"\1至\2", text)


def _apply(rules: tuple[_Rule, ...], text: str) -> str:
    """Every match is replaced wherever its text occurs, also where the pattern alone would not match there.

    That is how the talker's normaliser does it: "12个2个" reads the first match's text everywhere before the second.
    """
    for pattern, read in rules:
        for match in list(pattern.finditer(text)):
            text = text.replace(match[0], read(match))
    return text


def _read_date(match: _Match) -> str:
    spoken = digit_by_digit(match["year"]) + "年"
    if match["month"]:
        spoken += cardinal(match["month"]) + "月"
    if match["day"]:
        spoken += cardinal(match["day"]) + match["unit"]
    return spoken


def _read_date_with_marks(match: _Match) -> str:
    return f"{digit_by_digit(match['year'])}年{cardinal(match['month'])}月{cardinal(match['day'])}日"


def _read_time(match: _Match) -> str:
    hour, minute, second = match["hour"], match["minute"], match["second"]
    spoken = ("两" if hour == "2" else number(hour)) + "点"
    if minute == "30" and not second:
        spoken += "半"
    elif minute != "00":
        spoken += clock_part(minute) + "分"
    if second and second != "00":
        spoken += clock_part(second) + "秒"
    return spoken


def _read_fraction(match: _Match) -> str:
    sign = "负" if match["sign"] else ""
    over, under, unit = number(match["over"]), number(match["under"]), match["unit"]
    return f"{sign}{over}每{under}{unit}" if unit else f"{sign}{under}分之{over}"


def _read_temperature(match: _Match) -> str:
    unit = "摄氏度" if match["unit"] == "摄氏度" else "度"
    return ("零下" if match["sign"] else "") + number(match["value"]) + unit


def _read_digits(match: _Match) -> str:
    return digit_by_digit(match[0], telephone=True)


def _read_plate(match: _Match) -> str:
    return re.sub(r"[0-9]", lambda digit: digit_by_digit(digit[0], telephone=True), match[0])


def _read_telephone(match: _Match) -> str:
    parts = re.split(r"[- ]", match[0].lstrip("+"))
    return "，".join(digit_by_digit(part, telephone=True) for part in parts)


def _read_decimal(match: _Match) -> str:
    return number(match["bare"]) if match["bare"] else signed(match["sign"], match["value"])


def _read_plain_range(match: _Match) -> str:
    first, second = (_NUMBER.sub(_read_decimal, match[side]) for side in ("first", "second"))
    return f"{first}到{second}"


def _read_measure(match: _Match) -> str:
    count, more = match["count"], match["more"]
    spoken = "两" if count == "2" and not more else number(count)
    return spoken + ("多" if more == "+" else more or "") + match["measure"]


def _read_measure_range(match: _Match) -> str:
    return f"{number(match['first'])}至{match['rest']}"


_TIME = r"(?P<hour>[01]?[0-9]|2[0-3]):(?P<minute>[0-5][0-9])(?::(?P<second>[0-5][0-9]))?"
_NUMBER = re.compile(r"(?P<sign>-?)(?P<value>[0-9]+(?:\.[0-9]+)?)|(?P<bare>\.[0-9]+)")
_UNSIGNED = r"-?[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
_AMOUNT = r"(?P<value>[0-9]+(?:\.[0-9]+)?)"

# Measure words of the talker's training text: single characters first, which is also the order of preference.
_MEASURE = (
    "[丈世丘丝两个丸人代令件伏位元克冬出刀分刻勺匹升单卮厘双叠口只合名周啖回场块坡堂堆墙壳壶夏夜天头季客家寸对寻导尺尾层山岁岭常幢年座张忽户"
    "所手扎打担挑捆撮支斗斛斤日旬时春曲更月本朵条杯板枝根桶棵次毛毫江泡溪炮点煲片瓶盆盏盒盘石砣碗碟秋种秒程窠笼管箩箱篮簋米粒纪线罐网罗群"
    "脚腔袋袭角课贯贴跳身辆辈道里针钟钧钱钵铢铺锅锱阙队阵面页顶颗首]"
    "|千克|微克|公分|千米|微米|小时|公顷|平方|cm²|m²|cm|m|亿|千万|百万|万|千|百|美元"
)

_DATES: tuple[_Rule, ...] = (
    (
        re.compile(
            r"(?P<year>[0-9]{4})年(?:(?P<month>0?[1-9]|1[0-2])月)?"
            r"(?:(?P<day>0?[1-9]|[12][0-9]|30|31)(?P<unit>[日号]))?"
        ),
        _read_date,
    ),
    (
        re.compile(
            r"(?P<year>[0-9]{4})(?P<mark>[-_ /.])(?P<month>0?[1-9]|1[012])(?P=mark)(?P<day>[12][0-9]|3[01]|0?[1-9])"
        ),
        _read_date_with_marks,
    ),
)

_NUMBERS: tuple[_Rule, ...] = (
    (re.compile(_TIME), _read_time),
    (re.compile(r"¥" + _AMOUNT), lambda match: number(match["value"]) + "人民币"),
    (re.compile(r"\$" + _AMOUNT), lambda match: number(match["value"]) + "美元"),
    (re.compile(_AMOUNT + "(?:RMB|rmb)"), lambda match: number(match["value"]) + "人民币"),
    (re.compile(r"(?P<sign>-?)" + _AMOUNT + "(?P<unit>°C|℃|度|摄氏度)"), _read_temperature),
    (re.compile("[京津沪渝冀豫云辽黑湘皖鲁新苏浙赣鄂桂甘晋蒙陕吉闽贵粤青藏川宁琼使领][0-9a-zA-Z]+"), _read_plate),
    (re.compile(r"(?P<sign>-?)(?P<over>[0-9]+)/(?P<under>[0-9]+)(?P<unit>mmHg|毫米汞柱)?"), _read_fraction),
    (
        re.compile(r"(?P<sign>-?)" + _AMOUNT + "%"),
        lambda match: ("负" if match["sign"] else "") + "百分之" + number(match["value"]),
    ),
    (re.compile(r"(?<![0-9])(?:\+?86 ?)?1(?:[38][0-9]|5[0-35-9]|7[678]|9[89])[0-9]{8}(?![0-9])"), _read_telephone),
    (re.compile(r"(?<![0-9])(?:0(?:10|2[1-3]|[3-9][0-9]{2})-?)?[1-9][0-9]{7,8}(?![0-9])"), _read_telephone),
    (re.compile(r"400-?[0-9]{3}-?[0-9]{4}"), _read_telephone),
    (re.compile(rf"(?P<first>{_UNSIGNED})[-~](?P<second>{_UNSIGNED})"), _read_plain_range),
    (re.compile(r"-(?P<value>[0-9]+)"), lambda match: signed("-", match["value"])),
    (re.compile(r"(?P<sign>-?)(?P<value>[0-9]+\.[0-9]+)|(?P<bare>\.[0-9]+)"), _read_decimal),
    (re.compile(rf"(?P<first>[0-9]+)[至\-~](?P<rest>[0-9]+[多余几来+]?(?:{_MEASURE}))"), _read_measure_range),
    (re.compile(rf"(?P<count>[0-9]+)(?P<more>[多余几来+])?(?P<measure>{_MEASURE})"), _read_measure),
    (re.compile(r"[0-9]{3,}"), _read_digits),
    (_NUMBER, _read_decimal),
)

# In this order: a later row sees what the earlier ones wrote.
_MARKS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), mark)
    for pattern, mark in (
        ("…", "。"),
        ("!", "！"),
        (r"\?", "？"),
        ("[;﹔；｡]", "。"),
        ("[:：,﹐、]", "，"),
        ("。+", "。"),
        ("/", "每"),
        ("_", " "),
        ("[~～]+", "。"),
        ("(?<=[^a-zA-Z])[-']+", "，"),
        ("[-']+(?=[^a-zA-Z])", "，"),
        (f"[^。！？，{CJK}a-zA-Z ]", ""),
        ("，+", "，"),
        (" +", " "),
    )
)


def _keep_speakable(text: str) -> str:
    for pattern, mark in _MARKS:
        text = pattern.sub(mark, text)
    return text
