"""Routed experts in FP8: the graph's body in ONNX Runtime, the kernels' host reference and the kernels say the same."""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from builders import calibration
from builders.component import ExportOptions
from builders.export import save
from builders.fp8 import LARGEST
from builders.fp8_errors import linear_errors
from builders.fp8_experts import inline_bodies
from builders.functions import DOMAIN, add_bodies
from builders.precision import Floats, FP8PerChannel, FP8PerTensor, Scheme
from builders.tensorrt import Settings, compile_plan
from builders.tensorrt_audit import run_graph
from builders.tensorrt_graph import adapt
from builders.tensorrt_profiles import Phase
from builders.tensors import TORCH_DTYPES
from ming_trt.config import LLMConfig
from ming_trt.errors import BuildError
from ming_trt.models.llm import MoE
from ming_trt.models.weights import Stack
from tests.builders.test_functions import Experts, export_experts
from tests.plugins import binding, calls, reference

EXPERTS, HIDDEN, WIDTH, TOP_K, TOKENS = 12, 64, 48, 3, 14
# More than what enters: codes reach the last of 448, and nothing saturates.
RANGES = {"gate_up": 5.0, "down": 40.0}
SCHEME = FP8PerChannel("fp32")


def drawn() -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Weights, x and logits; all but the weights are float16 numbers, so that every side starts from the same."""
    torch.manual_seed(0)
    weights = {"gate_up": torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) / 8, "down": torch.randn(EXPERTS, HIDDEN, WIDTH)}
    # rows of very different sizes, which one scale for a matrix would not fit
    weights = {name: value * torch.logspace(-4, 1, value.shape[1])[:, None] for name, value in weights.items()}
    return weights, torch.randn(TOKENS, HIDDEN).half().float(), torch.randn(TOKENS, EXPERTS).half().float()


def quantised(weights: dict[str, torch.Tensor], scheme: Scheme = SCHEME, ranges: dict[str, float] = RANGES) -> ir.Model:
    dtype = TORCH_DTYPES[scheme.floats]
    with torch.device("meta"):
        module = Experts(EXPERTS, HIDDEN, WIDTH, TOP_K, True).to(dtype)
    model = export_experts(module, {name: value.to(dtype) for name, value in weights.items()}, dtype)
    add_bodies(model, scheme.floats)
    adapt(model, ExportOptions("tensorrt", "fp8", scheme, ranges=tuple(ranges.items())))
    return model


def as_call(model: ir.Model, x: torch.Tensor, logits: torch.Tensor) -> calls.Moe:
    """The call of the kernels that the plugin makes of the node: its inputs and attributes."""
    [node] = [node for node in model.graph if node.domain == DOMAIN]
    arrays = [value.const_value.numpy() for value in node.inputs[2:]]
    codes = [torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn) for array in arrays[:2]]
    scales = [torch.from_numpy(array) for array in arrays[2:]]
    units = [node.attributes[name].as_float() for name in ("x_scale", "inner_scale")]
    return calls.Moe(x, logits, *codes, TOP_K, True, None, None, *scales, *units)


def test_the_body_the_host_reference_and_the_kernels_agree(tmp_path: Path) -> None:
    weights, x, logits = drawn()
    model = quantised(weights)
    save(model, tmp_path)
    got = torch.from_numpy(run_graph(tmp_path / "model.onnx", {"x": x.numpy(), "logits": logits.numpy()})["y"])

    moe = as_call(model, x, logits)
    # the same roundings in float64: one code of an inner activation may fall to the other side, 1/16 of one of 48
    assert calls.relative_error(got, moe.expected()) < 2e-3
    host = calls.poisoned(*x.shape, like=x)
    calls.check(binding.host_library().ming_moe_host(ctypes.byref(moe.call(host, None, binding.AUTOMATIC))))
    assert calls.relative_error(got, host.double()) < 2e-3
    half = as_call(model, x.half(), logits.half())
    library = binding.emulated_library("moe")
    for path, chip in ((binding.DECODE, (8, 9)), (binding.PREFILL, (8, 9)), (binding.PREFILL, (9, 0))):
        library.ming_emulation_capability(*chip)
        # and the result is rounded to float16
        assert calls.relative_error(half.run(library, path), got.double()) < 2e-3 + 3 * calls.ROUNDING[torch.float16]
    exact = reference.sparse_moe(x, logits, None, weights["gate_up"], weights["down"], TOP_K, True)
    # six roundings of 2.6 % on a path
    assert 0.02 < calls.relative_error(got, exact) < 0.1


def test_one_scale_for_an_expert_is_possible_and_worse(tmp_path: Path) -> None:
    weights, x, logits = drawn()
    exact = reference.sparse_moe(x, logits, None, weights["gate_up"], weights["down"], TOP_K, True)
    errors = []
    for scheme in (FP8PerChannel("fp32"), FP8PerTensor("fp32")):
        model = quantised(weights, scheme)
        scales = model.graph.initializers["gate_up_scale"].const_value.numpy()
        assert scales.shape == (EXPERTS, 2 * WIDTH)
        assert (np.unique(scales, axis=1).shape[1] == 1) == isinstance(scheme, FP8PerTensor)
        save(model, tmp_path / str(len(errors)))
        got = run_graph(tmp_path / str(len(errors)) / "model.onnx", {"x": x.numpy(), "logits": logits.numpy()})["y"]
        # the small outputs are those that suffer
        small = slice(0, 4)
        errors.append(calls.relative_error(torch.from_numpy(got)[:, small], exact[:, small]))
    assert errors[1] > 1.5 * errors[0]


@pytest.mark.parametrize("lacking", ["gate_up", "down"])
def test_experts_without_a_range_are_refused(lacking: str) -> None:
    with pytest.raises(BuildError, match=f"the inputs of '{lacking}' have no range"):
        quantised(drawn()[0], ranges={name: value for name, value in RANGES.items() if name != lacking})


def test_the_body_is_that_of_the_floats_with_qdq_and_scales() -> None:
    """Nothing else is computed: what is added are Q/DQ, casts, and the factors of rows."""
    weights, _, _ = drawn()
    bodies = []
    for scheme in (Floats("bf16"), FP8PerChannel("bf16")):
        [function] = quantised(weights, scheme).functions.values()
        bodies.append([node.op_type for node in function])
    plain, fp8 = bodies
    added = ("QuantizeLinear", "DequantizeLinear", "Constant", "Cast", "Unsqueeze")
    counts = {kind: fp8.count(kind) - plain.count(kind) for kind in {*plain, *fp8} - set(added)}
    # the products of both matrices are multiplied by their rows' scales
    assert {kind: count for kind, count in counts.items() if count} == {"Mul": 2}
    assert fp8.count("QuantizeLinear") == 2 and fp8.count("DequantizeLinear") == 4


def test_each_matrix_of_the_experts_keeps_25_db() -> None:
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({"mlp": MoE(sizes())})
    for value in net.parameters():
        torch.nn.init.normal_(value, std=0.2)
    net.forward = lambda x, modality: net["mlp"](x, modality)
    feeds = {"x": torch.randn(1, 60, HIDDEN).numpy(), "modality": np.arange(60).reshape(1, 60) % 3}
    amax = {"mlp.gate_up": float(np.abs(feeds["x"]).max()), "mlp.down": 30.0}
    found = {report.name: report for report in linear_errors(net, feeds, amax)}
    assert set(found) == set(amax)
    for report in found.values():
        assert report.sqnr_db >= 25 and report.verdict == "passed" and "worst expert" in report.note
    # a range that is far too small clips
    clipped = {report.name: report for report in linear_errors(net, feeds, {**amax, "mlp.down": 0.01})}
    assert clipped["mlp.down"].verdict == "failed" and "SQNR" in clipped["mlp.down"].note


def test_an_expert_that_no_token_chose_is_measured_on_the_nearest() -> None:
    """Its inner activation is a hundred times larger than the others': without it the scale would clip them."""
    weights, x, logits = drawn()
    logits[:, 4] = -50 + torch.arange(TOKENS)
    weights["gate_up"][4] *= 10
    ranges = calibration.Ranges()
    stacks = [Stack(tuple(Matrix(value) for value in weights[part])) for part in ("gate_up", "down")]
    with torch.device("meta"):
        moe = MoE(sizes())
    total, unreached = calibration._experts(moe, None, *stacks, x, logits, ranges, "inner")
    assert unreached == [4]
    gate, up = (x @ weights["gate_up"][4].T).chunk(2, dim=-1)
    seen = float((torch.nn.functional.silu(gate) * up).abs().max())
    assert ranges.amax["inner"] == pytest.approx(seen)
    # and it adds nothing to any token
    expected = reference.sparse_moe(x, logits, None, weights["gate_up"], weights["down"], TOP_K, True)
    assert calls.relative_error(total, expected) < 1e-5


