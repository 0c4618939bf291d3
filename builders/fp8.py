"""FP8 (E4M3) by explicit Q/DQ nodes: weights stored as codes with scales, activations quantised with static scales.

Works on the exported graph, after its weights are bound and before they are read: codes and scales stream, one weight
at a time. `weight = code * scale`, scale = largest magnitude / 448 over an output (or over the whole matrix).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from builders.fp8_steps import StepRatios, scaled_after
from builders.precision import FP8PerChannel, FP8PerTensor, kept
from builders.tensors import BFLOAT16, Array, StreamedTensor, bound, drop_unused, streamed
from ming_trt.errors import BuildError

LARGEST = 448.0
_CODE = np.dtype(ml_dtypes.float8_e4m3fn)
# normal numbers: TensorRT may flush smaller ones to 0
_SMALLEST = {np.dtype(np.float32): 2.0**-126, np.dtype(np.float16): 2.0**-14, BFLOAT16: 2.0**-126}
FP8 = FP8PerChannel | FP8PerTensor
# The largest magnitude of an input, or that of each range of steps.
Range = float | tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix product with a weight of its own: its node, the weight, the axis of its outputs, its module's name."""

    node: ir.Node
    weight: ir.Value
    axis: int
    module: str


def linears(model: ir.Model) -> list[Linear]:
    """All `MatMul` and `Gemm` nodes whose second input is a streamed matrix, by node order."""
    found = []
    for node in model.graph:
        if node.domain not in ("", "ai.onnx") or node.op_type not in ("MatMul", "Gemm"):
            continue
        weight = node.inputs[1]
        if weight is None or not isinstance(weight.const_value, StreamedTensor):
            continue
        if weight.name not in model.graph.initializers or len(streamed(weight).shape) != 2:
            continue
        axis = 0 if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) else 1
        found.append(Linear(node, weight, axis, module_of(str(weight.name))))
    return found


def module_of(weight: str) -> str:
    """`blocks.0.attn.qkv` for its weight's name, also for the stored transpose of it."""
    return weight.removesuffix("_T").removesuffix(".weight")


def quantize(model: ir.Model, scheme: FP8, amax: Mapping[str, Range]) -> dict[str, str]:
    """Quantises the linear layers in place; returns module -> "fp8", or why it was kept.

    `amax` maps modules to the largest magnitude of their inputs, or to those of each range of steps. Raises
    `BuildError` if a layer that is to be quantised has none.
    """
    verdicts: dict[str, str] = {}
    cache: dict[tuple[ir.Value, Range], ir.Value] = {}
    steps = StepRatios(model.graph, scheme.steps) if isinstance(scheme, FP8PerChannel) and scheme.steps else None
    for linear in linears(model):
        reason = kept(str(linear.weight.name))
        verdicts[linear.module] = reason or "fp8"
        if reason:
            continue
        largest = largest_of(amax, linear.module)
        x = linear.node.inputs[0]
        if x is None or x.dtype is None:
            raise BuildError(f"the input of '{linear.node.name}' has no type: the export lost it")
        ratio = steps.value(amax_of_steps(amax, linear.module, scheme), x.dtype) if steps else None
        key = (x, amax[linear.module])
        if key not in cache:
            cache[key] = _activation(model.graph, linear, x, largest, ratio)
        linear.node.replace_input_with(0, cache[key])
        linear.node.replace_input_with(1, _weight(model.graph, linear, scheme))
        if ratio is not None:
            scaled_after(model.graph, linear.node, ratio)
        drop_unused(model.graph, [linear.weight])
    return verdicts


def largest_of(amax: Mapping[str, Range], module: str) -> float:
    """The largest magnitude of what enters `module` in any step. Raises `BuildError` if there is none to scale by."""
    found = amax.get(module)
    largest = max(found) if isinstance(found, tuple) else found
    if largest is None or not 0 < largest < float("inf"):
        raise BuildError(
            f"the inputs of '{module}' have no range ({largest}): calibrate with samples that reach it, or "
            "keep its component in bf16"
        )
    return largest


def amax_of_steps(amax: Mapping[str, Range], module: str, scheme: FP8) -> tuple[float, ...]:
    """The magnitudes by range of steps. Raises `BuildError` if they are not as many as the scheme has ranges."""
    found, count = amax[module], len(scheme.steps) + 1 if isinstance(scheme, FP8PerChannel) else 1
    if not isinstance(found, tuple) or len(found) != count:
        raise BuildError(f"the inputs of '{module}' have no magnitude for each of {count} ranges of steps: calibrate")
    return found


