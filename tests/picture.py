"""Engines and modules of the picture path, made once per test run from the reference checkpoint.

`MING_TRT_TEST_GENERATION` names another folder of the same form (untrimmed cases, another seed).
"""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from builders.component import ExportOptions
from builders.registry import component
from ming_trt.checkpoint import Checkpoint
from ming_trt.config import MingConfig, load_config
from ming_trt.golden.cases import Cases
from ming_trt.runtime.onnxruntime import OnnxRuntimeEngine

FOLDER = Path(os.environ.get("MING_TRT_TEST_GENERATION", Path(__file__).parent / "data" / "golden" / "generation"))
_SCRATCH = tempfile.TemporaryDirectory(prefix="ming-trt-picture-")


@cache
def cases() -> Cases:
    return Cases(FOLDER)


@cache
def config() -> MingConfig:
    return load_config(FOLDER / "checkpoint")


@cache
def checkpoint() -> Checkpoint:
    return Checkpoint(FOLDER / "checkpoint")


@cache
def module(name: str) -> Any:
    """The torch definition of an engine, with weights."""
    return component(name).reference(config(), checkpoint())


@cache
def engine(name: str) -> OnnxRuntimeEngine:
    """The built engine, one thread."""
    folder = Path(_SCRATCH.name) / name
    folder.mkdir()
    component(name).export(config(), checkpoint(), folder, ExportOptions())
    return OnnxRuntimeEngine(folder / "model.onnx", name, threads=1)


def query_rows(kind: str) -> np.ndarray:
    """Hidden rows [256, H] of the last query scale of a `cond` case."""
    mask = cases().array(f"prompt.{kind}.gen_mask").astype(bool)
    rows: np.ndarray = cases().array(f"cond.{kind}.hidden")[mask][-256:]
    return rows


def kinds(group: str) -> list[str]:
    """Which of t2i and edit the (perhaps trimmed) cases have with their condition."""
    names = cases().arrays
    return [k for k in ("t2i", "edit") if f"cond.{k}.hidden" in names and any(group in n and k in n for n in names)]


def no_grad(function: Any, *inputs: Any) -> Any:
    with torch.no_grad():
        return function(*inputs)
