"""Export of toy modules without weights: names, dynamic shapes, bound values, loud failures."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

from builders.export import DATA_FILE, MODEL_FILE, OPSET, bind_weights, export_graph, facts, save
from builders.tensors import StreamedTensor
from ming_trt.errors import BuildError


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


class Toy(nn.Module):
    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.unused = nn.Parameter(torch.empty(3))

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.embed(ids) + x
        for layer in self.layers:
            h = layer(h)
        return h, h.mean(-1)


def export_toy(width: int = 8) -> ir.Model:
    with torch.device("meta"):
        module = Toy(width)
        inputs = {"ids": torch.zeros(2, 5, dtype=torch.long), "x": torch.zeros(2, 5, width)}
    return export_graph(module, inputs, {"ids": {0: "B", 1: "S"}, "x": {0: "B", 1: "S"}}, ["h", "mean"])


def session(folder: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(folder / MODEL_FILE), options)


def test_exported_graph_equals_torch_at_other_shapes(tmp_path: Path) -> None:
    model = export_toy()
    real = Toy().eval()
    weights = {name: value.detach().numpy() for name, value in real.named_parameters()}
    bind_weights(model, {name: (lambda value=value: [value]) for name, value in weights.items()})
    save(model, tmp_path)
    run = session(tmp_path)
    for batch, steps in ((1, 1), (3, 7)):
        ids = torch.randint(0, 10, (batch, steps))
        x = torch.randn(batch, steps, 8)
        with torch.no_grad():
            expected = real(ids, x)
        got = run.run(None, {"ids": ids.numpy(), "x": x.numpy()})
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b.numpy(), atol=2e-6)  # float32 sums of 16 terms in another order


def test_names_are_canonical_and_stable(tmp_path: Path) -> None:
    first, second = export_toy(), export_toy()
    names = [node.name for node in first.graph]
    assert names == [node.name for node in second.graph]
    assert "/embed/Gather" in names and "/layers.0/up/MatMul" in names and "/layers.1/down/MatMul" in names
    assert "/layers.0/Add" in names
    assert set(first.graph.initializers) >= {"embed.weight", "layers.0.up.weight", "layers.1.down.weight"}
    assert "unused" not in first.graph.initializers
    described = facts(first)
    assert described["opset"] == OPSET
    assert described["inputs"]["x"] == {"dtype": "float", "shape": ["B", "S", 8]}
    assert described["outputs"]["mean"]["shape"] == ["B", "S"]


def test_saved_bytes_do_not_depend_on_the_run(tmp_path: Path) -> None:
    weights = {name: value.detach().numpy() for name, value in Toy().named_parameters()}
    for name in ("a", "b"):
        model = export_toy()
        bind_weights(model, {name: (lambda value=value: [value]) for name, value in weights.items()})
        save(model, tmp_path / name)
    for file in (MODEL_FILE, DATA_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [MODEL_FILE, DATA_FILE]
    assert (tmp_path / "a" / DATA_FILE).stat().st_size >= 4 * 4 * 2 * 8 * 8


def test_real_weight_is_refused() -> None:
    with pytest.raises(BuildError, match=r"'unused' is on 'cpu'.*meta"):
        export_graph(Toy(), {"ids": torch.zeros(1, 1, dtype=torch.long), "x": torch.zeros(1, 1, 8)}, {}, ["h", "m"])


def test_constant_made_from_a_missing_weight_is_refused() -> None:
    class Bad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(4))
            self.table = [torch.ones(4) * 2]  # neither parameter nor buffer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight + self.table[0]

    with torch.device("meta"):
        module = Bad()
        x = torch.zeros(2, 4)
    with pytest.raises(BuildError, match="made from a weight that is not there"):
        export_graph(module, {"x": x}, {"x": {0: "B"}}, ["y"])


def test_missing_and_wrong_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"no weight for '.*\.weight'"):
        bind_weights(export_toy(), {})
    with pytest.raises(BuildError, match="has no value"):
        save(export_toy(), tmp_path)
    weights = {name: value.detach().numpy() for name, value in Toy().named_parameters()}
    for wrong, message in ((np.zeros((9, 8), np.float32), "72 elements"), (np.zeros((10, 8)), "float64")):
        model = export_toy()
        bad = weights | {"embed.weight": wrong}
        bind_weights(model, {name: (lambda value=value: [value]) for name, value in bad.items()})
        with pytest.raises(BuildError, match=message):
            save(model, tmp_path)
    assert not (tmp_path / MODEL_FILE).exists() and list(tmp_path.iterdir()) == []


def test_memory_is_bounded_by_one_piece(tmp_path: Path) -> None:
    """A 256 MB stack of 1 MB pieces is written with less than 64 MB of new memory."""

    def pieces():  # type: ignore[no-untyped-def]
        for _ in range(256):
            yield np.ones((1, 256, 1024), np.float32)

    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    weight = StreamedTensor("w", pieces, ir.DataType.FLOAT, (256, 256, 1024))
    value = ir.Value(name="w", shape=weight.shape, type=ir.TensorType(weight.dtype), const_value=weight)
    node = ir.node("Mul", [x, value])
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "y", ir.DataType.FLOAT, weight.shape
    graph = ir.Graph([x], list(node.outputs), nodes=[node], initializers=[value], opset_imports={"": OPSET}, name="g")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    save(ir.Model(graph, ir_version=10), tmp_path)
    assert (tmp_path / DATA_FILE).stat().st_size == 256 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    assert onnx.load(str(tmp_path / MODEL_FILE), load_external_data=False).graph.initializer[0].data_location == 1