@dataclass
class Matrix:
    """A weight that is there, as a source."""

    value: torch.Tensor

    def load(self, checkpoint: object, dtype: torch.dtype) -> torch.Tensor:
        return self.value.to(dtype)


def sizes() -> LLMConfig:
    config = LLMConfig.__new__(LLMConfig)
    numbers = {"hidden_size": HIDDEN, "expert_width": WIDTH, "num_experts": EXPERTS, "top_k": TOP_K}
    for name, value in {**numbers, "shared_width": WIDTH, "normalize_top_k": True}.items():
        object.__setattr__(config, name, value)
    return config


@pytest.mark.slow
def test_a_builder_without_the_plugin_takes_the_body_apart(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt_rtx_libs") is None:
        pytest.skip("TensorRT-RTX is not installed: pip install 'ming-trt[rtx]'")
    model = quantised(drawn()[0], FP8PerChannel("bf16"))
    inline_bodies(model)
    assert not model.functions and DOMAIN not in model.opset_imports
    save(model, tmp_path)
    inputs = {"x": {"shape": ["N", HIDDEN]}, "logits": {"shape": ["N", EXPERTS]}}
    built = compile_plan(
        tmp_path / "model.onnx", inputs, [Phase("any", {"N": (1, 8, 64)})], tmp_path, Settings("tensorrt-rtx")
    )
    assert "PLUGIN_V3" not in built.layers and built.layers["MATRIX_MULTIPLY"] == 2 and built.layers["QUANTIZE"] == 2
    # sm_80 has no FP8
    assert built.stamp.devices == ("sm89",)


def test_codes_use_their_range() -> None:
    codes = quantised(drawn()[0]).graph.initializers["gate_up_fp8"].const_value.numpy().astype(np.float32)
    assert (np.abs(codes).max(-1) == LARGEST).all()
