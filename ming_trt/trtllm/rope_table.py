"""The rotary table of one request, on the host: what `mrope_rotary_cos_sin` of TensorRT-LLM holds.

Per position of the sequence and per frequency the pair (cos, sin), float32, flattened to [max_positions * head_dim].
The table is what makes three-axis positions work: the attention plugin looks a prompt token up by its place in the
sequence, whatever angle stands there. Generated tokens use the engine's own one-axis table at place + delta instead,
which is the same, since their three positions are equal. Reference: `ming_trt/models/rope.py`.

A bundle may hold a small engine `rope_table` that makes the table with the plugin of `plugins/mrope`; else it is made
here in numpy.
"""

from __future__ import annotations

import threading
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ming_trt.config import ROPE_3D, ROPE_VIDEO, LLMConfig
from ming_trt.errors import EngineError, InputError
from ming_trt.runtime.engine import Engine

Floats = npt.NDArray[np.float32]
COMPONENT = "rope_table"


class RopeTable(Protocol):
    """Makes the rotary tables of requests, from any thread."""

    def __call__(self, positions: npt.ArrayLike, delta: int) -> Floats:
        """As `rope_table`. The array must not be written to: requests may share it."""
        ...

    def close(self) -> None:
        """Frees what it holds. Closing twice is harmless."""
        ...


def frequency_axes(kind: str, sections: tuple[int, int, int]) -> npt.NDArray[np.int64]:
    """The axis (0 time, 1 height, 2 width) that each of head_dim / 2 frequencies reads."""
    time, height, width = sections
    if kind == ROPE_3D:
        return np.repeat([0, 1, 2], [time, height, width])
    if kind == ROPE_VIDEO:
        return np.concatenate((np.arange(height + width) % 2 + 1, np.zeros(time, np.int64)))
    raise ValueError(f"unknown rope kind {kind!r}")


def inverse_frequencies(config: LLMConfig) -> Floats:
    """Radians per unit of position, float32 [head_dim / 2], in the reference's order of operations."""
    exponents = np.arange(config.head_dim // 2, dtype=np.float32) * np.float32(2) / np.float32(config.head_dim)
    # numpy's own float32 power is an ulp off here and there, and an ulp is an angle of position * 2^-24
    powers = np.power(np.float64(np.float32(config.rope_theta)), exponents.astype(np.float64)).astype(np.float32)
    inverse: Floats = np.float32(1) / powers
    return inverse


def rope_table(config: LLMConfig, positions: npt.ArrayLike, delta: int, max_positions: int) -> Floats:
    """float32 [max_positions * head_dim] for the prompt's positions [3, L]; place i >= L has the position i + delta.

    Every request needs one, text too. Raises `InputError` if the prompt is longer than `max_positions`, which is the
    constant that the engine was built with.
    """
    given = np.asarray(positions, np.int64)
    length = given.shape[1]
    _check_length(length, max_positions)
    rest = np.arange(length, max_positions) + delta
    places = np.concatenate((given, np.broadcast_to(rest, (3, len(rest)))), axis=1).astype(np.float32)
    angles = places[frequency_axes(config.rope_kind, config.rope_sections)].T * inverse_frequencies(config)
    table: Floats = np.stack((np.cos(angles), np.sin(angles)), axis=-1).astype(np.float32).reshape(-1)
    return table


class HostTable:
    """Tables made in numpy. Text has the same one whatever its length, which is made once."""

    def __init__(self, config: LLMConfig, max_positions: int) -> None:
        self._config, self._positions = config, max_positions
        self._text = rope_table(config, np.zeros((3, 0), np.int64), 0, max_positions)

    def __call__(self, positions: npt.ArrayLike, delta: int) -> Floats:
        given = np.asarray(positions, np.int64)
        plain = delta == 0 and given.shape[1] <= self._positions and bool((given == np.arange(given.shape[1])).all())
        return self._text if plain else rope_table(self._config, given, delta, self._positions)

    def close(self) -> None:
        """Nothing is held."""


class EngineTable:
    """Tables made by the engine `rope_table` (inputs `position_ids` int64 [3, L], `delta` int64 [1]; output `table` f32
    [max_positions, head_dim / 2, 2]), one at a time."""

    def __init__(self, engine: Engine, config: LLMConfig, max_positions: int) -> None:
        self._engine, self._positions, self._size = engine, max_positions, max_positions * config.head_dim
        self._lock = threading.Lock()

    def __call__(self, positions: npt.ArrayLike, delta: int) -> Floats:
        given = np.ascontiguousarray(positions, np.int64)
        _check_length(given.shape[1], self._positions)
        with self._lock:
            feeds = {"position_ids": given, "delta": np.array([delta], np.int64)}
            table = self._engine.run(feeds, ["table"])["table"]
        if table.size != self._size:
            raise EngineError(
                f"engine '{self._engine.name}' gave a table of {list(table.shape)} for {self._positions} positions: "
                "build the bundle again"
            )
        return table.reshape(-1)

    def close(self) -> None:
        """Frees the engine."""
        self._engine.close()


def _check_length(length: int, max_positions: int) -> None:
    if length > max_positions:
        raise InputError(
            f"the prompt has {length} tokens and the engine's rotary table {max_positions} places: shorten the prompt"
        )
