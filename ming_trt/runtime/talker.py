"""The talker at work: from a prompt to a stream of codec codes, one engine step per audio id."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from ming_trt.errors import CancelledError, EngineError, InputError
from ming_trt.processing.s3_bpe import S3Bpe
from ming_trt.processing.talker_prompt import TalkerPrompt, TalkerTokens
from ming_trt.runtime.engine import Array, Arrays, Engine, OwnMemory, place, zeros
from ming_trt.runtime.kv_cache import KVCache

TOP_K = 20
MIN_STEPS = 10
"""Steps before which the talker may not end."""
MAX_STEPS = 1000
MAX_KEPT = 2
"""Caches that are kept for generations to come, where they are in a GPU's memory."""
_LEAST = np.finfo(np.float32).tiny
SILENCE = (0, 0, 0)
"""Codes that are spoken where the talker ends before it said anything."""


def never() -> bool:
    """For what cannot be cancelled."""
    return False


def _check(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise CancelledError("the talker was stopped: its client cancelled the request")


def choose(logits: Array, step: int, tokens: TalkerTokens, draws: Array) -> int:
    """One audio id, or `<audio_eos>`, from `logits` f32 [V].

    Among the 20 best ids (and what ties with the last of them) the one with the largest probability / draw, `draws` f32
    [V] being exponential: a draw from the softmax. Text ids are never chosen, the end not in the first steps.
    """
    allowed = np.full(logits.shape, -np.inf, np.float32)
    allowed[tokens.first_audio :] = logits[tokens.first_audio :]
    if step >= MIN_STEPS:
        allowed[tokens.audio_eos] = logits[tokens.audio_eos]
    for candidates in (logits, allowed):
        count = min(TOP_K, candidates.size)
        kept = np.where(candidates >= np.partition(candidates, -count)[-count], allowed, -np.inf)
        best = kept.max()
        if np.isfinite(best):
            probabilities = np.exp(kept - best)
            # a draw of zero must not make a number of 0 / 0
            return int(np.argmax(probabilities / probabilities.sum() / np.maximum(draws, _LEAST)))
    raise EngineError("the talker's logits are not finite: run `ming-trt verify` on the bundle")


@dataclass(slots=True)
class _Cursor:
    """Where one generation stands: its cache and the rows that its prompt refers to."""

    cache: KVCache
    speaker: Array
    thinker: Array


class Talker:
    """The `talker` engine (docs/DESIGN.md, 4.1) for any number of threads; a step at a time has the engine.

    `entries` is the codec's BPE; `max_steps` bounds a generation; a prompt is read `chunk` tokens at a time (0: at
    once).
    """

    def __init__(
        self, engine: Engine, entries: S3Bpe, tokens: TalkerTokens, max_steps: int = MAX_STEPS, chunk: int = 0
    ) -> None:
        self.tokens = tokens
        self._engine, self._entries, self._max_steps, self._chunk = engine, entries, max_steps, chunk
        fixed = engine.inputs["past_key_0"].shape[2]
        self._fixed = fixed if isinstance(fixed, int) else None
        self._no_rows = np.zeros((1, self.thinker_width), engine.inputs["thinker"].dtype)
        self._lock = threading.Lock()
        self._kept = deque[KVCache](maxlen=MAX_KEPT)
        audio_ids = int(engine.outputs["logits"].shape[-1] or 0) - tokens.first_audio
        if audio_ids != len(entries):
            raise EngineError(
                f"the talker has {audio_ids} audio ids for the codec's {len(entries)} entries: build the bundle again"
            )

    @property
    def thinker_width(self) -> int:
        """Width of the rows that a prompt may refer to."""
        return int(self._engine.inputs["thinker"].shape[-1] or 0)

    def codes(
        self,
        prompt: TalkerPrompt,
        speaker: Array,
        thinker: Array | None,
        random: np.random.Generator,
        cancelled: Callable[[], bool] = never,
    ) -> Iterator[list[int]]:
        """The codes of each generated id, as they come; at least one list.

        `speaker` f32 [192]; `thinker` f32 [R, H] or None. Raises `InputError` before any work for a prompt that leaves
        no room for `max_steps` ids in an engine of one capacity, `CancelledError` as soon as `cancelled` is true, and
        `EngineError` where the engine fails.
        """
        cursor = self._begin(prompt, speaker, thinker)
        try:
            yield from self._generate(cursor, prompt, random, cancelled)
        finally:
            self._end(cursor)

    def _generate(
        self, cursor: _Cursor, prompt: TalkerPrompt, random: np.random.Generator, cancelled: Callable[[], bool]
    ) -> Iterator[list[int]]:
        tokens, said = self.tokens, 0
        logits = self._read(cursor, prompt, cancelled)
        vocabulary = logits.size
        for step in range(self._max_steps):
            _check(cancelled)
            token = choose(logits, step, tokens, random.standard_exponential(vocabulary, np.float32))
            if token == tokens.audio_eos:
                break
            codes = self._entries.decode([token - tokens.first_audio])
            if codes:
                said += len(codes)
                yield codes
            text = prompt.later_text[step] if step < len(prompt.later_text) else tokens.text_pad
            none = np.array([-1], np.int64)
            logits = self._step(cursor, np.array([token]), np.array([text], np.int64), none, none)
        if not said:
            yield list(SILENCE)

    def _begin(self, prompt: TalkerPrompt, speaker: Array, thinker: Array | None) -> _Cursor:
        tokens, inputs = len(prompt) + self._max_steps, self._engine.inputs
        if self._fixed is not None and tokens > self._fixed:
            raise InputError(
                f"a prompt of {len(prompt)} tokens for the talker and up to {self._max_steps} spoken ones do not fit "
                f"the {self._fixed} that its engine was built for: shorten the conversation or the clip of the voice, "
                "or raise profile.max_seq_len"
            )
        rows = self._no_rows
        with self._lock:
            cache = self._kept.pop() if self._kept else self._cache(tokens)
            if thinker is not None and len(thinker):
                rows = place(self._engine, np.ascontiguousarray(thinker, rows.dtype))
        cache.allocate()
        return _Cursor(cache, np.ascontiguousarray(speaker[None], inputs["speaker"].dtype), rows)

    def _cache(self, tokens: int) -> KVCache:
        """For one generation of `tokens`, or of as many as the engine holds if that is a number."""
        return KVCache(self._engine.inputs, 1, self._fixed or tokens, zeros=partial(zeros, self._engine))

    def _end(self, cursor: _Cursor) -> None:
        """Keeps a cache in the engine's memory for the next generation: captured runs belong to its address."""
        if isinstance(self._engine, OwnMemory) and self._fixed is not None:
            with self._lock:
                cursor.thinker = self._no_rows
                cursor.cache.free(0)
                self._kept.append(cursor.cache)

    def _read(self, cursor: _Cursor, prompt: TalkerPrompt, cancelled: Callable[[], bool]) -> Array:
        """Feeds the prompt, and gives the logits f32 [V] after it."""
        count = len(prompt)
        # room for all of it at once, rather than growing from chunk to chunk
        cursor.cache.reserve(0, count)
        ids = (prompt.audio_ids, prompt.text_ids, prompt.speaker_index, prompt.thinker_index)
        for start in range(0, count, self._chunk or count):
            _check(cancelled)
            stop = start + (self._chunk or count)
            logits = self._step(cursor, *(each[start:stop] for each in ids))
        with self._lock:
            # no later id refers to them; one shape for all requests, whose steps are then captured once
            cursor.thinker = self._no_rows
        return logits

    def _step(self, cursor: _Cursor, audio: Array, text: Array, speaker: Array, thinker: Array) -> Array:
        """Feeds ids [S] and gives the logits f32 [V] after the last of them."""
        cache, count = cursor.cache, len(audio)
        start = cache.lengths[0]
        cache.reserve(0, start + count)
        place = np.arange(start, start + count)
        feeds: Arrays = {
            "audio_ids": audio[None],
            "text_ids": text[None],
            "speaker": cursor.speaker,
            "speaker_index": speaker[None],
            "thinker": cursor.thinker,
            "thinker_index": thinker[None],
            "position_ids": place[None],
            "write_index": np.array([start], np.int64),
            "attention_mask": (np.arange(cache.capacity) <= place[:, None])[None, None],
            "logit_index": np.array([[count - 1]], np.int64),
            **cache.feeds(0, 1),
        }
        with self._lock:
            out = self._engine.run(feeds, outputs=("logits",), into=cache.into(0, 1))
        cache.advance(0, count)
        logits: Array = out["logits"][0, 0]
        return logits
