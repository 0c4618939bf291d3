"""Layers of Qwen2: the same numbers with a cache and without, whatever the heads share."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ming_trt.models import qwen2


@dataclass(frozen=True)
class Sizes:
    heads: int
    kv_heads: int
    hidden: int = 24
    head_dim: int = 8
    intermediate: int = 20
    eps: float = 1e-6


def layer(heads: int, kv_heads: int) -> qwen2.Layer:
    made = qwen2.Layer(Sizes(heads, kv_heads))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made


@settings(max_examples=20)
@given(shared=st.integers(1, 3), kv_heads=st.integers(1, 3), tokens=st.integers(1, 6), data=st.data())
def test_steps_over_a_cache_are_one_causal_pass(shared: int, kv_heads: int, tokens: int, data: st.DataObject) -> None:
    """float32, sums of other shapes: 1e-5."""
    first, capacity = data.draw(st.integers(0, tokens)), tokens + 2
    made, x = layer(shared * kv_heads, kv_heads), torch.randn(1, tokens, 24, generator=torch.Generator().manual_seed(5))
    key = value = torch.zeros(1, kv_heads, capacity, 8)
    places, seen, rows = torch.arange(tokens), torch.arange(capacity), []
    with torch.no_grad():
        for start, stop in ((0, first), (first, tokens)):
            if start < stop:
                at, mask = torch.tensor([start]), (seen <= places[start:stop, None])[None, None]
                table = qwen2.rope_table(places[start:stop], 8, 1e4)
                out, key, value = made(x[:, start:stop], table, qwen2.Cache(key, value, at, mask))
                rows.append(out)
        # the last of a prefix sees all of it, and nothing else
        alone = [made(x[:, : i + 1], qwen2.rope_table(places[: i + 1], 8, 1e4))[0][:, -1:] for i in range(tokens)]
    assert torch.allclose(torch.cat(rows, 1), torch.cat(alone, 1), atol=1e-5)
    assert not key[:, :, tokens:].any() and not value[:, :, tokens:].any()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_without_a_cache_every_token_sees_every_other(heads: int, kv_heads: int) -> None:
    made, x = layer(heads, kv_heads), torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(7))
    table = qwen2.rope_table(torch.arange(5), 8, 1e4)
    with torch.no_grad():
        before, key, _ = made(x, table)
        x[:, -1] += 1
        after, _, _ = made(x, table)
    assert key.shape == (1, kv_heads, 5, 8)
    assert (before - after)[0, 0].abs().max() > 1e-3
