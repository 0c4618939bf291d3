"""Engines of one matrix each, for tests of the build: y = x · w + b, and a second one on other tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from builders.component import ExportOptions, Feeds
from ming_trt.models.weights import Tensor, WeightSource, load_weights

SIZE = 4


class Inner(torch.nn.Module):
    """`y = x @ weight + bias`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(SIZE, SIZE))
        self.bias = torch.nn.Parameter(torch.empty(SIZE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class Chain(torch.nn.Module):
    """Two of them, so that a difference has a place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Inner()
        self.second = Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.first(x))
        return y


class Toy:
    """A component whose tensors start with its name. `fault` plants an error in the engine, not in the definition."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.fault = ""

    def needs(self, config: Any, checkpoint: Any) -> str | None:
        return None if f"{self.name}.first.weight" in checkpoint else f"the checkpoint has no {self.name}"

    def config_key(self, config: Any) -> Mapping[str, Any]:
        return {"size": SIZE}

    def sources(self, config: Any) -> Mapping[str, WeightSource]:
        shapes = {"weight": (SIZE, SIZE), "bias": (SIZE,)}
        return {
            f"{part}.{leaf}": Tensor(f"{self.name}.{part}.{leaf}", shape)
            for part in ("first", "second")
            for leaf, shape in shapes.items()
        }

    def export(self, config: Any, checkpoint: Any, folder: Path, options: ExportOptions) -> Mapping[str, Any]:
        if self.fault == "crash":
            raise RuntimeError("the exporter\nfell over")
        nodes, weights, before = [], [], "x"
        for part in ("first", "second"):
            weight = checkpoint.read_numpy(f"{self.name}.{part}.weight")
            if self.fault == f"transpose {part}":
                weight = weight.T.copy()
            if self.fault == f"nan {part}":
                weight = weight * np.float32(np.nan)
            weights.append(numpy_helper.from_array(weight, f"{part}.weight"))
            weights.append(numpy_helper.from_array(checkpoint.read_numpy(f"{self.name}.{part}.bias"), f"{part}.bias"))
            product, after = f"/{part}/MatMul/output_0", "y" if part == "second" else f"/{part}/Add/output_0"
            nodes.append(helper.make_node("MatMul", [before, f"{part}.weight"], [product], f"/{part}/MatMul"))
            nodes.append(helper.make_node("Add", [product, f"{part}.bias"], [after], f"/{part}/Add"))
            before = after
        rows = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", SIZE]) for n in ("x", "y")]
        graph = helper.make_graph(nodes, self.name, rows[:1], rows[1:], weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
        onnx.save(
            model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0
        )
        spec = {"dtype": "float", "shape": ["B", SIZE]}
        return {"inputs": {"x": spec}, "outputs": {"y": spec}, "opset": 23, "hidden_size": SIZE}

    def reference(self, config: Any, checkpoint: Any) -> torch.nn.Module:
        with torch.device("meta"):
            module = Chain()
        return load_weights(module, checkpoint, self.sources(config))

    def sample_feeds(self, config: Any, rng: np.random.Generator) -> Feeds:
        return {"x": rng.standard_normal((3, SIZE)).astype(np.float32)}


ALPHA, BETA = Toy("alpha"), Toy("beta")
COMPONENTS = {"alpha": f"{__name__}:ALPHA", "beta": f"{__name__}:BETA"}


def write_checkpoint(folder: Path, config: Path, names: tuple[str, ...] = ("alpha", "beta"), seed: int = 0) -> Path:
    """A checkpoint of the toys' tensors beside the configuration file `config`."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_bytes(config.read_bytes())
    shapes = {"weight": (SIZE, SIZE), "bias": (SIZE,)}
    tensors = {
        f"{name}.{part}.{leaf}": rng.standard_normal(shape).astype(np.float32)
        for name in names
        for part in ("first", "second")
        for leaf, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder
