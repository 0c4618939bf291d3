"""Experts on ONNX Runtime's CPU as products of many rows: what a long prompt wants.

`QMoE` takes a few rows at a time through a weight, so that many rows cost hardly less each than one. Here the rows are
sorted by expert, each expert multiplies its own with `DynamicQuantizeMatMul` (8-bit weights by column, 8-bit
activations), and an expert without rows is skipped. One copy of the weights serves prompts and single tokens.

The scale of the activations is that of all rows of an expert in a step: what else is in the step changes the last
digits of a row, which `QMoE`, with a scale for each block of a row, does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from builders.functions import SPARSE_MOE
from builders.lowering import CONTRIB, constant, nodes, take_over
from builders.quantize import column_codes, column_scales
from builders.tensors import Array, StreamedTensor, bound, drop_unused, streamed
from ming_trt.errors import BuildError


def experts_by_rows(model: ir.Model) -> None:
    """`ming::SparseMoE` -> rows sorted by expert and one `If` for each expert."""
    last: dict[str, Array] = {}
    for node in nodes(model, SPARSE_MOE.name):
        _Layer(model.graph, node).replace(last)


class _Layer:
    """The nodes that take the place of one mixture of experts."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        x, logits, gate_up, down = node.inputs
        if x is None or logits is None or gate_up is None or down is None:
            raise BuildError(f"'{node.name}' lacks its weights")
        self.graph, self.node, self.x, self.logits, self.values = graph, node, x, logits, (gate_up, down)
        self.gate_up, self.down = streamed(gate_up), streamed(down)
        self.experts, _, self.hidden = self.gate_up.shape.numpy()
        self.prefix = f"{node.name}/"
        self.count = 0

    def replace(self, last: dict[str, Array]) -> None:
        """Inserts them; the node and the stacks of weights go. `last` holds the matrix that was read last, by name."""
        k, normalize = self.node.attributes["top_k"].as_int(), self.node.attributes["normalize"].as_int()
        weights, chosen = self.node_of(
            "TopK", self.emit("Softmax", self.logits, axis=-1), self.ints("k", [k]), outputs=2
        )
        if normalize:
            weights = self.emit("Div", weights, self.emit("ReduceSum", weights, self.ints("last", [-1])))
        rows, order, counts = self.sorted_rows(chosen, k)
        parts = self.node_of("Split", rows, counts, outputs=self.experts, axis=0)
        used = self.emit("Cast", counts, to=int(ir.DataType.BOOL))
        flags = self.node_of("Split", used, outputs=self.experts, axis=0, num_outputs=self.experts)
        gate_up, down = _Matrices(self.gate_up, last), _Matrices(self.down, last)
        results = [self.expert(e, parts[e], flags[e], gate_up, down) for e in range(self.experts)]
        joined = self.emit("Concat", *results, axis=0)
        # sorting the order gives its inverse
        inverse = self.node_of("TopK", order, self.emit("Shape", order), outputs=2, axis=0, largest=0)[1]
        unsorted = self.emit("Gather", joined, inverse, axis=0)
        by_token = self.emit("Reshape", unsorted, self.ints("by_token", [-1, k, self.hidden]))
        mixed = self.emit("MatMul", self.emit("Unsqueeze", weights, self.ints("middle", [1])), by_token)
        out = self.emit("Squeeze", mixed, self.ints("middle", [1]))
        take_over(self.node.outputs[0], out)
        self.graph.remove(self.node, safe=True)
        drop_unused(self.graph, self.values)

    def sorted_rows(self, chosen: ir.Value, k: int) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Rows [N * k, H] sorted by expert; where each comes from in [N, k]; how many each expert has, [E]."""
        flat = self.emit("Reshape", chosen, self.ints("flat", [-1]))
        order = self.node_of("TopK", flat, self.emit("Shape", flat), outputs=2, axis=0, largest=0)[1]
        token = self.emit("Div", order, self.ints("choices", k))
        column = self.emit("Unsqueeze", flat, self.ints("column", [1]))
        same = self.emit("Equal", column, self.ints("experts", list(range(self.experts))))
        ones = self.emit("Cast", same, to=int(ir.DataType.INT64))
        counts = self.emit("ReduceSum", ones, self.ints("first", [0]), keepdims=0)
        return self.emit("Gather", self.x, token, axis=0), order, counts

    def expert(self, index: int, rows: ir.Value, used: ir.Value, gate_up: _Matrices, down: _Matrices) -> ir.Value:
        """The expert's output for its rows, which may be none."""
        name = f"{self.prefix}experts.{index}/"
        made: list[ir.Node] = []

        def emit(operator: str, *inputs: ir.Value, outputs: int = 1, domain: str = "", **attributes: int) -> ir.Value:
            made.append(_node(name, operator, len(made), inputs, outputs, domain, attributes))
            return made[-1].outputs[0]

        both = emit("DynamicQuantizeMatMul", rows, *self.weights(gate_up, index), domain=CONTRIB)
        emit("Split", both, outputs=2, axis=-1, num_outputs=2)
        gate, up = made[-1].outputs
        active = emit("Mul", emit("Mul", gate, emit("Sigmoid", gate)), up)
        out = emit("DynamicQuantizeMatMul", active, *self.weights(down, index), domain=CONTRIB)
        nothing = _node(name, "Identity", len(made), [rows], 1, "", {})
        for value in (out, nothing.outputs[0]):
            value.type = ir.TensorType(ir.DataType.FLOAT)
        branches = {
            "then_branch": ir.Graph([], [out], nodes=made, name=f"{name}then"),
            "else_branch": ir.Graph([], list(nothing.outputs), nodes=[nothing], name=f"{name}else"),
        }
        choice = ir.node("If", [used], branches, name=f"{name}If")
        choice.outputs[0].name = f"{name}output_0"
        self.graph.insert_before(self.node, choice)
        return choice.outputs[0]

    def weights(self, matrices: _Matrices, index: int) -> tuple[ir.Value, ir.Value]:
        """Codes [width, rows] and scales [rows] of one expert's matrix, as initializers."""
        rows, width = matrices.stack.shape.numpy()[1:]
        name = f"{matrices.stack.name}.{index}"
        codes = StreamedTensor(
            f"{name}_codes", lambda: [matrices.read(index, column_codes)], ir.DataType.INT8, (width, rows)
        )
        scales = StreamedTensor(
            f"{name}_scales", lambda: [matrices.read(index, column_scales)], ir.DataType.FLOAT, (rows,)
        )
        return bound(self.graph, codes), bound(self.graph, scales)

    def emit(self, operator: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        return self.node_of(operator, *inputs, **attributes)[0]

    def node_of(self, operator: str, *inputs: ir.Value, outputs: int = 1, **attributes: int) -> list[ir.Value]:
        """One node of the main graph; its outputs."""
        node = _node(self.prefix, operator, self.count, inputs, outputs, "", attributes)
        self.count += 1
        self.graph.insert_before(self.node, node)
        return list(node.outputs)

    def ints(self, label: str, numbers: list[int] | int) -> ir.Value:
        """A constant, shared by the nodes of the layer that use it."""
        name = f"{self.prefix}{label}"
        known = self.graph.initializers.get(name)
        return known if known is not None else constant(self.graph, name, np.array(numbers, np.int64))


class _Matrices:
    """The matrices of a stack, which come one after the other: asking in that order reads each once."""

    def __init__(self, stack: StreamedTensor, last: dict[str, Array]) -> None:
        self.stack, self.last = stack, last
        self._rows: Iterator[Array] = iter(())
        self._next = 0

    def read(self, index: int, change: Callable[[Array], Array]) -> Array:
        """`change` of matrix `index`, which stays in `last` for what else is made of it."""
        name = f"{self.stack.name}.{index}"
        if name not in self.last:
            self.last.clear()
            if index < self._next or self._next == 0:
                self._rows, self._next = self.stack.rows(), 0
            for matrix in self._rows:
                self._next += 1
                if self._next > index:
                    self.last[name] = matrix
                    break
            if self._next == self.stack.shape.numpy()[0]:
                self._rows, self._next = iter(()), 0
        return change(self.last[name])


def _node(
    prefix: str,
    operator: str,
    number: int,
    inputs: Sequence[ir.Value],
    outputs: int,
    domain: str,
    attributes: Mapping[str, int],
) -> ir.Node:
    name = f"{prefix}{operator}_{number}"
    node = ir.node(operator, inputs, attributes, num_outputs=outputs, domain=domain, name=name)
    for i, value in enumerate(node.outputs):
        value.name = f"{name}/output_{i}"
    return node
