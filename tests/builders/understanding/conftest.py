"""Engines of the reference checkpoint, each exported once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from builders.component import ExportOptions
from builders.registry import component
from ming_trt.checkpoint import Checkpoint
from ming_trt.config import MingConfig, load_config
from ming_trt.golden.cases import Cases
from ming_trt.runtime.onnxruntime import OnnxRuntimeEngine

DATA = Path(__file__).parents[2] / "data" / "golden" / "understanding"
# Another folder of the same form (e.g. untrimmed cases, another seed) can be checked with the same tests.
FOLDER = Path(os.environ.get("MING_TRT_TEST_UNDERSTANDING", DATA))

OpenEngine = Callable[..., OnnxRuntimeEngine]


@pytest.fixture(scope="session")
def cases() -> Cases:
    return Cases(FOLDER)


@pytest.fixture(scope="session")
def config() -> MingConfig:
    return load_config(FOLDER / "checkpoint")


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    return Checkpoint(FOLDER / "checkpoint")


@pytest.fixture(scope="session")
def open_engine(config: MingConfig, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> OpenEngine:
    """`open_engine(name, rope="3D", target="onnxruntime", precision="fp32")`."""
    made: dict[tuple[str, ...], OnnxRuntimeEngine] = {}

    def make(name: str, rope: str = "3D", target: str = "onnxruntime", precision: str = "fp32") -> OnnxRuntimeEngine:
        key = (name, rope, target, precision)
        if key not in made:
            changed = dataclasses.replace(config, llm=dataclasses.replace(config.llm, rope_kind=rope))
            folder = tmp_path_factory.mktemp(name)
            component(name).export(changed, checkpoint, folder, ExportOptions(target, precision))
            made[key] = OnnxRuntimeEngine(folder / "model.onnx", name, threads=1)
        return made[key]

    return make
