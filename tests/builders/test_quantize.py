"""Quantised weights: what codes stand for, and ONNX Runtime's kernels against torch with dequantised weights."""

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

from builders.export import MODEL_FILE, bind_weights, export_graph, facts, save
from builders.functions import translations
from builders.lowering import CONTRIB, lower
from builders.quantize import (
    SCHEMES,
    block_for,
    column_codes,
    column_scales,
    dequantized,
    quantize_blocks,
    quantize_columns,
)
from ming_trt.models import ops


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the error over that of the values."""
    return float(np.sqrt(((got - expected) ** 2).mean() / (expected**2).mean()))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 300),
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([16, 32, 128]),
    seed=st.integers(0, 99),
)
def test_codes_are_the_nearest(rows: int, width: int, bits: int, block: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    matrix[0, : block // 2] = 0
    codes, scales = quantize_blocks(matrix, bits, block)
    assert codes.shape == (rows, -(-width // block), block * bits // 8) and codes.dtype == np.uint8
    assert scales.shape == codes.shape[:2] and scales.dtype == np.float32
    back = dequantized(codes, scales, bits, width)
    # half a step, except at the positive end, where the range stops one step short of the extreme
    step = np.abs(scales).repeat(block, axis=1)[:, :width]
    extreme = np.abs(matrix) > step * ((1 << (bits - 1)) - 1)
    assert (np.abs(back - matrix) <= step * np.where(extreme, 1.0, 0.5) * (1 + 1e-5) + 1e-7).all()
    # what is largest in magnitude is exact
    flat = np.pad(np.abs(matrix), ((0, 0), (0, -width % block))).reshape(rows, -1, block)
    np.testing.assert_allclose(flat.max(-1), np.abs(scales) * (1 << (bits - 1)), rtol=1e-6)


def test_columns() -> None:
    matrix = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    matrix[2] = 0
    codes, scales = quantize_columns(matrix)
    assert codes.shape == (40, 5) and codes.dtype == np.int8 and (scales > 0).all()
    assert (np.abs(codes.T * scales[:, None] - matrix) <= scales[:, None] * 0.5001).all()


def test_block_divides_all_widths() -> None:
    assert block_for(2048, 1408) == 128 and block_for(256, 32) == 32 and block_for(256, 24) is None


def test_bits_by_layer() -> None:
    names = ("layers.0.attention.dense.weight", "layers.3.mlp.shared_experts.up_proj.weight", "lm_head.weight")
    assert [SCHEMES["int4"].bits(name) for name in names] == [8, 4, 8]
    assert [SCHEMES["int8"].bits(name) for name in names] == [8, 8, 8]


class Experts(nn.Module):
    def __init__(self, experts: int, hidden: int, width: int, normalize: bool) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))
        self.normalize = normalize

    def forward(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return ops.sparse_moe(x, logits, self.gate_up, self.down, 2, self.normalize)


class Linears(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.first = nn.Linear(width, 48, bias=bias)
        self.router = nn.Linear(width, 4, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.first(x), self.router(x)


def run(model: ir.Model, folder: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    save(model, folder)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(folder / MODEL_FILE), options).run(None, feeds)


def bind(model: ir.Model, module: nn.Module) -> None:
    weights = {name: value.detach().numpy() for name, value in module.named_parameters()}
    bind_weights(model, {name: (lambda value=value: [value]) for name, value in weights.items()})


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("sizes", [(256, 32), (128, 128), (40, 24)], ids=["block 32", "block 128", "whole rows"])
@pytest.mark.parametrize("precision", list(SCHEMES))
def test_experts(tmp_path: Path, precision: str, sizes: tuple[int, int], normalize: bool) -> None:
    torch.manual_seed(0)
    experts, (hidden, width), bits = 4, sizes, SCHEMES[precision].experts
    real = Experts(experts, hidden, width, normalize)
    for value in real.parameters():
        nn.init.normal_(value, std=value.shape[-1] ** -0.5)
    with torch.device("meta"):
        module = Experts(experts, hidden, width, normalize)
        inputs = {"x": torch.zeros(5, hidden), "logits": torch.zeros(5, experts)}
    model = export_graph(module, inputs, {"x": {0: "N"}, "logits": {0: "N"}}, ["y"], translations())
    bind(model, real)
    lower(model, precision)
    assert "QMoE" in [node.op_type for node in model.graph]
    with torch.no_grad():
        for value in real.parameters():
            block = block_for(hidden, width) or value.shape[-1]
            for matrix in value:
                m = matrix.numpy()
                back = dequantized(*quantize_blocks(m, bits, block), bits, m.shape[1])
                matrix.copy_(torch.from_numpy(back))
    for rows in (1, 40):
        x, logits = torch.randn(rows, hidden), 2 * torch.randn(rows, experts)
        with torch.no_grad():
            expected = real(x, logits).numpy()
        got = run(model, tmp_path / str(rows), {"x": x.numpy(), "logits": logits.numpy()})[0]
        # Activations have 8 bits per block inside: their extreme is about 2.7 deviations, so an operand's error is
        # 2.7/127/sqrt(12) = 0.6 % of it, and three products follow each other. A wrong layout gives 100 %.
        assert relative(got, expected) < 0.025


@pytest.mark.parametrize("normalize", [True, False])
def test_experts_by_rows(tmp_path: Path, normalize: bool) -> None:
    """One row (most experts have none), some, and one that no expert but two sees."""
    torch.manual_seed(2)
    experts, hidden, width = 5, 40, 24
    real = Experts(experts, hidden, width, normalize)
    for value in real.parameters():
        nn.init.normal_(value, std=value.shape[-1] ** -0.5)
    with torch.device("meta"):
        module = Experts(experts, hidden, width, normalize)
        inputs = {"x": torch.zeros(3, hidden), "logits": torch.zeros(3, experts)}
    model = export_graph(module, inputs, {"x": {0: "N"}, "logits": {0: "N"}}, ["y"], translations())
    bind(model, real)
    lower(model, "w8a8")
    operators = facts(model)["operators"]
    assert operators["com.microsoft:DynamicQuantizeMatMul"] == 2 * operators["ai.onnx:If"] == 2 * experts
    with torch.no_grad():
        for value in real.parameters():
            for matrix in value:
                matrix.copy_(torch.from_numpy(column_codes(matrix.numpy()).T * column_scales(matrix.numpy())[:, None]))
    save(model, tmp_path)
    session = ort.InferenceSession(str(tmp_path / MODEL_FILE))
    for rows, skew in ((1, 0.0), (40, 0.0), (7, 50.0)):
        x, logits = torch.randn(rows, hidden), 2 * torch.randn(rows, experts)
        logits[:, 1:3] += skew
        with torch.no_grad():
            expected = real(x, logits).numpy()
        got = session.run(None, {"x": x.numpy(), "logits": logits.numpy()})[0]
        # 8 bits between the extremes of all rows: a step is 1/127 of about 3 deviations, its error 1/sqrt(12) of that,
        # 0.7 % of an operand, and more where a product of two normal ones has longer tails. A wrong row gives 100 %.
        assert relative(got, expected) < 0.03


def test_a_matrix_is_quantised_once_when_the_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes and scales follow each other in the file; scales asked for later are made again."""
    made = []

    def counted(matrix: np.ndarray, bits: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        made.append(matrix.shape)
        return quantize_blocks(matrix, bits, block)

    monkeypatch.setattr("builders.lowering_quantized.quantize_blocks", counted)
    experts, hidden, width = 5, 64, 32
    real = Experts(experts, hidden, width, True)
    for value in real.parameters():
        nn.init.normal_(value)
    with torch.device("meta"):
        module = Experts(experts, hidden, width, True)
        inputs = {"x": torch.zeros(5, hidden), "logits": torch.zeros(5, experts)}
    model = export_graph(module, inputs, {"x": {0: "N"}, "logits": {0: "N"}}, ["y"], translations())
    bind(model, real)
    lower(model, "int8")
    save(model, tmp_path)
    assert sorted(made) == sorted([(2 * width, hidden), (hidden, width)] * experts)
    scales = next(v.const_value for name, v in model.graph.initializers.items() if name.endswith("_scales"))
    again = scales.numpy()
    assert len(made) == 3 * experts
    np.testing.assert_array_equal(again, scales.numpy())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [24, 100, 256])
