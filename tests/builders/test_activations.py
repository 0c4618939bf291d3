"""Working memory from definitions without data: figures that can be counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from builders.activations import activation_bytes, cache_bytes
from builders.export import Signature


class _Chain(nn.Module):
    """x [B, 4] -> wide [B, 64] -> x's size; the wide rows live until the narrow ones are there."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 64), nn.Linear(64, 4)

    def forward(self, x: torch.Tensor, past_key_0: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


class _Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(x, x, x)


def _signature(module: nn.Module, axes: dict[str, dict[int, str]], **inputs: torch.Tensor) -> Signature:
    return Signature(module, {name: value.to("meta") for name, value in inputs.items()}, axes)


def test_what_is_dead_is_not_counted() -> None:
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(8, 8) for _ in range(10)))
    signature = _signature(module, {"x": {0: "B"}}, x=torch.zeros(2, 8))
    # the input, and at any time one layer's input and output
    assert activation_bytes(signature, {"B": 16}, scores=False) == 3 * 16 * 8 * 4


def test_sizes_and_caches() -> None:
    with torch.device("meta"):
        module = _Chain()
    axes = {"x": {0: "B"}, "past_key_0": {0: "B", 1: "T"}}
    signature = _signature(module, axes, x=torch.zeros(2, 4), past_key_0=torch.zeros(2, 3))
    assert activation_bytes(signature, {"B": 5, "T": 1000}, scores=False) == 4 * 5 * (4 + 64 + 4)
    assert cache_bytes(signature, {"B": 5, "T": 1000}) == 4 * 5 * 1000


def test_scores_of_attention() -> None:
    signature = _signature(_Attention(), {"x": {2: "S"}}, x=torch.zeros(1, 2, 3, 8))
    fused, written = (activation_bytes(signature, {"S": 100}, scores=scores) for scores in (False, True))
    assert written - fused == pytest.approx(4 * 2 * 100 * 100, abs=256)  # the arena's alignment


def test_what_onnxruntime_copies_and_what_it_writes_over() -> None:
    """A cut is a tensor of its own there, and outlives what it was cut from; a sum takes the place of a summand."""

    class Cut(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = (x * 2).split(32, 1)
            return first + second

    signature = _signature(Cut(), {"x": {0: "B"}}, x=torch.zeros(2, 64))
    whole = 4 * 64 * 64
    # the input and the product; the sum beside it, of half its size
    assert activation_bytes(signature, {"B": 64}, scores=False) == 2 * whole + whole // 2
    # the product and its halves, over one of which the sum is written
    assert activation_bytes(signature, {"B": 64}, scores=True) == 3 * whole
