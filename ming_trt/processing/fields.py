"""Checks for values that come from outside as JSON: each takes the field's name and its value, and gives the value back
or raises an `InputError` of one sentence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from ming_trt.errors import InputError

Check = Callable[[str, Any], Any]


def load_object(data: bytes | str | Mapping[str, Any], max_bytes: int) -> Mapping[str, Any]:
    if isinstance(data, bytes | str):
        size = len(data)
        if size > max_bytes:
            raise InputError(f"the request has {size} bytes, more than {max_bytes}: send less text")
        try:
            text = data.decode("utf-8") if isinstance(data, bytes) else data
            data = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
        except UnicodeDecodeError as error:
            raise InputError(f"the request is not UTF-8 (byte {error.start}): encode it as UTF-8 JSON") from None
        except (json.JSONDecodeError, RecursionError, ValueError) as error:
            raise InputError(f"the request is not JSON ({_brief(error)}): send one JSON object") from None
    if not isinstance(data, Mapping):
        raise InputError(f"the request is a JSON {_kind(data)}, not an object: send an object with 'messages'")
    return data


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has the same key twice")
    return result


def fields(where: str, data: Any, known: Mapping[str, Check]) -> dict[str, Any]:
    """Applies one check per key; keys that hold null count as absent."""
    if not isinstance(data, Mapping):
        raise InputError(f"{where} is a JSON {_kind(data)}, not an object")
    unknown = [key for key in data if key not in known]
    if unknown:
        raise InputError(f"{where} has the unknown key '{_brief(unknown[0])}': known are {', '.join(known)}")
    return {key: known[key](key, value) for key, value in data.items() if value is not None}


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"'{name}' is {show(value)}, not true or false")
    return value


def integer(low: int, high: int) -> Check:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InputError(f"'{name}' is {show(value)}: give an integer from {low} to {high}")
        return value

    return check


def number(low: float, high: float, *, above: bool = False) -> Check:
    """A finite number in [low, high], or in (low, high] with `above`."""

    def check(name: str, value: Any) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        good = good and (low < value if above else low <= value) and value <= high
        if not good or not math.isfinite(value):
            relation = "above" if above else "from"
            raise InputError(f"'{name}' is {show(value)}: give a number {relation} {low:g} to {high:g}")
        return float(value)

    return check


def choice(names: tuple[str, ...]) -> Check:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise InputError(f"'{name}' is {show(value)}: choose one of {', '.join(names)}")
        return value

    return check


def string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"'{name}' is {show(value)}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"'{name}' holds half of a surrogate pair, which is no character: send valid text") from None
    return value


def _kind(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def show(value: Any) -> str:
    """A value in an error message: short, printable, and never a whole prompt."""
    try:
        return _brief(json.dumps(value, ensure_ascii=True))
    except (TypeError, ValueError, RecursionError):
        return f"a {_kind(value)}"


def _brief(value: Any) -> str:
    text = str(value).encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= 80 else text[:77] + "..."
