"""Builds by the real TensorRT-RTX builder on tiny graphs: plans, stamps, and failures as sentences."""

import os
from collections.abc import Mapping
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper

from builders.tensorrt import Built, Settings, compile_plan, expect_layers
from builders.tensorrt_api import RTX, load
from builders.tensorrt_child import fatal, node_in
from builders.tensorrt_profiles import Phase, fixed_sizes, phases
from ming_trt.bundle import sha256
from ming_trt.errors import BuildError, UnavailableError
from ming_trt.presets import Profile
from ming_trt.runtime.plan import Stamp

needs_rtx = pytest.mark.usefixtures("rtx")


@pytest.fixture
def rtx() -> None:
    """TensorRT-RTX, or a skip that says how to get it."""
    try:
        load(RTX)
    except UnavailableError as error:
        pytest.skip(str(error))


def graph(
    nodes: list[onnx.NodeProto], inputs: Mapping[str, tuple[int, list[int | str]]], outputs: Mapping[str, int]
) -> onnx.ModelProto:
    given = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    made = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()]
    return helper.make_model(helper.make_graph(nodes, "g", given, made), opset_imports=[helper.make_opsetid("", 24)])


def build(
    proto: onnx.ModelProto, folder: Path, sizes: Mapping[str, tuple[int, int, int]], settings: Settings | None = None
) -> Built:
    onnx.save(proto, folder / "model.onnx")
    inputs = {
        value.name: {"shape": [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]}
        for value in proto.graph.input
    }
    return compile_plan(folder / "model.onnx", inputs, [Phase("all", sizes)], folder, settings or Settings(RTX))


def attention(*inputs: str) -> onnx.NodeProto:
    return helper.make_node("Attention", list(inputs), ["y"], name="/block/attention")


QKV = {name: (T.FLOAT16, ["B", 4, "S", 64]) for name in "qkv"}
SIZES = {"B": (1, 1, 2), "S": (1, 8, 32)}


@needs_rtx
def test_a_plan_has_a_stamp_layers_and_a_log(tmp_path: Path) -> None:
    built = build(graph([attention("q", "k", "v")], QKV, {"y": T.FLOAT16}), tmp_path, SIZES)
    plan = tmp_path / "model.plan"
    assert built.stamp == Stamp("tensorrt-rtx", load(RTX).version, ("sm80",), 0, sha256(plan), plan.stat().st_size)
    assert built.layers["ATTENTION_INPUT"] == 1 and sum(built.attention_kernels.values()) >= 1
    assert "[WARNING]" in (tmp_path / "build.log").read_text() or "[INFO]" in (tmp_path / "build.log").read_text()
    expect_layers(built, {"ai.onnx:Attention": 1}, "llm")
    for operators in ({"ai.onnx:Attention": 2}, {"ai.onnx:TensorScatter": 1}, {"ming:MRope": 1}):
        with pytest.raises(BuildError, match="took them apart"):
            expect_layers(built, operators, "llm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build.log", "model.onnx", "model.plan"]


@needs_rtx
def test_devices_are_chosen_or_refused(tmp_path: Path) -> None:
    proto = graph([helper.make_node("Relu", ["x"], ["y"])], {"x": (T.FLOAT16, ["B", 8])}, {"y": T.FLOAT16})
    built = build(proto, tmp_path, {"B": (1, 1, 2)}, Settings(RTX, devices=("sm80", "sm89")))
    assert built.stamp.devices == ("sm80", "sm89")
    with pytest.raises(BuildError, match="does not compile for sm90: choose from sm75"):
        build(proto, tmp_path, {"B": (1, 1, 2)}, Settings(RTX, devices=("sm90",)))
    assert not (tmp_path / "model.plan").exists()


@needs_rtx
def test_the_parser_s_complaint_names_the_node(tmp_path: Path) -> None:
    proto = graph(
        [helper.make_node("NonZero", ["x"], ["y"], name="/find/me")], {"x": (T.FLOAT, ["B", 8])}, {"y": T.INT64}
    )
    with pytest.raises(BuildError, match=r"parsing the graph failed at node '/find/me' \(NonZero\)"):
        build(proto, tmp_path, {"B": (1, 1, 2)})
    assert (tmp_path / "build.log").is_file()


@needs_rtx
def test_the_builder_s_complaint_is_a_sentence(tmp_path: Path) -> None:
    shapes = {name: (T.FLOAT, ["B", 4, "S", 64]) for name in "qkv"}
    with pytest.raises(BuildError, match=r"building the plan failed.*not supported by a dedicated kernel") as caught:
        build(graph([attention("q", "k", "v")], shapes, {"y": T.FLOAT}), tmp_path, SIZES)
    assert "cudaError 35" not in str(caught.value) and "build.log" in str(caught.value)


