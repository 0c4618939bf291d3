"""Lowering for ONNX Runtime on a CPU: nodes of domain `ming` become its contrib operators, for speed.

The bodies of these nodes are right everywhere but dense: a mixture of experts computed that way costs E / top_k times
too much. The pass runs after the weights are bound and keeps them streaming: layouts change one expert at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from builders.functions import DOMAIN, SPARSE_MOE, remove_unused_bodies
from builders.tensors import Array, Pieces, StreamedTensor, bound, drop_unused, streamed
from ming_trt.errors import BuildError

CONTRIB = "com.microsoft"


def lower(model: ir.Model, precision: str = "fp32") -> ir.Model:
    """Replaces what ONNX Runtime's CPU provider has better operators for, in place; returns `model`.

    "fp32": `ming::SparseMoE` -> `com.microsoft::MoE`. Raises `BuildError` for another precision.
    """
    if precision != "fp32":
        raise BuildError(f"precision '{precision}' has no lowering for onnxruntime: choose fp32")
    for node in list(model.graph):
        if node.op_identifier()[:2] == (DOMAIN, SPARSE_MOE.name):
            _moe(model.graph, node)
    remove_unused_bodies(model)
    if any(node.domain == CONTRIB for node in model.graph):
        model.opset_imports[CONTRIB] = 1
    return model


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
        after.name, after.type, after.shape = before.name, before.type, before.shape
        ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    graph.insert_before(old, new)
    graph.remove(old, safe=True)
