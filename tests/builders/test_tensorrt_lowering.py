"""What replaces operators that TensorRT's parser lacks gives the same numbers in ONNX Runtime."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from builders.component import ExportOptions
from builders.export import save
from builders.functions import add_bodies
from builders.precision import Floats
from builders.tensorrt import Settings, compile_plan
from builders.tensorrt_api import RTX, lacking, release_of
from builders.tensorrt_graph import adapt
from builders.tensorrt_lowering import lower_operators, lower_unfused_attention
from builders.tensorrt_profiles import Phase
from ming_trt.errors import BuildError

OLD = lacking((10, 14))
TYPES = {np.dtype(np.float32): T.FLOAT, np.dtype(np.float16): T.FLOAT16, np.dtype(np.int64): T.INT64}
TYPES[np.dtype(np.bool_)] = T.BOOL
Feeds = Mapping[str, np.ndarray]


def model(operator: str, feeds: Feeds, outputs: int = 1, domain: str = "", **attributes: Any) -> onnx.ModelProto:
    """One node over `feeds`; outputs have the first feed's type."""
    first = next(iter(feeds.values()))
    names = [f"y{k}" for k in range(outputs)]
    node = helper.make_node(operator, list(feeds), names, name="/the/node", domain=domain, **attributes)
    inputs = [helper.make_tensor_value_info(name, TYPES[a.dtype], a.shape) for name, a in feeds.items()]
    given_outputs = [helper.make_tensor_value_info(name, TYPES[first.dtype], [None] * first.ndim) for name in names]
    graph = helper.make_graph([node], "g", inputs, given_outputs)
    imports = [helper.make_opsetid("", 24), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=imports)


def run(proto: onnx.ModelProto, feeds: Feeds) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def lowered(proto: onnx.ModelProto, operators: tuple[str, ...] = OLD) -> onnx.ModelProto:
    changed = ir.from_proto(proto)
    lower_operators(changed, operators)
    result = ir.to_proto(changed)
    assert not {node.op_type for node in result.graph.node} & set(operators)
    onnx.checker.check_model(result)
    return result


def same(proto: onnx.ModelProto, feeds: Feeds, operators: tuple[str, ...] = OLD) -> None:
    # float16: one rounding at another place, of numbers of a few units
    tolerance = 1e-5 if next(iter(feeds.values())).dtype == np.float32 else 1e-2
    for got, expected in zip(run(lowered(proto, operators), feeds), run(proto, feeds), strict=True):
        np.testing.assert_allclose(got, expected, atol=tolerance, rtol=tolerance)
        assert got.dtype == expected.dtype


def test_releases_lack_what_their_changelog_says() -> None:
    assert OLD == ("RMSNormalization", "RotaryEmbedding", "Swish", "TensorScatter")
    assert lacking((11, 4)) == () and "Attention" in lacking((10, 13))
    assert release_of("10.14.1.48") == (10, 14)
    with pytest.raises(BuildError, match="no version"):
        release_of("new")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rms_normalization(dtype: type) -> None:
    rng = np.random.default_rng(0)
    feeds = {"x": (3 * rng.standard_normal((2, 3, 8))).astype(dtype), "scale": rng.standard_normal(8).astype(dtype)}
    same(model("RMSNormalization", feeds, axis=-1, epsilon=1e-2), feeds)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rotary_embedding(dtype: type) -> None:
    rng = np.random.default_rng(1)
    angle = rng.uniform(-9, 9, (2, 5, 4))
    feeds = {"x": rng.standard_normal((2, 3, 5, 8)).astype(dtype), "cos": np.cos(angle).astype(dtype)}
    feeds["sin"] = np.sin(angle).astype(dtype)
    same(model("RotaryEmbedding", feeds), feeds)


