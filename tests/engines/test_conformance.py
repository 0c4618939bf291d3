"""What every back end's engine must do. A new back end adds itself to `BACK_ENDS` and passes this file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from ming_trt.errors import EngineError, UnavailableError
from ming_trt.runtime.engine import Engine, TensorSpec, open_engine
from tests.runtime.fake_tensorrt import open_fake
from tests.runtime.host_device import open_host_engine

KV, D = 2, 4


def open_onnxruntime(path: Path, **options: Any) -> Engine:
    return open_engine(path, "toy", threads=1, **options)


def open_device(path: Path, **options: Any) -> Engine:
    """TensorRT's engine class over a device of host memory and ONNX Runtime as its plan: the host's part of it."""
    return open_host_engine(path, "toy", **options)


def open_captured(path: Path, **options: Any) -> Engine:
    """The same with runs captured as graphs, and caches that the plan copies instead of writing them in place."""
    return open_host_engine(path, "toy", in_place=False, capture=True, **options)


BACK_ENDS: dict[str, Callable[..., Engine]] = {
    "onnxruntime": open_onnxruntime,
    "device": open_device,
    "device, captured": open_captured,
    "tensorrt's calls": open_fake,
}


def toy(path: Path) -> Path:
    """`total` = x + sum of the cache, `chosen` = x or 1 / x, and a cache [B, 2, T, 4] that is written in place."""
    cache = ["B", KV, "T", D]
    graph = helper.make_graph(
        [
            helper.make_node("TensorScatter", ["past", "new", "write_index"], ["present"]),
            helper.make_node("ReduceSum", ["present"], ["content"], keepdims=0),
            helper.make_node("Add", ["x", "content"], ["total"]),
            helper.make_node("Reciprocal", ["x"], ["inverse"]),
            helper.make_node("Where", ["flag", "x", "inverse"], ["chosen"]),
        ],
        "toy",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, ["N", 1]),
            helper.make_tensor_value_info("past", TensorProto.FLOAT, cache),
            helper.make_tensor_value_info("new", TensorProto.FLOAT, ["B", KV, "S", D]),
            helper.make_tensor_value_info("write_index", TensorProto.INT64, ["B"]),
        ],
        [
            helper.make_tensor_value_info("total", TensorProto.FLOAT, ["N", 3]),
            helper.make_tensor_value_info("chosen", TensorProto.FLOAT, ["N", 3]),
            helper.make_tensor_value_info("present", TensorProto.FLOAT, cache),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def feeds(rows: int = 2, batch: int = 1, capacity: int = 6, new: int = 1) -> dict[str, np.ndarray]:
    return {
        "x": np.arange(1, 3 * rows + 1, dtype=np.float32).reshape(rows, 3),
        "flag": np.ones((rows, 1), np.bool_),
        "past": np.zeros((batch, KV, capacity, D), np.float32),
        "new": np.ones((batch, KV, new, D), np.float32),
        "write_index": np.zeros(batch, np.int64),
    }


@pytest.fixture(params=list(BACK_ENDS))
def back_end(request: pytest.FixtureRequest) -> Iterator[Callable[..., Engine]]:
    """Opens engines of one kind, and closes them after the test: a plan stays loaded as long as one of it is open."""
    with ExitStack() as opened:

        def open_one(path: Path, **options: Any) -> Engine:
            engine = BACK_ENDS[request.param](path, **options)
            opened.callback(engine.close)
            return engine

        yield open_one


@pytest.fixture
def engine(back_end: Callable[..., Engine], tmp_path: Path) -> Engine:
    return back_end(toy(tmp_path / "toy.onnx"))


def test_it_describes_its_tensors(engine: Engine) -> None:
    assert engine.name == "toy"
    assert engine.inputs["x"] == TensorSpec("x", np.dtype(np.float32), ("N", 3))
    assert engine.inputs["flag"].dtype == np.bool_
    assert str(engine.inputs["past"]) == "float32 [B, 2, T, 4]"
    assert list(engine.outputs) == ["total", "chosen", "present"]


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_it_runs_for_any_size(engine: Engine, rows: int) -> None:
    given = feeds(rows, batch=2, new=3)
    results = engine.run(given)
    assert list(results) == ["total", "chosen", "present"]
    np.testing.assert_array_equal(results["total"], given["x"] + 2 * KV * 3 * D)
    np.testing.assert_array_equal(results["present"][:, :, :3], 1)
    np.testing.assert_array_equal(given["past"], 0)


def test_it_takes_no_rows(engine: Engine) -> None:
    assert engine.run(feeds(rows=0), ["chosen"])["chosen"].shape == (0, 3)


def test_it_gives_what_was_asked_for(engine: Engine) -> None:
    assert list(engine.run(feeds(), ["chosen"])) == ["chosen"]
    assert engine.run(feeds(), [], {"present": np.empty((1, KV, 6, D), np.float32)}).keys() == {"present"}


def test_an_output_may_be_written_over_its_input(engine: Engine) -> None:
    cache = np.zeros((3, KV, 6, D), np.float32)
    for step in range(4):
        given = feeds(batch=2) | {"past": cache[:2], "write_index": np.array([step, 5 - step])}
        given["new"] *= step + 1
        results = engine.run(given, ["total"], {"present": cache[:2]})
        assert np.shares_memory(results["present"], cache)
    np.testing.assert_array_equal(cache[0, 0, :, 0], [1, 2, 3, 4, 0, 0])
    np.testing.assert_array_equal(cache[1, 1, :, 3], [0, 0, 4, 3, 2, 1])
    np.testing.assert_array_equal(cache[2], 0)


def test_results_outlive_the_next_run(engine: Engine) -> None:
    first = engine.run(feeds())["total"]
    copy = first.copy()
    engine.run(feeds() | {"x": np.full((2, 3), 9, np.float32)})
    np.testing.assert_array_equal(first, copy)


def test_inputs_need_not_be_contiguous(engine: Engine) -> None:
    given = feeds()
    x = np.asfortranarray(given["x"])
    np.testing.assert_array_equal(engine.run(given | {"x": x})["total"], engine.run(given)["total"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "lacks 'x'"),
        ({"y": np.zeros(1)}, "got 'y', which it does not have"),
        ({"x": np.zeros((2, 3))}, r"got float64 \[2, 3\] for 'x': it takes float32 \[N, 3\]"),
        ({"x": np.zeros((2, 4), np.float32)}, r"got \[2, 4\] for 'x'"),
        ({"x": np.zeros(3, np.float32)}, r"got float32 \[3\] for 'x'"),
        ({"flag": np.ones((3, 1), np.bool_)}, "'x' says that N is 2"),
        ({"x": [[1.0, 2.0, 3.0]]}, "got a list for 'x'"),
    ],
)
def test_feeds_that_do_not_fit_are_named(engine: Engine, change: dict[str, Any], message: str) -> None:
    given = {name: value for name, value in (feeds() | change).items() if value is not None}
    with pytest.raises(EngineError, match=message):
        engine.run(given)


def test_outputs_that_do_not_fit_are_named(engine: Engine) -> None:
    with pytest.raises(EngineError, match="no output 'logits'"):
        engine.run(feeds(), ["logits"])
    with pytest.raises(EngineError, match="C-contiguous"):
        engine.run(feeds(), [], {"total": np.empty((3, 2), np.float32).T})
    with pytest.raises(EngineError, match="got float64"):
        engine.run(feeds(), [], {"total": np.empty((2, 3))})
    with pytest.raises(EngineError, match="toy"):
        engine.run(feeds(), [], {"total": np.empty((5, 3), np.float32)})
    assert engine.run(feeds())["total"].shape == (2, 3)


def test_values_that_are_not_finite_are_errors_where_it_was_told_to_look(
    back_end: Callable[..., Engine], tmp_path: Path
) -> None:
    path = toy(tmp_path / "toy.onnx")
    bad = feeds() | {"x": np.zeros((2, 3), np.float32), "flag": np.zeros((2, 1), np.bool_)}
    checking = back_end(path, finite=["chosen"])
    with pytest.raises(EngineError, match="engine 'toy' gave 6 of 6 values of 'chosen' that are not finite"):
        checking.run(bad)
    assert np.isfinite(checking.run(bad, ["total"])["total"]).all()
    assert np.isinf(back_end(path).run(bad)["chosen"]).all()
    with pytest.raises(EngineError, match="no output 'rows'"):
        back_end(path, finite=["rows"])


def test_a_closed_engine_says_so(engine: Engine) -> None:
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run(feeds())


def test_memory_can_be_given_back_after_each_run(back_end: Callable[..., Engine], tmp_path: Path) -> None:
    engine = back_end(toy(tmp_path / "toy.onnx"), shrink_memory=True)
    for rows in (1, 500, 3):
        assert engine.run(feeds(rows), ["total"])["total"].shape == (rows, 3)


def test_files_that_cannot_be_loaded_are_named(back_end: Callable[..., Engine], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no file"):
        back_end(tmp_path / "absent.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(EngineError, match="cannot be loaded"):
        back_end(tmp_path / "broken.onnx")


def test_a_path_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"give a \.onnx file or a bundle"):
        open_engine(tmp_path / "model.plan", "toy")


class ForeignBundle:
    """A bundle built for a machine that this is not."""

    def model_path(self, name: str) -> Path:
        return Path("model.plan")

    def component(self, name: str) -> Any:
        return type("Entry", (), {"target": "tensorrt"})()


def test_an_engine_of_another_target_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> str:
        raise UnavailableError("there is no NVIDIA driver")

    monkeypatch.setattr("ming_trt.runtime.tensorrt.gpu_capability", absent)
    with pytest.raises(UnavailableError, match="was built for 'tensorrt'"):
        open_engine(ForeignBundle(), "llm")  # type: ignore[arg-type]
