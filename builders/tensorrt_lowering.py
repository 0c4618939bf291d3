"""Operators that older parsers of TensorRT lack, in basic ones: the 10.14 of TensorRT-LLM's container knows `Attention`
but none of `RMSNormalization`, `RotaryEmbedding` and `TensorScatter`.

Numerically the same as the operators' definitions in the ONNX standard; `builders/tensorrt_api.py` says which release
lacks what.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from ming_trt.errors import BuildError

Block: TypeAlias = ir.Graph | ir.Function
# What has fused attention kernels, found by building each: widths of a head, and the fewest heads for one query.
NARROWEST_HEAD, WIDEST_HEAD, FEWEST_HEADS = 16, 256, 4
_LOWEST = float(np.finfo(np.float32).min)


def lower_operators(model: ir.Model, operators: Sequence[str]) -> None:
    """Replaces all nodes of `operators` in the graph and in local functions, in place.

    Raises `BuildError` for an operator that has no lowering, if the model uses it.
    """
    blocks: list[Block] = [model.graph, *model.functions.values()]
    for block in blocks:
        for node in list(block):
            if node.domain in ("", "ai.onnx") and node.op_type in operators:
                _lower(block, node)


def lower_unfused_attention(model: ir.Model) -> int:
    """Writes those `Attention` nodes in basic operators that TensorRT has no kernel for, and then refuses to build:
    float32, heads wider than 256 (the autoencoder's), fewer than four (a tiny model's). Returns how many."""
    count = 0
    for node in list(model.graph):
        if node.op_type == "Attention" and node.domain in ("", "ai.onnx"):
            query = _input(node, 0)
            heads, width = (_static(node, query, axis) for axis in (1, 3))
            fused = NARROWEST_HEAD <= width <= WIDEST_HEAD and heads >= FEWEST_HEADS
            if query.dtype == ir.DataType.FLOAT or not fused:
                _lower(model.graph, node)
                count += 1
    return count


def _lower(block: Block, node: ir.Node) -> None:
    if node.op_type not in _LOWERINGS:
        raise BuildError(
            f"'{node.name}' is {node.op_type}, which this TensorRT's parser does not know and which has no lowering: "
            "use a newer TensorRT"
        )
    _LOWERINGS[node.op_type](_Writer(block, node), node)
    block.remove(node, safe=True)


class _Writer:
    """Emits nodes in front of one that is replaced; names derive from its name, so that they stay unique."""

    def __init__(self, block: Block, node: ir.Node) -> None:
        self.block, self.node, self.count = block, node, 0

    def __call__(self, operator: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return self.many(operator, 1, *inputs, **attributes)[0]

    def many(self, operator: str, outputs: int, *inputs: ir.Value | None, **attributes: Any) -> Sequence[ir.Value]:
        base = self.node.name or self.node.outputs[0].name
        name = f"{base}/{operator}_{self.count}"
        self.count += 1
        node = ir.node(operator, list(inputs), attributes or None, num_outputs=outputs, name=name)
        for index, value in enumerate(node.outputs):
            value.name = f"{name}/output_{index}"
        self.block.insert_before(self.node, node)
        return node.outputs

    def integers(self, *values: int) -> ir.Value:
        return self("Constant", value=ir.tensor(np.array(values, np.int64)))

    def finish(self, value: ir.Value) -> None:
        """`value` takes the place of the node's output."""
        before = self.node.outputs[0]
        value.name, value.type, value.shape = before.name, before.type, before.shape
        before.name = f"{before.name}/lowered"
        ir.convenience.replace_all_uses_with(before, value, replace_graph_outputs=True)


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise BuildError(f"'{node.name}' ({node.op_type}) lacks its input {index}")
    return value


def _rms_norm(write: _Writer, node: ir.Node) -> None:
    """Normalised in `stash_type` (float32), rounded to x's type, then scaled in that type."""
    x, scale = _input(node, 0), _input(node, 1)
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    stash = node.attributes.get_int("stash_type", int(ir.DataType.FLOAT))
    if node.attributes.get_int("axis", -1) != -1:
        raise BuildError(f"'{node.name}' normalises more than its last axis, which has no lowering")
    if stash != int(ir.DataType.FLOAT):
        raise BuildError(f"'{node.name}' normalises in another type than float32, which has no lowering")
    wide = write("Cast", x, to=stash)
    square = write("Mul", wide, wide)
    mean = write("ReduceMean", square, write.integers(-1), keepdims=1)
    small = write("Constant", value=ir.tensor(np.array(epsilon, np.float32)))
    root = write("Sqrt", write("Add", mean, small))
    normal = write("CastLike", write("Div", wide, root), x)
    write.finish(write("Mul", normal, scale))


