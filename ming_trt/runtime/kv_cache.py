"""The KV cache: what each layer remembers of every running sequence.

A sequence holds a *slot*, a row of every array `past_key_{i}`, `past_value_{i}` f32 [slots, kv heads, T, head_dim]. The
engine reads and writes the rows in place, and rows in use are always 0..count-1, so a decode step passes a prefix of
each array and copies nothing. The capacity T doubles when a sequence outgrows it, up to `max_seq_len`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ming_trt.errors import ConfigError, EngineError
from ming_trt.runtime.engine import Array, TensorSpec

_FIRST_CAPACITY = 64


def layer_count(inputs: Mapping[str, TensorSpec]) -> int:
    """Number of layers of an `llm` engine, from its inputs. Raises `EngineError` if it has no cache."""
    layers = sum(name.startswith("past_key_") for name in inputs)
    names = {f"past_{kind}_{i}" for kind in ("key", "value") for i in range(layers)}
    if not layers or not names <= inputs.keys():
        raise EngineError("the engine has no inputs past_key_0, past_value_0, ...: it is not an engine of the LLM")
    return layers


class KVCache:
    """Slots for `slots` sequences of at most `max_seq_len` tokens; `budget` bytes is the most it may ever take (0:
    any). `zeros` makes the arrays: those of the engine's own memory, if it has one (`engine.zeros`).

    Raises `ConfigError` if the full size would not fit the budget.
    """

    def __init__(
        self,
        inputs: Mapping[str, TensorSpec],
        slots: int,
        max_seq_len: int,
        budget: int = 0,
        zeros: Callable[[tuple[int, ...], np.dtype[Any]], Array] = np.zeros,
    ) -> None:
        self._zeros = zeros
        self.slots = slots
        self.max_seq_len = max_seq_len
        self.lengths: list[int] = []
        self._reserved: list[int] = []
        self._specs = {
            name: inputs[name] for i in range(layer_count(inputs)) for name in (f"past_key_{i}", f"past_value_{i}")
        }
        self._outputs = {name: name.replace("past_", "present_", 1) for name in self._specs}
        batch, heads, fixed, width = self._specs["past_key_0"].shape
        if not (isinstance(heads, int) and isinstance(width, int)):
            raise EngineError(
                f"the engine's past_key_0 has the shape [{batch}, {heads}, {fixed}, {width}]: "
                "the second and the last size must be numbers"
            )
        if isinstance(batch, int) and batch < slots:
            raise ConfigError(
                f"the engine takes {batch} sequences and {slots} slots are asked for: lower profile.slots"
            )
        if isinstance(fixed, int) and fixed < max_seq_len:
            raise ConfigError(
                f"the engine's cache holds {fixed} tokens and profile.max_seq_len is {max_seq_len}: lower it"
            )
        self._fixed = fixed if isinstance(fixed, int) else None
        full = self.slots * (self._fixed or max_seq_len) * self.bytes_per_token
        if budget and full > budget:
            raise ConfigError(
                f"{slots} slots of {max_seq_len} tokens need {full / 2**20:.1f} MiB of KV cache and kv_budget is "
                f"{budget / 2**20:.1f} MiB: raise it, or lower profile.slots or profile.max_seq_len"
            )
        self._arrays = self._allocate(self._first_capacity)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in all layers."""
        sizes = (
            int(spec.shape[1] or 0) * int(spec.shape[3] or 0) * spec.dtype.itemsize for spec in self._specs.values()
        )
        return sum(sizes)

    @property
    def count(self) -> int:
        """Slots in use."""
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        """T: tokens that a slot holds before the cache must grow."""
        return next(iter(self._arrays.values())).shape[2]

    def allocate(self) -> int:
        """Takes a slot for a new, empty sequence: always the row behind those in use. Raises `EngineError` if none is
        free."""
        if self.count == self.slots:
            raise EngineError(f"all {self.slots} slots of the KV cache are taken: wait until a request ends")
        self.lengths.append(0)
        self._reserved.append(0)
        return self.count - 1

    def free(self, slot: int, boundary: int | None = None) -> list[tuple[int, int]]:
        """Gives a slot back and closes the gap; returns the moves (from, to) of other sequences, in order.

        Sequences in rows below `boundary` stay below it (less one if `slot` was below), and the others behind them:
        the scheduler keeps the sequence that is still being read behind those that decode. Default: no such order.
        """
        if not 0 <= slot < self.count:
            raise EngineError(f"slot {slot} is not in use: {self.count} are")
        boundary = self.count if boundary is None else boundary
        moves = []
        hole = slot
        for last in (boundary - 1, self.count - 1):
            if last > hole:
                self._copy(last, hole)
                moves.append((last, hole))
                hole = last
        # Masked places count zero times their content, and zero times NaN is NaN: leave nothing behind.
        for array in self._arrays.values():
            array[hole, :, : self._reserved[hole]] = 0
        self.lengths.pop()
        self._reserved.pop()
        if not self.lengths and self.capacity > self._first_capacity:
            self._arrays = self._allocate(self._first_capacity)
        return moves

    def reserve(self, slot: int, tokens: int) -> None:
        """Makes room so that `slot` can hold `tokens` in all; call it before the engine writes them.

        Raises `EngineError` above `max_seq_len`.
        """
        if tokens > self.max_seq_len:
            raise EngineError(
                f"a sequence of {tokens} tokens does not fit the {self.max_seq_len} of profile.max_seq_len"
            )
        self._reserved[slot] = max(self._reserved[slot], tokens)
        capacity = self.capacity
        while capacity < tokens:
            capacity = min(2 * capacity, self.max_seq_len)
        if capacity == self.capacity:
            return
        old, self._arrays = self._arrays, self._allocate(capacity)
        used = max(self.lengths)
        for name in list(old):
            self._arrays[name][: self.count, :, :used] = old.pop(name)[: self.count, :, :used]

    def advance(self, slot: int, tokens: int) -> None:
        """Notes that the engine wrote `tokens` more into `slot`."""
        self.lengths[slot] += tokens

    def feeds(self, first: int, stop: int) -> dict[str, Array]:
        """Inputs `past_*` for the rows first..stop-1: views, [stop - first, kv heads, T, head_dim]."""
        if (first, stop) not in self._views:  # as many as there are slots and lengths of their prefix
            self._views[first, stop] = {name: array[first:stop] for name, array in self._arrays.items()}
        return self._views[first, stop]

    def into(self, first: int, stop: int) -> dict[str, Array]:
        """The same memory under the names of the outputs, `present_*`."""
        return {self._outputs[name]: array for name, array in self.feeds(first, stop).items()}

    @property
    def _first_capacity(self) -> int:
        return self._fixed or min(_FIRST_CAPACITY, self.max_seq_len)

    def _allocate(self, capacity: int) -> dict[str, Array]:
        self._views: dict[tuple[int, int], dict[str, Array]] = {}
        # Numpy's zeroed pages are mapped when they are first written: rows that are never used cost no memory there.
        return {
            name: self._zeros((self.slots, int(spec.shape[1] or 0), capacity, int(spec.shape[3] or 0)), spec.dtype)
            for name, spec in self._specs.items()
        }

    def _copy(self, source: int, target: int) -> None:
        used, stale = self.lengths[source], self._reserved[target]
        for array in self._arrays.values():
            array[target, :, :used] = array[source, :, :used]
            array[target, :, used:stale] = 0
        self.lengths[target] = self._reserved[target] = used
