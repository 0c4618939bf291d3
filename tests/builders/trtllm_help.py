"""What the tests of the TensorRT-LLM export share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from builders.trtllm import config_json
from builders.trtllm_layout import layout, parallel
from builders.trtllm_write import Exporter, rank_file
from ming_trt.checkpoint import Checkpoint
from ming_trt.config import MingConfig, load_config

POSITIONS = 256


def store_as(source: Path, folder: Path, dtype: torch.dtype) -> Path:
    """A copy of a checkpoint with all tensors rounded to `dtype`."""
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    checkpoint = Checkpoint(source)
    save_file({name: checkpoint.read(name).to(dtype) for name in checkpoint.names()}, folder / "model.safetensors")
    return folder


def export(
    source: Path,
    folder: Path,
    precision: str,
    tp: int = 1,
    ep: int = 1,
    scales: dict[str, float] | None = None,
    *,
    fp8_cache: bool = False,
    rope: str | None = None,
) -> MingConfig:
    """Writes rank files and config.json as the build does, without a bundle."""
    config = load_config(source)
    made = layout(config.llm, parallel(config.llm, tp, ep))
    Exporter(Checkpoint(source), made, precision, scales, fp8_cache=fp8_cache).run(folder, "key")
    content = config_json(config.llm, made, precision, POSITIONS, fp8_cache=fp8_cache)
    (folder / "config.json").write_text(json.dumps(content))
    return config


def read(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    """All tensors of a rank file."""
    with safe_open(folder / rank_file(rank), framework="pt") as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}


def sqnr_db(got: torch.Tensor, expected: torch.Tensor) -> float:
    """10 log10 of signal over error power."""
    error = (got.double() - expected.double()).square().sum()
    return float(10 * np.log10(float(expected.double().square().sum() / error)))
