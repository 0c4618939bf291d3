"""The custom operators: reference against a direct formula, and the contracts that back ends rely on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ming_trt.models import ops, rope

SECTIONS = (2, 3, 3)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["3D", "video_rope"])
def test_each_frequency_reads_one_axis(kind: str) -> None:
    axes = rope.frequency_axes(kind, (16, 24, 24))
    assert [axes.count(axis) for axis in range(3)] == [16, 24, 24]
    if kind == "3D":
        assert axes == sorted(axes)
    else:
        assert axes[:4] == [1, 2, 1, 2] and axes[48:] == [0] * 16


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="yarn"):
        rope.frequency_axes("yarn", SECTIONS)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), kind=st.sampled_from(["3D", "video_rope"]), shift=st.integers(-50, 1000))
def test_scores_depend_on_distances_only(seed: int, kind: str, shift: int) -> None:
    """Rotated q·k is unchanged when all positions move together (float32 angles of up to 1000: 2e-3)."""
    g = generator(seed)
    q, k = torch.randn(1, 2, 3, 16, generator=g), torch.randn(1, 1, 3, 16, generator=g)
    positions = torch.randint(-5, 30, (3, 1, 3), generator=g)
    scores = []
    for moved in (positions, positions + shift):
        rotated_q, rotated_k = ops.mrope(q, k, moved, 600000.0, kind, SECTIONS)
        assert torch.allclose(rotated_q.norm(dim=-1), q.norm(dim=-1), atol=1e-5)
        scores.append(rotated_q @ rotated_k.transpose(-1, -2))
    assert torch.allclose(*scores, atol=2e-3)


def test_mrope_rounds_once() -> None:
    """In bfloat16 the rotation is that of float32, rounded at the end."""
    g = generator(0)
    q, k = (torch.randn(1, heads, 5, 16, generator=g).bfloat16() for heads in (4, 2))
    positions = torch.arange(5).expand(3, 1, 5) + 300
    low = ops.mrope(q, k, positions, 600000.0, "3D", SECTIONS)
    high = ops.mrope(q.float(), k.float(), positions, 600000.0, "3D", SECTIONS)
    for a, b in zip(low, high, strict=True):
        assert torch.equal(a, b.bfloat16())


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 999),
    tokens=st.integers(1, 6),
    experts=st.integers(1, 5),
    top_k=st.integers(1, 5),
    normalize=st.booleans(),
)
def test_sparse_moe_is_the_weighted_sum_of_dense_experts(
    seed: int, tokens: int, experts: int, top_k: int, normalize: bool
) -> None:
    top_k = min(top_k, experts)
    g = generator(seed)
    x, logits = torch.randn(tokens, 8, generator=g), torch.randn(tokens, experts, generator=g)
    gate_up, down = torch.randn(experts, 6, 8, generator=g), torch.randn(experts, 8, 3, generator=g)
    got = ops.sparse_moe(x, logits, gate_up, down, top_k, normalize)
    for t in range(tokens):
        p = [math.exp(v) for v in logits[t].tolist()]
        p = [v / sum(p) for v in p]
        chosen = sorted(range(experts), key=lambda e: -p[e])[:top_k]
        scale = sum(p[e] for e in chosen) if normalize else 1.0
        expected = torch.zeros(8)
        for e in chosen:
            gate, up = gate_up[e, :3] @ x[t], gate_up[e, 3:] @ x[t]
            expected += p[e] / scale * (down[e] @ (gate * torch.sigmoid(gate) * up))
        assert torch.allclose(got[t], expected, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_kv_update_writes_rows_of_each_entry(data: st.DataObject) -> None:
    capacity = data.draw(st.integers(1, 8))
    count = data.draw(st.integers(1, capacity))
    starts = data.draw(st.lists(st.integers(0, capacity - count), min_size=1, max_size=3))
    g = generator(capacity)
    cache = torch.randn(len(starts), 2, capacity, 4, generator=g)
    update = torch.randn(len(starts), 2, count, 4, generator=g)
    before = cache.clone()
    got = ops.kv_update(cache, update, torch.tensor(starts))
    assert torch.equal(cache, before)
    for row, start in enumerate(starts):
        before[row, :, start : start + count] = update[row]
    assert torch.equal(got, before)


@pytest.mark.parametrize("name", ["mrope", "sparse_moe", "kv_update"])
def test_operators_are_well_formed(name: str) -> None:
    """Schema, fake kernel and aliasing, as torch itself checks them."""
    g = generator(1)
    q, k = torch.randn(2, 4, 3, 16, generator=g), torch.randn(2, 2, 3, 16, generator=g)
    inputs = {
        "mrope": (q, k, torch.arange(3).expand(3, 2, 3), 600000.0, "3D", list(SECTIONS)),
        "sparse_moe": (q[0, 0], torch.randn(3, 4), torch.randn(4, 6, 16), torch.randn(4, 16, 3), 2, True),
        "kv_update": (torch.zeros(2, 2, 9, 16), k, torch.tensor([1, 6])),
    }[name]
    torch.library.opcheck(getattr(torch.ops.ming, name).default, inputs)


def test_routing_takes_any_leading_axes_and_the_lower_of_equal_experts() -> None:
    logits = torch.randint(0, 3, (2, 5, 8), generator=torch.Generator().manual_seed(0)).float()
    experts, weights = ops.route(logits, top_k=3, normalize=True)
    flat_experts, flat_weights = ops.route(logits.flatten(0, 1), top_k=3, normalize=True)
    assert torch.equal(experts.flatten(0, 1), flat_experts) and torch.equal(weights.flatten(0, 1), flat_weights)
    ranked = [sorted(range(8), key=lambda expert: (-row[expert].item(), expert)) for row in logits.flatten(0, 1)]
    assert flat_experts.tolist() == [row[:3] for row in ranked]
