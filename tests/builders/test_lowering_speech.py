"""What the audio decoder is rewritten to for ONNX Runtime, against the same module in torch."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from builders.export import bind_weights, export_graph, save
from builders.lowering_speech import lower_decoder
from ming_trt.models.hift import _Snake
from ming_trt.runtime.onnxruntime import OnnxRuntimeEngine


class Decoder(nn.Module):
    """One of each: convolutions with and without padding, with gaps, of one frame, with a stride; Mish and Snake."""

    def __init__(self) -> None:
        super().__init__()
        self.causal = nn.Conv1d(12, 32, 3)
        self.single = nn.Conv1d(32, 24, 1)
        self.gaps = nn.Conv1d(24, 24, 3, dilation=2)
        self.snake = _Snake(24)
        self.padded = nn.Conv1d(24, 16, 5, padding=2)
        self.strided = nn.Conv1d(16, 8, 4, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.mish(self.causal(x))
        x = self.snake(self.gaps(nn.functional.mish(self.single(x))))
        return self.strided(self.padded(x))


@pytest.fixture(scope="module")
def module() -> Decoder:
    torch.manual_seed(0)
    module = Decoder().eval()
    with torch.no_grad():
        module.snake.alpha.uniform_(0.5, 2)
        module.snake.alpha[:3] = torch.tensor([0.0, 1e-9, -0.7])
        module.causal.bias[:4] += 40.0  # where exp(x) squared has no float32
        module.causal.bias[4:8] -= 120.0
    return module


Built = tuple[OnnxRuntimeEngine, Counter[str]]


def lowered(module: Decoder, folder: Path, precision: str, keep: tuple[str, ...]) -> Built:
    with torch.device("meta"):
        empty, example = Decoder(), torch.zeros(2, 12, 40)
    model = export_graph(empty, {"x": example}, {"x": {0: "B", 2: "T"}}, ["y"])
    weights = {name: value.detach().numpy() for name, value in module.named_parameters()}
    bind_weights(model, {name: lambda w=value: [w] for name, value in weights.items()})  # type: ignore[misc]
    lower_decoder(model, precision, keep)
    save(model, folder)
    return OnnxRuntimeEngine(folder / "model.onnx", threads=1), operators(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_snake_without_an_alpha_is_the_input_in_every_graph(dtype: torch.dtype, tmp_path: Path) -> None:
    """Its small number survives the exporter's optimiser and half precision, where 0 / 0 would be left of it."""
    alpha = torch.tensor([0.0, 1e-9, 3e-8, 1e-3, 0.5, -2.0])
    with torch.device("meta"):
        empty, example = _Snake(len(alpha)).to(dtype), torch.zeros(2, len(alpha), 7, dtype=dtype)
    model = export_graph(empty, {"x": example}, {"x": {0: "B", 2: "T"}}, ["y"])
    bind_weights(model, {"alpha": lambda: [alpha.to(dtype).numpy()]})
    save(model, tmp_path)
    x = np.random.default_rng(0).standard_normal((2, len(alpha), 9)).astype(np.float32)
    a = alpha.to(dtype).numpy().astype(np.float32)[:, None]
    rounded = torch.from_numpy(x).to(dtype).numpy()
    wide = rounded.astype(np.float32)
    # as the official model has it, in float32
    expected = wide + np.float32(1) / (a + np.float32(1e-9)) * np.sin(wide * a) ** 2
    got = OnnxRuntimeEngine(tmp_path / "model.onnx", threads=1).run({"x": rounded})["y"]
    assert np.array_equal(got[:, 0], rounded[:, 0])
    # one rounding of the result, and another order of the division
    np.testing.assert_allclose(got, expected, rtol=2 * float(torch.finfo(dtype).eps), atol=1e-6)


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.fixture(scope="module")
def built(module: Decoder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    kept = {"fp32": (), "int8": ("single",)}
    return {name: lowered(module, tmp_path_factory.mktemp(name), name, keep) for name, keep in kept.items()}


@pytest.mark.parametrize("frames", [9, 40, 171])
def test_float32_is_the_same_computation(module: Decoder, built: dict[str, Built], frames: int) -> None:
    engine, found = built["fp32"]
    assert found["Conv"] == 5 and not found["Mish"] and found["Div"] == 2, "one for each Mish, none for Snake"
    x = np.random.default_rng(frames).standard_normal((2, 12, frames)).astype(np.float32)
    with torch.inference_mode():
        expected = module(torch.from_numpy(x)).numpy()
    # sums of some hundred products in another order
    assert np.abs(engine.run({"x": x})["y"] - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("frames", [9, 171])
def test_eight_bits(module: Decoder, built: dict[str, Built], frames: int) -> None:
    """Convolutions without padding or stride become products; those of `keep` and the others stay."""
    engine, found = built["int8"]
    assert found["MatMulIntegerToFloat"] == 2 and found["Conv"] == 3
    x = np.random.default_rng(frames).standard_normal((2, 12, frames)).astype(np.float32)
    with torch.inference_mode():
        expected = module(torch.from_numpy(x)).numpy()
    error = engine.run({"x": x})["y"] - expected
    # 255 steps over the range of an activation: about 40 dB a layer
    assert 10 * np.log10(np.square(expected).sum() / np.square(error).sum()) > 30
