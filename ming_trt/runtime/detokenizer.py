"""Codec codes to audio on the engines of the decoder (docs/DESIGN.md, 4.1)."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from math import prod
from typing import Any
from weakref import finalize

import numpy as np
import numpy.typing as npt

from ming_trt.bundle import SPEAKING_ENGINES
from ming_trt.errors import ConfigError, InputError
from ming_trt.processing.voice import Voice
from ming_trt.runtime.engine import Arrays, Engine, OwnMemory, TensorSpec, zeros
from ming_trt.runtime.flow_match import initial_noise
from ming_trt.runtime.flow_memory import FlowMemory, Share

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

STEPS = 10
"""Euler steps of the flow."""
MAX_FRAMES = 15000
"""Frames of the flow's fixed noise: the longest prompt and utterance together (300 s)."""
MEMORY_BUDGET = 4 << 30
"""Bytes that the flows of all streams may take together, if nobody says otherwise."""
MAX_KEPT = 2
"""Caches that are kept for utterances to come, where they are in a GPU's memory."""
# rows of the estimator: with the condition and without
_GUIDED = 2


class PartCaches:
    """What parts of an utterance leave for the next in an engine that runs part by part (`past_*`, `present_*`).

    `rows` is the batch; keys and values hold `capacity` frames (or as many as the engine has once and for all) and are
    written in place. With `keep` false nothing else is left, so that any number of parts without a part before them may
    share one. Raises `InputError` for more than the engine has.
    """

    def __init__(self, engine: Engine, rows: int, capacity: int, keep: bool = True) -> None:
        past = _carried(engine)
        self._in_place = {name for name in past if name.startswith(_IN_PLACE)}
        self._fixed = fixed_capacity(engine)
        self._check(capacity)
        self.capacity = self._fixed or capacity
        self._keep = keep
        # Where arrays stay in the engine's memory so does what is not written in place: its results go over it.
        self._stays = isinstance(engine, OwnMemory)
        self._zeros = partial(zeros, engine)
        self._arrays: Arrays = {}
        for name, spec in past.items():
            shape = [size if isinstance(size, int) else self.capacity for size in spec.shape[1:]]
            self._arrays[name] = self._zeros((rows, *shape), spec.dtype)

    @staticmethod
    def size(engine: Engine, rows: int, capacity: int) -> int:
        """Bytes of such caches with room for `capacity` frames, or for all that the engine has once and for all."""
        frames = fixed_capacity(engine) or capacity
        shapes = (
            ([size if isinstance(size, int) else frames for size in spec.shape[1:]], spec.dtype.itemsize)
            for spec in _carried(engine).values()
        )
        return rows * sum(prod(shape) * number for shape, number in shapes)

    def grow(self, capacity: int) -> None:
        """Makes room for `capacity` frames."""
        if capacity <= self.capacity:
            return
        self._check(capacity)
        for name in self._in_place:
            old = self._arrays[name]
            self._arrays[name] = self._zeros((*old.shape[:2], capacity, old.shape[3]), old.dtype)
            self._arrays[name][:, :, : self.capacity] = old
        self.capacity = capacity

    def restart(self) -> None:
        """As new, for another utterance. What keys and values hold is behind the mask until it is written over."""
        for name in self._arrays.keys() - self._in_place:
            self._arrays[name][...] = 0

    def _check(self, capacity: int) -> None:
        if self._fixed is not None and capacity > self._fixed:
            raise InputError(
                f"{capacity} codes with those of the voice, and the speech engines were built for {self._fixed}: split "
                "the text, or take a shorter clip of the voice"
            )

    def run(self, engine: Engine, feeds: Arrays, outputs: tuple[str, ...]) -> Arrays:
        """One run of `engine` on the next part."""
        into = {name.replace("past_", "present_", 1): self._arrays[name] for name in self._in_place}
        short = [
            name.replace("past_", "present_", 1) for name in self._arrays if self._keep and name not in self._in_place
        ]
        if self._stays:
            into |= {name: self._arrays[name.replace("present_", "past_", 1)] for name in short}
            short = []
        out = engine.run({**feeds, **self._arrays}, outputs=(*outputs, *short), into=into)
        for name in short:
            self._arrays[name.replace("present_", "past_", 1)] = out[name]
        return out


_IN_PLACE = ("past_key_", "past_value_")


def _carried(engine: Engine) -> dict[str, TensorSpec]:
    return {name: spec for name, spec in engine.inputs.items() if name.startswith("past_")}


