"""The tiny LLM as an engine, written once; also on TensorRT's engine class over a device of host memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ming_trt.runtime.engine import Engine, open_engine

from .host_device import open_host_engine
from .tiny_llm import write


@pytest.fixture(scope="session", params=["onnxruntime", "device"])
def tiny_engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path = write(tmp_path_factory.mktemp("tiny") / "model.onnx")
    if request.param == "onnxruntime":
        engine = open_engine(path, "llm", threads=1)
    else:
        engine = open_host_engine(path, "llm", capture=True)
    yield engine
    engine.close()
