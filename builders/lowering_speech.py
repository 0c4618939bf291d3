"""Lowering of the audio decoder for ONNX Runtime on a CPU, after `lowering.py`: what its profile asked for.

Mish and the reciprocal in Snake in operators with vector kernels, and one-dimensional convolutions as two-dimensional
ones, which get the blocked kernels: equal to the graph before it but for the last bits. With "int8" convolutions become
products of 8 bits, as linear layers do in `lowering_quantized.py`: one scale per run for what they read, one per output
for the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from builders.lowering import CONTRIB, Emitter, take_over
from builders.quantize import column_codes, column_scales
from builders.tensors import Array, StreamedTensor, bound, drop_unused

_EXP_TOP = np.float32(30)
"""Above it exp(x) (exp(x) + 2) / (exp(x) (exp(x) + 2) + 2) is 1 in float32, far above it overflows."""


# what the divisor of Snake is made with
_OF_ONE_WEIGHT = ("Unsqueeze", "Mul", "Add", "Div")


def lower_decoder(model: ir.Model, precision: str, keep: Sequence[str]) -> None:
    """Rewrites an engine of the audio decoder, weights bound, in place.

    With "int8" the convolutions whose weight's name has none of `keep` in it are quantised.
    """
    _rewrite_mish(model.graph)
    _rewrite_snake(model.graph)
    if precision == "int8":
        _quantize_convolutions(model, keep)
    _widen_convolutions(model.graph)


def _of_type(graph: ir.Graph, *operators: str) -> list[ir.Node]:
    return [node for node in graph if node.op_type in operators and node.domain in ("", "ai.onnx")]


def _weight(node: ir.Node, place: int = 1) -> StreamedTensor | None:
    """The weight of a layer, if it is one of the checkpoint's."""
    value = node.inputs[place] if len(node.inputs) > place else None
    tensor = None if value is None else value.const_value
    return tensor if isinstance(tensor, StreamedTensor) else None


def _rewrite_mish(graph: ir.Graph) -> None:
    """x tanh(log(1 + e)) = x n / (n + 2) with e = exp(x), n = e (e + 2): exactly, and exp has a vector kernel."""
    for node in _of_type(graph, "Mish"):
        emit = Emitter(graph, node, f"{node.name}/")
        x, two = node.inputs[0], emit.constant("two", np.float32(2))
        e = emit("Exp", emit("Min", x, emit.constant("top", _EXP_TOP)))
        n = emit("Mul", e, emit("Add", e, two))
        take_over(node.outputs[0], emit("Mul", x, emit("Div", n, emit("Add", n, two))))
        graph.remove(node, safe=True)


def _rewrite_snake(graph: ir.Graph) -> None:
    """sin(alpha x)^2 / (alpha + 1e-9): a product with the reciprocal, which is known, in the place of the division."""
    for node in _of_type(graph, "Div"):
        square, divisor = node.inputs
        alpha = _row_of(divisor)
        if alpha is None:
            continue
        shape = [*alpha.shape.numpy(), 1]
        inverse = StreamedTensor(f"{alpha.name}_inverse", lambda a=alpha: [_inverse(a)], alpha.dtype, shape)  # type: ignore[misc]
        emit = Emitter(graph, node, f"{node.name}/")
        take_over(node.outputs[0], emit("Mul", square, bound(graph, inverse)))
        graph.remove(node, safe=True)
        while divisor is not None and not divisor.uses() and (unused := divisor.producer()) is not None:
            divisor = unused.inputs[0]
            graph.remove(unused, safe=True)


def _row_of(value: ir.Value | None) -> StreamedTensor | None:
    """The weight [C] that `value` is made of alone: with another axis, and constants multiplied or added."""
    while value is not None and (node := value.producer()) is not None:
        others = (ir.convenience.get_const_tensor(other) for other in node.inputs[1:] if other is not None)
        if node.op_type not in _OF_ONE_WEIGHT or any(tensor is None for tensor in others):
            return None
        value = node.inputs[0]
    tensor = None if value is None else value.const_value
    return tensor if isinstance(tensor, StreamedTensor) and len(tensor.shape) == 1 else None


def _inverse(alpha: StreamedTensor) -> Array:
    values: Array = np.float32(1) / (alpha.numpy()[:, None] + np.float32(1e-9))
    return values


