"""Lowering for ONNX Runtime on a CPU: nodes of domain `ming` become its contrib operators, for speed.

The bodies of these nodes are right everywhere but dense: a mixture of experts computed that way costs E / top_k times
too much. The pass runs after the weights are bound and keeps them streaming: layouts change one expert at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from builders.functions import DOMAIN, MROPE, SPARSE_MOE, remove_unused_bodies
from builders.quantize import ACTIVATIONS_BY_BLOCK, SCHEMES
from builders.tensors import Array, StreamedTensor, bound, drop_unused, streamed
from ming_trt.errors import BuildError
from ming_trt.models import rope

CONTRIB = "com.microsoft"


def lower(model: ir.Model, precision: str = "fp32", *, keep: Sequence[str] = (), many_rows: bool = False) -> ir.Model:
    """Replaces what ONNX Runtime's CPU provider has better operators for, in place; returns `model`.

    All precisions: one table of cosines and sines per step instead of one per `ming::MRope`, and attention by groups
    of query heads. "fp32":
    `ming::SparseMoE` -> `com.microsoft::MoE`. "int8", "int4": experts and linear layers in so many bits, but for
    weights with one of `keep` in their name; `many_rows` says that a run has dozens of rows at least, so that "int8"
    quantises activations as well. "w8a8": activations are quantised too, and each expert multiplies all of its rows at
    once, but for `ACTIVATIONS_BY_BLOCK`. Raises `BuildError` for another precision.
    """
    from builders import lowering_quantized as quantized
    from builders.lowering_experts import experts_by_rows

    known = ("fp32", *SCHEMES, "w8a8")
    if precision not in known:
        raise BuildError(f"precision '{precision}' has no lowering for onnxruntime: choose {', '.join(known)}")
    _share_rope_tables(model)
    _group_attention(model)
    if precision == "fp32":
        for node in nodes(model, SPARSE_MOE.name):
            _moe(model.graph, node)
    elif precision == "w8a8":
        experts_by_rows(model)
        quantized.quantize_dynamically(model, (*keep, *ACTIVATIONS_BY_BLOCK))
        quantized.quantize_linears(model, SCHEMES["int8"], keep)
    else:
        quantized.quantize_experts(model, SCHEMES[precision])
        if precision == "int8" and many_rows:
            quantized.quantize_dynamically(model, keep)
        else:
            quantized.quantize_linears(model, SCHEMES[precision], keep)
    remove_unused_bodies(model)
    if any(node.domain == CONTRIB for node in model.graph.all_nodes()):
        model.opset_imports[CONTRIB] = 1
    return model


def nodes(model: ir.Model, name: str) -> list[ir.Node]:
    """The nodes of `ming::name`."""
    return [node for node in model.graph if node.domain == DOMAIN and node.op_type == name]


class Emitter:
    """Inserts nodes before `before`, named `prefix` + operator, and gives their first outputs."""

    def __init__(self, graph: ir.Graph, before: ir.Node, prefix: str) -> None:
        self.graph, self.before, self.prefix = graph, before, prefix
        self._count: Counter[str] = Counter()

    def __call__(self, operator: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """One node. Attributes as of `onnx_ir.node`."""
        repeat = self._count[operator]
        self._count[operator] += 1
        name = f"{self.prefix}{operator}" + (f"_{repeat}" if repeat else "")
        node = ir.node(operator, list(inputs), attributes, domain=domain, name=name)
        node.outputs[0].name = f"{name}/output_0"
        self.graph.insert_before(self.before, node)
        return node.outputs[0]

    def constant(self, label: str, array: Array | np.float32) -> ir.Value:
        """A small array as an initializer."""
        return constant(self.graph, f"{self.prefix}{label}", array)


def _share_rope_tables(model: ir.Model) -> None:
    """Inlines `ming::MRope`; nodes with the same positions and attributes read the same tables."""
    graph, tables = model.graph, dict[tuple[Any, ...], tuple[ir.Value, ir.Value]]()
    for node in nodes(model, MROPE.name):
        q, k, position_ids = node.inputs
        axes, theta = list(node.attributes["axes"].as_ints()), node.attributes["theta"].as_float()
        key = (position_ids, tuple(axes), theta)
        if key not in tables:
            tables[key] = _rope_tables(Emitter(graph, node, f"/rope_{len(tables)}/"), position_ids, axes, theta)
        emit = Emitter(graph, node, f"{scope_of(node)}MRope/")
        for source, output in zip((q, k), list(node.outputs), strict=True):
            take_over(output, emit("RotaryEmbedding", source, *tables[key]))
        graph.remove(node, safe=True)


def _rope_tables(
    emit: Emitter, position_ids: ir.Value | None, axes: list[int], theta: float
) -> tuple[ir.Value, ir.Value]:
    """Cosines and sines [B, S, D/2], as the body of `MRope` computes them."""
    inverse = np.array(rope.inverse_frequencies(2 * len(axes), theta), np.float32)
    chosen = emit("Gather", position_ids, emit.constant("axes", np.array(axes, np.int64)), axis=0)
    last = emit("Transpose", chosen, perm=[1, 2, 0])
    position = emit("Cast", last, to=int(ir.DataType.FLOAT))
    angle = emit("Mul", position, emit.constant("inverse", inverse))
    return emit("Cos", angle), emit("Sin", angle)


class Grouping(NamedTuple):
    """What all layers share: the additive mask [B, 1, 1, S, T] and the shapes of the steps."""

    bias: ir.Value
    rows: ir.Value
    scores: ir.Value
    weights: ir.Value


def _group_attention(model: ir.Model) -> None:
    """`Attention` whose query heads share key heads, as matrix products over the queries of each key head.

    The kernel of `Attention` reads a key head once for every query head that shares it; here it is read once. Half
    the time of a decoding step's attention, and no slower for many tokens.
    """
    groupings: dict[tuple[Any, ...], Grouping] = {}
    for node in list(model.graph):
        if node.op_type != "Attention" or node.domain not in ("", "ai.onnx") or len(node.inputs) != 4:
            continue
        q, k, v, mask = node.inputs
        if q is None or k is None or v is None or mask is None or mask.dtype != ir.DataType.BOOL:
            continue
        heads, kv_heads, width = static(q, 1), static(k, 1), static(q, 3)
        if heads == kv_heads or node.attributes.get_int("is_causal", 0) or node.attributes.get_float("softcap", 0.0):
            continue
        key = (mask, heads, kv_heads, width)
        if key not in groupings:
            emit = Emitter(model.graph, node, f"/attention_{len(groupings)}/")
            groupings[key] = _grouping(emit, mask, heads, kv_heads, width)
        shared = groupings[key]
        emit = Emitter(model.graph, node, f"{scope_of(node)}Attention/")
        scale = node.attributes.get_float("scale", width**-0.5) or width**-0.5
        # [B, M * G, S, D] -> [B, M, G * S, D]: head h belongs to key head h // G
        rows = emit("Reshape", q, shared.rows)
        scores = emit("FusedMatMul", rows, k, domain=CONTRIB, transB=1, alpha=scale)
        weights = emit("Softmax", emit("Add", emit("Reshape", scores, shared.scores), shared.bias), axis=-1)
        out = emit("MatMul", emit("Reshape", weights, shared.weights), v)
        take_over(node.outputs[0], emit("Reshape", out, emit("Shape", q)))
        model.graph.remove(node, safe=True)


def _grouping(emit: Emitter, mask: ir.Value, heads: int, kv_heads: int, width: int) -> Grouping:
    """The mask is 0 where `mask` [B, 1, S, T] is true, else so low that the weight is 0.

    It is finite, so that a row that sees nothing (padding) gives an average and not NaN.
    """
    seen, hidden = emit.constant("seen", np.float32(0)), emit.constant("hidden", np.float32(-1e30))
    bias = emit("Unsqueeze", emit("Where", mask, seen, hidden), emit.constant("axis", np.array([1], np.int64)))
    rows = emit.constant("rows", np.array([0, kv_heads, -1, width], np.int64))
    group = emit.constant("group", np.array([0, kv_heads, heads // kv_heads], np.int64))
    scores = emit("Concat", group, emit("Shape", mask, start=2), axis=0)
    merged = emit.constant("merged", np.array([0, kv_heads, -1], np.int64))
    return Grouping(bias, rows, scores, emit("Concat", merged, emit("Shape", mask, start=3), axis=0))


def static(value: ir.Value, axis: int) -> int:
    """A size that is a number. Raises `BuildError` if the graph does not know it."""
    size = value.shape[axis] if value.shape is not None else None
    if not isinstance(size, int):
        raise BuildError(f"axis {axis} of '{value.name}' is not static: the export lost its shape")
    return size


def scope_of(node: ir.Node) -> str:
    """`/layers.0/attention/` of a node with a canonical name."""
    return f"{(node.name or '').rpartition('/')[0]}/"


def constant(graph: ir.Graph, name: str, array: Array | np.float32) -> ir.Value:
    """Registers a small array as an initializer."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def interleaved(gate_up: StreamedTensor) -> StreamedTensor:
    """`gate_up` [E, 2I, H] as the contrib kernels want it: rows gate 0, up 0, gate 1, up 1, ...; experts backwards."""

    def pieces() -> Iterator[Array]:
        for expert in gate_up.rows_backwards():
            half = expert.shape[0] // 2
            yield np.stack((expert[:half], expert[half:]), axis=1).reshape(expert.shape)

    return StreamedTensor(f"{gate_up.name}_interleaved", pieces, gate_up.dtype, gate_up.shape.numpy())


