"""The weight-map language: every source gives what its torch counterpart gives, whole and in pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ming_trt.checkpoint import Checkpoint
from ming_trt.errors import CheckpointError
from ming_trt.models.weights import (
    Concat,
    Interleave,
    Permute,
    Reshape,
    Stack,
    Tensor,
    WeightSource,
    check_sources,
    load_weights,
    source_names,
    tensor_shapes,
)

A, B, C = (Tensor(name, (4, 6)) for name in "abc")
VALUES = {
    name: torch.randn(4, 6, generator=torch.Generator().manual_seed(i)).bfloat16() for i, name in enumerate("abc")
}
a, b, c = VALUES.values()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    save_file({**VALUES, "f": torch.ones(4, 6)}, tmp_path / "model.safetensors")
    return Checkpoint(tmp_path)


SOURCES: list[tuple[WeightSource, torch.Tensor]] = [
    (A, a),
    (Stack((A, B)), torch.stack((a, b))),
    (Concat((A, B, C)), torch.cat((a, b, c))),
    (Concat((A, B), 1), torch.cat((a, b), 1)),
    (Stack((Concat((A, B)), Concat((B, C)))), torch.stack((torch.cat((a, b)), torch.cat((b, c))))),
    (Reshape(A, (2, 12)), a.reshape(2, 12)),
    (Reshape(Concat((A, B)), (48,)), torch.cat((a, b)).flatten()),
    (Permute(A, (1, 0)), a.t()),
    (Permute(Stack((A, B, C)), (1, 2, 0)), torch.stack((a, b, c)).permute(1, 2, 0)),
    (Interleave(Concat((A, B))), torch.stack((a, b), 1).flatten(0, 1)),
    (Stack((Permute(Interleave(Concat((A, B))), (1, 0)),)), torch.stack((a, b), 1).flatten(0, 1).t()[None]),
]


@pytest.mark.parametrize(("source", "expected"), SOURCES, ids=lambda value: type(value).__name__)
def test_sources(checkpoint: Checkpoint, source: WeightSource, expected: torch.Tensor) -> None:
    assert source.shape == tuple(expected.shape)
    assert source.stored_dtype(checkpoint) == "BF16"
    assert set(source.names) <= set("abc")
    assert set(tensor_shapes({"x": source})) == set(source.names)
    for dtype in (None, torch.float32):
        wanted = expected.to(dtype or torch.bfloat16)
        loaded = source.load(checkpoint, dtype)
        assert loaded.dtype == wanted.dtype and loaded.is_contiguous() and torch.equal(loaded, wanted)
        pieces = list(source.pieces(checkpoint, dtype))
        assert all(piece.is_contiguous() and piece.dtype == wanted.dtype for piece in pieces)
        assert torch.equal(torch.cat([piece.flatten() for piece in pieces]), wanted.flatten())


def test_pieces_of_stacked_experts_are_single_tensors(checkpoint: Checkpoint) -> None:
    source = Stack((Concat((A, B)), Concat((B, C))))
    assert [piece.numel() for piece in source.pieces(checkpoint)] == [24] * 4


def test_different_stored_types_meet_in_float32(checkpoint: Checkpoint) -> None:
    source = Stack((A, Tensor("f", (4, 6))))
    assert source.stored_dtype(checkpoint) == "F32"
    assert torch.equal(source.load(checkpoint), torch.stack((a.float(), torch.ones(4, 6))))
    assert {piece.dtype for piece in source.pieces(checkpoint)} == {torch.float32}


def test_checks(checkpoint: Checkpoint) -> None:
    good = {"x": Stack((A, B)), "y": Reshape(C, (24,))}
    check_sources(good, checkpoint)
    assert source_names(good) == ["a", "b", "c"]
    with pytest.raises(CheckpointError, match="'z'"):
        check_sources({**good, "z": Stack((A, Tensor("z", (4, 6))))}, checkpoint)
    with pytest.raises(CheckpointError, match=r"\[4, 6\]"):
        check_sources({"x": Permute(Tensor("a", (6, 4)), (1, 0))}, checkpoint)
    with pytest.raises(ValueError, match="reshaped"):
        Reshape(A, (5, 5))


def test_load_weights_fills_a_module_without_memory(checkpoint: Checkpoint) -> None:
    with torch.device("meta"):
        module = torch.nn.Sequential(
            torch.nn.Linear(6, 4, bias=False), torch.nn.ReLU(), torch.nn.Linear(4, 12, bias=False)
        )
    sources: dict[str, WeightSource] = {"0.weight": A, "2.weight": Permute(Concat((B, C), 1), (1, 0))}
    load_weights(module, checkpoint, sources)
    assert not module.training
    assert torch.equal(module[0].weight, a.float())
    assert torch.equal(module[2].weight, torch.cat((b, c), 1).t().float())
    with pytest.raises(CheckpointError, match=r"disagree about \['2.weight'\]"):
        load_weights(module, checkpoint, {"0.weight": A})
    with pytest.raises(CheckpointError, match=r"parameter '2.weight' is"):
        load_weights(module, checkpoint, {"0.weight": A, "2.weight": B})
