"""An utterance's audio in chunks, while its codes still come.

`SeamlessStream` is what is served: chunk attention from first to last, phases that carry on, and enough frames held
back, so that the chunks joined are the audio of one run over all codes. `OfficialStream` joins as the official model
does: source and waveform of 8 frames are kept and cross-faded, and the last chunk sees everything at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ming_trt.processing.voice import Voice
from ming_trt.runtime.detokenizer import Detokenizer, Floats, VocoderFrames

MOST_CHUNKS = 4
"""The largest step, in the flow's chunks: the first audio must come soon, and later large chunks cost less."""
OVERLAP = 8
"""Frames that the official streaming keeps."""


class SeamlessStream:
    """`push` codes as they come, `finish` after the last; both give f32 [n] samples.

    With `chunked` false nothing is given before `finish`, and every frame sees every other: the best quality, for
    utterances that are not waited for. Equal generators `random` give equal audio, however the codes arrive.
    """

    def __init__(
        self, detokenizer: Detokenizer, voice: Voice, random: np.random.Generator, *, chunked: bool = True
    ) -> None:
        self._d, self._voice, self._random, self._chunked = detokenizer, voice, random, chunked
        self._codes: list[int] = []
        self._frames = 0  # frames of mel that exist
        self._sent = 0  # frames whose audio was given
        self._chunks = 1
        # Frames before those that were sent, which the next ones lean on; `_start` is the first of them.
        self._start = 0
        self._mel = np.empty((detokenizer.mel, 0), np.float32)
        self._noise = detokenizer.draw(random, 0)
        self._f0 = np.empty(0, np.float32)
        self._phase = np.zeros(detokenizer.harmonics, np.float32)

    @property
    def codes(self) -> int:
        """Codes so far."""
        return len(self._codes)

    def push(self, codes: Sequence[int]) -> Iterator[Floats]:
        """Audio that these codes complete: none, one or several chunks."""
        self._codes += codes
        while self._chunked and len(self._codes) >= self._next() + self._d.look_ahead:
            target = self._next()
            upto = np.array(self._codes[: target + self._d.look_ahead], np.int64)
            mel = self._d.to_mel(self._voice, upto, chunked=True, final=False, skip=self._frames)
            self._frames = target
            self._chunks = min(2 * self._chunks, MOST_CHUNKS)
            audio = self._render(mel, max(self._sent, target - self._d.reach))
            if audio.size:
                yield audio

    def finish(self) -> Floats:
        """The rest. Call it once, after at least one code."""
        codes = np.array(self._codes, np.int64)
        mel = self._d.to_mel(self._voice, codes, chunked=self._chunked, final=True, skip=self._frames)
        self._frames = len(codes)
        return self._render(mel, self._frames)

    def _next(self) -> int:
        """Frames after the next chunk: chunks are counted from the prompt's start and must be whole."""
        prompt, chunk = len(self._voice.flow_codes), self._d.chunk
        whole = -(-(prompt + self._frames) // chunk) + self._chunks
        return whole * chunk - prompt

    def _render(self, mel: Floats, until: int) -> Floats:
        """Vocodes from `_start` on, gives frames `_sent` … `until` and keeps what the next call needs."""
        d = self._d
        self._mel = np.concatenate([self._mel, mel], axis=1)
        self._noise = np.concatenate([self._noise, d.draw(self._random, mel.shape[1])])
        out = d.vocode(self._mel, self._noise, f0=self._f0, phase=self._phase)
        audio = out.audio[(self._sent - self._start) * d.hop : (until - self._start) * d.hop]
        first = max(0, until - d.reach)
        drop = first - self._start
        if drop > 0:
            self._phase = out.cycles[drop - 1]
        self._mel, self._noise = self._mel[:, drop:], self._noise[drop:]
        self._f0 = out.f0[drop : until - self._start]
        self._start, self._sent = first, until
        return audio


class OfficialStream:
    """As `SeamlessStream`, with the official model's chunk sizes and joins."""

    def __init__(self, detokenizer: Detokenizer, voice: Voice, random: np.random.Generator) -> None:
        self._d, self._voice, self._random = detokenizer, voice, random
        self._codes: list[int] = []
        self._frames = 0
        self._mel = np.empty((detokenizer.mel, 0), np.float32)
        self._source = np.empty((0, detokenizer.hop), np.float32)
        self.held_back = np.empty(0, np.float32)
        self.fade = np.hamming(2 * OVERLAP * detokenizer.hop)

    @property
    def codes(self) -> int:
        """Codes so far."""
        return len(self._codes)

    def hold(self, codes: Sequence[int]) -> None:
        """Takes codes without making audio, for utterances that are not streamed."""
        self._codes += codes

    def push(self, codes: Sequence[int]) -> Iterator[Floats]:
        """Audio that these codes complete."""
        self._codes += codes
        while len(self._codes) >= self._next() + self._d.look_ahead:
            target = self._next()
            upto = np.array(self._codes[: target + self._d.look_ahead], np.int64)
            mel = self._d.to_mel(self._voice, upto, chunked=True, final=False, skip=self._frames)
            self._frames = target
            mel = np.concatenate([self._mel, mel], axis=1)
            out = self.vocode(mel, self._source)
            audio = self._join(out.audio)
            keep = OVERLAP * self._d.hop
            self._mel, self._source, self.held_back = mel[:, -OVERLAP:], out.source[-OVERLAP:], audio[-keep:]
            yield audio[:-keep]

    def finish(self) -> Floats:
        """The rest. Call it once, after at least one code."""
        codes = np.array(self._codes, np.int64)
        mel = self._d.to_mel(self._voice, codes, chunked=False, final=True, skip=self._frames)
        return self._join(self.vocode(np.concatenate([self._mel, mel], axis=1), self._source).audio)

    def vocode(self, mel: Floats, source: Floats) -> VocoderFrames:
        """Audio of `mel`, whose first frames have the source of the chunk before."""
        return self._d.vocode(mel, self._d.draw(self._random, mel.shape[1]), source=source)

    def _next(self) -> int:
        prompt, chunk = len(self._voice.flow_codes), self._d.chunk
        return self._frames + chunk + ((-prompt) % chunk if self._frames == 0 else 0)

    def _join(self, audio: Floats) -> Floats:
        """Cross-fades the first frames with those that were held back."""
        if not self.held_back.size:
            return audio
        half = len(self.fade) // 2
        audio = audio.copy()
        audio[:half] = audio[:half] * self.fade[:half] + self.held_back * self.fade[half:]
        return audio