def fixed_capacity(engine: Engine) -> int | None:
    """Frames that the keys and values of `engine` hold, if its plan says so; None where they grow as they must."""
    sizes = (spec.shape[2] for name, spec in _carried(engine).items() if name.startswith(_IN_PLACE))
    return min((size for size in sizes if isinstance(size, int)), default=None)


@dataclass(frozen=True, slots=True, eq=False)
class FlowCaches:
    """The caches of one utterance: the encoder's, one set for each Euler step, what they would take with room for so
    many frames, and what they have taken of the streams' memory."""

    encoder: PartCaches
    steps: list[PartCaches]
    size: Callable[[int], int]
    share: Share | None

    def restart(self) -> None:
        """As new, for another utterance."""
        for caches in (self.encoder, *self.steps):
            caches.restart()


class FlowState:
    """The flow over one utterance as far as it went: `length` frames, the voice's prompt included.

    With `parts` false it is made for one part only, which needs no cache of its own for each Euler step.
    """

    def __init__(self, caches: FlowCaches) -> None:
        self.length = 0
        self.share = caches.share
        self.encoder, self.steps = caches.encoder, caches.steps
        self._size = caches.size

    @property
    def capacity(self) -> int:
        """Frames that there is room for."""
        return self.encoder.capacity

    def reserve(self, frames: int, spare: int = 0) -> bool:
        """Makes room for `frames` in all, and for `spare` more if there is none yet. A run takes time for all the room
        that there is, so little is better than doubling. False if the memory of all streams has no room for it."""
        if frames <= self.capacity:
            return True
        if self.share is not None and not self.share.grow(self._size(frames + spare)):
            return False
        for caches in (self.encoder, *self.steps):
            caches.grow(frames + spare)
        return True


@dataclass(frozen=True, slots=True)
class VocoderFrames:
    """What the vocoder made of T frames: `audio` f32 [T·hop], `source` f32 [T, hop], and `cycles` f32 [T, harmonics],
    the phase after each frame."""

    audio: Floats
    source: Floats
    cycles: Floats


