"""The rotary table of one request, on the host: what `mrope_rotary_cos_sin` of TensorRT-LLM holds.

Per position of the sequence and per frequency the pair (cos, sin), float32, flattened to [max_positions * head_dim].
The table is what makes three-axis positions work: the attention plugin looks a prompt token up by its place in the
sequence, whatever angle stands there. Generated tokens use the engine's own one-axis table at place + delta instead,
which is the same, since their three positions are equal. Reference: `ming_trt/models/rope.py`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ming_trt.config import ROPE_3D, ROPE_VIDEO, LLMConfig
from ming_trt.errors import InputError

Floats = npt.NDArray[np.float32]


def frequency_axes(kind: str, sections: tuple[int, int, int]) -> npt.NDArray[np.int64]:
    """The axis (0 time, 1 height, 2 width) that each of head_dim / 2 frequencies reads."""
    time, height, width = sections
    if kind == ROPE_3D:
        return np.repeat([0, 1, 2], [time, height, width])
    if kind == ROPE_VIDEO:
        return np.concatenate((np.arange(height + width) % 2 + 1, np.zeros(time, np.int64)))
    raise ValueError(f"unknown rope kind {kind!r}")


def rope_table(config: LLMConfig, positions: npt.ArrayLike, delta: int, max_positions: int) -> Floats:
    """float32 [max_positions * head_dim] for the prompt's positions [3, L]; place i >= L has the position i + delta.

    Every request needs one, text too. Raises `InputError` if the prompt is longer than `max_positions`, which is the
    constant that the engine was built with.
    """
    given = np.asarray(positions, np.int64)
    length = given.shape[1]
    if length > max_positions:
        raise InputError(
            f"the prompt has {length} tokens and the engine's rotary table {max_positions} places: shorten the prompt"
        )
    rest = np.arange(length, max_positions) + delta
    places = np.concatenate((given, np.broadcast_to(rest, (3, len(rest)))), axis=1).astype(np.float32)
    half = config.head_dim // 2
    exponents = np.arange(half, dtype=np.float32) * np.float32(2) / np.float32(config.head_dim)
    inverse = np.float32(1) / np.power(np.float32(config.rope_theta), exponents)
    angles = places[frequency_axes(config.rope_kind, config.rope_sections)].T * inverse
    table: Floats = np.stack((np.cos(angles), np.sin(angles)), axis=-1).astype(np.float32).reshape(-1)
    return table
