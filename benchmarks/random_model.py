"""Engines of true width with random weights: configurations, weights from the seed alone, and their ONNX files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from harness import CACHE

from builders.code import code_version
from builders.component import ExportOptions
from builders.main_shard import MainShardComponent
from ming_trt.config import AudioConfig, LLMConfig, MingConfig, TokenIds, VisionConfig

# Ming-lite-omni v1.5, but for depths and the vocabulary, which the scripts choose.
_LLM = LLMConfig(
    vocab_size=1024, hidden_size=2048, num_layers=4, num_heads=16, num_kv_heads=4, head_dim=128, num_experts=64,
    top_k=6, expert_width=1408, shared_width=2816, norm_eps=1e-5, rope_theta=600000.0, rope_kind="3D",
    rope_sections=(16, 24, 24), max_positions=32768, normalize_top_k=True, multi_gate=True, tie_embeddings=False,
)  # fmt: skip
_VISION = VisionConfig(
    num_layers=4, hidden_size=1280, num_heads=16, mlp_width=3456, in_channels=3, patch_size=14, temporal_patch=2,
    merge_size=2, window_size=112, full_attention=(3,), out_size=8192,
)  # fmt: skip
_AUDIO = AudioConfig(
    num_mels=128, max_positions=15000, hidden_size=1280, num_heads=20, num_layers=4, normalize_rows=True
)
OFFICIAL_VOCABULARY = 126464


def config(tiny: bool = False, **llm: int) -> MingConfig:
    """Four layers of each component at true width; `tiny`: at a width that only shows that a script runs."""
    language, vision, audio = dataclasses.replace(_LLM, **llm), _VISION, _AUDIO
    if tiny:
        language = dataclasses.replace(
            language, hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=128, num_experts=8, top_k=2,
            expert_width=128, shared_width=256, num_layers=2,
        )  # fmt: skip
        vision = dataclasses.replace(vision, hidden_size=160, num_heads=2, mlp_width=256, out_size=256)
        audio = dataclasses.replace(audio, hidden_size=128, num_heads=2, max_positions=3000)
    return MingConfig(language, vision, audio, TokenIds(*range(1, 11)))


class RandomCheckpoint:
    """Stands for a checkpoint: every tensor exists, in bfloat16, with values that follow from its name.

    Matrices are N(0, 1 / fan-in), so that activations stay near unit size, and bfloat16 candidates have the very
    weights of float32 ones. Numbers come from one table, each tensor's from a place of its own: two thousand million
    of them would take a quarter of a minute every time.
    """

    def __contains__(self, name: str) -> bool:
        return True

    def info(self, name: str) -> Any:
        return SimpleNamespace(dtype="BF16")

    def require(self, name: str, shape: Sequence[int]) -> None:
        self._shape = tuple(shape)

    def read(self, name: str) -> torch.Tensor:
        """The tensor of the shape that was required last (sources require a tensor right before they read it)."""
        shape = self._shape
        numbers = _normal(zlib.crc32(name.encode()), math.prod(shape)).reshape(shape)
        if len(shape) == 1:
            ones = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
            return (ones + 0.1 * numbers).bfloat16()
        return (numbers * math.prod(shape[1:]) ** -0.5).bfloat16()


@cache
def _table() -> torch.Tensor:
    # an odd size: where a tensor is longer, its rows do not repeat
    return torch.randn((1 << 24) - 3, generator=torch.Generator().manual_seed(0))


def _normal(place: int, count: int) -> torch.Tensor:
    """`count` numbers of the table from `place` on, round and round."""
    table = _table()
    start = place % len(table)
    parts = [table[start : start + count]]
    while (missing := count - sum(map(len, parts))) > 0:
        parts.append(table[:missing])
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def engine_file(component: MainShardComponent, model: MingConfig, precision: str) -> Path:
    """The ONNX file of `component`, made unless it is there already.

    Its folder is named after all that it depends on: configuration, precision, and the code that makes it.
    """
    label = json.dumps([component.config_key(model), component.many_rows], sort_keys=True, default=str)
    key = label + precision + code_version(type(component).__module__)
    folder = CACHE / f"{component.name}-{precision}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    file = folder / "model.onnx"
    if not file.is_file():
        _forget_others(f"{component.name}-{precision}", label)
        component.export(model, RandomCheckpoint(), folder, ExportOptions("onnxruntime", precision))  # type: ignore[arg-type]
        (folder / "label").write_text(label)
    return file


def _forget_others(stem: str, label: str) -> None:
    """Removes what an older state of the code made: gigabytes each."""
    for folder in CACHE.glob(f"{stem}-*"):
        mark = folder / "label"
        if mark.is_file() and mark.read_text() == label:
            shutil.rmtree(folder)
