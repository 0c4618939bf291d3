"""Routed experts in FP8: `ming::SparseMoE` becomes `ming::SparseMoEFP8`, the node of the plugin of that name.

SparseMoEFP8(x [N, H], logits [N, E], gate_up e4m3 [E, 2I, H], down e4m3 [E, H, I], gate_up_scale float32 [E, 2I],
             down_scale float32 [E, H]) -> y [N, H]
    A weight is its code times the scale of its row. x and the inner activation are rounded to E4M3 in units of
    `x_scale` and `inner_scale`, products are summed in float32 and scaled then; the rest is SparseMoE. Attributes
    `top_k`, `normalize` (ints), `x_scale`, `inner_scale` (floats).

Its body computes the same with Q/DQ in float32, whatever the graph's floats are. The scales of rows are multiplied
after the products, as the kernels do it: so the products take the codes themselves, with one scale for all, and a
builder without the plugin multiplies in FP8 too (`inline_bodies`). The body is dense, as that of SparseMoE.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper
from onnx_ir.passes.common import InlinePass

from builders.fp8 import FP8, LARGEST, Range, largest_of, to_fp8, weight_scales
from builders.functions import DOMAIN, PLUGIN_NAMESPACE, SPARSE_MOE, remove_unused_bodies
from builders.lowering import replace
from builders.precision import FP8PerChannel, kept
from builders.tensors import DTYPES, Array, Pieces, StreamedTensor, bound, drop_unused, streamed
from ming_trt.errors import BuildError

SPARSE_MOE_FP8 = "SparseMoEFP8"


def quantize_experts(model: ir.Model, scheme: FP8, amax: Mapping[str, Range]) -> dict[str, str]:
    """Quantises the experts of every layer in place; returns stack of weights -> "fp8", or why it was kept.

    `amax` has the largest magnitude of what enters each stack, by its name: `layers.0.mlp.gate_up` of x,
    `layers.0.mlp.down` of the inner activation of any expert. Raises `BuildError` if one has none.
    """
    verdicts: dict[str, str] = {}
    for node in list(model.graph):
        if node.domain != DOMAIN or node.op_type != SPARSE_MOE.name:
            continue
        x, logits, gate_up, down = node.inputs
        if x is None or logits is None or gate_up is None or down is None:
            raise BuildError(f"'{node.name}' lacks an input: the export lost it")
        names = (str(gate_up.name), str(down.name))
        reason = next((why for name in names if (why := kept(name))), "")
        verdicts |= dict.fromkeys(names, reason or "fp8")
        if reason:
            continue
        scales = [largest_of(amax, name) / LARGEST for name in names]
        replace(model.graph, node, _node(model.graph, node, scheme, [x, logits], [gate_up, down], scales))
        drop_unused(model.graph, [gate_up, down])
    remove_unused_bodies(model)
    return verdicts


def add_body(model: ir.Model, precision: str) -> None:
    """Adds the function of the experts in FP8, if the graph has such; `precision` is that of its activations."""
    nodes = [node for node in model.graph if node.domain == DOMAIN and node.op_type == SPARSE_MOE_FP8]
    kinds = {(n.attributes["top_k"].as_int(), n.attributes["normalize"].as_int()) for n in nodes}
    if len(kinds) > 1:
        raise BuildError(f"the layers choose experts in {len(kinds)} ways: one body of {SPARSE_MOE_FP8} serves one")
    for top_k, normalize in kinds:
        function = ir.serde.deserialize_function(_body(top_k, bool(normalize), DTYPES[precision]))
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = 1


def inline_bodies(model: ir.Model) -> None:
    """Writes the body in the place of each node, for a builder without the plugin.

    TensorRT's parser does that by itself, but names a `QuantizeLinear` in a function by its node alone, so that the
    second layer's is refused ("the new name is already in use"). Here each gets a name of its own.
    """
    InlinePass(lambda function: function.name == SPARSE_MOE_FP8)(model)
    remove_unused_bodies(model)


def _node(
    graph: ir.Graph,
    node: ir.Node,
    scheme: FP8,
    activations: list[ir.Value],
    weights: list[ir.Value],
    scales: list[float],
) -> ir.Node:
    codes, rows = [], []
    for weight in weights:
        source, name = streamed(weight), str(weight.name)
        shape = source.shape.numpy()
        channels = isinstance(scheme, FP8PerChannel)
        codes.append(StreamedTensor(f"{name}_fp8", _codes(source, channels), ir.DataType.FLOAT8E4M3FN, shape))
        rows.append(StreamedTensor(f"{name}_scale", _scales(source, channels), ir.DataType.FLOAT, shape[:2]))
    inputs = [*activations, *(bound(graph, tensor) for tensor in (*codes, *rows))]
    attributes = [
        ir.AttrInt64("top_k", node.attributes["top_k"].as_int()),
        ir.AttrInt64("normalize", node.attributes["normalize"].as_int()),
        ir.AttrFloat32("x_scale", scales[0]),
        ir.AttrFloat32("inner_scale", scales[1]),
        ir.AttrString("plugin_namespace", PLUGIN_NAMESPACE),
    ]
    return ir.Node(DOMAIN, SPARSE_MOE_FP8, inputs, attributes, name=node.name)


def expert_scales(expert: Array, channels: bool) -> Array:
    """Float32 [rows] of one matrix [rows, width]: one per row, or the same for all."""
    scales = weight_scales(np.asarray(expert, np.float32), 0, channels)
    return np.ascontiguousarray(np.broadcast_to(scales, expert.shape[:1]))


def _scales(source: StreamedTensor, channels: bool) -> Pieces:
    def pieces() -> Iterator[Array]:
        for expert in source.rows():
            yield expert_scales(expert, channels)

    return pieces


def _codes(source: StreamedTensor, channels: bool) -> Pieces:
    def pieces() -> Iterator[Array]:
        for expert in source.rows():
            yield to_fp8(np.asarray(expert, np.float32) / expert_scales(expert, channels)[:, None])

    return pieces


def _body(top_k: int, normalize: bool, dtype: ir.DataType) -> onnx.FunctionProto:
    weight = "total = ReduceSum <keepdims = 1> (best, minus_one)\n        weight = Div (best, total)"
    function: onnx.FunctionProto = onnx.parser.parse_function(f"""
    <opset_import: ["" : 24], domain: "{DOMAIN}">
    {SPARSE_MOE_FP8} <x_scale: float, inner_scale: float>
                     (x, logits, gate_up, down, gate_up_scale, down_scale) => (y) {{
        minus_one = Constant <value = int64[1] {{-1}}> ()
        zero = Constant <value = int64[1] {{0}}> ()
        one = Constant <value = int64[1] {{1}}> ()
        k = Constant <value = int64[1] {{{top_k}}}> ()
        unit = Constant <value = float {{1}}> ()
        x_unit = Constant <value_float: float = @x_scale> ()
        inner_unit = Constant <value_float: float = @inner_scale> ()
        logits32 = Cast <to = {int(ir.DataType.FLOAT)}> (logits)
        probability = Softmax <axis = -1> (logits32)
        best, index = TopK <axis = -1, largest = 1, sorted = 1> (probability, k)
        {weight if normalize else "weight = Identity (best)"}
        none = Sub (probability, probability)
        score = ScatterElements <axis = 1> (none, index, weight)
        x32 = Cast <to = {int(ir.DataType.FLOAT)}> (x)
        batch = Unsqueeze (x32, zero)
        batch_code = QuantizeLinear (batch, x_unit, zero8)
        batch_restored = DequantizeLinear (batch_code, x_unit, zero8)
        gate_up32 = DequantizeLinear (gate_up, unit, zero8)
        gate_up_t = Transpose <perm = [0, 2, 1]> (gate_up32)
        both_units = MatMul (batch_restored, gate_up_t)
        gate_up_rows = Unsqueeze (gate_up_scale, one)
        both = Mul (both_units, gate_up_rows)
        gate, up = Split <axis = 2, num_outputs = 2> (both)
        sigmoid = Sigmoid (gate)
        silu = Mul (gate, sigmoid)
        inner = Mul (silu, up)
        inner_code = QuantizeLinear (inner, inner_unit, zero8)
        inner_restored = DequantizeLinear (inner_code, inner_unit, zero8)
        down32 = DequantizeLinear (down, unit, zero8)
        down_t = Transpose <perm = [0, 2, 1]> (down32)
        each_units = MatMul (inner_restored, down_t)
        down_rows = Unsqueeze (down_scale, one)
        each = Mul (each_units, down_rows)
        score_t = Transpose <perm = [1, 0]> (score)
        score3 = Unsqueeze (score_t, minus_one)
        weighted = Mul (each, score3)
        sum32 = ReduceSum <keepdims = 0> (weighted, zero)
        y = Cast <to = {int(dtype)}> (sum32)
    }}""")
    # the parser's text has no FP8 numbers
    zero8 = helper.make_tensor("", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    function.node.insert(0, helper.make_node("Constant", [], ["zero8"], value=zero8))
    return function
