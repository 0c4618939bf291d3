"""Operators of domain `ming`: their bodies and their lowering in ONNX Runtime against the torch operators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from builders.export import MODEL_FILE, bind_weights, export_graph, save
from builders.functions import DOMAIN, PLUGIN_NAMESPACE, add_bodies, translations
from builders.lowering import CONTRIB, lower
from builders.tensors import BFLOAT16
from ming_trt.config import ROPE_KINDS
from ming_trt.errors import BuildError
from ming_trt.models import ops


class Experts(nn.Module):
    def __init__(self, experts: int, hidden: int, width: int, top_k: int, normalize: bool) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))
        self.top_k, self.normalize = top_k, normalize

    def forward(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return ops.sparse_moe(x, logits, self.gate_up, self.down, self.top_k, self.normalize)


class Rope(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, q: torch.Tensor, k: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ops.mrope(q, k, position_ids, 600000.0, self.kind, [4, 6, 6])


def export_experts(module: Experts, weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> ir.Model:
    experts, hidden = module.down.shape[:2]
    sizes = {"x": hidden, "logits": experts}
    inputs = {name: torch.zeros(5, size, dtype=dtype, device="meta") for name, size in sizes.items()}
    model = export_graph(module, inputs, {"x": {0: "N"}, "logits": {0: "N"}}, ["y"], translations())
    # in pieces that do not end where an expert does
    pieces = {name: [as_numpy(part) for part in value.reshape(-1).split(7)] for name, value in weights.items()}
    bind_weights(model, {name: (lambda value=value: value) for name, value in pieces.items()})
    return model


def as_numpy(value: torch.Tensor) -> np.ndarray:
    return value.view(torch.uint16).numpy().view(BFLOAT16) if value.dtype == torch.bfloat16 else value.numpy()


def run(model: ir.Model, folder: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    save(model, folder)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(folder / MODEL_FILE), options).run(None, feeds)


def domains(model: ir.Model) -> set[str]:
    return {node.domain for node in model.graph}


@settings(max_examples=6, deadline=None)
@given(
    experts=st.integers(2, 9),
    hidden=st.sampled_from([4, 10]),
    width=st.sampled_from([3, 8]),
    normalize=st.booleans(),
    data=st.data(),
)
def test_experts(
    tmp_path_factory: pytest.TempPathFactory,
    experts: int,
    hidden: int,
    width: int,
    normalize: bool,
    data: st.DataObject,
) -> None:
    top_k = data.draw(st.integers(1, experts))
    torch.manual_seed(experts)
    weights = {"gate_up": torch.randn(experts, 2 * width, hidden), "down": torch.randn(experts, hidden, width)}
    for target in ("body", "lowered"):
        with torch.device("meta"):
            module = Experts(experts, hidden, width, top_k, normalize)
        model = export_experts(module, weights)
        [node] = [node for node in model.graph if node.domain == DOMAIN]
        assert node.attributes["plugin_namespace"].as_string() == PLUGIN_NAMESPACE
        if target == "lowered":
            lower(model)
        add_bodies(model)
        assert (len(model.functions) == 1) == (target == "body")
        assert (CONTRIB in domains(model)) == (target == "lowered")
        for rows in (1, 13):
            x, logits = torch.randn(rows, hidden), 3 * torch.randn(rows, experts)
            expected = ops.sparse_moe(x, logits, weights["gate_up"], weights["down"], top_k, normalize)
            got = run(model, tmp_path_factory.mktemp("moe"), {"x": x.numpy(), "logits": logits.numpy()})[0]
            # float32 sums of at most 10 products of size < 100, in another order
            np.testing.assert_allclose(got, expected.numpy(), atol=2e-5 * float(expected.abs().max() + 1))


@pytest.mark.parametrize("target", ["body", "fp32", "int8"])
@pytest.mark.parametrize("normalize", [True, False])
def test_of_experts_with_equal_logits_the_lower_one_is_chosen(tmp_path: Path, target: str, normalize: bool) -> None:
    """Three kinds of logits over 40 experts: every token ties at the edge of its choice, in each form of the operator.
    The host reference and the kernels: tests/plugins/test_moe.py."""
    experts, hidden, width, top_k = 40, 16, 16, 5
    torch.manual_seed(0)
    weights = {"gate_up": torch.randn(experts, 2 * width, hidden), "down": torch.randn(experts, hidden, width)}
    x, logits = torch.randn(30, hidden), torch.randint(-1, 2, (30, experts)).float()
    chosen, _ = ops.route(logits, top_k, normalize)
    by_rule = [sorted(range(experts), key=lambda e: (-row[e], e))[:top_k] for row in logits.tolist()]
    assert chosen.tolist() == by_rule
    with torch.device("meta"):
        module = Experts(experts, hidden, width, top_k, normalize)
    model = export_experts(module, weights)
    if target != "body":
        lower(model, target)
    add_bodies(model)
    got = run(model, tmp_path, {"x": x.numpy(), "logits": logits.numpy()})[0]
    expected = ops.sparse_moe(x, logits, weights["gate_up"], weights["down"], top_k, normalize).numpy()
    # other experts give another output altogether; int8 rounds weights and activations
    error = np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < (0.05 if target == "int8" else 1e-5)


@pytest.mark.parametrize("kind", ROPE_KINDS)
def test_rope(tmp_path: Path, kind: str) -> None:
    with torch.device("meta"):
        inputs = {
            "q": torch.zeros(2, 4, 5, 32),
            "k": torch.zeros(2, 2, 5, 32),
            "position_ids": torch.zeros(3, 2, 5, dtype=torch.long),
        }
        module = Rope(kind)
    axes = {"q": {0: "B", 2: "S"}, "k": {0: "B", 2: "S"}, "position_ids": {1: "B", 2: "S"}}
    model = export_graph(module, inputs, axes, ["q_rotated", "k_rotated"], translations())
    add_bodies(model)
    assert [node.op_type for node in model.graph] == ["MRope"] and len(model.functions) == 1
    q, k = torch.randn(3, 4, 9, 32), torch.randn(3, 2, 9, 32)
    position_ids = torch.randint(-40, 32768, (3, 3, 9))
    got = run(model, tmp_path, {"q": q.numpy(), "k": k.numpy(), "position_ids": position_ids.numpy()})
    for a, b in zip(got, ops.mrope(q, k, position_ids, 600000.0, kind, [4, 6, 6]), strict=True):
        # angles up to 32768 in float32: an ulp is 2e-3, but both sides round the same product
        np.testing.assert_allclose(a, b.numpy(), atol=2e-5)


def test_an_operator_without_a_body_and_an_unknown_precision_are_refused() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    node = ir.Node(DOMAIN, "Unknown", [x], name="n")
    graph = ir.Graph([x], list(node.outputs), nodes=[node], opset_imports={"": 24, DOMAIN: 1}, name="g")
    model = ir.Model(graph, ir_version=10)
    with pytest.raises(BuildError, match="ming::Unknown"):
        add_bodies(model)
    with pytest.raises(BuildError, match="int3"):
        lower(model, "int3")
