"""Rows and sequences stay together, whatever order requests come and go in."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ming_trt.processing.request import Sampling
from ming_trt.runtime.engine import TensorSpec
from ming_trt.runtime.events import Handle
from ming_trt.runtime.kv_cache import KVCache
from ming_trt.runtime.scheduler import Scheduler
from ming_trt.runtime.sequence import GenerationRequest, LLMOptions, Sequence, prepare

SPECS = {name: TensorSpec(name, np.dtype(np.float32), ("B", 1, "T", 1)) for name in ("past_key_0", "past_value_0")}


class SchedulerMachine(RuleBasedStateMachine):
    """Every sequence writes its own number into its row."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(KVCache(SPECS, 3, 100))
        self.number = 0
        self.arrived: list[int] = []
        self.begun: list[int] = []

    def value(self, sequence: Sequence) -> int:
        return int(sequence.handle.request_id)

    @rule()
    def add(self) -> None:
        self.number += 1
        request = GenerationRequest(np.array([1]), sampling=Sampling(max_tokens=5))
        self.scheduler.add(prepare(request, Handle(str(self.number)), LLMOptions(), 10, 4, None))
        self.arrived.append(self.number)

    @rule()
    def read(self) -> None:
        sequence = self.scheduler.next_to_read()
        if sequence is None:
            return
        if not self.begun or self.begun[-1] != self.value(sequence):
            self.begun.append(self.value(sequence))
        cache, slot = self.scheduler.cache, sequence.slot
        cache.reserve(slot, cache.lengths[slot] + 1)
        for array in cache.into(slot, slot + 1).values():
            array[0, :, cache.lengths[slot]] = self.value(sequence)
        cache.advance(slot, 1)

    @precondition(lambda self: self.scheduler.reading is not None)
    @rule()
    def promote(self) -> None:
        self.scheduler.promote()

    @precondition(lambda self: not self.scheduler.idle)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(list(self.scheduler)))
        self.scheduler.release(sequence)
        self.scheduler.release(sequence)
        self.arrived = [number for number in self.arrived if number != self.value(sequence)]
        assert sequence not in list(self.scheduler)

    @invariant()
    def rows_are_in_order(self) -> None:
        scheduler, cache = self.scheduler, self.scheduler.cache
        assert [each.slot for each in scheduler.decoding] == list(range(len(scheduler.decoding)))
        rows = list(scheduler.decoding)
        if scheduler.reading is not None:
            assert scheduler.reading.slot == len(rows)
            rows.append(scheduler.reading)
        assert cache.count == len(rows)
        for array in cache.feeds(0, len(rows)).values():
            for row, sequence in zip(array, rows, strict=True):
                assert (row[:, : cache.lengths[sequence.slot]] == self.value(sequence)).all()

    @invariant()
    def first_come_first_served(self) -> None:
        assert self.begun == sorted(self.begun)
        assert {self.value(each) for each in self.scheduler} == set(self.arrived)
        assert self.scheduler.idle == (not self.arrived)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
