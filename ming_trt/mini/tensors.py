"""Random weights and safetensors files for the small checkpoint; numpy only."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def generator(seed: int, component: str) -> np.random.Generator:
    """Random numbers of one component: adding a component leaves the others as they are."""
    return np.random.default_rng([seed, *component.encode()])


def random_weight(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    """Values that keep activations near unit size: matrices N(0, 1 / fan-in), one-dimensional weights (norms) around 1,
    biases N(0, 0.01)."""
    values = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        return values / np.float32(math.sqrt(math.prod(shape[1:])))
    if name.endswith("weight"):
        return 1 + np.float32(0.2) * values
    return np.float32(0.1) * values


def to_bfloat16(values: Array) -> npt.NDArray[np.uint16]:
    """Bits of the nearest bfloat16 (ties to even) of finite values."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def write_safetensors(file: Path, tensors: Mapping[str, Array], dtype: str = "BF16") -> int:
    """Writes `tensors` as "BF16" or "F32". Returns the bytes of data.

    Written here, since the library's numpy interface has no bfloat16: 8 bytes of length, a JSON header, the data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts: list[bytes] = []
    end = 0
    for name, values in sorted(tensors.items()):
        part = (to_bfloat16(values) if dtype == "BF16" else values.astype("<f4")).tobytes()
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [end, end + len(part)]}
        parts.append(part)
        end += len(part)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(b"".join([struct.pack("<Q", len(text)), text, *parts]))
    return end


def write_shards(folder: Path, tensors: Mapping[str, Array], shards: int, stem: str = "model") -> None:
    """Writes `stem-0000k-of-0000n.safetensors` of about equal size, and the index that says which tensor is where."""
    total = sum(values.size for values in tensors.values())
    groups: list[dict[str, Array]] = [{} for _ in range(shards)]
    before = 0
    for name, values in tensors.items():
        groups[min(shards - 1, before * shards // total)][name] = values
        before += values.size
    weight_map: dict[str, str] = {}
    written = 0
    for number, group in enumerate(groups, 1):
        file = f"{stem}-{number:05d}-of-{shards:05d}.safetensors"
        written += write_safetensors(folder / file, group)
        weight_map |= dict.fromkeys(group, file)
    index = {"metadata": {"total_size": written}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
