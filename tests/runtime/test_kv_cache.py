"""Whatever order sequences come, grow and go in, each finds what it wrote, and nothing else lies in its row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ming_trt.errors import ConfigError, EngineError
from ming_trt.runtime.engine import TensorSpec
from ming_trt.runtime.kv_cache import KVCache, layer_count

KV, D, LAYERS = 2, 3, 2


def specs(batch: int | str = "B", capacity: int | str = "T") -> dict[str, TensorSpec]:
    shape = (batch, KV, capacity, D)
    names = [f"past_{part}_{i}" for i in range(LAYERS) for part in ("key", "value")]
    return {name: TensorSpec(name, np.dtype(np.float32), shape) for name in names}


class CacheMachine(RuleBasedStateMachine):
    """Writes tokens of a number that only their sequence has. `order` holds the numbers by row; those from
    `boundary` on are still being read."""

    slots, limit = 5, 300

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(specs(), self.slots, self.limit)
        self.order: list[tuple[int, list[float]]] = []
        self.boundary = 0
        self.number = 0

    @precondition(lambda self: len(self.order) < self.slots)
    @rule()
    def allocate(self) -> None:
        self.number += 1
        assert self.cache.allocate() == len(self.order)
        self.order.append((self.number, []))

    @precondition(lambda self: self.boundary < len(self.order))
    @rule()
    def promote(self) -> None:
        self.boundary += 1

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        slot = data.draw(st.integers(0, len(self.order) - 1))
        number, content = self.order[slot]
        count = data.draw(st.integers(1, min(100, self.limit - len(content)))) if len(content) < self.limit else 0
        values = [number + len(content) / 1000 + i / 1000 for i in range(count)]
        self.cache.reserve(slot, len(content) + count)
        for array in self.cache.into(slot, slot + 1).values():
            array[0, :, len(content) : len(content) + count] = np.array(values, np.float32)[None, :, None]
        if data.draw(st.booleans()):
            self.cache.advance(slot, count)
            content += values
        # else the engine failed after it had written

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        slot = data.draw(st.integers(0, len(self.order) - 1))
        moves = self.cache.free(slot, self.boundary)
        before, after = list(self.order), list(self.order)
        for source, target in moves:
            after[target] = before[source]
            before[target] = before[source]
        after.pop()
        decoding = {number for number, _ in self.order[: self.boundary]} - {self.order[slot][0]}
        self.boundary -= slot < self.boundary
        assert {number for number, _ in after[: self.boundary]} == decoding
        self.order = after

    @invariant()
    def every_row_holds_its_sequence(self) -> None:
        assert self.cache.count == len(self.order)
        assert self.cache.lengths == [len(content) for _, content in self.order]
        for array in self.cache.feeds(0, self.slots).values():
            for row, (_, content) in zip(array, self.order, strict=False):
                np.testing.assert_array_equal(row[:, : len(content)].max(axis=(0, 2)), np.array(content, np.float32))
                np.testing.assert_array_equal(row[:, : len(content)].min(axis=(0, 2)), np.array(content, np.float32))
            assert not array[len(self.order) :].any(), "rows that are free are zero"

    @invariant()
    def the_capacity_doubles_and_falls_back(self) -> None:
        assert self.cache.capacity in (64, 128, 256, 300)
        if not self.order:
            assert self.cache.capacity == 64


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_step_takes_a_prefix_of_each_array_and_copies_nothing() -> None:
    cache = KVCache(specs(), 4, 100)
    feeds, into = cache.feeds(0, 3), cache.into(0, 3)
    assert list(feeds) == ["past_key_0", "past_value_0", "past_key_1", "past_value_1"]
    assert list(into) == ["present_key_0", "present_value_0", "present_key_1", "present_value_1"]
    for past, present in zip(feeds.values(), into.values(), strict=True):
        assert past.shape == (3, KV, 64, D) and past.flags.c_contiguous
        assert past.ctypes.data == present.ctypes.data


def test_limits() -> None:
    cache = KVCache(specs(), 1, 10)
    assert cache.bytes_per_token == 2 * LAYERS * KV * D * 4
    cache.allocate()
    with pytest.raises(EngineError, match="all 1 slots"):
        cache.allocate()
    with pytest.raises(EngineError, match="11 tokens does not fit the 10"):
        cache.reserve(0, 11)
    with pytest.raises(EngineError, match="slot 1 is not in use"):
        cache.free(1)
    KVCache(specs(), 4, 100, budget=4 * 100 * cache.bytes_per_token)
    with pytest.raises(ConfigError, match="kv_budget"):
        KVCache(specs(), 4, 100, budget=4 * 100 * cache.bytes_per_token - 1)


def test_an_engine_of_fixed_sizes_fixes_the_cache() -> None:
    cache = KVCache(specs(4, 32), 4, 20)
    cache.allocate()
    cache.reserve(0, 20)
    assert cache.capacity == 32
    with pytest.raises(ConfigError, match="takes 2 sequences"):
        KVCache(specs(2), 4, 20)
    with pytest.raises(ConfigError, match="holds 16 tokens"):
        KVCache(specs(4, 16), 4, 20)


def test_engines_that_are_no_llm_are_refused() -> None:
    assert layer_count(specs()) == LAYERS
    with pytest.raises(EngineError, match="past_key_0"):
        KVCache({}, 1, 10)
    with pytest.raises(EngineError, match="must be numbers"):
        KVCache({name: TensorSpec(name, spec.dtype, ("B", "G", "T", D)) for name, spec in specs().items()}, 1, 10)
