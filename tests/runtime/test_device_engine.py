"""Engines on a device: what is kept between runs, when runs are captured and captured anew, and what is refused.

The device is host memory and the plan ONNX Runtime (`host_device.py`): this is the host's logic, not a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from ming_trt.errors import EngineError
from ming_trt.runtime import engine as engines
from ming_trt.runtime.device import Range
from ming_trt.runtime.device_engine import DeviceEngine
from ming_trt.runtime.onnxruntime import OnnxRuntimeEngine

from .host_device import HostQueue, OrtContext, OrtPlan, open_host_engine

WIDTH = 64  # a row of 256 bytes: rows of device arrays are aligned


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`y` = x + the sum of what is in the cache [B, 1, T, 64] after `new` was written to it at `write_index`."""
    cache = ["B", 1, "T", WIDTH]
    graph = helper.make_graph(
        [
            helper.make_node("TensorScatter", ["past", "new", "write_index"], ["present"]),
            helper.make_node("ReduceSum", ["present"], ["content"], keepdims=0),
            helper.make_node("Add", ["x", "content"], ["y"]),
            helper.make_node("Mul", ["x", "x"], ["square"]),
        ],
        "cached",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"]),
            helper.make_tensor_value_info("past", TensorProto.FLOAT, cache),
            helper.make_tensor_value_info("new", TensorProto.FLOAT, ["B", 1, "S", WIDTH]),
            helper.make_tensor_value_info("write_index", TensorProto.INT64, ["B"]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"]),
            helper.make_tensor_value_info("square", TensorProto.FLOAT, ["N"]),
            helper.make_tensor_value_info("present", TensorProto.FLOAT, cache),
        ],
    )
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11), path)
    return path


def feeds(cache: Any, x: float = 1, rows: int = 1, at: int = 0, tokens: int = 1, count: int = 2) -> dict[str, Any]:
    return {
        "x": np.full(count, x, np.float32),
        "past": cache,
        "new": np.full((rows, 1, tokens, WIDTH), x, np.float32),
        "write_index": np.full(rows, at, np.int64),
    }


def opened(path: Path, **options: Any) -> tuple[DeviceEngine, HostQueue, OrtPlan]:
    engine = open_host_engine(path, "cached", **options)
    plan, queue = engine._plan, engine._queue
    assert isinstance(plan, OrtPlan) and isinstance(queue, HostQueue)
    return engine, queue, plan


def test_a_repeated_run_is_captured_after_its_second_and_launched_from_then_on(model: Path) -> None:
    engine, queue, _ = opened(model, capture=True)
    cache = engine.zeros((1, 1, 8, WIDTH), np.float32)
    for step in range(6):
        result = engine.run(feeds(cache, step + 1, at=step), ["y"], {"present": cache})
        np.testing.assert_array_equal(result["y"], step + 1 + WIDTH * sum(range(step + 2)))
        assert result["present"] is cache
    assert (engine.counts.runs, engine.counts.captured, engine.counts.launched) == (6, 1, 4)
    assert queue.launches == 4 and queue.alive_graphs == 1
    engine.close()
    assert queue.closed


def test_another_address_or_shape_is_another_graph(model: Path) -> None:
    engine, queue, _ = opened(model, capture=True)
    caches = [engine.zeros((2, 1, 8, WIDTH), np.float32) for _ in range(2)]
    for _ in range(3):
        for cache in caches:
            for rows in (1, 2):
                engine.run(feeds(cache[:rows], rows=rows), ["y"], {"present": cache[:rows]})
    assert (engine.counts.captured, engine.counts.launched, queue.alive_graphs) == (4, 4, 4)
    # what goes to the host belongs to it as well
    for _ in range(3):
        engine.run(feeds(caches[0][:1]), ["y", "square"], {"present": caches[0][:1]})
    assert engine.counts.captured == 5


def test_a_graph_is_captured_anew_when_buffers_move(model: Path) -> None:
    engine, queue, _ = opened(model, capture=True)
    cache = engine.zeros((1, 1, 8, WIDTH), np.float32)

    def step(count: int) -> None:
        result = engine.run(feeds(cache, 2, count=count), ["y"], {"present": cache})
        np.testing.assert_array_equal(result["y"], 2 + 2 * WIDTH)

    for _ in range(3):
        step(2)
    assert engine.counts.captured == 1
    step(5000)
    for _ in range(2):
        step(2)
    assert engine.counts.captured == 2 and queue.alive_graphs == 1
    step(2)
    assert engine.counts.launched == 3


