"""Input scales by step: ratios, what calibration keeps, the graph in ONNX Runtime, and that RTX multiplies in FP8."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders.component import ExportOptions
from builders.export import bind_weights, export_graph, save
from builders.fp8 import LARGEST, fake_quantised, weight_scales
from builders.fp8_errors import at_times, linear_errors, read_amax
from builders.fp8_ranges import observe_steps
from builders.fp8_steps import range_of, ratios, scale_at
from builders.precision import STEP_BOUNDS, FP8PerChannel, scheme
from builders.tensorrt import Settings, compile_plan
from builders.tensorrt_audit import run_graph
from builders.tensorrt_graph import adapt
from builders.tensorrt_profiles import Phase
from ming_trt.errors import BuildError

BOUNDS = (500.0, 750.0)
SCHEME = FP8PerChannel("fp32", BOUNDS)


class Denoiser(torch.nn.Module):
    """Inputs that grow a hundredfold with the time; a layer on tokens, and one on rows, which is exported as `Gemm`."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = torch.nn.Linear(16, 32)
        self.rows = torch.nn.Linear(32, 32)

    def forward(self, latent: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        dtype = self.tokens.weight.dtype
        grown = latent * torch.where(time > 600, 100.0, 1.0)[:, None, None]
        tokens = self.tokens(grown.to(dtype))
        return (tokens + self.rows(tokens.mean(1)).unsqueeze(1)).float()


def made() -> Denoiser:
    torch.manual_seed(1)
    return Denoiser().eval()


def feeds(*times: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(len(times))
    latent = rng.standard_normal((len(times), 5, 16)).astype(np.float32)
    return {"latent": latent, "time": np.array(times, np.float32)}


def graph(net: Denoiser, amax: dict[str, tuple[float, ...]], scheme: FP8PerChannel = SCHEME) -> ir.Model:
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[scheme.floats]
    with torch.device("meta"):
        meta = Denoiser().to(kind)
        inputs = {"latent": torch.zeros(2, 3, 16), "time": torch.zeros(2)}
    model = export_graph(meta, inputs, {"latent": {0: "B", 1: "N"}, "time": {0: "B"}}, ["velocity"])
    dtypes = {name: value.dtype.numpy() for name, value in model.graph.initializers.items() if value.dtype}
    weights = {
        name: lambda v=value, d=dtypes[name]: [v.detach().numpy().astype(d)] for name, value in net.named_parameters()
    }
    bind_weights(model, weights)
    adapt(model, ExportOptions("tensorrt", "fp8", scheme, ranges=tuple(amax.items())))
    return model


def calibrated(net: Denoiser) -> dict[str, tuple[float, ...]]:
    return observe_steps(net, [feeds(100.0, 500.0), feeds(700.0), feeds(760.0, 1000.0)], BOUNDS)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
def test_ratios_are_powers_of_two_that_cover_their_range(largest: list[float]) -> None:
    found = ratios(largest)
    assert max(found) == 1.0
    for ratio, value in zip(found, largest, strict=True):
        assert np.log2(ratio) == round(np.log2(ratio))
        # nothing saturates, and not a whole power of two is given away
        assert value <= ratio * max(largest) * (1 + 1e-12) and (ratio == 1 or value > ratio * max(largest) / 2)
    assert scale_at(largest, range(len(largest))) == max(largest)


def test_ranges_begin_after_their_bound() -> None:
    assert [range_of(time, BOUNDS) for time in (0, 500, 500.1, 750, 1000)] == [0, 0, 1, 1, 2]
    assert ratios((0.0, 2.0)) == (1.0, 1.0)


def test_calibration_keeps_each_range_and_refuses_one_without_samples() -> None:
    amax = calibrated(made())
    assert set(amax) == {"tokens", "rows"}
    for values in amax.values():
        assert len(values) == 3 and 10 * values[0] < values[1] and 10 * values[0] < values[2]
    with pytest.raises(BuildError, match="has a `time` from 500 to 750, or from 750 to 1000"):
        observe_steps(made(), [feeds(3.0)], BOUNDS)
    assert read_amax({"input_amax": {"a": [1, 2], "b": 3}}) == {"a": (1.0, 2.0), "b": 3.0}


@pytest.mark.parametrize("times", [(100.0, 200.0), (800.0,), (100.0, 900.0)])
def test_the_graph_scales_by_the_step(times: tuple[float, ...], tmp_path: Path) -> None:
    net = made()
    amax = calibrated(net)
    save(graph(net, amax), tmp_path)
    given_feeds = feeds(*times)
    got = run_graph(tmp_path / "model.onnx", given_feeds)["velocity"]

    scales = at_times(amax, SCHEME, given_feeds)
    x = given_feeds["latent"] * np.where(given_feeds["time"] > 600, 100, 1)[:, None, None].astype(np.float32)

    def layer(name: str, values: np.ndarray) -> np.ndarray:
        module = getattr(net, name)
        weight = module.weight.detach().numpy()
        weight = fake_quantised(weight, weight_scales(weight, 0, True)[:, None])
        return fake_quantised(values, np.float32(scales[name] / LARGEST)) @ weight.T + module.bias.detach().numpy()

    tokens = layer("tokens", x)
    expected = tokens + layer("rows", tokens.mean(1))[:, None]
    # another order of summation can move one of 32 inputs over a rounding boundary
    np.testing.assert_allclose(got, expected, atol=2e-2 * np.abs(expected).max())
    assert np.median(np.abs(got - expected)) < 1e-5 * np.abs(expected).max()


def test_small_steps_are_better_for_scales_of_their_own() -> None:
    net, early = made(), feeds(100.0)
    # the middle of a hundredfold range falls among FP8's smallest numbers when the range is ten times as wide again
    amax = {name: (low, high, 1000 * high) for name, (low, high, _) in calibrated(net).items()}
    by_step = {r.name: r.sqnr_db for r in linear_errors(net, early, at_times(amax, SCHEME, early))}
    one = {r.name: r.sqnr_db for r in linear_errors(net, early, {name: max(v) for name, v in amax.items()})}
    assert all(value >= 25 for value in by_step.values())
    assert all(by_step[name] > one[name] + 10 for name in one)


def test_what_is_equal_in_all_steps_costs_nothing() -> None:
    model = graph(made(), {"tokens": (5.0, 5.0, 4.0), "rows": (3.0, 3.0, 3.0)})
    assert not any("step" in str(node.name).lower() for node in model.graph)
    with pytest.raises(BuildError, match="for each of 3 ranges"):
        graph(made(), {"tokens": (5.0, 5.0), "rows": (3.0, 3.0, 3.0)})


def test_the_denoiser_has_ranges_of_steps_and_no_other_engine() -> None:
    assert scheme("tensorrt", "dit", "fp8") == FP8PerChannel("bf16", STEP_BOUNDS["dit"])
    assert scheme("tensorrt", "vision_encoder", "fp8") == FP8PerChannel("bf16")


@pytest.mark.slow
def test_rtx_multiplies_in_fp8_with_scales_by_step(tmp_path: Path) -> None:
    """A scale that is computed in the graph is taken too, but then the product is one of bf16 numbers: hence ratios."""
    if importlib.util.find_spec("tensorrt_rtx_libs") is None:
        pytest.skip("TensorRT-RTX is not installed: pip install 'ming-trt[rtx]'")
    net = made()
    save(graph(net, calibrated(net), FP8PerChannel("bf16", BOUNDS)), tmp_path)
    inputs = {"latent": {"shape": ["B", "N", 16]}, "time": {"shape": ["B"]}}
    built = compile_plan(
        tmp_path / "model.onnx",
        inputs,
        [Phase("any", {"B": (1, 2, 4), "N": (1, 64, 256)})],
        tmp_path,
        Settings("tensorrt-rtx"),
    )
    assert built.layers["QUANTIZE"] == 2
    plan = (tmp_path / "model.plan").read_bytes()
    # tensors of FP8 that are no weights: what was quantised is written as such, and read by a product
    kept = re.findall(rb'tensor=\{ alignment=\d+ dims=\{[^}]*\} mem_prop=0 name="([^"]*)"[^\n]*type=fp8_e4m3', plan)
    assert len({name for name in kept if b"const" not in name}) >= 2