class Detokenizer:
    """The engines `ENGINES` and the numbers that their builders recorded (`facts`), both by engine name; `budget` bytes
    for the flows of all streams.

    Raises `ConfigError` if the budget has no room for a single one, where all streams are as large from the start.
    """

    ENGINES = SPEAKING_ENGINES[1:]

    def __init__(
        self, engines: Mapping[str, Engine], facts: Mapping[str, Mapping[str, Any]], budget: int = MEMORY_BUDGET
    ) -> None:
        self._encoder, self._estimator, self._pitch, self._vocoder = (engines[name] for name in self.ENGINES)
        if fixed_capacity(self._estimator) and self.stream_bytes(1) > budget:
            raise ConfigError(
                f"speech in parts holds {self.stream_bytes(1) / 2**20:.1f} MiB for each stream and flow_budget is "
                f"{budget / 2**20:.1f} MiB: raise it, or build the flow engines in a smaller precision"
            )
        self.memory = FlowMemory(budget)
        self._lock = threading.Lock()
        self._whole = threading.Lock()
        # caches of utterances that are over, the latest MAX_KEPT; by whether they were done in parts
        self._kept = {parts: deque[FlowCaches](maxlen=MAX_KEPT) for parts in (False, True)}
        self.look_ahead = int(facts["flow_encoder"]["look_ahead"])
        self.vocabulary = int(facts["flow_encoder"]["vocabulary"])
        self.chunk = int(facts["flow_estimator"]["chunk"])
        self.mel = int(facts["flow_estimator"]["mel"])
        self.guidance = np.float32(facts["flow_estimator"]["guidance"])
        self.sample_rate = int(facts["vocoder"]["sample_rate"])
        self.hop = int(facts["vocoder"]["hop"])
        self.harmonics = int(facts["vocoder"]["harmonics"])
        self.reach = int(facts["vocoder"]["reach"])
        self.pitch_reach = int(facts["f0_predictor"]["reach"])

    @cached_property
    def noise(self) -> Floats:
        """Where every flow starts: the first draws of torch's generator with seed 0, f32 [mel, MAX_FRAMES]."""
        noise: Floats = initial_noise(0, (1, self.mel, MAX_FRAMES))[0]
        return noise

    def state(self, capacity: int, parts: bool) -> FlowState:
        """An utterance of which nothing is done yet; `capacity` frames may grow only if it is done in `parts`.

        Where caches stay in the engine's memory they are used again: captured runs belong to their addresses.
        """
        return self._again(capacity, parts) or self._new(capacity, parts)

    def stream_state(self, capacity: int) -> FlowState | None:
        """As `state` in parts, within the budget for all streams, in which caches that wait to be used again count too;
        None if that has no room for it."""
        state = self._again(capacity, parts=True)
        if state is not None:
            return state
        share, needed = Share(self.memory), self.stream_bytes(capacity)
        if not share.grow(needed):
            with self._lock:
                self._kept[True].clear()  # all too small
            if not share.grow(needed):
                return None
        return self._new(capacity, True, share)

    def stream_bytes(self, capacity: int) -> int:
        """What a stream holds with room for `capacity` frames."""
        return self._bytes(capacity, parts=True)

    def _bytes(self, capacity: int, parts: bool) -> int:
        steps = (STEPS if parts else 1) * PartCaches.size(self._estimator, _GUIDED, capacity)
        return PartCaches.size(self._encoder, 1, capacity) + steps

    def _again(self, capacity: int, parts: bool) -> FlowState | None:
        """A state in the caches of an utterance that is over."""
        kept = self._kept[parts]
        with self._lock:
            if not kept or kept[-1].encoder.capacity < capacity:
                return None
            caches = kept.pop()
            caches.restart()
        return self._given(caches, parts)

    def _new(self, capacity: int, parts: bool, share: Share | None = None) -> FlowState:
        with self._lock:
            sets = [PartCaches(self._estimator, _GUIDED, capacity, keep=parts) for _ in range(STEPS if parts else 1)]
            encoder = PartCaches(self._encoder, 1, capacity)
        return self._given(FlowCaches(encoder, sets if parts else sets * STEPS, self.stream_bytes, share), parts)

    def _given(self, caches: FlowCaches, parts: bool) -> FlowState:
        state = FlowState(caches)
        if isinstance(self._estimator, OwnMemory):
            finalize(state, self._kept[parts].append, caches).atexit = False
        return state

    def mask(self, state: FlowState, length: int, chunked: bool) -> npt.NDArray[np.bool_]:
        """Who of the next `length` frames sees whom, [1, 1, length, capacity]: everybody what is before the end of the
        part, with `chunked` only up to the end of the own chunk."""
        query, key = state.length + np.arange(length)[:, None], np.arange(state.capacity)
        seen = np.broadcast_to(key < state.length + length, (length, state.capacity))
        if chunked:
            seen = seen & (key < (query // self.chunk + 1) * self.chunk)
        return np.ascontiguousarray(seen)[None, None]

    def encode(self, state: FlowState, voice: Voice, codes: Ints, ahead: Ints, chunked: bool) -> tuple[Floats, Floats]:
        """`mu` f32 [1, mel, C] of the next codes [C], and `spk` f32 [1, mel].

        `ahead` are the codes that follow, at most `look_ahead`, fewer where the utterance ends. Raises `InputError` for
        codes that the flow does not know, or more than it can place.
        """
        both = np.concatenate([codes, ahead])
        if both.max() >= self.vocabulary or both.min() < 0:
            raise InputError(f"codec code {both.max()} is not one of the {self.vocabulary} that this decoder knows")
        if state.length + len(codes) > MAX_FRAMES:
            raise InputError(
                f"{state.length + len(codes)} codes are more than the {MAX_FRAMES} of a piece: split the text"
            )
        place = np.arange(self.look_ahead)
        feeds: Arrays = {
            "codes": codes[None],
            "ahead": np.concatenate([ahead, np.zeros(self.look_ahead - len(ahead), np.int64)])[None],
            "look": (place < len(ahead)).astype(np.float32)[None, :, None],
            "write_index": np.array([state.length], np.int64),
            "mask": self.mask(state, len(codes), chunked),
            "speaker": np.ascontiguousarray(voice.flow_speaker[None], np.float32),
        }
        with self._lock:
            out = state.encoder.run(self._encoder, feeds, ("mu", "spk"))
        return out["mu"], out["spk"]

    def velocity(
        self, state: FlowState, step: int, z: Floats, mu: Floats, spk: Floats, cond: Floats, chunked: bool
    ) -> Floats:
        """One run of the estimator on the next frames at the time of an Euler step: f32 [2, mel, C], with and without
        the condition."""
        length = z.shape[2]
        feeds: Arrays = {
            "z": np.concatenate([z, z]),
            "mu": _with_zeros(mu),
            "spk": _with_zeros(spk),
            "cond": _with_zeros(cond),
            "time": np.repeat(self.times()[step], 2),
            "write_index": np.full(2, state.length, np.int64),
            "mask": np.repeat(self.mask(state, length, chunked), 2, axis=0),
        }
        with self._lock:
            out = state.steps[step].run(self._estimator, feeds, ("velocity",))
        return out["velocity"]

    def times(self) -> Floats:
        """The flow's times, f32 [STEPS + 1]: slow at first, as a cosine."""
        return np.asarray(1 - np.cos(np.pi / 2 * np.arange(STEPS + 1) / STEPS), np.float32)

    def condition(self, voice: Voice, start: int, length: int) -> Floats:
        """The prompt's mel where there is one, f32 [1, mel, length] from frame `start` on."""
        cond = np.zeros((1, self.mel, length), np.float32)
        prompt = voice.flow_mel[start : start + length]
        cond[0, :, : len(prompt)] = prompt.T
        return cond

    def extend(self, state: FlowState, voice: Voice, codes: Ints, ahead: Ints, *, chunked: bool) -> Floats:
        """Mel f32 [mel, C] of the next codes [C]; the voice's own codes come first in an utterance."""
        start, length = state.length, len(codes)
        mu, spk = self.encode(state, voice, codes, ahead, chunked)
        cond = self.condition(voice, start, length)
        z = np.ascontiguousarray(self.noise[None, :, start : start + length])
        times = self.times()
        for step, (now, then) in enumerate(pairwise(times)):
            velocity = self.velocity(state, step, z, mu, spk, cond, chunked)
            guided = (1 + self.guidance) * velocity[:1] - self.guidance * velocity[1:]
            z = z + (then - now) * guided
        state.length += length
        mel: Floats = z[0]
        return mel

    def to_mel(self, voice: Voice, codes: Ints, *, chunked: bool, final: bool, skip: int = 0) -> Floats:
        """Mel f32 [mel, n - skip] of `codes` in one part (n = their number, less the look-ahead unless `final`).

        The flow runs over the voice's prompt too, whose frames are dropped.
        """
        both = np.concatenate([voice.flow_codes, codes])
        count = len(both) if final else len(both) - self.look_ahead
        if not 0 < count <= MAX_FRAMES:
            raise InputError(f"{count} codes at once: the decoder takes 1 to {MAX_FRAMES}, split the text")
        with self._whole:  # its caches are as large as its utterance is long: one at a time
            mel = self.extend(self.state(count, parts=False), voice, both[:count], both[count:], chunked=chunked)
        return mel[:, len(voice.flow_codes) + skip :]

    def pitch(self, mel: Floats) -> Floats:
        """F0 of `mel` f32 [mel, T] in Hz, f32 [T]."""
        with self._lock:
            out = self._pitch.run({"mel": np.ascontiguousarray(mel[None])})
        f0: Floats = out["f0"][0]
        return f0

    def vocode(
        self, mel: Floats, f0: Floats, noise: Floats, *, phase: Floats | None = None, source: Floats | None = None
    ) -> VocoderFrames:
        """Audio of `mel` f32 [mel, T] with pitch `f0` f32 [T] and normal draws `noise` f32 [T, hop, harmonics].

        `phase` f32 [harmonics] are the cycles before the first frame (0 if None); `source` f32 [k, hop] is what is
        known of the first k frames' source.
        """
        frames = mel.shape[1]
        known = np.empty((0, self.hop), np.float32) if source is None else source
        given = np.zeros((frames, self.hop), np.float32)
        given[: len(known)] = known
        feeds: Arrays = {
            "mel": mel[None],
            "f0": f0[None],
            "phase": (np.zeros(self.harmonics, np.float32) if phase is None else phase)[None],
            "noise": noise[None],
            "source_given": given[None],
            "source_keep": np.arange(frames)[None] < len(known),
        }
        with self._lock:
            out = self._vocoder.run({name: np.ascontiguousarray(value) for name, value in feeds.items()})
        return VocoderFrames(*(out[name][0] for name in ("audio", "source", "cycles")))

    def draw(self, random: np.random.Generator, frames: int) -> Floats:
        """The vocoder's normal draws for `frames` frames."""
        return random.standard_normal((frames, self.hop, self.harmonics), np.float32)


def _with_zeros(values: Floats) -> Floats:
    """A row, and one of zeros: what guidance compares with."""
    return np.concatenate([values, np.zeros_like(values)])
