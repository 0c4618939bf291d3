"""What every spoken answer must keep, checked before its end is announced: no silence or noise passes as speech."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ming_trt.errors import EngineError

Floats = npt.NDArray[np.float32]

CODES_PER_SECOND = 50
DURATION_TOLERANCE = 0.2
QUIETEST = 10 ** (-60 / 20)
"""Root mean square below which an utterance counts as silent (full scale 1)."""
MOST_CLIPPED = 0.05
"""Share of samples that may touch the limit."""


class AudioContract:
    """Follows one utterance. `add` every chunk, then `close` with the number of codes that it speaks.

    Both raise `EngineError` naming what is wrong. `limit` is the vocoder's largest amplitude.
    """

    def __init__(self, sample_rate: int, limit: float = 0.99) -> None:
        self._rate, self._limit = sample_rate, limit
        self._samples = self._clipped = 0
        self._power = 0.0

    def add(self, audio: Floats) -> None:
        bad = audio.size - int(np.count_nonzero(np.isfinite(audio)))
        if bad:
            raise EngineError(
                f"the vocoder gave {bad} of {audio.size} samples that are not finite: run `ming-trt verify`"
            )
        self._samples += audio.size
        self._clipped += int(np.count_nonzero(np.abs(audio) >= self._limit))
        self._power += float(np.square(audio, dtype=np.float64).sum())

    def close(self, codes: int) -> None:
        seconds, expected = self._samples / self._rate, codes / CODES_PER_SECOND
        if abs(seconds - expected) > DURATION_TOLERANCE * expected:
            raise EngineError(
                f"{codes} codes must last {expected:.2f} s and became {seconds:.2f} s of audio: report this"
            )
        if self._samples and (self._power / self._samples) ** 0.5 < QUIETEST:
            raise EngineError(f"{seconds:.2f} s of speech came out silent: run `ming-trt verify` on the bundle")
        if self._clipped > MOST_CLIPPED * self._samples:
            share = self._clipped / self._samples
            raise EngineError(f"{share:.0%} of the samples are clipped: run `ming-trt verify` on the bundle")


def to_pcm(audio: Floats) -> npt.NDArray[np.int16]:
    """16-bit samples of audio in [-1, 1]."""
    return np.asarray(np.round(np.clip(audio, -1.0, 1.0) * 32767.0), np.int16)