@pytest.mark.parametrize("form", ["int8", "int4", "dynamic"])
def test_linears(tmp_path: Path, form: str, width: int, bias: bool) -> None:
    torch.manual_seed(1)
    real = Linears(width, bias)
    with torch.device("meta"):
        module, inputs = Linears(width, bias), {"x": torch.zeros(3, 5, width)}
    model = export_graph(module, inputs, {"x": {0: "B", 1: "S"}}, ["y", "logits"])
    bind(model, real)
    lower(model, "int8" if form == "dynamic" else form, keep=("router.",), many_rows=form == "dynamic")
    domains = {node.name: node.domain for node in model.graph if "MatMul" in node.op_type}
    assert sorted(domains.values()) == ["", CONTRIB]
    weight = real.first.weight.detach().numpy()
    with torch.no_grad():
        if form == "dynamic":
            back = column_codes(weight).T * column_scales(weight)[:, None]
        else:
            bits, block = SCHEMES[form].linears, next(b for b in (128, 64, 32, 16) if b <= width)
            back = dequantized(*quantize_blocks(weight, bits, block), bits, width)
        real.first.weight.copy_(torch.from_numpy(back))
        x = torch.randn(2, 33, width)
        expected = [value.numpy() for value in real(x)]
    got = run(model, tmp_path, {"x": x.numpy()})
    assert relative(got[0], expected[0]) < 0.015
    np.testing.assert_allclose(got[1], expected[1], atol=1e-5)  # left in float32