@settings(max_examples=15)
@given(batch=st.integers(1, 3), steps=st.integers(1, 4), room=st.integers(0, 5), data=st.data())
def test_tensor_scatter(batch: int, steps: int, room: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(2)
    first = data.draw(st.lists(st.integers(0, room), min_size=batch, max_size=batch))
    feeds = {"cache": rng.standard_normal((batch, 2, steps + room, 4)).astype(np.float32)}
    feeds["update"] = rng.standard_normal((batch, 2, steps, 4)).astype(np.float32)
    feeds["write_index"] = np.array(first)
    same(model("TensorScatter", feeds, axis=-2, mode="linear"), feeds)


@settings(max_examples=15)
@given(
    groups=st.sampled_from([1, 2, 3]),
    kv_heads=st.integers(1, 3),
    mask=st.sampled_from(["none", "bool", "float"]),
    heads_axis=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
)
def test_attention(groups: int, kv_heads: int, mask: str, heads_axis: bool, scale: float | None) -> None:
    rng = np.random.default_rng(3)
    heads, steps, capacity = groups * kv_heads, 4, 7
    # with groups a mask of its own for every head would have to be split too, which no graph here has
    axis = heads if heads_axis and groups == 1 else 1
    feeds = {"q": rng.standard_normal((2, heads, steps, 8)).astype(np.float32)}
    feeds |= {name: rng.standard_normal((2, kv_heads, capacity, 8)).astype(np.float32) for name in "kv"}
    if mask == "bool":
        feeds["mask"] = rng.random((2, axis, steps, capacity)) < 0.6
        feeds["mask"][..., 0] = True
    elif mask == "float":
        feeds["mask"] = rng.standard_normal((2, axis, steps, capacity)).astype(np.float32)
    proto = model("Attention", feeds, **({} if scale is None else {"scale": scale}))
    same(proto, feeds, ("Attention",))


@pytest.mark.parametrize(
    ("heads", "width", "dtype", "count"),
    [
        (4, 64, T.BFLOAT16, 0),
        (4, 256, T.FLOAT16, 0),
        (1, 512, T.BFLOAT16, 1),
        (4, 64, T.FLOAT, 1),
        (2, 64, T.FLOAT16, 1),
    ],
)
def test_attention_without_a_kernel_is_found(heads: int, width: int, dtype: int, count: int) -> None:
    shape = ["B", heads, "S", width]
    values = [helper.make_tensor_value_info(name, dtype, shape) for name in "qkvy"]
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], name="/attention")
    graph = helper.make_graph([node], "g", values[:3], values[3:])
    changed = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)]))
    assert lower_unfused_attention(changed) == count


def test_mish() -> None:
    feeds = {"x": np.linspace(-20, 20, 41, dtype=np.float32)}
    same(model("Mish", feeds), feeds, ("Mish",))


def test_bodies_of_our_operators_are_lowered_too() -> None:
    rng = np.random.default_rng(4)
    feeds = {name: rng.standard_normal((2, heads, 3, 8)).astype(np.float32) for name, heads in (("q", 4), ("k", 2))}
    feeds["position_ids"] = rng.integers(0, 99, (3, 2, 3))
    attributes = {"theta": 1e4, "axes": [0, 1, 2, 0], "plugin_namespace": "ming"}
    proto = ir.from_proto(model("MRope", feeds, 2, "ming", **attributes))
    add_bodies(proto)
    expected = run(ir.to_proto(proto), feeds)
    lower_operators(proto, OLD)
    result = ir.to_proto(proto)
    assert "RotaryEmbedding" not in {node.op_type for function in result.functions for node in function.node}
    for got, value in zip(run(result, feeds), expected, strict=True):
        np.testing.assert_allclose(got, value, atol=1e-5)


