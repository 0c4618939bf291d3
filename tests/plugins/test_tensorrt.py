"""The TensorRT plugins, driven by a real builder: TensorRT-RTX parses, shapes, configures and serialises them.

It compiles a plan without a GPU; nothing is run. Needs NvInfer.h (environment variable TENSORRT_INCLUDE_DIR, or a usual
place), nvcc and the RTX wheel; skipped with the reason where one is missing.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from builders import tensorrt_api
from builders.tensorrt import Built, Settings, compile_plan
from builders.tensorrt_profiles import Phase
from ming_trt.errors import BuildError
from ming_trt.runtime.plan import PLUGIN_ABI
from tests.plugins import binding, reference

HEADER_PLACES = [
    os.environ.get("TENSORRT_INCLUDE_DIR", ""),
    "/usr/include/x86_64-linux-gnu",
    "/usr/local/tensorrt/include",
]
HEADERS = next((Path(p) for p in HEADER_PLACES if p and (Path(p) / "NvInfer.h").exists()), None)
HEAD_DIM, HEADS, KV_HEADS, HIDDEN, WIDTH, EXPERTS, PLACES = 32, 4, 2, 64, 48, 8, 100
TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@pytest.fixture(scope="module")
def plugins() -> Path:
    if HEADERS is None:
        pytest.skip("NvInfer.h is not found: set TENSORRT_INCLUDE_DIR to compile the TensorRT plugins")
    if binding.nvcc() is None:
        pytest.skip("nvcc is not on the PATH")
    if importlib.util.find_spec("tensorrt_rtx_libs") is None:
        pytest.skip("the package tensorrt_rtx_cu13_libs is not installed: no builder to drive the plugins with")
    wrappers = ["mrope/mrope_plugin.cpp", "moe/moe_plugin.cpp", "tensorrt/creators.cpp", "mrope/mrope.cu"]
    files = [str(binding.PLUGINS / name) for name in wrappers]
    includes = [f"-I{binding.PLUGINS / 'tensorrt'}", "-isystem", str(HEADERS)]
    return binding.compiled("plugins", binding.device_command("moe", ["80"], *includes, *files))[0]


def test_abi_of_library_and_stamp_agree() -> None:
    assert binding.emulated_library("mrope").ming_plugin_abi() == PLUGIN_ABI


def model(kind: str, precision: str, folder: Path, **changed: float) -> Path:
    """One node of each plugin; the experts, in floats and in FP8, with and without modality codes."""
    float_type = TYPES[precision]
    value = helper.make_tensor_value_info
    axes = reference.frequency_axes(kind, (4, 6, 6))
    shared = {"domain": "ming", "plugin_namespace": "ming"}
    rope = {"theta": 600000.0, "axes": axes} | shared
    experts = {"top_k": int(changed.get("top_k", 2)), "normalize": 1} | shared
    width = int(changed.get("width", WIDTH))
    nodes = [
        helper.make_node("MRope", ["q", "k", "positions"], ["q_out", "k_out"], name="rope", **rope),
        helper.make_node("MRopeTable", ["prompt", "delta"], ["table"], name="table", max_positions=PLACES, **rope),
        helper.make_node("SparseMoE", ["x", "logits", "gate_up", "down"], ["y"], name="experts", **experts),
        helper.make_node(
            "SparseMoE", ["x", "all_logits", "gate_up", "down", "modality"], ["z"], name="more", **experts
        ),
    ]
    in_fp8 = ["gate_up_fp8", "down_fp8", "gate_up_scale", "down_scale"]
    units = {"x_scale": 0.01, "inner_scale": changed.get("inner_scale", 0.02)}
    nodes += [
        helper.make_node("SparseMoEFP8", ["x", "logits", *in_fp8], ["y8"], name="experts8", **units, **experts),
        helper.make_node(
            "SparseMoEFP8", ["x", "all_logits", *in_fp8, "modality"], ["z8"], name="more8", **units, **experts
        ),
    ]
    inputs = [
        value("q", float_type, ["B", HEADS, "S", HEAD_DIM]),
        value("k", float_type, ["B", KV_HEADS, "S", HEAD_DIM]),
        value("positions", TensorProto.INT64, [3, "B", "S"]),
        value("prompt", TensorProto.INT32, [3, "L"]),
        value("delta", TensorProto.INT32, [1]),
        value("x", float_type, ["N", HIDDEN]),
        value("logits", float_type, ["N", EXPERTS]),
        value("all_logits", float_type, ["N", 3 * EXPERTS]),
        value("modality", TensorProto.INT64, ["N"]),
    ]
    outputs = [value(name, float_type, None) for name in ("q_out", "k_out", "y", "z", "y8", "z8")]
    outputs.append(value("table", TensorProto.FLOAT, None))
    weights = []
    for name, shape in (("gate_up", (EXPERTS, 2 * width, HIDDEN)), ("down", (EXPERTS, HIDDEN, width))):
        count = shape[0] * shape[1] * shape[2]
        weights.append(helper.make_tensor(name, float_type, shape, bytes(2 * count), raw=True))
        weights.append(helper.make_tensor(f"{name}_fp8", TensorProto.FLOAT8E4M3FN, shape, bytes(count), raw=True))
        ones = np.ones(shape[:2], np.float32)
        weights.append(numpy_helper.from_array(ones, f"{name}_scale"))
    assert all(numpy_helper.to_array(weight).size for weight in weights)
    graph = helper.make_graph(nodes, "plugins", inputs, outputs, weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24), helper.make_opsetid("ming", 1)])
    path = folder / "model.onnx"
    onnx.save(made, path)
    return path


def build(path: Path, plugins: Path, folder: Path) -> Built:
    graph = onnx.load(path).graph
    inputs = {
        i.name: {"shape": [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim]} for i in graph.input
    }
    phase = Phase("any", {"B": (1, 2, 4), "S": (1, 8, 64), "L": (1, 20, PLACES), "N": (1, 16, 256)})
    return compile_plan(path, inputs, [phase], folder, Settings(tensorrt_api.RTX, plugins=(plugins,), timeout=120))


@pytest.mark.parametrize(
    ("kind", "precision"), [(reference.THREE_D, "bf16"), (reference.VIDEO, "bf16"), (reference.THREE_D, "fp16")]
)
def test_a_real_builder_takes_the_plugins(kind: str, precision: str, plugins: Path, tmp_path: Path) -> None:
    built = build(model(kind, precision, tmp_path), plugins, tmp_path / "out")
    assert built.layers["PLUGIN_V3"] == 6
    assert built.stamp.plugin_abi == PLUGIN_ABI
    plan = (tmp_path / "out" / "model.plan").read_bytes()
    for name in (b"MRope", b"MRopeTable", b"SparseMoE", b"SparseMoEFP8"):
        assert name in plan


def test_the_exported_node_of_experts_in_fp8_is_the_plugin_s(plugins: Path, tmp_path: Path) -> None:
    from builders.export import save
    from builders.precision import FP8PerChannel
    from tests.builders.test_fp8_experts import EXPERTS as COUNT
    from tests.builders.test_fp8_experts import HIDDEN as SIZE
    from tests.builders.test_fp8_experts import drawn, quantised

    # activations of half a size, since no kernel takes float32
    save(quantised(drawn()[0], FP8PerChannel("bf16")), tmp_path)
    inputs = {"x": {"shape": ["N", SIZE]}, "logits": {"shape": ["N", COUNT]}}
    settings = Settings(tensorrt_api.RTX, plugins=(plugins,), timeout=120)
    built = compile_plan(tmp_path / "model.onnx", inputs, [Phase("any", {"N": (1, 8, 64)})], tmp_path / "out", settings)
    assert built.layers["PLUGIN_V3"] == 1 and "MATRIX_MULTIPLY" not in built.layers


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": 44}, "do not agree"),
        # a multiple of 8, which FP8 rows may not be
        ({"width": 40}, "SparseMoEFP8: the shapes"),
        ({"top_k": 17}, "top_k"),
        ({"inner_scale": 0.0}, "above 0"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_in_words(
    change: dict[str, float], said: str, plugins: Path, tmp_path: Path
) -> None:
    path = model(reference.THREE_D, "bf16", tmp_path, **change)
    with pytest.raises(BuildError):
        build(path, plugins, tmp_path / "out")
    assert said in (tmp_path / "out" / "build.log").read_text()
