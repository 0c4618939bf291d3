"""Codec codes to audio on the engines `flow_encoder`, `flow_estimator` and `vocoder` (docs/DESIGN.md, 4.1)."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ming_trt.errors import InputError
from ming_trt.processing.voice import Voice
from ming_trt.runtime.engine import Arrays, Engine
from ming_trt.runtime.flow_match import initial_noise

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

STEPS = 10
"""Euler steps of the flow."""
MAX_FRAMES = 15000
"""Frames of the flow's fixed noise: the longest prompt and utterance together (300 s)."""


@dataclass(frozen=True, slots=True)
class VocoderFrames:
    """What the vocoder made of T frames: `audio` f32 [T·hop], `source` f32 [T, hop], `f0` f32 [T], and `cycles` f32
    [T, harmonics], the phase after each frame."""

    audio: Floats
    source: Floats
    f0: Floats
    cycles: Floats


class Detokenizer:
    """The three engines and the numbers that their builders recorded (`facts` by engine name)."""

    def __init__(
        self, encoder: Engine, estimator: Engine, vocoder: Engine, facts: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self._encoder, self._estimator, self._vocoder = encoder, estimator, vocoder
        self._lock = threading.Lock()
        self.look_ahead = int(facts["flow_encoder"]["look_ahead"])
        self.vocabulary = int(facts["flow_encoder"]["vocabulary"])
        self.chunk = int(facts["flow_estimator"]["chunk"])
        self.mel = int(facts["flow_estimator"]["mel"])
        self.guidance = np.float32(facts["flow_estimator"]["guidance"])
        self.sample_rate = int(facts["vocoder"]["sample_rate"])
        self.hop = int(facts["vocoder"]["hop"])
        self.harmonics = int(facts["vocoder"]["harmonics"])
        self.reach = int(facts["vocoder"]["reach"])

    @cached_property
    def noise(self) -> Floats:
        """Where every flow starts: the first draws of torch's generator with seed 0, f32 [mel, MAX_FRAMES]."""
        noise: Floats = initial_noise(0, (1, self.mel, MAX_FRAMES))[0]
        return noise

    def mask(self, length: int, chunked: bool) -> npt.NDArray[np.bool_]:
        """Who sees whom, [1, 1, length, length]: with `chunked` up to the end of the own chunk, else all."""
        if not chunked:
            return np.ones((1, 1, length, length), np.bool_)
        place = np.arange(length)
        return np.asarray(place < (place[:, None] // self.chunk + 1) * self.chunk)[None, None]

    def encode(self, voice: Voice, codes: Ints, *, chunked: bool, final: bool) -> tuple[Floats, Floats]:
        """`mu` f32 [1, mel, N] of the voice's codes and `codes`, and `spk` f32 [1, mel].

        Unless `final`, the last `look_ahead` codes are only looked at: N does not count them. Raises `InputError` for
        codes outside the flow's vocabulary or more than it can place.
        """
        both = np.concatenate([voice.flow_codes, codes])
        if both.size and (both.max() >= self.vocabulary or both.min() < 0):
            raise InputError(f"codec code {both.max()} is not one of the {self.vocabulary} that this decoder knows")
        main = both if final else both[: -self.look_ahead]
        if not 0 < len(main) <= MAX_FRAMES:
            raise InputError(f"{len(main)} codes at once: the decoder takes 1 to {MAX_FRAMES}, split the text")
        ahead = np.zeros(self.look_ahead, np.int64) if final else both[-self.look_ahead :]
        feeds: Arrays = {
            "codes": main[None],
            "ahead": ahead[None],
            "look": np.full((1, 1, 1), 0.0 if final else 1.0, np.float32),
            "mask": self.mask(len(main), chunked),
            "speaker": voice.flow_speaker[None],
        }
        with self._lock:
            out = self._encoder.run(_cast(self._encoder, feeds))
        return np.asarray(out["mu"], np.float32), np.asarray(out["spk"], np.float32)

    def velocity(self, z: Floats, mu: Floats, spk: Floats, cond: Floats, time: np.float32, mask: Any) -> Floats:
        """One run of the estimator: f32 [2, mel, N], with and without the condition."""
        feeds: Arrays = {
            "z": z,
            "mu": mu,
            "spk": spk,
            "cond": cond,
            "time": np.array([time], np.float32),
            "mask": mask,
        }
        with self._lock:
            out = self._estimator.run(_cast(self._estimator, feeds))
        return np.asarray(out["velocity"], np.float32)

    def times(self) -> Floats:
        """The flow's times, f32 [STEPS + 1]: slow at first, as a cosine."""
        return np.asarray(1 - np.cos(np.pi / 2 * np.arange(STEPS + 1) / STEPS), np.float32)

    def to_mel(self, voice: Voice, codes: Ints, *, chunked: bool, final: bool, skip: int = 0) -> Floats:
        """Mel f32 [mel, n - skip] of `codes` (n = their number, less the look-ahead unless `final`).

        The flow runs over the voice's prompt too, whose frames are dropped.
        """
        mu, spk = self.encode(voice, codes, chunked=chunked, final=final)
        prompt, length = len(voice.flow_codes), mu.shape[2]
        cond = np.zeros((1, self.mel, length), np.float32)
        cond[0, :, :prompt] = voice.flow_mel.T
        z = np.ascontiguousarray(self.noise[None, :, :length])
        mask, times = self.mask(length, chunked), self.times()
        for now, then in pairwise(times):
            velocity = self.velocity(z, mu, spk, cond, now, mask)
            guided = (1 + self.guidance) * velocity[:1] - self.guidance * velocity[1:]
            z = z + (then - now) * guided
        mel: Floats = z[0, :, prompt + skip :]
        return mel

    def vocode(
        self,
        mel: Floats,
        noise: Floats,
        *,
        f0: Floats | None = None,
        phase: Floats | None = None,
        source: Floats | None = None,
    ) -> VocoderFrames:
        """Audio of `mel` f32 [mel, T] with normal draws `noise` f32 [T, hop, harmonics].

        `f0` f32 [m] is what is known of the first m frames' F0, `source` f32 [k, hop] of the first k frames' source;
        `phase` f32 [harmonics] are the cycles before the first frame (0 if None).
        """
        frames = mel.shape[1]
        known_f0 = np.empty(0, np.float32) if f0 is None else f0
        known_source = np.empty((0, self.hop), np.float32) if source is None else source
        f0_given, source_given = np.zeros(frames, np.float32), np.zeros((frames, self.hop), np.float32)
        f0_given[: len(known_f0)] = known_f0
        source_given[: len(known_source)] = known_source
        place = np.arange(frames)[None]
        feeds: Arrays = {
            "mel": mel[None],
            "f0_given": f0_given[None],
            "f0_keep": place < len(known_f0),
            "phase": (np.zeros(self.harmonics, np.float32) if phase is None else phase)[None],
            "noise": noise[None],
            "source_given": source_given[None],
            "source_keep": place < len(known_source),
        }
        with self._lock:
            out = self._vocoder.run(_cast(self._vocoder, feeds))
        return VocoderFrames(*(out[name][0].astype(np.float32) for name in ("audio", "source", "f0", "cycles")))

    def draw(self, random: np.random.Generator, frames: int) -> Floats:
        """The vocoder's normal draws for `frames` frames."""
        return random.standard_normal((frames, self.hop, self.harmonics), np.float32)


def _cast(engine: Engine, feeds: Arrays) -> Arrays:
    """Floats in the engine's own precision, everything contiguous."""
    return {name: np.ascontiguousarray(value, engine.inputs[name].dtype) for name, value in feeds.items()}