def test_a_larger_profile_moves_the_working_memory(model: Path) -> None:
    """Profiles share it; contexts made before get the new place, graphs of the old one are not launched."""
    shapes = {"x": (1,), "past": (1, 1, 8, WIDTH), "new": (1, 1, 1, WIDTH), "write_index": (1,)}
    small = {name: Range(shape, shape) for name, shape in shapes.items()}
    large = {name: Range(shape, (5, *shape[1:]) if name == "x" else shape) for name, shape in shapes.items()}
    queue = HostQueue()
    plan = OrtPlan(model, "cached", True, [small, large], (1000, 5000))
    engine = DeviceEngine("cached", plan, queue, capture=True)
    cache = engine.zeros((1, 1, 8, WIDTH), np.float32)
    for count in (1, 1, 1, 5, 1, 1, 5, 5):
        engine.run(feeds(cache, count=count), ["y"], {"present": cache})
    # one for each profile, and one for the graph
    assert len(plan.contexts) == 3 and len({context.scratch for context in plan.contexts[1:]}) == 1
    # runs of the second profile are not captured
    assert engine.counts.captured == 2 and engine.counts.launched == 2 and engine.memory()["scratch"] == 5120
    with pytest.raises(EngineError, match=r"got \[6\] for 'x', and its plan takes \[1\] to \[5\] \(profile 2 of 2\)"):
        engine.run(feeds(cache, count=6), ["y"], {"present": cache})


def test_what_cannot_be_captured_runs_piece_by_piece_and_is_counted(model: Path) -> None:
    engine, queue, _ = opened(model, capture=True)
    queue.fail_capture = "cudaStreamEndCapture failed: operation not permitted"
    cache = engine.zeros((1, 1, 8, WIDTH), np.float32)
    for step in range(4):
        result = engine.run(feeds(cache, 1, at=step), ["y"], {"present": cache})
        np.testing.assert_array_equal(result["y"], 1 + WIDTH * (step + 1))
    assert engine.counts.captured == engine.counts.launched == 0
    assert engine.counts.refused == {queue.fail_capture: 1}


