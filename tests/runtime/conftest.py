"""The tiny LLM as an engine, written once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ming_trt.runtime.engine import Engine, open_engine

from .tiny_llm import write


@pytest.fixture(scope="session")
def tiny_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = open_engine(write(tmp_path_factory.mktemp("tiny") / "model.onnx"), "llm", threads=1)
    yield engine
    engine.close()