def _activation(graph: ir.Graph, linear: Linear, x: ir.Value, largest: float, ratio: ir.Value | None) -> ir.Value:
    base = linear.node.name
    if ratio is not None:
        divided = ir.node("Div", [x, ratio], name=f"{base}/StepUnits")
        divided.outputs[0].name, divided.outputs[0].type = f"{base}/units", x.type
        divided.outputs[0].shape = x.shape
        graph.insert_before(linear.node, divided)
        x = divided.outputs[0]
    scale = _constant(graph, f"{linear.module}.input_scale", np.array(largest / LARGEST, _numpy(x)))
    zero = _constant(graph, "fp8_zero", np.array(0, _CODE))
    quantise = ir.node("QuantizeLinear", [x, scale, zero], name=f"{base}/QuantizeLinear")
    restore = ir.node("DequantizeLinear", [quantise.outputs[0], scale, zero], name=f"{base}/DequantizeLinear")
    quantise.outputs[0].name, quantise.outputs[0].type = f"{base}/code", ir.TensorType(ir.DataType.FLOAT8E4M3FN)
    restore.outputs[0].name, restore.outputs[0].type = f"{base}/restored", x.type
    quantise.outputs[0].shape = restore.outputs[0].shape = x.shape
    for node in (quantise, restore):
        graph.insert_before(linear.node, node)
    return restore.outputs[0]


def _weight(graph: ir.Graph, linear: Linear, scheme: FP8) -> ir.Value:
    source, name = streamed(linear.weight), str(linear.weight.name)
    shape = source.shape.numpy()
    channels = isinstance(scheme, FP8PerChannel)
    scales = StreamedTensor(
        f"{name}_scale",
        lambda: [weight_scales(source.numpy(), linear.axis, channels)],
        source.dtype,
        (shape[linear.axis],) if channels else (),
    )
    codes = StreamedTensor(
        f"{name}_fp8", lambda: [weight_codes(source.numpy(), linear.axis, channels)], ir.DataType.FLOAT8E4M3FN, shape
    )
    inputs = [bound(graph, codes), bound(graph, scales)]
    attributes = {"axis": linear.axis} if channels else None
    restore = ir.node("DequantizeLinear", inputs, attributes, name=f"{linear.node.name}/weight/DequantizeLinear")
    restore.outputs[0].name = f"{linear.node.name}/weight"
    restore.outputs[0].type, restore.outputs[0].shape = linear.weight.type, linear.weight.shape
    graph.insert_before(linear.node, restore)
    return restore.outputs[0]


def weight_scales(matrix: Array, axis: int, channels: bool) -> Array:
    """Scales in the matrix's type: one per index of `axis`, or one; never 0, so that a row of zeros stays zero."""
    wide = np.abs(np.asarray(matrix, np.float32))
    largest = wide.max(axis=1 - axis) if channels else wide.max()
    scales = np.where(largest > 0, largest / LARGEST, 1.0).astype(matrix.dtype)
    # in a half type a scale may round down, or to 0; codes saturate, and nothing is divided by 0
    return np.maximum(scales, np.array(_SMALLEST[matrix.dtype], matrix.dtype))


def weight_codes(matrix: Array, axis: int, channels: bool) -> Array:
    """The E4M3 codes of `matrix` under `weight_scales`, saturating at 448."""
    scales = weight_scales(matrix, axis, channels).astype(np.float32)
    if channels:
        scales = np.expand_dims(scales, 1 - axis)
    return to_fp8(np.asarray(matrix, np.float32) / scales)


def to_fp8(values: Array) -> Array:
    """Rounds float32 to E4M3, to the nearest, saturating."""
    codes: Array = np.clip(values, -LARGEST, LARGEST).astype(_CODE)
    return codes


def fake_quantised(values: Array, scale: Array | float) -> Array:
    """`values` as E4M3 codes times `scale` holds them, in float32."""
    restored: Array = to_fp8(np.asarray(values, np.float32) / scale).astype(np.float32) * scale
    return restored


def _constant(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    existing = graph.initializers.get(name)
    if existing is not None:
        return existing
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _numpy(value: ir.Value) -> np.dtype[np.generic]:
    assert value.dtype is not None
    return np.dtype(value.dtype.numpy())
