"""Canonical names: a node is called after the module that made it, e.g. `/layers.0/attention/dense/MatMul`.

They do not change when another part of the graph does, so that a difference between two engines can be followed
layer by layer.
"""

from __future__ import annotations

import ast
from collections import Counter

import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"
# what torch writes for arithmetic on sizes, which no module claims
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"


def _module(node: ir.Node) -> str | None:
    """The dotted name of the module that made a node ("" for the outermost), None if the node does not say."""
    text = node.metadata_props.get(_SCOPES)
    if text is None:
        return None
    scopes = ast.literal_eval(text)
    # the last entry is the operator; the one before it is the innermost module
    return scopes[-2] if len(scopes) > 1 and scopes[-2] != _NO_MODULE else ""


def scope(node: ir.Node) -> str:
    """`layers.0.attention` as `/layers.0/attention/`, "/" for what no module claims. Indices stay with their list.

    A node that an optimisation made belongs to the module that uses its result.
    """
    module = _module(node)
    if module is None:
        users = (user for value in node.outputs for user in value.consumers())
        module = next((found for user in users if (found := _module(user)) is not None), "")
    path = ""
    for part in module.split("."):
        path += f".{part}" if part.isdigit() else f"/{part}"
    return path.rstrip("/") + "/"


def canonical_names(model: ir.Model) -> None:
    """Renames nodes and inner values in place; names of inputs, outputs and initializers stay.

    Within a module the second node of a type gets `_1`, and so on. Removes the exporter's metadata, which holds
    source paths and would make equal graphs differ.
    """
    seen: Counter[str] = Counter()
    graph = model.graph
    scopes = [scope(node) for node in graph]
    for node, prefix in zip(graph, scopes, strict=True):
        name = prefix + node.op_type
        repeat = seen[name]
        seen[name] += 1
        node.name = f"{name}_{repeat}" if repeat else name
        for index, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = f"{node.name}/output_{index}"
            value.metadata_props.clear()
        node.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    model.metadata_props.clear()
