"""Step `rope_table`: a small engine that makes the rotary table of a request, with the plugin of `plugins/mrope`.

One node `MRopeTable` of domain `ming`: TensorRT takes the plugin, ONNX Runtime the body in standard operators. It is
built for TensorRT-LLM bundles where a plugin library is named; else the service makes the table on the host.

MRopeTable(position_ids int64 [3, L], delta int64 [1]) -> table f32 [max_positions, D/2, 2]
    (cos, sin) of `position[axes[j]] * theta^(-2j/D)` for every place: the prompt's positions, then place + delta.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from onnx import TensorProto, helper

from builders.code import code_version
from builders.export import OPSET
from builders.functions import DOMAIN, PLUGIN_NAMESPACE, VERSION
from builders.steps import Context, Step, digest
from builders.tensorrt import PLAN_FILE, Settings, compile_plan
from builders.tensorrt_build import not_run, plugin_libraries
from builders.tensorrt_profiles import Phase
from ming_trt.bundle import sha256
from ming_trt.config import LLMConfig
from ming_trt.trtllm.rope_table import COMPONENT, frequency_axes, inverse_frequencies

if TYPE_CHECKING:
    from ming_trt.config import MingConfig
    from ming_trt.models.weights import WeightSource
    from ming_trt.presets import Preset

NAME = COMPONENT
GATE = f"gate:{NAME}"
OPERATOR = "MRopeTable"
_MODEL = "model.onnx"


class RopeTableEngine:
    """What the build needs to know of the component besides its steps."""

    def sources(self, config: MingConfig) -> Mapping[str, WeightSource]:
        """None: the table depends on the configuration only."""
        return {}


ENGINE = RopeTableEngine()


def graph(llm: LLMConfig, max_positions: int) -> onnx.ModelProto:
    """The engine's graph: the node, and its body for back ends without the plugin."""
    half = llm.head_dim // 2
    axes = [int(axis) for axis in frequency_axes(llm.rope_kind, llm.rope_sections)]
    node = helper.make_node(
        OPERATOR,
        ["position_ids", "delta"],
        ["table"],
        name="rope_table",
        domain=DOMAIN,
        plugin_namespace=PLUGIN_NAMESPACE,
        theta=float(llm.rope_theta),
        axes=axes,
        max_positions=max_positions,
    )
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        [node],
        NAME,
        [value("position_ids", TensorProto.INT64, [3, "L"]), value("delta", TensorProto.INT64, [1])],
        [value("table", TensorProto.FLOAT, [max_positions, half, 2])],
    )
    text = f'<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">' + _body(llm, axes, max_positions)
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(made, opset_imports=imports, functions=[onnx.parser.parse_function(text)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def _body(llm: LLMConfig, axes: list[int], max_positions: int) -> str:
    numbers = ", ".join(f"{value:.9g}" for value in inverse_frequencies(llm))
    # No sizes depend on values: places after the prompt read its last position, and are then replaced.
    return f"""
    {OPERATOR} (position_ids, delta) => (table) {{
        first = Constant <value = int64 {{0}}> ()
        end = Constant <value = int64 {{{max_positions}}}> ()
        one = Constant <value = int64 {{1}}> ()
        last = Constant <value = int64[1] {{-1}}> ()
        axes = Constant <value = int64[{len(axes)}] {{{", ".join(map(str, axes))}}}> ()
        inverse = Constant <value = float[{len(axes)}] {{{numbers}}}> ()
        place = Range (first, end, one)
        length = Shape <start = 1, end = 2> (position_ids)
        limit = Sub (length, one)
        near = Min (place, limit)
        given = Gather <axis = 1> (position_ids, near)
        after = Add (place, delta)
        known = Less (place, length)
        position = Where (known, given, after)
        chosen = Gather <axis = 0> (position, axes)
        rows = Transpose <perm = [1, 0]> (chosen)
        number = Cast <to = {TensorProto.FLOAT}> (rows)
        angle = Mul (number, inverse)
        cosine = Cos (angle)
        sine = Sin (angle)
        low = Unsqueeze (cosine, last)
        high = Unsqueeze (sine, last)
        table = Concat <axis = -1> (low, high)
    }}"""


def steps(preset: Preset, llm: LLMConfig, max_positions: int, cache: Path) -> list[Step]:
    """The step and its gate; `preset` is TensorRT's. Skipped where no plugin library is named."""
    libraries = plugin_libraries()
    if not libraries:
        reason = "no plugin library is named by MING_TRT_PLUGINS: the host makes the rotary tables"
        return [
            Step(NAME, "", _never, output=NAME, skip=reason),
            Step(GATE, "", _never, (NAME,), skip=f"there is no {NAME} to check"),
        ]
    model = graph(llm, max_positions)
    stamps = [sha256(path) for path in libraries]
    key = digest([sha256_of(model), stamps, code_version(__name__)])

    def run(context: Context) -> Mapping[str, Any]:
        path = context.work / _MODEL
        path.write_bytes(model.SerializeToString())
        inputs = {
            "position_ids": {"dtype": "int64", "shape": [3, "L"]},
            "delta": {"dtype": "int64", "shape": [1]},
        }
        table = {"dtype": "float32", "shape": [max_positions, llm.head_dim // 2, 2]}
        phase = Phase("prompt", {"L": (1, min(512, max_positions), max_positions)})
        settings = Settings(preset.target, libraries, cache=cache / "tensorrt")
        built = compile_plan(path, inputs, [phase], context.work, settings, context.report)
        path.unlink()
        return {
            "precision": "fp32",
            "weights": "",
            "target": preset.target,
            "inputs": inputs,
            "outputs": {"table": table},
            "model": f"{NAME}/{PLAN_FILE}",
            "plan": built.as_dict(),
        }

    def gate(context: Context) -> Mapping[str, Any]:
        return not_run(preset, context.facts[NAME]).as_dict()

    return [Step(NAME, key, run, output=NAME), Step(GATE, digest(NAME), gate, (NAME,))]


def sha256_of(model: onnx.ModelProto) -> str:
    """Digest of a graph's content."""
    return digest(str(model))


def _never(_: Context) -> Mapping[str, Any]:
    raise AssertionError("a skipped step ran")