@pytest.mark.slow
def test_rtx_builds_what_is_lowered(tmp_path: Path) -> None:
    """All of them in one graph of float16 with sizes that change, as a decoder has them; no operator is left that the
    parser of 10.14 lacks."""
    pytest.importorskip("tensorrt_rtx_libs", reason="TensorRT-RTX is not installed: pip install 'ming-trt[rtx]'")
    heads, width, capacity = 4, 64, 128
    value = helper.make_tensor_value_info
    inputs = [
        value("x", T.FLOAT16, ["B", heads, "S", width]),
        value("position_ids", T.INT64, [3, "B", "S"]),
        value("cache", T.FLOAT16, ["B", heads, capacity, width]),
        value("write_index", T.INT64, ["B"]),
        value("mask", T.BOOL, ["B", 1, "S", capacity]),
    ]
    nodes = [
        helper.make_node("RMSNormalization", ["x", "weight"], ["normed"], name="/norm", axis=-1, epsilon=1e-6),
        helper.make_node(
            "MRope", ["normed", "normed", "position_ids"], ["q", "k"], name="/rope", domain="ming", theta=1e4,
            axes=[0, 1, 2, 0] * 8, plugin_namespace="ming",
        ),
        helper.make_node("TensorScatter", ["cache", "k", "write_index"], ["present"], name="/update", axis=-2),
        helper.make_node("Attention", ["q", "present", "present", "mask"], ["y"], name="/attention"),
    ]  # fmt: skip
    outputs = [value("y", T.FLOAT16, ["B", heads, "S", width])]
    outputs.append(value("present", T.FLOAT16, ["B", heads, capacity, width]))
    weight = numpy_helper.from_array(np.ones(width, np.float16), "weight")
    known = [value(name, T.FLOAT16, ["B", heads, "S", width]) for name in ("q", "k")]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [weight], value_info=known)
    proto = ir.from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24), helper.make_opsetid("ming", 1)])
    )
    add_bodies(proto, "fp16")
    adapt(proto, ExportOptions("tensorrt", "fp16", Floats("fp16"), lowered=OLD))
    save(proto, tmp_path)
    described = {i.name: {"shape": [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim]} for i in inputs}
    phases = [
        Phase("decode", {"B": (1, 2, 4), "S": (1, 1, 1)}),
        Phase("prefill", {"B": (1, 1, 1), "S": (1, 16, capacity)}),
    ]
    built = compile_plan(tmp_path / "model.onnx", described, phases, tmp_path, Settings(RTX))
    # the cache is copied by a scatter, the rest are elementwise layers; attention stays one, which 10.14 knows
    native = {"KV_CACHE_UPDATE", "ROTARY_EMBEDDING", "NORMALIZATION"} & set(built.layers)
    assert not native and built.layers["SCATTER"] == 1 and built.layers["ATTENTION_INPUT"] == 1
    assert sum(built.attention_kernels.values()) >= 1


@pytest.mark.parametrize(
    ("operator", "attributes", "words"),
    [
        ("RMSNormalization", {"axis": 1}, "more than its last axis"),
        ("RotaryEmbedding", {"interleaved": 1}, "interleaved"),
        ("TensorScatter", {"mode": "circular", "axis": -2}, "in circles"),
        ("Attention", {"is_causal": 1}, "causal by attribute"),
        ("Swish", {}, "has no lowering"),
    ],
)
def test_what_cannot_be_lowered_names_its_node(operator: str, attributes: dict[str, Any], words: str) -> None:
    x = np.zeros((1, 4, 3, 8), np.float32)
    count = {"Swish": 1, "RMSNormalization": 2}.get(operator, 3)
    feeds = dict.fromkeys(("a", "b", "c")[:count], x)
    with pytest.raises(BuildError, match=words) as caught:
        lower_operators(ir.from_proto(model(operator, feeds, **attributes)), (operator,))
    assert "/the/node" in str(caught.value)


def test_graphs_that_crash_or_escape_tensorrt_are_refused() -> None:
    x = np.zeros((1, 4, 3, 64), np.float16)
    options = ExportOptions("tensorrt", "fp16", Floats("fp16"))
    proto = model("Attention", {"q": x, "v": x})
    del proto.graph.node[0].input[:]
    proto.graph.node[0].input.extend(["q", "q", "v"])
    with pytest.raises(BuildError, match="one tensor as query and key"):
        adapt(ir.from_proto(proto), options)
    with pytest.raises(BuildError, match="data-dependent"):
        adapt(ir.from_proto(model("NonZero", {"x": x})), options)
