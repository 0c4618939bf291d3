"""JSON files with checked access: a wrong or missing key is one sentence that names it as a path."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ming_trt.errors import ConfigError

# Far beyond any width, and any number of layers or experts, of a model.
MOST, MOST_LAYERS = 2**31 - 1, 4096
_T = TypeVar("_T", int, float, bool)
_WORDS = {int: "a whole number", float: "a number", bool: "true or false"}


class Section:
    """A JSON object with checked access; errors name the key as a path."""

    def __init__(self, values: Any, name: str, file: Path) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(f"'{name}' in '{file}' is missing or not an object: use the checkpoint's own config.json")
        self.values, self.name, self.file = values, name, file

    def _get(self, key: str, kind: type[_T], default: _T | None) -> _T:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise ConfigError(
                    f"'{self.name}.{key}' is missing in '{self.file}': use the checkpoint's own config.json"
                )
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ConfigError(f"'{self.name}.{key}' in '{self.file}' is {value!r}, expected {_WORDS[kind]}")
        return value

    def count(self, key: str, default: int | None = None, most: int = MOST) -> int:
        """A whole number from 1 to `most`: a damaged one would be looped over for ever."""
        value = self._get(key, int, default)
        if value < 1:
            raise ConfigError(f"'{self.name}.{key}' in '{self.file}' is {value}, expected at least 1")
        if value > most:
            raise ConfigError(f"'{self.name}.{key}' in '{self.file}' is {value}, expected at most {most}")
        return value

    def real(self, key: str, default: float | None = None, above: float = 0.0) -> float:
        """A finite number greater than `above`."""
        value = self._get(key, float, default)
        if not above < value < math.inf:
            limit = "a finite number" if above == -math.inf else f"more than {above:g}"
            raise ConfigError(f"'{self.name}.{key}' in '{self.file}' is {value}, expected {limit}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        return self._get(key, bool, default)

    def head_dim(self, hidden: int, heads: int) -> int:
        """Features of a head: "head_dim", or else an even share of `hidden`. Pairs of them are rotated."""
        size = self.count("head_dim", hidden // heads or None)
        if size % 2:
            raise ConfigError(f"'{self.name}.head_dim' in '{self.file}' is {size}, expected an even number")
        return size

    def refuse(self, key: str, supported: Any, default: Any = None) -> None:
        """Raises unless the setting has the only value that is implemented (absent counts as `default`)."""
        value = self.values.get(key)
        if value is None:
            value = supported if default is None else default
        if value != supported:
            raise ConfigError(
                f"'{self.name}.{key}' is {value!r} in '{self.file}', but only {supported!r} is implemented: "
                "use a checkpoint of Ming-lite-omni v1.5"
            )


def read_json(file: Path) -> Any:
    """The content of a JSON file. Raises `ConfigError` if it is missing or is not JSON."""
    try:
        return json.loads(file.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"no {file.name} in '{file.parent}': give the folder of a Ming-lite-omni checkpoint"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{file}' cannot be read as JSON ({error}): download it again") from None
