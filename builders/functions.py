"""Operators of domain `ming`: their schemas, their bodies in standard ONNX, and how torch operators become such nodes.

A node carries `plugin_namespace="ming"` and the numbers that a plugin needs. Its body is an ONNX local function that
ONNX Runtime inlines; TensorRT takes the plugin of that name and namespace if one is registered, else the body. Bodies
are the portable truth: standard operators of opset 24, no data-dependent shapes. Numbers of the configuration are
baked into the body, since a model has one of each.

MRope(q [B, N, S, D], k [B, M, S, D], position_ids int64 [3, B, S]) -> q and k, rotated
    Rotates the halves of each head by `position[axes[j]] * theta^(-2j/D)`; attributes `theta` (float) and `axes`
    (ints, [D/2]: whether frequency j reads time 0, height 1 or width 2).
SparseMoE(x [N, H], logits [N, E], gate_up [E, 2I, H], down [E, H, I]) -> y [N, H]
    Sum over the `top_k` experts with the largest logits of `softmax(logits)[e] * down(silu(gate(x)) * up(x))`; the
    weights are divided by their sum if `normalize` is 1. `gate_up` holds the rows of gate, then those of up.
    Softmax and sum in float32, one rounding. Attributes `top_k`, `normalize` (ints).

The torch operators and their exact meaning are in `ming_trt/models/ops.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript.values import Op, Opset

from builders.export import OPSET
from builders.tensors import DTYPES
from ming_trt.errors import BuildError
from ming_trt.models import ops as _registered  # noqa: F401  (importing it registers the torch operators)
from ming_trt.models import rope

DOMAIN = "ming"
VERSION = 1
PLUGIN_NAMESPACE = "ming"

_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_INTEGERS = ["tensor(int64)"]


def _schema(
    name: str,
    inputs: Sequence[tuple[str, str]],
    outputs: Sequence[str],
    attributes: Mapping[str, OpSchema.AttrType],
) -> OpSchema:
    return OpSchema(
        name,
        DOMAIN,
        VERSION,
        inputs=[OpSchema.FormalParameter(label, kind) for label, kind in inputs],
        outputs=[OpSchema.FormalParameter(label, "T") for label in outputs],
        type_constraints=[("T", _FLOATS, "activations and weights"), ("I", _INTEGERS, "indices")],
        attributes=[
            OpSchema.Attribute(label, kind, "")
            for label, kind in {**attributes, "plugin_namespace": OpSchema.AttrType.STRING}.items()
        ],
    )


MROPE = _schema(
    "MRope",
    [("q", "T"), ("k", "T"), ("position_ids", "I")],
    ["q_rotated", "k_rotated"],
    {"theta": OpSchema.AttrType.FLOAT, "axes": OpSchema.AttrType.INTS},
)
SPARSE_MOE = _schema(
    "SparseMoE",
    [("x", "T"), ("logits", "T"), ("gate_up", "T"), ("down", "T")],
    ["y"],
    {"top_k": OpSchema.AttrType.INT, "normalize": OpSchema.AttrType.INT},
)
_MING = Opset(DOMAIN, VERSION)


def _mrope(q: Any, k: Any, position_ids: Any, theta: float, kind: str, sections: Sequence[int]) -> Any:
    operator = Op(_MING, MROPE.name, MROPE)
    axes = rope.frequency_axes(kind, sections)
    return operator(q, k, position_ids, theta=float(theta), axes=axes, plugin_namespace=PLUGIN_NAMESPACE)


def _sparse_moe(x: Any, router_logits: Any, gate_up: Any, down: Any, top_k: int, normalize: bool) -> Any:
    operator = Op(_MING, SPARSE_MOE.name, SPARSE_MOE)
    return operator(
        x, router_logits, gate_up, down, top_k=top_k, normalize=int(normalize), plugin_namespace=PLUGIN_NAMESPACE
    )


def _kv_update(cache: Any, update: Any, write_index: Any) -> Any:
    schema = onnx.defs.get_schema("TensorScatter", OPSET, "")
    return Op(Opset("", OPSET), schema.name, schema)(cache, update, write_index, axis=-2, mode="linear")


def translations() -> dict[Any, Callable[..., Any]]:
    """What torch's exporter emits for each operator of `ming_trt.models.ops`."""
    operators = torch.ops.ming
    return {
        operators.mrope.default: _mrope,
        operators.sparse_moe.default: _sparse_moe,
        operators.kv_update.default: _kv_update,
    }


