"""The engine `rope_table`: its graph on ONNX Runtime, its step of the build, and the compiled host reference."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import tensorrt_build, trtllm_rope
from builders.steps import Context
from ming_trt import presets
from ming_trt.bundle import NOT_RUN
from ming_trt.config import ROPE_3D, ROPE_VIDEO, load_config
from ming_trt.errors import InputError
from ming_trt.runtime.engine import open_engine
from ming_trt.trtllm.rope_table import EngineTable, HostTable, frequency_axes, inverse_frequencies, rope_table
from tests.conftest import UNDERSTANDING
from tests.plugins import binding

CONFIG = load_config(UNDERSTANDING / "checkpoint").llm
OFFICIAL = dataclasses.replace(CONFIG, head_dim=128, rope_sections=(16, 24, 24), rope_theta=6e5)
PLACES = 96
# cos and sin are rounded by other libraries: an ulp of numbers up to 1
ULP = 2.0**-23


@pytest.fixture(scope="module", params=[ROPE_3D, ROPE_VIDEO])
def tables(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EngineTable, HostTable]]:
    config = dataclasses.replace(OFFICIAL, rope_kind=request.param)
    path = tmp_path_factory.mktemp("rope") / "model.onnx"
    path.write_bytes(trtllm_rope.graph(config, PLACES).SerializeToString())
    engine = EngineTable(open_engine(path, "rope_table"), config, PLACES)
    yield engine, HostTable(config, PLACES)
    engine.close()


@given(length=st.integers(1, PLACES), delta=st.integers(-60, 60), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_engine_and_host_make_one_table(
    tables: tuple[EngineTable, HostTable], length: int, delta: int, seed: int
) -> None:
    engine, host = tables
    positions = np.random.default_rng(seed).integers(-50, 3000, (3, length))
    np.testing.assert_allclose(engine(positions, delta), host(positions, delta), rtol=0, atol=ULP)


def test_text_has_one_table(tables: tuple[EngineTable, HostTable]) -> None:
    engine, host = tables
    text = np.tile(np.arange(30), (3, 1))
    assert host(text, 0) is host(text[:, :7], 0)
    assert host(text, 1) is not host(text, 0)
    np.testing.assert_allclose(engine(text, 0), host(text, 0), rtol=0, atol=ULP)
    for each in (engine, host):
        with pytest.raises(InputError, match="97 tokens and the engine's rotary table 96 places"):
            each(np.zeros((3, PLACES + 1)), 0)


@pytest.mark.parametrize("kind", [ROPE_3D, ROPE_VIDEO])
def test_host_table_is_the_plugins_host_reference(kind: str) -> None:
    """Angles bit for bit, which is what positions of thousands need; cos and sin within an ulp."""
    config = dataclasses.replace(OFFICIAL, rope_kind=kind)
    axes = frequency_axes(kind, config.rope_sections).tolist()
    theta = ctypes.c_float(config.rope_theta)
    library, argument, half = binding.host_library(), binding.axes_argument(axes), len(axes)
    inverse = np.empty(half, np.float32)
    assert library.ming_frequencies_host(argument, half, theta, inverse.ctypes.data) == 0
    assert np.array_equal(inverse, inverse_frequencies(config))
    positions = np.random.default_rng(3).integers(0, 16000, (3, 300))
    delta, made = np.array([-70], np.int64), np.empty((1024, half, 2), np.float32)
    status = library.ming_mrope_table_host(
        positions.ctypes.data, 8, 300, delta.ctypes.data, 8, argument, half, theta, 1024, made.ctypes.data
    )
    assert status == 0
    np.testing.assert_allclose(rope_table(config, positions, -70, 1024), made.reshape(-1), rtol=0, atol=ULP)


def test_step_compiles_the_node_with_the_named_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a library the step is skipped with the reason; with one TensorRT gets the node and a whole profile."""
    preset = presets.load("h200-fp8")
    skipped = trtllm_rope.steps(preset, CONFIG, PLACES, tmp_path)
    assert [step.name for step in skipped] == ["rope_table", "gate:rope_table"]
    assert "no plugin library" in skipped[0].skip
    library = tmp_path / "libming_plugins.so"
    library.write_bytes(b"x")
    monkeypatch.setenv(tensorrt_build.PLUGINS_VARIABLE, str(library))
    seen: dict[str, Any] = {}

    class Built:
        def as_dict(self) -> dict[str, Any]:
            return {"stamp": {"version": "10.14.1.48", "devices": ["sm90"]}}

    def compile_plan(path: Path, inputs: Any, phases: Any, folder: Path, chosen: Any, report: Any) -> Built:
        import onnx

        (node,) = onnx.load(path).graph.node
        seen.update(node=node, shapes=phases[0].shapes(inputs), plugins=chosen.plugins)
        (folder / "model.plan").write_bytes(b"plan")
        return Built()

    monkeypatch.setattr(trtllm_rope, "compile_plan", compile_plan)
    monkeypatch.setattr(trtllm_rope, "sha256", lambda _: "digest")
    step, gate = trtllm_rope.steps(dataclasses.replace(preset, target="tensorrt"), CONFIG, PLACES, tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    facts = dict(step.run(Context(work, {}, {})))
    assert facts["model"] == "rope_table/model.plan" and facts["target"] == "tensorrt"
    assert seen["node"].op_type == "MRopeTable" and seen["node"].domain == "ming"
    assert seen["shapes"]["position_ids"] == ((3, 1), (3, PLACES), (3, PLACES)) and seen["plugins"] == (library,)
    assert [path.name for path in work.iterdir()] == ["model.plan"]
    report = gate.run(Context(work, {}, {"rope_table": facts}))
    assert report["verdict"] == NOT_RUN and "for sm90, not run" in report["reason"]
