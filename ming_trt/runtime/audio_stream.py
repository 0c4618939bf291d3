"""An utterance's audio in chunks, while its codes still come.

`SeamlessStream` is what is served: chunk attention from first to last, phases that carry on, and enough frames held
back, so that the chunks joined are the audio of one run over all codes. `OfficialStream` joins as the official model
does: source and waveform of 8 frames are kept and cross-faded, and the last chunk sees everything at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ming_trt.processing.voice import Voice
from ming_trt.runtime.detokenizer import Detokenizer, Floats, FlowState, VocoderFrames

STEPS_IN_CHUNKS = (1, 1, 2, 4)
"""Steps of the audio in the flow's chunks, the last again and again: the first must come soon, large ones cost less."""
OVERLAP = 8
"""Frames that the official streaming keeps."""


class SeamlessStream:
    """`push` codes as they come, `finish` after the last; both give f32 [n] samples.

    With `chunked` false nothing is given before `finish`, and every frame sees every other: the best quality, for
    utterances that are not waited for. Equal generators `random` give equal audio, however the codes arrive.

    Where the memory of all streams has no room for this one (`FlowMemory`), its own is given back, and the rest of the
    utterance comes with `finish`, from one run over all codes: the same audio, later.

    `lap` is told what was just done: "flow" or "vocoder" (`speech_clock.py`).
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        voice: Voice,
        random: np.random.Generator,
        *,
        chunked: bool = True,
        lap: Callable[[str], None] = lambda label: None,
    ) -> None:
        self._lap = lap
        self._d, self._voice, self._random, self._chunked = detokenizer, voice, random, chunked
        self._prompt = len(voice.flow_codes)
        self._codes: list[int] = voice.flow_codes.tolist()
        self._state: FlowState | None = None
        self._late = False  # no room: nothing more before the end
        self._frames = 0  # frames of mel that exist, the prompt's not counted
        self._sent = 0  # frames whose audio was given
        self._given = 0  # chunks of audio
        # Frames before those that were sent, which the next ones lean on; `_start` is the first of them.
        self._start = 0
        self._mel = np.empty((detokenizer.mel, 0), np.float32)
        self._noise = detokenizer.draw(random, 0)
        self._f0 = np.empty(0, np.float32)
        self._phase = np.zeros(detokenizer.harmonics, np.float32)

    @property
    def codes(self) -> int:
        """Codes so far."""
        return len(self._codes) - self._prompt

    def hold(self, codes: Sequence[int]) -> None:
        """Takes codes without making audio, for an utterance that is not streamed."""
        self._codes += codes

    def push(self, codes: Sequence[int]) -> Iterator[Floats]:
        """Audio that these codes complete: none, one or several chunks."""
        self._codes += codes
        while self._chunked and len(self._codes) >= self._done + self._d.chunk + self._d.look_ahead:
            if not self._extend(self._d.chunk):
                return
            until = self._frames - self._d.pitch_reach - self._d.reach
            if until > self._sent and self._enough():
                yield self._render(until)

    def finish(self) -> Floats:
        """The rest. Call it once, after at least one code."""
        left = self._chunked
        while left and self._done < len(self._codes):
            left = self._extend(min(self._d.chunk, len(self._codes) - self._done))
        self._state = None
        if not left:
            codes = np.array(self._codes[self._prompt :], np.int64)
            self._append(self._d.to_mel(self._voice, codes, chunked=self._chunked, final=True, skip=self._frames))
            self._lap("flow")
        self._follow_pitch(final=True)
        return self._render(self._frames)

    @property
    def _done(self) -> int:
        """Codes that the flow has seen, the prompt's counted."""
        return 0 if self._state is None else self._state.length

    def _enough(self) -> bool:
        """Whether as many new frames wait as the next chunk of audio shall have."""
        held_back = self._d.pitch_reach + self._d.reach
        step = STEPS_IN_CHUNKS[min(self._given, len(STEPS_IN_CHUNKS) - 1)]
        return self._frames - self._sent > (step - 1) * self._d.chunk + held_back

    def _extend(self, count: int) -> bool:
        """The flow's next part of `count` codes: always one chunk but for the last, so that no number depends on how
        the codes arrived. False if there is no room for it, now and from now on."""
        if self._state is None and not self._late:
            self._state = self._d.stream_state(self._next_whole(self._prompt + 1))
        start = self._done
        if self._state is None or not self._state.reserve(self._next_whole(start + count), spare=self._d.chunk):
            self._state, self._late = None, True
            return False
        codes = np.array(self._codes[start : start + count + self._d.look_ahead], np.int64)
        mel = self._d.extend(self._state, self._voice, codes[:count], codes[count:], chunked=True)
        self._append(mel[:, max(0, self._prompt - start) :])
        self._lap("flow")
        self._follow_pitch(final=False)
        self._lap("vocoder")
        return True

    def _next_whole(self, frames: int) -> int:
        """`frames`, filled up to whole chunks."""
        return -(-frames // self._d.chunk) * self._d.chunk

    def _append(self, mel: Floats) -> None:
        self._mel = np.concatenate([self._mel, mel], axis=1)
        self._noise = np.concatenate([self._noise, self._d.draw(self._random, mel.shape[1])])
        self._frames += mel.shape[1]

    def _follow_pitch(self, final: bool) -> None:
        """F0 of the frames that have all the frames around them that it depends on."""
        reach = self._d.pitch_reach
        known, end = self._start + len(self._f0), self._frames if final else self._frames - reach
        if end > known:
            first = max(known - reach, self._start)
            f0 = self._d.pitch(self._mel[:, first - self._start :])
            self._f0 = np.concatenate([self._f0, f0[known - first : end - first]])

    def _render(self, until: int) -> Floats:
        """Vocodes from `_start` on, gives frames `_sent` … `until` and keeps what the next call needs."""
        d = self._d
        f0 = np.zeros(self._mel.shape[1], np.float32)
        f0[: len(self._f0)] = self._f0
        out = d.vocode(self._mel, f0, self._noise, phase=self._phase)
        audio = out.audio[(self._sent - self._start) * d.hop : (until - self._start) * d.hop]
        first = max(0, until - d.reach)
        drop = first - self._start
        if drop > 0:
            self._phase = out.cycles[drop - 1]
        self._mel, self._noise, self._f0 = self._mel[:, drop:], self._noise[drop:], self._f0[drop:]
        self._start, self._sent = first, until
        self._given += 1
        self._lap("vocoder")
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
        return self._d.vocode(mel, self._d.pitch(mel), self._d.draw(self._random, mel.shape[1]), source=source)

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