def _mrope_body(node: ir.Node, dtype: ir.DataType) -> str:
    axes = list(node.attributes["axes"].as_ints())
    inverse = rope.inverse_frequencies(2 * len(axes), node.attributes["theta"].as_float())
    numbers = ", ".join(f"{value:.9g}" for value in inverse)
    # The angles are float32 in every precision: half types cannot hold a position of some thousands exactly.
    return f"""
    MRope (q, k, position_ids) => (q_rotated, k_rotated) {{
        axes = Constant <value = int64[{len(axes)}] {{{", ".join(map(str, axes))}}}> ()
        inverse = Constant <value = float[{len(axes)}] {{{numbers}}}> ()
        chosen = Gather <axis = 0> (position_ids, axes)
        last = Transpose <perm = [1, 2, 0]> (chosen)
        position = Cast <to = {int(ir.DataType.FLOAT)}> (last)
        angle = Mul (position, inverse)
        cos32 = Cos (angle)
        sin32 = Sin (angle)
        cos = Cast <to = {int(dtype)}> (cos32)
        sin = Cast <to = {int(dtype)}> (sin32)
        q_rotated = RotaryEmbedding <interleaved = 0> (q, cos, sin)
        k_rotated = RotaryEmbedding <interleaved = 0> (k, cos, sin)
    }}"""


def _sparse_moe_body(node: ir.Node, dtype: ir.DataType) -> str:
    top_k = node.attributes["top_k"].as_int()
    scale = "total = ReduceSum <keepdims = 1> (best, minus_one)\n        weight = Div (best, total)"
    if not node.attributes["normalize"].as_int():
        scale = "weight = Identity (best)"
    # Dense: every expert sees every token, and the scores of those not chosen are 0. Sums over experts are float32.
    return f"""
    SparseMoE (x, logits, gate_up, down) => (y) {{
        minus_one = Constant <value = int64[1] {{-1}}> ()
        zero = Constant <value = int64[1] {{0}}> ()
        k = Constant <value = int64[1] {{{top_k}}}> ()
        logits32 = Cast <to = {int(ir.DataType.FLOAT)}> (logits)
        probability = Softmax <axis = -1> (logits32)
        best, index = TopK <axis = -1, largest = 1, sorted = 1> (probability, k)
        {scale}
        none = Sub (probability, probability)
        score = ScatterElements <axis = 1> (none, index, weight)
        batch = Unsqueeze (x, zero)
        gate_up_t = Transpose <perm = [0, 2, 1]> (gate_up)
        both = MatMul (batch, gate_up_t)
        gate, up = Split <axis = 2, num_outputs = 2> (both)
        sigmoid = Sigmoid (gate)
        silu = Mul (gate, sigmoid)
        inner = Mul (silu, up)
        down_t = Transpose <perm = [0, 2, 1]> (down)
        each = MatMul (inner, down_t)
        each32 = Cast <to = {int(ir.DataType.FLOAT)}> (each)
        score_t = Transpose <perm = [1, 0]> (score)
        score3 = Unsqueeze (score_t, minus_one)
        weighted = Mul (each32, score3)
        sum32 = ReduceSum <keepdims = 0> (weighted, zero)
        y = Cast <to = {int(dtype)}> (sum32)
    }}"""


_BODIES: dict[str, Callable[[ir.Node, ir.DataType], str]] = {
    MROPE.name: _mrope_body,
    SPARSE_MOE.name: _sparse_moe_body,
}


def add_bodies(model: ir.Model, precision: str = "fp32") -> None:
    """Adds the local function of each `ming` operator that `model` uses; does nothing without such nodes.

    Raises `BuildError` if two nodes of a type would need different bodies, or an operator is unknown.
    """
    bodies: dict[str, str] = {}
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        if node.op_type not in _BODIES:
            raise BuildError(f"'{node.name}' is {DOMAIN}::{node.op_type}, which has no body")
        body = _BODIES[node.op_type](node, DTYPES[precision])
        if bodies.setdefault(node.op_type, body) != body:
            raise BuildError(f"'{node.name}' needs another body than the other nodes of type {node.op_type}")
    for body in bodies.values():
        text = f'<opset_import: ["" : {model.opset_imports[""]}], domain: "{DOMAIN}">' + body
        function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
        model.functions[function.identifier()] = function
    if bodies:
        model.opset_imports[DOMAIN] = VERSION


def remove_unused_bodies(model: ir.Model) -> None:
    """Drops the functions and the opset import that no node uses any more, after a lowering."""
    used = {node.op_identifier() for node in model.graph}
    for identifier in list(model.functions):
        if identifier not in used:
            del model.functions[identifier]
    if not any(node.domain == DOMAIN for node in model.graph):
        model.opset_imports.pop(DOMAIN, None)
