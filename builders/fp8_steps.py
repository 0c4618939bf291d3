"""Input scales of FP8 that follow the denoiser's step: one for each range of its input `time`.

A scale that is computed at run time may be given to Q/DQ, but TensorRT then multiplies in bf16 what it has rounded to
FP8 and restored (seen in plans of RTX 1.7). So Q/DQ keep one constant scale, that of the widest range, and in a step
whose inputs are smaller the input is divided by a ratio first and the product multiplied by it after, which fuses with
what stands around. Ratios are powers of two, so that neither rounds anything: FP8 numbers have an exponent of their
own, and a finer ratio would gain nothing.

The rows of a batch may be at different times. Their scale is the largest of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from builders.tensors import Array
from ming_trt.errors import BuildError

TIME = "time"


def range_of(time: float, bounds: Sequence[float]) -> int:
    """The range that `time` falls into: 0 up to and with the first bound, and so on."""
    return sum(time > bound for bound in bounds)


def ranges_of(times: Array, bounds: Sequence[float]) -> list[int]:
    """The ranges that the rows of a batch fall into, each once."""
    return sorted({range_of(float(time), bounds) for time in np.ravel(times)})


def ratios(largest: Sequence[float]) -> tuple[float, ...]:
    """For each range the power of two, 1 at most, by which its scale is smaller than that of the widest; 1 where the
    samples showed zeros only."""
    widest = max(largest)
    return tuple(2.0 ** min(0, math.ceil(math.log2(value / widest))) if value > 0 else 1.0 for value in largest)


def scale_at(largest: Sequence[float], chosen: Sequence[int]) -> float:
    """The magnitude that is the largest code in a batch whose rows are in the ranges `chosen`."""
    return max(largest) * max(ratios(largest)[index] for index in chosen)


class StepRatios:
    """Emits the ratios of a step, as scalars, at the head of a graph that has the input `time` [B]."""

    def __init__(self, graph: ir.Graph, bounds: Sequence[float]) -> None:
        self.graph, self.bounds, self.anchor = graph, tuple(bounds), next(iter(graph))
        self.index: ir.Value | None = None
        self.cache: dict[tuple[tuple[float, ...], ir.DataType], ir.Value] = {}

    def value(self, largest: Sequence[float], dtype: ir.DataType) -> ir.Value | None:
        """The ratio of ranges with these magnitudes, a scalar of `dtype`; None if it is always 1."""
        found = ratios(largest)
        if all(ratio == 1.0 for ratio in found):
            return None
        if (found, dtype) not in self.cache:
            name = f"/step_ratio_{len(self.cache)}"
            table = self._constant(f"{name}/table", np.array(found, np.float32))
            rows = self._emit(f"{name}/rows", "Gather", table, self._index(), axis=0)
            zero = self._constant("/step/zero", np.array([0], np.int64))
            most = self._emit(f"{name}/most", "ReduceMax", rows, zero, keepdims=0)
            self.cache[found, dtype] = self._emit(name, "Cast", most, to=int(dtype))
        return self.cache[found, dtype]

    def _index(self) -> ir.Value:
        """[B]: the range of each row."""
        if self.index is None:
            time = next((value for value in self.graph.inputs if value.name == TIME), None)
            if time is None:
                raise BuildError(f"there are scales by step and the graph has no input '{TIME}': give it one scale")
            last = self._constant("/step/last", np.array([-1], np.int64))
            column = self._emit("/step/column", "Unsqueeze", time, last)
            bounds = self._constant("/step/bounds", np.array(self.bounds, np.float32))
            above = self._emit("/step/above", "Greater", column, bounds)
            counted = self._emit("/step/counted", "Cast", above, to=int(ir.DataType.INT64))
            self.index = self._emit("/step/range", "ReduceSum", counted, last, keepdims=0)
        return self.index

    def _emit(self, name: str, operator: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(operator, list(inputs), attributes or None, name=name)
        node.outputs[0].name = f"{name}/output"
        self.graph.insert_before(self.anchor, node)
        return node.outputs[0]

    def _constant(self, name: str, array: Array) -> ir.Value:
        existing = self.graph.initializers.get(name)
        if existing is not None:
            return existing
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value


def scaled_after(graph: ir.Graph, node: ir.Node, ratio: ir.Value) -> None:
    """Multiplies the product of a `MatMul` or `Gemm` by `ratio`; the bias of a `Gemm` is added after that."""
    if node.op_type == "Gemm" and not (
        node.attributes.get_float("alpha", 1.0) == node.attributes.get_float("beta", 1.0) == 1.0
    ):
        raise BuildError(f"'{node.name}' scales its product or its bias, which scales by step do not allow")
    product = node.outputs[0]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    last = restored = ir.node("Mul", [product, ratio], name=f"{node.name}/StepRatio")
    made = [restored]
    if bias is not None:
        # not an empty third input, which TensorRT's parser refuses
        node.resize_inputs(2)
        last = ir.node("Add", [restored.outputs[0], bias], name=f"{node.name}/Bias")
        made.append(last)
    for each in made:
        each.outputs[0].name = f"{each.name}/output"
        each.outputs[0].type, each.outputs[0].shape = product.type, product.shape
    name = product.name
    ir.convenience.replace_all_uses_with(product, last.outputs[0], replace_graph_outputs=True)
    restored.replace_input_with(0, product)
    product.name, last.outputs[0].name = f"{node.name}/product", name
    graph.insert_after(node, made)