def _widen_convolutions(graph: ir.Graph) -> None:
    """Convolutions of [B, C, T] -> of [B, C, 1, T]: ONNX Runtime has blocked kernels for four axes only."""
    for node in _of_type(graph, "Conv"):
        weight = _weight(node)
        if weight is None or len(weight.shape) != 3:
            continue
        outputs, channels, width = weight.shape.numpy()
        wide = StreamedTensor(f"{weight.name}_2d", weight.pieces, weight.dtype, (outputs, channels, 1, width))
        emit = Emitter(graph, node, f"{node.name}/")
        axis = emit.constant("axis", np.array([2], np.int64))
        before, after = _pads(node)
        x, old = node.inputs[:2]
        result = emit(
            "Conv",
            emit("Unsqueeze", x, axis),
            bound(graph, wide),
            *node.inputs[2:],
            pads=[0, before, 0, after],
            dilations=[1, _first(node, "dilations")],
            strides=[1, _first(node, "strides")],
            kernel_shape=[1, width],
        )
        take_over(node.outputs[0], emit("Squeeze", result, axis))
        graph.remove(node, safe=True)
        drop_unused(graph, [value for value in (old,) if value is not None])


def _quantize_convolutions(model: ir.Model, keep: Sequence[str]) -> None:
    """y[t] = sum over taps i of w_i x[t + i d]: the rows of the taps side by side, times the taps below each other."""
    graph = model.graph
    for node in _of_type(graph, "Conv"):
        weight = _weight(node)
        plain = _first(node, "strides") == 1 and node.attributes.get_int("group", 1) == 1 and not any(_pads(node))
        if weight is None or len(weight.shape) != 3 or not plain or any(word in str(weight.name) for word in keep):
            continue
        emit = Emitter(graph, node, f"{node.name}/")
        x, old = node.inputs[:2]
        outputs, channels, taps = weight.shape.numpy()
        codes, scale, zero = _quantized(emit, emit("Transpose", x, perm=[0, 2, 1]))
        if taps > 1:
            rows = emit("Gather", codes, _places(emit, codes, taps, _first(node, "dilations")), axis=1)
            codes = emit("Reshape", rows, emit.constant("together", np.array([0, 0, taps * channels], np.int64)))
        matrix = bound(graph, _changed(weight, "codes", column_codes, ir.DataType.INT8, (taps * channels, outputs)))
        scales = bound(graph, _changed(weight, "scales", column_scales, ir.DataType.FLOAT, (outputs,)))
        bias = [None, node.inputs[2]] if len(node.inputs) > 2 else []
        product = emit("MatMulIntegerToFloat", codes, matrix, scale, scales, zero, *bias, domain=CONTRIB)
        take_over(node.outputs[0], emit("Transpose", product, perm=[0, 2, 1]))
        graph.remove(node, safe=True)
        drop_unused(graph, [value for value in (old,) if value is not None])
        model.opset_imports[CONTRIB] = 1


def _quantized(emit: Emitter, x: ir.Value) -> Sequence[ir.Value]:
    """Codes uint8, their scale and their zero point."""
    node = ir.node("DynamicQuantizeLinear", [x], num_outputs=3, name=f"{emit.prefix}DynamicQuantizeLinear")
    for i, output in enumerate(node.outputs):
        output.name = f"{node.name}/output_{i}"
    emit.graph.insert_before(emit.before, node)
    return node.outputs


def _places(emit: Emitter, rows: ir.Value, taps: int, dilation: int) -> ir.Value:
    """The rows that each output reads, int64 [T, taps]."""
    before = emit.constant("before", np.array((taps - 1) * dilation))
    count = emit("Sub", emit("Squeeze", emit("Shape", rows, start=1, end=2)), before)
    zero, one = (emit.constant(name, np.array(value)) for name, value in (("from", 0), ("by", 1)))
    first = emit("Unsqueeze", emit("Range", zero, count, one), emit.constant("last", np.array([1], np.int64)))
    return emit("Add", first, emit.constant("taps", np.arange(taps) * dilation))


def _changed(
    weight: StreamedTensor, label: str, change: Callable[[Array], Array], dtype: ir.DataType, shape: Sequence[int]
) -> StreamedTensor:
    """`change` of a convolution's weight [out, in, taps] as the matrix [out, taps · in]."""

    def pieces() -> list[Array]:
        array = weight.numpy()
        return [change(array.transpose(0, 2, 1).reshape(len(array), -1))]

    return StreamedTensor(f"{weight.name}_{label}", pieces, dtype, shape)


def _pads(node: ir.Node) -> tuple[int, int]:
    before, after = node.attributes.get_ints("pads", [0, 0])
    return before, after


def _first(node: ir.Node, name: str) -> int:
    return int(node.attributes.get_ints(name, [1])[0])