def _rotary(write: _Writer, node: ir.Node) -> None:
    """x [B, heads, S, D]; cos and sin [B, S, D/2]; the halves of a head are the two parts of a pair."""
    x, cos, sin = (_input(node, index) for index in range(3))
    if node.attributes.get_int("interleaved", 0) or node.attributes.get_int("rotary_embedding_dim", 0):
        raise BuildError(f"'{node.name}' rotates interleaved pairs or a part of a head, which has no lowering")
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        raise BuildError(f"'{node.name}' reads its tables by position ids, which has no lowering")
    heads = write.integers(1)
    cos, sin = write("Unsqueeze", cos, heads), write("Unsqueeze", sin, heads)
    low, high = write.many("Split", 2, x, axis=-1, num_outputs=2)
    real = write("Sub", write("Mul", low, cos), write("Mul", high, sin))
    imaginary = write("Add", write("Mul", low, sin), write("Mul", high, cos))
    write.finish(write("Concat", real, imaginary, axis=-1))


def _tensor_scatter(write: _Writer, node: ir.Node) -> None:
    """cache [B, heads, T, D], update [B, heads, S, D], write_index [B]: a scatter of S rows along T.

    The result is another tensor than the cache: what TensorRT updates in place with the operator, it copies with this.
    """
    cache, update = _input(node, 0), _input(node, 1)
    if node.attributes.get_int("axis", -2) != -2 or node.attributes.get_string("mode", "linear") != "linear":
        raise BuildError(f"'{node.name}' writes along another axis or in circles, which has no lowering")
    first = _input(node, 2)
    steps = write("Shape", update, start=2, end=3)
    zero, one = (write("Constant", value=ir.tensor(np.array(value, np.int64))) for value in (0, 1))
    offsets = write("Range", zero, write("Squeeze", steps), one)
    place = write("Add", write("Unsqueeze", first, write.integers(1)), offsets)
    index = write("Expand", write("Unsqueeze", place, write.integers(1, 3)), write("Shape", update))
    write.finish(write("ScatterElements", cache, index, update, axis=2))


def _static(node: ir.Node, value: ir.Value, axis: int) -> int:
    size = value.shape[axis] if value.shape is not None and len(value.shape) == 4 else None
    if not isinstance(size, int):
        raise BuildError(f"'{node.name}' has an input whose axis {axis} has no static size, which has no lowering")
    return size


def _attention(write: _Writer, node: ir.Node) -> None:
    """q [B, heads, S, D], k and v [B, kv heads, T, D], an optional mask that broadcasts to [B, heads, S, T] (bool: true
    is seen). Softmax in float32. The heads that share a key are an axis of their own, so keys are not repeated."""
    q, k, v = (_input(node, index) for index in range(3))
    if any(value is not None for value in node.inputs[4:]) or len(node.outputs) > 1:
        raise BuildError(f"'{node.name}' has a cache of its own or further outputs, which has no lowering")
    if node.attributes.get_int("is_causal", 0) or node.attributes.get_float("softcap", 0.0):
        raise BuildError(f"'{node.name}' is causal by attribute or caps its scores, which has no lowering")
    heads, kv_heads, width = _static(node, q, 1), _static(node, k, 1), _static(node, q, 3)
    scale = node.attributes.get_float("scale", width**-0.5)
    grouped = heads != kv_heads
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if grouped:
        size = write("Shape", q)
        q = write("Reshape", q, write.integers(0, kv_heads, heads // kv_heads, -1, width))
        k, v = (write("Unsqueeze", value, write.integers(2)) for value in (k, v))
        mask = None if mask is None else write("Unsqueeze", mask, write.integers(1))
    axes = [0, 1, 2, 4, 3] if grouped else [0, 1, 3, 2]
    # scaled before the product, where a half type cannot overflow
    small = write("CastLike", write("Constant", value=ir.tensor(np.array(scale, np.float32))), q)
    scores = write("MatMul", write("Mul", q, small), write("Transpose", k, perm=axes))
    wide = write("Cast", scores, to=int(ir.DataType.FLOAT))
    if mask is not None:
        if mask.dtype == ir.DataType.BOOL or (node.inputs[3] is not None and node.inputs[3].dtype == ir.DataType.BOOL):
            wide = write("Where", mask, wide, write("Constant", value=ir.tensor(np.array(_LOWEST, np.float32))))
        else:
            wide = write("Add", wide, write("Cast", mask, to=int(ir.DataType.FLOAT)))
    mixed = write("MatMul", write("CastLike", write("Softmax", wide, axis=-1), v), v)
    write.finish(write("Reshape", mixed, size) if grouped else mixed)


def _mish(write: _Writer, node: ir.Node) -> None:
    """x * tanh(softplus(x)), in float32: the parser takes the operator in float32 and float16 only."""
    x = _input(node, 0)
    wide = write("Cast", x, to=int(ir.DataType.FLOAT))
    write.finish(write("CastLike", write("Mul", wide, write("Tanh", write("Softplus", wide))), x))


_LOWERINGS: dict[str, Callable[[_Writer, ir.Node], None]] = {
    "Attention": _attention,
    "Mish": _mish,
    "RMSNormalization": _rms_norm,
    "RotaryEmbedding": _rotary,
    "TensorScatter": _tensor_scatter,
}