def backwards(stack: StreamedTensor) -> StreamedTensor:
    """The stack with its last entry first."""
    return StreamedTensor(f"{stack.name}_backwards", stack.rows_backwards, stack.dtype, stack.shape.numpy())


def backwards_logits(graph: ir.Graph, node: ir.Node, logits: ir.Value) -> ir.Value:
    """The logits of a `SparseMoE` with the last expert first.

    Of experts with equal logits the contrib kernels choose the higher one (seen in 1.32), our definition the lower one:
    so they get the experts backwards.
    """
    experts = static(logits, 1)
    name = f"experts_backwards_{experts}"
    order = graph.initializers.get(name)
    if order is None:
        order = constant(graph, name, np.arange(experts - 1, -1, -1))
    turned = ir.node("Gather", [logits, order], {"axis": 1}, name=f"{node.name}/Backwards")
    turned.outputs[0].name = f"{turned.name}/output_0"
    turned.outputs[0].type, turned.outputs[0].shape = logits.type, logits.shape
    graph.insert_before(node, turned)
    return turned.outputs[0]


def _moe(graph: ir.Graph, node: ir.Node) -> None:
    """`MoE` takes logits and does softmax and top-k itself; silu(gate) * up is its SwiGLU with alpha 1 and beta 0."""
    x, logits, gate_up_value, down_value = node.inputs
    if logits is None or gate_up_value is None or down_value is None:
        raise BuildError(f"'{node.name}' lacks its weights")
    gate_up, down = bound(graph, interleaved(streamed(gate_up_value))), bound(graph, backwards(streamed(down_value)))
    lowered = ir.Node(
        CONTRIB,
        "MoE",
        inputs=[x, backwards_logits(graph, node, logits), gate_up, None, down],
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
    drop_unused(graph, [gate_up_value, down_value])


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
