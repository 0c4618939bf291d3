"""Presets: what a build aims at (target, precision, profile, KV budget, gate), as checked data from a TOML file.

A preset is a file under `engines/`, named by its stem, or any path that ends in `.toml`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ming_trt.errors import ConfigError
from ming_trt.resources import engines_dir

TARGETS = ("onnxruntime", "tensorrt", "tensorrt-rtx", "tensorrt-llm")
PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "int8", "int4", "w8a8")
# What each target's builders can make. A precision that the target lacks is refused before any work.
TARGET_PRECISIONS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("fp32", "int8", "int4", "w8a8"),
    "tensorrt": ("fp32", "fp16", "bf16", "fp8"),
    "tensorrt-rtx": ("fp32", "fp16", "bf16", "fp8"),
    "tensorrt-llm": ("bf16", "fp8"),
}
_LLM_KEYS = ("default", "llm", "llm-checkpoint", "kv_cache")
DEFAULT_PRESETS: Mapping[str, str] = {
    "onnxruntime": "cpu-fp32",
    "tensorrt": "tensorrt-fp8",
    "tensorrt-rtx": "rtx",
    "tensorrt-llm": "h200-fp8",
}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_UNITS |= {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "TB": 10**12, "TIB": 2**40}


def parse_size(text: str | int, what: str = "size") -> int:
    """Bytes of `"12GiB"`, `"500MB"`, `"4G"` (binary) or a plain number. Raises `ConfigError`."""
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise ConfigError(f"{what} is {text!r}: write a size such as '12GiB'")
    digits = str(text).strip().rstrip("BKMGTIbkmgti ")
    unit = str(text).strip()[len(digits) :].strip().upper()
    try:
        value = float(digits)
        scale = _UNITS[unit]
    except (ValueError, KeyError):
        raise ConfigError(f"{what} is '{text}': write a size such as '12GiB', '500MB' or a number of bytes") from None
    if not 0 < value * scale < 2**63:
        raise ConfigError(f"{what} is '{text}': it must be above zero and below 8 EiB")
    return int(value * scale)


@dataclass(frozen=True, slots=True)
class Profile:
    """Limits of a request. A request above one of them is refused with a sentence, not cut.

    `max_seq_len` tokens of prompt and answer together; `slots` requests that decode together; `prefill_chunk` tokens of
    one prefill step; `max_image_tokens` LLM rows of all images and videos of a request (four patches each);
    `max_audio_frames` mel frames (10 ms) of one clip.
    """

    max_seq_len: int = 8192
    slots: int = 4
    prefill_chunk: int = 512
    max_image_tokens: int = 8192
    max_audio_frames: int = 30000

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"profile.{each.name} is {value!r}: it must be a whole number of at least 1")
        if self.prefill_chunk > self.max_seq_len:
            raise ConfigError(
                f"profile.prefill_chunk is {self.prefill_chunk}, above profile.max_seq_len {self.max_seq_len}: lower it"
            )


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What an engine's output must reach against its torch definition to pass the gate.

    `max_relative` = largest absolute difference over the reference's largest magnitude; `min_cosine` over the whole
    output; `min_sqnr_db` = 10·log10(signal power / error power), decibels.
    """

    max_relative: float
    min_cosine: float
    min_sqnr_db: float

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
                raise ConfigError(f"gate.{each.name} is {value!r}: it must be a number")
        if self.max_relative <= 0 or not -1 <= self.min_cosine <= 1:
            raise ConfigError(
                f"gate thresholds are max_relative {self.max_relative}, min_cosine {self.min_cosine}: "
                "the first must be above 0 and the second within -1 and 1"
            )


# By precision: float32 engines differ from torch by the order of summation only.
DEFAULT_THRESHOLDS: Mapping[str, Thresholds] = {
    "fp32": Thresholds(2e-4, 0.999999, 80.0),
    "fp16": Thresholds(2e-2, 0.9999, 40.0),
    "bf16": Thresholds(6e-2, 0.999, 28.0),
    "fp8": Thresholds(2e-1, 0.99, 16.0),
    "int8": Thresholds(1e-1, 0.998, 24.0),
    "int4": Thresholds(5e-1, 0.97, 10.0),
    "w8a8": Thresholds(1e-1, 0.998, 24.0),
}


@dataclass(frozen=True, slots=True)
class Preset:
    """A checked preset. `precision` maps component names to one of `PRECISIONS`, with `default` for the rest;
    `gate` maps component names, or precisions, to thresholds; `threads` 0 means one per core; `kv_budget` bytes of the
    language model's cache, `flow_budget` bytes that the flows of all streamed speech may take together."""

    name: str
    description: str = ""
    target: str = "onnxruntime"
    precision: Mapping[str, str] = field(default_factory=lambda: {"default": "fp32"})
    profile: Profile = field(default_factory=Profile)
    kv_budget: int = 8 * 2**30
    gate: Mapping[str, Thresholds] = field(default_factory=dict)
    threads: int = 0
    device_memory: int = 0
    flow_budget: int = 4 * 2**30

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ConfigError(_unknown("target", self.target, TARGETS))
        for component, precision in self.precision.items():
            self._check_precision(component, precision)
        if isinstance(self.threads, bool) or not isinstance(self.threads, int) or self.threads < 0:
            raise ConfigError(f"threads is {self.threads!r}: it must be 0 (one per core) or more")
        if self.flow_budget < 1:
            raise ConfigError(f"flow_budget is {self.flow_budget!r}: write a size such as '4GiB'")

    def _check_precision(self, component: str, precision: str) -> None:
        if precision not in PRECISIONS:
            raise ConfigError(_unknown(f"precision of {component}", str(precision), PRECISIONS))
        target = self.target
        if target == "tensorrt-llm" and component not in _LLM_KEYS:
            # served beside the language model, as an engine of TensorRT
            target = "tensorrt"
        if precision not in TARGET_PRECISIONS[target]:
            allowed = ", ".join(TARGET_PRECISIONS[target])
            raise ConfigError(
                f"precision of {component} is {precision}, which target {self.target} does not build: use {allowed}"
            )

    def precision_of(self, component: str) -> str:
        """The precision of `component`."""
        return self.precision.get(component, self.precision.get("default", "fp32"))

    def thresholds(self, component: str) -> Thresholds:
        """The gate's thresholds of `component`: its own entry, else its precision's, else the built-in ones."""
        precision = self.precision_of(component)
        return self.gate.get(component) or self.gate.get(precision) or DEFAULT_THRESHOLDS[precision]

    def with_options(self, *, target: str | None = None, precision: str | None = None) -> Preset:
        """A copy with the command line's options: `precision` is a name, or `COMPONENT=NAME` pairs joined by commas."""
        merged: dict[str, str] = dict(self.precision)
        for part in (precision or "").split(",") if precision else ():
            component, _, value = part.strip().rpartition("=")
            if component:
                merged[component.strip()] = value.strip()
            else:
                merged = {"default": value.strip()}
        return replace(self, target=target or self.target, precision=merged)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, for the manifest. `from_dict` reads it back."""
        return asdict(self)


def from_dict(data: Mapping[str, Any], name: str) -> Preset:
    """A preset from parsed TOML or a manifest. Raises `ConfigError`; an unknown key is named with its nearest one."""
    known = [each.name for each in fields(Preset)]
    _check_keys(data, known, f"preset '{name}'")
    values: dict[str, Any] = dict(data)
    values["name"] = name
    values["precision"] = _table(data, "precision", name) or {"default": "fp32"}
    profile = _table(data, "profile", name)
    _check_keys(profile, [each.name for each in fields(Profile)], f"profile of preset '{name}'")
    values["profile"] = Profile(**profile)
    gate: dict[str, Thresholds] = {}
    for key, table in _table(data, "gate", name).items():
        if not isinstance(table, Mapping):
            raise ConfigError(f"gate.{key} of preset '{name}' is {table!r}: write a table with three thresholds")
        wanted = [each.name for each in fields(Thresholds)]
        _check_keys(table, wanted, f"gate.{key} of preset '{name}'")
        missing = [each for each in wanted if each not in table]
        if missing:
            raise ConfigError(f"gate.{key} of preset '{name}' lacks {', '.join(missing)}: add it")
        # 80 and 80.0 are one threshold
        gate[key] = Thresholds(**{name: float(x) if type(x) is int else x for name, x in table.items()})
    values["gate"] = gate
    for key in ("kv_budget", "flow_budget", "device_memory"):
        if data.get(key):
            values[key] = parse_size(data[key], f"{key} of preset '{name}'")
    return Preset(**values)


def names() -> list[str]:
    """Names of the shipped presets."""
    return sorted(path.stem for path in engines_dir().glob("*.toml"))


def load(name: str) -> Preset:
    """The preset of that name, or of that path. Raises `ConfigError` naming the nearest one if it is unknown."""
    path = Path(name) if name.endswith(".toml") else engines_dir() / f"{name}.toml"
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ConfigError(_unknown("preset", name, names())) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"preset '{path}' is not TOML ({error}): correct that line") from None
    return from_dict(data, path.stem)


def default_name(target: str | None) -> str:
    """The preset that a build without `--preset` uses."""
    if target is not None and target not in TARGETS:
        raise ConfigError(_unknown("target", target, TARGETS))
    return DEFAULT_PRESETS[target or "onnxruntime"]


def _table(data: Mapping[str, Any], key: str, name: str) -> dict[str, Any]:
    table = data.get(key, {})
    if not isinstance(table, Mapping):
        raise ConfigError(f"{key} of preset '{name}' is {table!r}: write it as a table, [{key}]")
    return dict(table)


def _check_keys(data: Mapping[str, Any], known: list[str], where: str) -> None:
    for key in data:
        if key not in known:
            raise ConfigError(_unknown(f"key of {where}", key, known))


def _unknown(what: str, value: str, known: tuple[str, ...] | list[str]) -> str:
    near = get_close_matches(value, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(known)}"
    return f"unknown {what} '{value}': {hint}"
