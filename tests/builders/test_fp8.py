"""FP8 by Q/DQ: codes and scales, what is kept out, and that ONNX Runtime computes what numpy says."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders.component import ExportOptions
from builders.export import bind_weights, export_graph, save
from builders.fp8 import LARGEST, fake_quantised, to_fp8, weight_codes, weight_scales
from builders.fp8_ranges import by_module, choose, observe
from builders.precision import Floats, FP8PerChannel, FP8PerTensor, kept, scheme
from builders.tensorrt_audit import linear_errors, psnr, run_graph
from builders.tensorrt_graph import adapt
from builders.tokens import token_agreement
from ming_trt.errors import BuildError


class Net(torch.nn.Module):
    """Two layers, a Relu between them, and one whose name keeps it out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(16, 24)
        self.second = torch.nn.Linear(24, 8, bias=False)
        self.proj_out = torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj_out(self.second(torch.relu(self.first(x.to(self.first.weight.dtype))))).float()


X = np.random.default_rng(0).standard_normal((5, 3, 16)).astype(np.float32)


def trained() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def exported(made: Floats | FP8PerChannel | FP8PerTensor, ranges: dict[str, float], net: Net) -> ir.Model:
    with torch.device("meta"):
        meta, x = (
            Net().to(getattr(torch, {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[made.floats])),
            torch.zeros(2, 3, 16),
        )
    model = export_graph(meta, {"x": x}, {"x": {0: "N"}}, ["y"])
    kind = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}[made.floats]
    weights = {name: lambda v=value: [v.detach().numpy().astype(kind)] for name, value in net.named_parameters()}
    bind_weights(model, weights)
    adapt(model, ExportOptions("tensorrt", "fp8", made, ranges=tuple(ranges.items())))
    return model


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=64), st.booleans())
def test_codes_round_to_the_nearest_and_saturate(values: list[float], channels: bool) -> None:
    matrix = np.array(values, np.float32)[: len(values) // 2 * 2].reshape(2, -1)
    scales = weight_scales(matrix, 0, channels)
    codes = weight_codes(matrix, 0, channels).astype(np.float32)
    restored = codes * (scales[:, None] if channels else scales)
    # half a step of three mantissa bits, or half of the smallest subnormal, 2^-9
    step = np.maximum(np.abs(matrix) / 16, np.broadcast_to(scales[:, None] if channels else scales, matrix.shape) / 512)
    assert np.isfinite(restored).all() and (np.abs(restored - matrix) <= step * 1.001 + 1e-30).all()
    assert np.abs(codes).max() <= LARGEST
    assert to_fp8(np.array([1e9, -1e9], np.float32)).astype(np.float32).tolist() == [LARGEST, -LARGEST]


def test_a_row_of_zeros_stays_zero_in_every_type() -> None:
    for kind in (np.float32, np.float16, ml_dtypes.bfloat16):
        matrix = np.zeros((2, 4), kind)
        matrix[1] = 1
        assert (weight_scales(matrix, 0, True).astype(np.float32) > 0).all()
        assert weight_codes(matrix, 0, True).astype(np.float32)[0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("made", [FP8PerChannel("fp32"), FP8PerTensor("fp32")])
def test_onnxruntime_computes_the_fake_quantised_layers(made: FP8PerChannel | FP8PerTensor, tmp_path: Path) -> None:
    net = trained()
    amax = observe(net, [{"x": X}])
    save(exported(made, amax, net), tmp_path)
    got = run_graph(tmp_path / "model.onnx", {"x": X})["y"]
    x = X
    for name in ("first", "second"):
        layer = getattr(net, name)
        weight = layer.weight.detach().numpy()
        scales = weight_scales(weight, 0, isinstance(made, FP8PerChannel))
        weight = fake_quantised(weight, scales[:, None] if scales.ndim else scales)
        x = fake_quantised(x, np.float32(amax[name] / LARGEST)) @ weight.T
        x = x if layer.bias is None else x + layer.bias.detach().numpy()
        x = np.maximum(x, 0) if name == "first" else x
    expected = x @ net.proj_out.weight.detach().numpy().T + net.proj_out.bias.detach().numpy()
    # another order of summation can move an activation over a rounding boundary: one code of 24 inputs
    np.testing.assert_allclose(got, expected, atol=2e-2)
    assert np.median(np.abs(got - expected)) < 1e-5


def test_graphs_of_all_precisions_differ_in_types_and_qdq_only() -> None:
    net = trained()
    nodes = {}
    for made in (Floats("fp16"), Floats("bf16"), FP8PerChannel("bf16")):
        model = exported(made, observe(net, [{"x": X}]), net)
        nodes[str(made)] = [(node.name, node.op_type) for node in model.graph]
    first, second, quantised = nodes.values()
    assert first == second
    qdq = [kind for _, kind in quantised if kind in ("QuantizeLinear", "DequantizeLinear")]
    assert [node for node in quantised if node[1] not in ("QuantizeLinear", "DequantizeLinear")] == first
    # two layers: each quantises its input and restores input and weight; `proj_out` is kept
    assert sorted(qdq) == ["DequantizeLinear"] * 4 + ["QuantizeLinear"] * 2


def test_a_layer_without_a_range_is_refused() -> None:
    with pytest.raises(BuildError, match="'second' have no range"):
        exported(FP8PerChannel("fp32"), {"first": 1.0}, trained())


def test_every_linear_keeps_25_db() -> None:
    net = trained()
    reports = linear_errors(net, {"x": X}, observe(net, [{"x": X}]))
    assert [report.name for report in reports] == ["first", "second"]
    assert all(report.sqnr_db >= 25 and report.verdict == "passed" for report in reports)
    # a range that is far too small clips
    clipped = linear_errors(net, {"x": X}, {"first": 0.1, "second": 10.0})
    assert clipped[0].verdict == "failed" and "SQNR" in clipped[0].note


def test_what_is_sensitive_is_kept() -> None:
    for name in (
        "layers.0.mlp.gates.weight",
        "lm_head.weight",
        "proj_out.weight",
        "transformer_blocks.0.norm1.linear.weight",
        "layers.0.attention.query_key_value.weight_T",
    ):
        assert kept(name)
    for name in ("layers.0.mlp.shared_experts.up_proj.weight", "layers.0.mlp.gate_up", "blocks.0.attn.qkv.weight"):
        assert not kept(name)


def test_schemes_by_target() -> None:
    assert (
        scheme("tensorrt-rtx", "llm", "fp8") == FP8PerChannel()
        and scheme("tensorrt-llm", "llm", "fp8") == FP8PerTensor()
    )
    for target, component, precision, words in (
        ("tensorrt", "llm", "int4", "no scheme"),
        ("tensorrt-llm", "llm", "fp16", "no scheme"),
        ("tensorrt", "vocoder", "bf16", "transposed convolutions"),
        ("tensorrt-rtx", "vae_decoder", "fp8", "convolutions"),
    ):
        with pytest.raises(BuildError, match=words):
            scheme(target, component, precision)


def test_samples_can_be_replaced(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"has no 'dit/\*\.npz'"):
        choose("dit", tmp_path, tmp_path)
    (tmp_path / "dit").mkdir()
    np.savez(tmp_path / "dit" / "a.npz", x=X)
    mine = choose("dit", tmp_path, tmp_path)
    assert mine.files and mine.digest != choose("dit", None, tmp_path).digest
    with pytest.raises(BuildError, match="no sample"):
        observe(trained(), [])
    with pytest.raises(BuildError, match="not finite at 'first'"):
        observe(trained(), [{"x": X * np.inf}])


def test_ranges_of_the_language_model_are_renamed() -> None:
    names = ("attention.qkv", "attention.dense", "mlp.shared_expert.fc", "mlp.shared_expert.proj", "mlp.fc", "mlp.proj")
    found = {f"transformer.layers.0.{name}": float(k) for k, name in enumerate(names)}
    renamed = by_module(found, 1, "transformer.layers.{}.")
    assert (
        renamed["layers.0.mlp.shared_experts.up_proj"] == 2.0 and renamed["layers.0.attention.query_key_value"] == 0.0
    )
    # one scale for all experts of a layer
    assert renamed["layers.0.mlp.gate_up"] == 4.0 and renamed["layers.0.mlp.down"] == 5.0


def test_figures_of_tokens_and_pictures() -> None:
    expected = np.array([[0.0, 1.0, 9.0], [0.0, 5.0, 5.2]])
    found = token_agreement(expected + np.array([[0.5, 0, 0], [0, 0.4, 0]]), expected)
    # the second row's lead is below the error, so that its other token does not count
    assert (found.share, found.decided, found.total, found.error) == (1.0, 1, 2, 0.5) and 0 < found.divergence < 0.1
    assert not found.problem() and "100.0% of 1 decided tokens (2 in all" in found.remark()
    nothing = token_agreement(np.roll(expected, 1, -1), expected)
    assert nothing.decided == 0 and "no token decided" in nothing.remark()
    # a lead of 9, errors of 4.9 and 4.5: both tokens moved, towards each other
    moved = token_agreement(np.array([[4.9, 0, 4.5]]), np.array([[0.0, 0.0, 9.0]]))
    assert (moved.share, moved.decided) == (0.0, 1) and "is below 99%" in moved.problem()
    # an outlier among thousands does not decide what the others must keep
    rng = np.random.default_rng(0)
    logits = 8 * rng.standard_normal((50, 1000))
    noisy = logits + 0.1 * rng.standard_normal(logits.shape)
    noisy[0, 0] -= 50
    large = token_agreement(noisy, logits)
    assert 0.4 < large.error < 7 and large.decided > 0 and large.share == 1.0
    assert psnr(np.zeros(4), np.zeros(4)) == 300 and psnr(np.full(4, 0.2), np.zeros(4)) == pytest.approx(20.0)
