"""From an exported graph to what TensorRT takes: sizes that must be static, operators an older parser lacks, FP8."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from builders.fp8 import quantize
from builders.fp8_experts import SPARSE_MOE_FP8, add_body, inline_bodies, quantize_experts
from builders.precision import Floats
from builders.tensorrt_lowering import lower_operators, lower_unfused_attention
from ming_trt.errors import BuildError

if TYPE_CHECKING:
    from builders.component import ExportOptions


def adapt(model: ir.Model, options: ExportOptions) -> dict[str, str]:
    """Adapts a model with bound weights and bodies in place; returns module -> "fp8" or why it was kept, if quantised.

    Raises `BuildError` for operators that TensorRT does not take.
    """
    verdicts = {}
    if not isinstance(options.scheme, Floats) and options.scheme is not None:
        ranges = dict(options.ranges)
        verdicts = quantize(model, options.scheme, ranges) | quantize_experts(model, options.scheme, ranges)
        add_body(model, options.float_precision)
        if SPARSE_MOE_FP8 in options.lowered:
            inline_bodies(model)
    _fix(model, dict(options.fixed))
    lower_unfused_attention(model)
    lower_operators(model, (*options.lowered, *(("Mish",) if options.float_precision == "bf16" else ())))
    for node in model.graph:
        if node.op_type == "Attention" and len(node.inputs) > 0 and node.inputs[0] is node.inputs[1]:
            # TensorRT's parser crashes on it
            raise BuildError(f"'{node.name}' attends with one tensor as query and key: copy one by Identity")
        if node.op_type == "NonZero":
            raise BuildError(f"'{node.name}' has a data-dependent shape: pass the indices in")
    return verdicts


def _fix(model: ir.Model, sizes: dict[str, int]) -> None:
    """Symbols become numbers in inputs and outputs; inferred shapes in between are dropped, TensorRT has its own."""
    if not sizes:
        return
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape(
                [sizes.get(str(dim), dim) if not isinstance(dim, int) else dim for dim in value.shape]
            )
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output() and value.shape is not None and _symbols(value) & sizes.keys():
                value.shape = None


def _symbols(value: ir.Value) -> set[str]:
    return {str(dim) for dim in value.shape or () if not isinstance(dim, int)}
