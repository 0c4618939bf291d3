"""The LLM as a service: many requests, one engine, one thread that steps.

A round of the thread: end what was cancelled, read one chunk of one prompt, decode one token for every sequence that
has been read. So a long prompt delays the others by a chunk at a time, and requests join and leave at any step.

A fault that has one request as its cause (logits that are not finite, an impossible option) ends that request; a failed
run of the engine ends those that took part in it. The thread goes on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from functools import partial
from time import perf_counter
from typing import ParamSpec

import numpy as np

from ming_trt.errors import EngineError, MingError
from ming_trt.runtime.cancel import CancelBoard
from ming_trt.runtime.engine import Array, Arrays, Engine, place, zeros
from ming_trt.runtime.events import HiddenEvent
from ming_trt.runtime.front import Front
from ming_trt.runtime.kv_cache import KVCache
from ming_trt.runtime.scheduler import Scheduler
from ming_trt.runtime.sequence import NO_FEATURE, LLMOptions, Sequence
from ming_trt.runtime.stop import TextDecoder

log = logging.getLogger(__name__)
P = ParamSpec("P")

# A step of the engine cannot be interrupted; closing waits this long for the one that runs.
_JOIN_SECONDS = 60.0
# How long an answer's first token may hold up the next step. Its reader needs the interpreter, which this thread keeps
# until the engine runs, and then a core, of which the engine leaves none: without the pause it waits 3 ms to be sent.
_FIRST_TOKEN_SECONDS = 0.002


class LLM(Front):
    """Generates with an `llm` engine (tensors: docs/DESIGN.md, 4.1); the engine is this object's."""

    def __init__(
        self, engine: Engine, options: LLMOptions, decoder: TextDecoder | None = None, board: CancelBoard | None = None
    ) -> None:
        vocabulary, hidden = _fixed_size(engine, "logits", -1), _fixed_size(engine, "features", -1)
        super().__init__(options, vocabulary, hidden, decoder, board)
        self._engine = engine
        in_place = partial(zeros, engine)
        self._cache = KVCache(engine.inputs, options.slots, options.max_seq_len, options.kv_budget, in_place)
        self._scheduler = Scheduler(self._cache)
        self._inbox: list[Sequence] = []
        self._thread = threading.Thread(target=self._work, name="llm", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Cancels what is left and stops the thread. The engine stays open. Closing twice is harmless."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(_JOIN_SECONDS)

    def _enqueue(self, sequence: Sequence, coded: None) -> None:
        self._inbox.append(sequence)

    def _ended(self, sequence: Sequence) -> None:
        self._scheduler.release(sequence)

    def _work(self) -> None:
        closing = False
        while not closing:
            with self._wake:
                while self._scheduler.idle and not self._inbox and not self._closing:
                    self._wake.wait()
                for sequence in self._inbox:
                    self._scheduler.add(sequence)
                self._inbox.clear()
                closing = self._closing
            # Steps guard themselves; this guard is for faults around them, of which all may suffer.
            self._guard(list(self._scheduler), self._round, closing)

    def _round(self, closing: bool) -> None:
        for sequence in list(self._scheduler):
            if (error := self._ending(sequence, closing)) is not None:
                self._fail(sequence, error)
        reading = self._scheduler.next_to_read()
        if reading is not None:
            self._guard([reading], self._read_chunk, reading)
        if self._scheduler.decoding:
            rows = list(self._scheduler.decoding)
            self._guard(rows, self._decode, rows)

    def _guard(self, sequences: list[Sequence], step: Callable[P, None], *args: P.args, **named: P.kwargs) -> None:
        """Runs a step; if it raises, those of `sequences` that have not ended yet end with the error."""
        try:
            step(*args, **named)
        except MingError as error:
            for sequence in sequences:
                self._fail(sequence, error)
        except Exception as error:
            log.exception("the LLM's step failed")
            for sequence in sequences:
                self._fail(sequence, EngineError(f"the LLM's step failed ({type(error).__name__}: {error}): report it"))

    def _read_chunk(self, sequence: Sequence) -> None:
        start = sequence.read
        stop = min(start + self.options.prefill_chunk, sequence.prompt_length)
        last = stop == sequence.prompt_length
        wanted = None
        if not last and not start:
            sequence.features = place(self._engine, sequence.features)  # every chunk takes all of them
        if sequence.wanted is not None:
            wanted = sequence.wanted[(sequence.wanted >= start) & (sequence.wanted < stop)] - start
        # `logits` of every chunk but the last would be thrown away: the engine makes one row of them and gives none.
        outputs = (["logits"] if last else []) + (["hidden", "embeds"] if wanted is not None and wanted.size else [])
        results = self._step(
            sequence.slot,
            [sequence],
            input_ids=sequence.ids[None, start:stop],
            features=sequence.features,
            feature_index=sequence.feature_index[None, start:stop],
            modality=sequence.modality[None, start:stop],
            position_ids=sequence.positions[:, None, start:stop],
            logit_index=np.full((1, 1), stop - start - 1, np.int64),
            outputs=outputs,
        )
        sequence.read = stop
        if wanted is not None and wanted.size:
            sequence.hidden.append((results["hidden"][0, wanted], results["embeds"][0, wanted]))
        if last:
            sequence.features = np.zeros((0, self._hidden), np.float32)  # nothing looks at them any more
            self._scheduler.promote()
            self._finish_reading(sequence, results["logits"][0, 0])

    def _finish_reading(self, sequence: Sequence, logits: Array) -> None:
        if sequence.wanted is not None:
            empty = np.zeros((0, self._hidden), np.float32)
            hidden = np.concatenate([empty, *(pair[0] for pair in sequence.hidden)])
            embeds = np.concatenate([empty, *(pair[1] for pair in sequence.hidden)])
            sequence.hidden.clear()
            if not (np.isfinite(hidden).all() and np.isfinite(embeds).all()):
                raise _not_finite(sequence, "hidden")
            sequence.handle.put(HiddenEvent(sequence.wanted, hidden, embeds))
        self._accept(sequence, logits)
        sequence.handle.wait_for_reader(_FIRST_TOKEN_SECONDS)

    def _decode(self, rows: list[Sequence]) -> None:
        count = len(rows)
        place = np.array([[row.length - 1] for row in rows], np.int64)
        positions = place + np.array([[row.position_delta] for row in rows], np.int64)
        results = self._step(
            0,
            rows,
            input_ids=np.array([[row.history[-1]] for row in rows], np.int64),
            features=np.zeros((1, self._hidden), np.float32),
            feature_index=np.full((count, 1), NO_FEATURE, np.int64),
            modality=np.zeros((count, 1), np.int64),
            position_ids=np.broadcast_to(positions, (3, count, 1)),
            logit_index=np.zeros((count, 1), np.int64),
            outputs=["logits"],
        )
        for row, logits in zip(rows, results["logits"][:, 0], strict=True):
            self._guard([row], self._accept, row, logits)

    def _step(self, first: int, rows: list[Sequence], *, outputs: Collection[str], **feeds: Array) -> Arrays:
        """Runs the engine on `rows`, which hold the cache rows from `first` on, and notes what it wrote there."""
        tokens = feeds["input_ids"].shape[1]
        for row in rows:
            self._cache.reserve(row.slot, self._cache.lengths[row.slot] + tokens)
        lengths = np.array([self._cache.lengths[row.slot] for row in rows], np.int64)
        ends = lengths[:, None] + np.arange(tokens)
        stop = first + len(rows)
        results = self._engine.run(
            {
                **feeds,
                "write_index": lengths,
                "attention_mask": (np.arange(self._cache.capacity) <= ends[:, :, None])[:, None],
                **self._cache.feeds(first, stop),
            },
            outputs,
            self._cache.into(first, stop),
        )
        for row in rows:
            self._cache.advance(row.slot, tokens)
        return results

    def _accept(self, sequence: Sequence, logits: Array) -> None:
        """Chooses the next token, sends what may go out, and ends the sequence if that was the last."""
        if not sequence.first_token:
            sequence.first_token = perf_counter()
        if sequence.length >= sequence.limit:  # a prompt that is only to be read
            return self._finish(sequence, "length")
        if not np.isfinite(logits).all():
            raise _not_finite(sequence, "logits")
        self._take(sequence, sequence.sampler.next(logits, sequence.history))


def _not_finite(sequence: Sequence, what: str) -> EngineError:
    return EngineError(
        f"the llm gave {what} that are not finite after {sequence.length} tokens of request "
        f"'{sequence.handle.request_id}': run `ming-trt verify` on the bundle, and look at this request's input"
    )


def _fixed_size(engine: Engine, name: str, axis: int) -> int:
    spec = engine.outputs.get(name) or engine.inputs.get(name)
    size = spec.shape[axis] if spec is not None else None
    if not isinstance(size, int):
        raise EngineError(
            f"engine '{engine.name}' has no '{name}' with a fixed last size: it is not an engine of the LLM"
        )
    return size