def test_a_graph_without_a_context_of_its_own_is_not_captured(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _, plan = opened(model, capture=True)
    cache = engine.zeros((1, 1, 8, WIDTH), np.float32)
    make = plan.context

    def once(profile: int, queue: HostQueue) -> OrtContext:
        if plan.contexts:
            raise EngineError("TensorRT cannot make an execution context (out of memory)")
        return make(profile, queue)

    monkeypatch.setattr(plan, "context", once)
    for step in range(4):
        result = engine.run(feeds(cache, 1, at=step), ["y"], {"present": cache})
        np.testing.assert_array_equal(result["y"], 1 + WIDTH * (step + 1))
    assert engine.counts.captured == 0 and sum(engine.counts.refused.values()) == 1


def test_graphs_are_bounded_and_the_oldest_go(model: Path) -> None:
    engine, queue, _ = opened(model, capture=True, max_calls=3)
    cache = engine.zeros((1, 1, 8, WIDTH), np.float32)
    for count in range(1, 9):
        for _ in range(3):
            engine.run(feeds(cache, count=count), ["y"], {"present": cache})
    assert engine.counts.captured == 8 and queue.alive_graphs == 3


def test_one_wait_a_run_and_no_memory_after_the_first(model: Path) -> None:
    engine, queue, _ = opened(model)
    cache = engine.zeros((1, 1, 8, WIDTH), np.float32)
    engine.run(feeds(cache), ["y"], {"present": cache})
    before, blocks = queue.waits, set(queue.memory)
    for _ in range(5):
        engine.run(feeds(cache), ["y"], {"present": cache})
    assert queue.waits == before + 5 and set(queue.memory) == blocks


def test_memory_is_given_back_where_it_was_asked_for(model: Path) -> None:
    engine, queue, _ = opened(model, shrink_memory=True)
    engine.run(feeds(np.zeros((1, 1, 8, WIDTH), np.float32)))
    assert not queue.memory and not queue.host
    assert engine.memory() == {"weights": model.stat().st_size, "scratch": 0, "buffers": 0}


@settings(max_examples=40)
@given(st.data(), st.booleans(), st.booleans())
def test_any_mix_of_arrays_gives_what_onnxruntime_gives(
    model: Path, data: st.DataObject, in_place: bool, capture: bool
) -> None:
    """Caches of numpy or of the device, written in place, elsewhere, to the host or nowhere; in any order."""
    engine, _, _ = opened(model, in_place=in_place, capture=capture)
    reference = OnnxRuntimeEngine(model, "cached", threads=1)
    held = engine.zeros((3, 1, 4, WIDTH), np.float32)
    spare = engine.zeros((3, 1, 4, WIDTH), np.float32)
    twin = {id(held): np.zeros((3, 1, 4, WIDTH), np.float32), id(spare): np.zeros((3, 1, 4, WIDTH), np.float32)}
    for step in range(data.draw(st.integers(1, 8))):
        rows = data.draw(st.integers(1, 3))
        source = data.draw(st.sampled_from([held, spare, None]))
        target = data.draw(st.sampled_from([held, spare, "host", None]))
        past = np.full((rows, 1, 4, WIDTH), step, np.float32) if source is None else twin[id(source)][:rows]
        given = feeds(past, step + 1, rows, at=data.draw(st.integers(0, 3)), count=data.draw(st.integers(1, 3)))
        expected = reference.run(given)
        into: dict[str, Any] = {}
        if target == "host":
            into = {"present": np.empty((rows, 1, 4, WIDTH), np.float32)}
        elif target is not None:
            into = {"present": target[:rows]}
        outputs = data.draw(st.lists(st.sampled_from(["y", "square", "present"]), unique=True))
        if source is not None:
            given = {**given, "past": source[:rows]}
        results = engine.run(given, outputs, into)
        assert results.keys() == {*outputs, *into}
        for name in results:
            if not isinstance(results[name], np.ndarray):
                twin[id(target)][:rows] = expected[name]
            else:
                np.testing.assert_array_equal(results[name], expected[name])
        for array in (held, spare):
            np.testing.assert_array_equal(array.numpy(), twin[id(array)])
    engine.close()


def test_values_of_arrays_that_stay_are_checked_too(model: Path) -> None:
    engine, _, _ = opened(model, finite=["present"])
    cache = engine.zeros((1, 1, 8, WIDTH), np.float32)
    with pytest.raises(EngineError, match="64 of 512 values of 'present' that are not finite"):
        engine.run(feeds(cache, float("nan")), [], {"present": cache})


def test_arrays_of_another_engine_are_refused(model: Path) -> None:
    (one, _, _), (two, _, _) = opened(model), opened(model)
    cache = one.zeros((1, 1, 8, WIDTH), np.float32)
    with pytest.raises(EngineError, match="device array of another engine for 'past'"):
        two.run(feeds(cache))
    with pytest.raises(EngineError, match="device array of another engine for 'present'"):
        two.run(feeds(np.zeros((1, 1, 8, WIDTH), np.float32)), [], {"present": cache})
    with pytest.raises(EngineError, match=r"got float32 \[1, 1, 8, 64\] for 'x'"):
        one.run(feeds(cache) | {"x": cache})


def test_a_closed_engine_gives_no_memory(model: Path) -> None:
    engine, _, plan = opened(model)
    cache = engine.place(np.ones((1, 1, 8, WIDTH), np.float32))
    np.testing.assert_array_equal(cache.numpy(), 1)  # type: ignore[attr-defined]
    assert engine.place(cache) is cache
    same = engine.place(np.zeros((1, 1, 8, WIDTH), np.float32), cache)
    assert same is cache and not cache.numpy().any()  # type: ignore[attr-defined]
    assert engine.place(np.zeros((2, 1, 8, WIDTH), np.float32), cache) is not cache
    engine.close()
    engine.close()
    assert plan.closed == 1
    for call in (lambda: engine.zeros((1,), np.float32), lambda: engine.place(np.zeros(1)), engine.memory):
        with pytest.raises(EngineError, match="was closed"):
            call()
    del cache


def test_engines_without_memory_of_their_own_use_numpys(model: Path) -> None:
    plain = OnnxRuntimeEngine(model, "cached", threads=1)
    array = np.ones((2, 2), np.float32)
    assert engines.place(plain, array) is array
    assert isinstance(engines.zeros(plain, (2,), np.float32), np.ndarray)
    own, _, _ = opened(model)
    assert not isinstance(engines.place(own, array), np.ndarray)
    with pytest.raises(EngineError, match="got a DeviceArray for 'x'"):
        plain.run(feeds(np.zeros((1, 1, 8, WIDTH), np.float32)) | {"x": engines.place(own, array)})


def test_a_shape_that_depends_on_values_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _, _ = opened(model)
    monkeypatch.setattr(OrtContext, "set_shapes", lambda *_: {"y": (-1,)})
    with pytest.raises(EngineError, match="'y' whose shape depends on values"):
        engine.run(feeds(np.zeros((1, 1, 8, WIDTH), np.float32)))


def test_a_run_that_fails_names_the_engine_and_the_next_one_works(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _, _ = opened(model)
    cache = engine.zeros((1, 1, 8, WIDTH), np.float32)

    def refuse(self: Any) -> None:
        raise EngineError("TensorRT could not queue the run: no memory")

    with monkeypatch.context() as patch:
        patch.setattr(OrtContext, "enqueue", refuse)
        with pytest.raises(EngineError, match=r"engine 'cached' failed \(TensorRT could not queue the run"):
            engine.run(feeds(cache), ["y"], {"present": cache})
    np.testing.assert_array_equal(engine.run(feeds(cache), ["y"], {"present": cache})["y"], 1 + WIDTH)