@needs_rtx
def test_an_input_that_would_be_ignored_fails_the_build(tmp_path: Path) -> None:
    inputs = {**QKV, "length": (T.INT64, ["B"])}
    proto = graph([attention("q", "k", "v", "", "", "", "length")], inputs, {"y": T.FLOAT16})
    with pytest.raises(BuildError, match="would not compute what the graph says: Unused Input: length"):
        build(proto, tmp_path, SIZES)
    assert not (tmp_path / "model.plan").exists()


@needs_rtx
def test_a_crash_of_the_builder_is_a_sentence(tmp_path: Path) -> None:
    inputs = {name: QKV[name] for name in "qv"}
    with pytest.raises(BuildError, match="died with signal SIGSEGV"):
        build(graph([attention("q", "q", "v")], inputs, {"y": T.FLOAT16}), tmp_path, SIZES)


@needs_rtx
def test_a_build_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="did not end within"):
        build(graph([attention("q", "k", "v")], QKV, {"y": T.FLOAT16}), tmp_path, SIZES, Settings(RTX, timeout=0.01))


def test_sizes_without_a_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no range for 'S' of input 'q'"):
        build(graph([attention("q", "k", "v")], QKV, {"y": T.FLOAT16}), tmp_path, {"B": (1, 1, 1)})


def test_a_missing_plugin_library_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from builders.tensorrt_build import PLUGINS_VARIABLE, plugin_libraries

    monkeypatch.setenv(PLUGINS_VARIABLE, f"{tmp_path / 'a.so'}{os.pathsep}")
    with pytest.raises(BuildError, match="which is missing"):
        plugin_libraries()


@needs_rtx
def test_experts_in_fp8_are_a_plugin_if_there_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from builders.tensorrt_build import PLUGINS_VARIABLE, export_options
    from ming_trt import presets

    preset = presets.from_dict({"target": RTX, "precision": {"default": "bf16", "llm": "fp8", "dit": "fp8"}}, "mine")
    monkeypatch.delenv(PLUGINS_VARIABLE, raising=False)
    assert export_options(preset, "llm").lowered == ("SparseMoEFP8",) and not export_options(preset, "talker").lowered
    library = tmp_path / "libming_plugins.so"
    library.touch()
    monkeypatch.setenv(PLUGINS_VARIABLE, str(library))
    assert export_options(preset, "llm").lowered == ()
    # what the manifest says of a scheme
    assert str(export_options(preset, "dit").scheme) == "FP8PerChannel(floats='bf16', steps=(500.0, 750.0, 900.0))"


def test_a_library_that_lacks_a_plugin_is_noticed() -> None:
    stamp = Stamp(RTX, "1", ("sm89",), 1, "", 1)
    built = Built(stamp, {"PLUGIN_V3": 1}, {}, {}, 0, 1)
    expect_layers(built, {"ming:MRope": 1}, "llm")
    with pytest.raises(BuildError, match="1 plugin layers where the graph has 2 nodes"):
        expect_layers(built, {"ming:MRope": 1, "ming:SparseMoEFP8": 1}, "llm")


def test_profiles_follow_the_preset() -> None:
    profile = Profile(max_seq_len=100, slots=3, prefill_chunk=20, max_image_tokens=64, max_audio_frames=500)
    decode, prefill = phases("llm", profile, {})
    assert decode.sizes["S"] == (1, 1, 1) and decode.sizes["B"] == (1, 3, 3)
    assert prefill.sizes["S"] == (1, 20, 128) and prefill.sizes["B"] == (1, 1, 1)
    assert fixed_sizes("llm", profile) == {"T": 128} and fixed_sizes("dit", profile) == {}
    assert phases("audio_encoder", profile, {"max_frames": 300})[0].sizes["frames"] == (1, 300, 300)
    assert all(phase.sizes["N"][2] == 256 for phase in phases("vision_encoder", profile, {}))
    with pytest.raises(BuildError, match="no profiles for engine 'other'"):
        phases("other", profile, {})


def test_every_engine_has_profiles() -> None:
    from builders.registry import COMPONENTS

    for name in COMPONENTS:
        for phase in phases(name, Profile(), {}):
            assert all(0 < low <= typical <= high for low, typical, high in phase.sizes.values()), (name, phase)


def test_messages_are_sorted() -> None:
    assert fatal(["Unused Input: kv_len", "Make sure input x has Int64 binding."]) == ["Unused Input: kv_len"]
    assert node_in("in operation /a/b/MatMul_1: no", ["/a/b", "/a/b/MatMul_1", "/a"]) == "/a/b/MatMul_1"
    assert node_in("nothing", ["/a/b"]) == ""
