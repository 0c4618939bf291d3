"""Lowering to ONNX Runtime's quantised CPU kernels; the formats are in `quantize.py`.

Experts become `QMoE`. Linear layers become `MatMulNBits` where weights are what a step waits for (decoding), or
`DynamicQuantizeMatMul`, which quantises activations too, where there are many rows (encoders, the denoiser).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import onnx_ir as ir

from builders.functions import SPARSE_MOE
from builders.lowering import CONTRIB, backwards, backwards_logits, interleaved, nodes, replace
from builders.quantize import (
    BLOCKS,
    WeightOnly,
    block_for,
    quantize_blocks,
    quantize_columns,
)
from builders.tensors import Array, StreamedTensor, bound, drop_unused, quantized, streamed
from ming_trt.errors import BuildError

# int8 activations inside the kernel: the only fast form of 8 bits, and twice as fast for 4
_ACCURACY_LEVEL = 4


class Linear(NamedTuple):
    """`x @ weight.T + bias` found in a graph; `weight` [out, in] is initializer `name`."""

    node: ir.Node
    name: str
    x: ir.Value
    weight: StreamedTensor
    bias: ir.Value | None


def linears(model: ir.Model, keep: Sequence[str]) -> list[Linear]:
    """The linear layers whose weight's name has none of `keep` in it."""
    found = []
    for node in model.graph:
        if node.domain not in ("", "ai.onnx") or node.op_type not in ("MatMul", "Gemm") or len(node.inputs) < 2:
            continue
        x, value = node.inputs[:2]
        if x is None or value is None or not isinstance(value.const_value, StreamedTensor):
            continue
        if node.op_type == "Gemm":
            plain = node.attributes.get_float("alpha", 1.0) == node.attributes.get_float("beta", 1.0) == 1.0
            if not plain or node.attributes.get_int("transA", 0) or not node.attributes.get_int("transB", 0):
                continue
            weight = streamed(value)
        else:
            weight = value.meta.get("transposed_from")
        if weight is None or any(word in str(weight.name) for word in keep):
            continue
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        found.append(Linear(node, str(weight.name), x, weight, bias))
    return found


def quantize_experts(model: ir.Model, scheme: WeightOnly) -> None:
    """`ming::SparseMoE` -> `com.microsoft::QMoE`."""
    for node in nodes(model, SPARSE_MOE.name):
        _qmoe(model.graph, node, scheme.experts)


def _qmoe(graph: ir.Graph, node: ir.Node, bits: int) -> None:
    x, logits, gate_up_value, down_value = node.inputs
    if gate_up_value is None or down_value is None or logits is None:
        raise BuildError(f"'{node.name}' lacks its weights")
    gate_up, down = streamed(gate_up_value), streamed(down_value)
    block = block_for(gate_up.shape.numpy()[2], down.shape.numpy()[2])
    logits = backwards_logits(graph, node, logits)
    attributes = [
        ir.AttrInt64("k", node.attributes["top_k"].as_int()),
        ir.AttrInt64("normalize_routing_weights", node.attributes["normalize"].as_int()),
        ir.AttrString("activation_type", "swiglu"),
        ir.AttrInt64("swiglu_fusion", 1),
        ir.AttrFloat32("activation_alpha", 1.0),
        ir.AttrFloat32("activation_beta", 0.0),
        ir.AttrInt64("expert_weight_bits", bits),
        ir.AttrInt64("accuracy_level", _ACCURACY_LEVEL),
    ]
    if block is not None:
        attributes.append(ir.AttrInt64("block_size", block))
    inputs: list[ir.Value | None] = [x, logits]
    for tensor in (interleaved(gate_up), backwards(down)):
        codes, scales = _stack(tensor, bits, block)
        inputs += [bound(graph, codes), bound(graph, scales), None]
    if not node.attributes["normalize"].as_int():
        # without mixing weights of its own the kernel divides them by their sum, whatever the attribute says
        softmax = ir.node("Softmax", [logits], {"axis": -1}, name=f"{node.name}/Softmax")
        softmax.outputs[0].name = f"{softmax.name}/output_0"
        graph.insert_before(node, softmax)
        inputs += [None] * (14 - len(inputs)) + [softmax.outputs[0]]
    else:
        inputs.pop()
    name = (node.name or "").replace(SPARSE_MOE.name, "QMoE")
    replace(graph, node, ir.Node(CONTRIB, "QMoE", inputs=inputs, attributes=attributes, name=name))
    drop_unused(graph, [gate_up_value, down_value])


