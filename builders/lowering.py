"""Lowering for ONNX Runtime on a CPU: nodes of domain `ming` become its contrib operators, for speed.

The bodies of these nodes are right everywhere but dense: a mixture of experts computed that way costs E / top_k times
too much. The pass runs after the weights are bound and keeps them streaming: layouts change one expert at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from builders.functions import DOMAIN, MROPE, SPARSE_MOE, remove_unused_bodies
from builders.quantize import SCHEMES
from builders.tensors import Array, Pieces, StreamedTensor, bound, drop_unused, streamed
from ming_trt.errors import BuildError
from ming_trt.models import rope

CONTRIB = "com.microsoft"


def lower(model: ir.Model, precision: str = "fp32", *, keep: Sequence[str] = (), many_rows: bool = False) -> ir.Model:
    """Replaces what ONNX Runtime's CPU provider has better operators for, in place; returns `model`.

    All precisions: one table of cosines and sines per step instead of one per `ming::MRope`. "fp32":
    `ming::SparseMoE` -> `com.microsoft::MoE`. "int8", "int4": experts and linear layers in so many bits, but for
    weights with one of `keep` in their name; `many_rows` says that a run has dozens of rows at least, so that "int8"
    quantises activations as well. Raises `BuildError` for another precision.
    """
    from builders import lowering_quantized as quantized

    if precision != "fp32" and precision not in SCHEMES:
        raise BuildError(f"precision '{precision}' has no lowering for onnxruntime: choose fp32, {', '.join(SCHEMES)}")
    _share_rope_tables(model)
    if precision == "fp32":
        for node in nodes(model, SPARSE_MOE.name):
            _moe(model.graph, node)
    else:
        quantized.quantize_experts(model, SCHEMES[precision])
        if precision == "int8" and many_rows:
            quantized.quantize_dynamically(model, keep)
        else:
            quantized.quantize_linears(model, SCHEMES[precision], keep)
    remove_unused_bodies(model)
    if any(node.domain == CONTRIB for node in model.graph):
        model.opset_imports[CONTRIB] = 1
    return model


def nodes(model: ir.Model, name: str) -> list[ir.Node]:
    """The nodes of `ming::name`."""
    return [node for node in model.graph if node.domain == DOMAIN and node.op_type == name]


def _share_rope_tables(model: ir.Model) -> None:
    """Inlines `ming::MRope`; nodes with the same positions and attributes read the same tables."""
    graph, tables = model.graph, dict[tuple[Any, ...], tuple[ir.Value, ir.Value]]()
    for node in nodes(model, MROPE.name):
        q, k, position_ids = node.inputs
        axes, theta = list(node.attributes["axes"].as_ints()), node.attributes["theta"].as_float()
        key = (position_ids, tuple(axes), theta)
        if key not in tables:
            tables[key] = _rope_tables(graph, node, position_ids, axes, theta, f"/rope_{len(tables)}")
        for label, source, output in zip("qk", (q, k), list(node.outputs), strict=True):
            rotated = ir.node("RotaryEmbedding", [source, *tables[key]], name=f"{node.name}/{label}")
            take_over(output, rotated.outputs[0])
            graph.insert_before(node, rotated)
        graph.remove(node, safe=True)


def _rope_tables(
    graph: ir.Graph, before: ir.Node, position_ids: ir.Value | None, axes: list[int], theta: float, name: str
) -> tuple[ir.Value, ir.Value]:
    """Emits cosines and sines [B, S, D/2] before a node, as the body of `MRope` computes them."""
    inverse = np.array(rope.inverse_frequencies(2 * len(axes), theta), np.float32)
    axis = constant(graph, f"{name}/axes", np.array(axes, np.int64))
    frequency = constant(graph, f"{name}/inverse", inverse)
    chosen = ir.node("Gather", [position_ids, axis], {"axis": 0}, name=f"{name}/Gather")
    last = ir.node("Transpose", [chosen.outputs[0]], {"perm": [1, 2, 0]}, name=f"{name}/Transpose")
    position = ir.node("Cast", [last.outputs[0]], {"to": int(ir.DataType.FLOAT)}, name=f"{name}/Cast")
    angle = ir.node("Mul", [position.outputs[0], frequency], name=f"{name}/Mul")
    cos = ir.node("Cos", [angle.outputs[0]], name=f"{name}/Cos")
    sin = ir.node("Sin", [angle.outputs[0]], name=f"{name}/Sin")
    for node in (chosen, last, position, angle, cos, sin):
        node.outputs[0].name = f"{node.name}/output_0"
        graph.insert_before(before, node)
    return cos.outputs[0], sin.outputs[0]


def constant(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """Registers a small array as an initializer."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def interleaved(gate_up: StreamedTensor) -> Pieces:
    """The stream of `gate_up` [E, 2I, H] with rows gate 0, up 0, gate 1, up 1, ..., which the contrib kernels want."""

    def pieces() -> Iterator[Array]:
        for expert in gate_up.rows():
            half = expert.shape[0] // 2
            yield np.stack((expert[:half], expert[half:]), axis=1).reshape(expert.shape)

    return pieces


def _moe(graph: ir.Graph, node: ir.Node) -> None:
    """`MoE` takes logits and does softmax and top-k itself; silu(gate) * up is its SwiGLU with alpha 1 and beta 0."""
    x, logits, gate_up_value, down = node.inputs
    if gate_up_value is None or down is None:
        raise BuildError(f"'{node.name}' lacks its weights")
    source = streamed(gate_up_value)
    gate_up = bound(
        graph,
        StreamedTensor(f"{gate_up_value.name}_interleaved", interleaved(source), source.dtype, source.shape.numpy()),
    )
    lowered = ir.Node(
        CONTRIB,
        "MoE",
        inputs=[x, logits, gate_up, None, down],
        attributes=[
            ir.AttrInt64("k", node.attributes["top_k"].as_int()),
            ir.AttrInt64("normalize_routing_weights", node.attributes["normalize"].as_int()),
            ir.AttrString("activation_type", "swiglu"),
            ir.AttrInt64("swiglu_fusion", 1),
            ir.AttrFloat32("activation_alpha", 1.0),
            ir.AttrFloat32("activation_beta", 0.0),
        ],
        name=(node.name or "").replace(SPARSE_MOE.name, "MoE"),
    )
    replace(graph, node, lowered)
    drop_unused(graph, [gate_up_value])


def replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Puts `new` in the place of `old`; its outputs take over names, types and uses."""
    for before, after in zip(old.outputs, new.outputs, strict=True):
        take_over(before, after)
    graph.insert_before(old, new)
    graph.remove(old, safe=True)


def take_over(before: ir.Value, after: ir.Value) -> None:
    """`after` gets the name, type and uses of `before`."""
    after.name, after.type, after.shape = before.name, before.type, before.shape
    ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