def _stack(tensor: StreamedTensor, bits: int, block: int | None) -> tuple[StreamedTensor, StreamedTensor]:
    """Codes [E, rows, width * bits / 8] and scales [E, rows, blocks], or [E, rows] with one block per row."""
    experts, rows, width = tensor.shape.numpy()
    run = block or width
    if width * bits % 8:
        raise BuildError(
            f"'{tensor.name}' has rows of {width} weights, which do not fill bytes at {bits} bits: use int8"
        )

    def quantize(matrix: Array) -> tuple[Array, Array]:
        return quantize_blocks(matrix, bits, run)

    scales = (experts, rows, width // run) if block else (experts, rows)
    return quantized(
        str(tensor.name), tensor.rows, quantize, (ir.DataType.UINT8, (experts, rows, width * bits // 8)), scales
    )


def quantize_linears(model: ir.Model, scheme: WeightOnly, keep: Sequence[str]) -> None:
    """Linear layers -> `com.microsoft::MatMulNBits`, except those named in `keep` and those too narrow for a block."""
    for linear in linears(model, keep):
        out, width = linear.weight.shape.numpy()
        bits = scheme.bits(linear.name)
        block = next((size for size in BLOCKS if size <= width), None)
        if block is None:
            continue
        count = -(-width // block)
        codes, scales = quantized(
            linear.name,
            partial(_alone, linear.weight),
            partial(quantize_blocks, bits=bits, block=block),
            (ir.DataType.UINT8, (out, count, block * bits // 8)),
            (out, count),
        )
        attributes = {"K": width, "N": out, "bits": bits, "block_size": block, "accuracy_level": _ACCURACY_LEVEL}
        inputs: list[ir.Value | None] = [linear.x, bound(model.graph, codes), bound(model.graph, scales)]
        if linear.bias is not None:
            inputs += [None, None, linear.bias]
        _swap(model.graph, linear, "MatMulNBits", inputs, attributes)


def quantize_dynamically(model: ir.Model, keep: Sequence[str]) -> None:
    """Linear layers -> `com.microsoft::DynamicQuantizeMatMul`, except those named in `keep`."""
    for linear in linears(model, keep):
        out, width = linear.weight.shape.numpy()
        codes, scales = quantized(
            linear.name,
            partial(_alone, linear.weight),
            quantize_columns,
            (ir.DataType.INT8, (width, out)),
            (out,),
        )
        inputs: list[ir.Value | None] = [linear.x, bound(model.graph, codes), bound(model.graph, scales)]
        if linear.bias is not None:
            inputs += [None, linear.bias]
        _swap(model.graph, linear, "DynamicQuantizeMatMul", inputs, {})


def _swap(
    graph: ir.Graph, linear: Linear, operator: str, inputs: Iterable[ir.Value | None], attributes: dict[str, int]
) -> None:
    old_inputs = [value for value in linear.node.inputs if value is not None]
    name = f"{(linear.node.name or '').rpartition('/')[0]}/{operator}"
    numbers = [ir.AttrInt64(label, value) for label, value in attributes.items()]
    replace(graph, linear.node, ir.Node(CONTRIB, operator, inputs=inputs, attributes=numbers, name=name))
    drop_unused(graph, [value for value in old_inputs if isinstance(value.const_value, StreamedTensor)])


def _alone(tensor: StreamedTensor) -> list[Array]:
    return [tensor.numpy()]
