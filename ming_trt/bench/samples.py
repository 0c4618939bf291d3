"""What one request of a benchmark left behind, and how it is measured by a client's clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ming_trt.errors import MingError
from ming_trt.serving.answer import Answer

Clock = Callable[[], float]
_SAMPLE_BYTES = 2  # 16-bit mono
_LEAST_S = 1e-4  # a part that takes less was not done: without a picture to edit nothing is encoded


@dataclass(slots=True)
class Sample:
    """One request; times in seconds.

    `due` is when it should have been sent, from the start of the phase; `late` how much later it was. The others count
    from when it was due, so that a slow server cannot hide its queue in the client's. `arrivals`: (time, tokens) of
    each message that brought tokens; `sounds`: (time, seconds of audio) of each that brought sound; `picture`: when the
    finished picture came (0: none). `finished`: when the text was complete; `seconds`: when the stream ended.
    `engine`: queue, prefill and decode by the language model's own clock; `drawing`: the parts of a picture by that of
    the model that drew it (condition, encode, denoise, decode); `drawn`: its width and height, pixels, and steps.
    `speaking`: what the time after the last text went into, by the clock of the model that spoke (`speech_clock.py`).
    `error`: the sentence of a failed request, which then counts as an error and in nothing else. `id` names the request
    on the server; `clock` is the client's clock (`time.perf_counter`) when it was due, for traces by the same clock.
    """

    due: float
    late: float = 0.0
    seconds: float = 0.0
    finished: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    sounds: list[tuple[float, float]] = field(default_factory=list)
    picture: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = ""
    engine: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    id: str = ""
    clock: float = 0.0
    drawing: Mapping[str, float] = field(default_factory=dict)
    drawn: Mapping[str, int] = field(default_factory=dict)
    speaking: Mapping[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def called(self) -> tuple[str, Mapping[str, float]]:
        """The model that went on after the text ("" if none), and the parts of its time that its own clock tells."""
        if self.picture or self.drawing:
            return "image", self.drawing
        return ("speech", self.speaking) if self.sounds or self.speaking else ("", {})

    @property
    def first_token(self) -> float | None:
        """Seconds to the first message with tokens; None if there was none."""
        return self.arrivals[0][0] if self.arrivals else None

    @property
    def token_times(self) -> list[float]:
        """The arrival of every token, those of one message at the same time."""
        return [at for at, tokens in self.arrivals for _ in range(tokens)]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; times to the microsecond."""
        data = asdict(self)
        data["arrivals"] = [(round(at, 6), tokens) for at, tokens in self.arrivals]
        data["sounds"] = [(round(at, 6), seconds) for at, seconds in self.sounds]
        for name in ("due", "late", "seconds", "finished", "picture"):
            data[name] = round(data[name], 6)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sample:
        """Reads `as_dict` back."""
        arrivals = [(float(at), int(tokens)) for at, tokens in data["arrivals"]]
        sounds = [(float(at), float(seconds)) for at, seconds in data.get("sounds", ())]
        return cls(**{**data, "arrivals": arrivals, "sounds": sounds})


def measure(ask: Callable[[], Answer], due: float, origin: float, clock: Clock = time.perf_counter) -> Sample:
    """Sends one request and reads its answer. `origin`: the clock's time at the start of the phase."""
    zero = origin + due
    sample = Sample(due, clock=zero)
    sample.late = max(0.0, clock() - zero)
    try:
        answer = ask()
        sample.id = answer.id
        for delta in answer:
            now = clock() - zero
            tokens = len(delta.state.get("token_ids") or ())
            if tokens:
                sample.arrivals.append((now, tokens))
            if delta.audio and delta.sample_rate:
                sample.sounds.append((now, len(delta.audio) / _SAMPLE_BYTES / delta.sample_rate))
            if delta.image is not None and not delta.preview:
                sample.picture = now
            if delta.state.get("finish_reason"):
                sample.finished = now
        sample.seconds = clock() - zero
        sample.prompt_tokens = int(answer.usage.get("prompt_tokens", 0))
        sample.completion_tokens = int(answer.usage.get("completion_tokens", 0))
        sample.finish_reason = answer.finish_reason or ""
        sample.engine = {name: float(value) for name, value in answer.timings.items()}
        sample.drawing = _done(answer.picture.get("seconds"))
        sample.speaking = _done(answer.speaking.get("after_text"))
        if "given" in answer.picture:
            width, height = answer.picture["given"]
            sample.drawn = {"width": int(width), "height": int(height), "steps": int(answer.picture["steps"])}
    except MingError as error:
        sample.seconds = clock() - zero
        sample.error = f"{type(error).__name__}: {error}"
    return sample


def _done(parts: Mapping[str, Any] | None) -> dict[str, float]:
    """The parts that were done at all."""
    return {name: float(value) for name, value in (parts or {}).items() if value >= _LEAST_S}


@dataclass(frozen=True, slots=True)
class Playback:
    """How a stream would have been played: how often it ran dry, and for how long it stood still (seconds)."""

    underruns: int
    stalled: float


def playback(arrivals: Sequence[tuple[float, float]], lead: float = 0.0) -> Playback:
    """Plays (arrival, duration) pieces, seconds, from `lead` after the first one on.

    An underrun is a piece that arrives after all that came before it has been played: audio would fall silent, a
    reader of text at that pace would wait.
    """
    underruns, stalled = 0, 0.0
    end = (arrivals[0][0] + lead) if arrivals else 0.0
    for at, duration in arrivals:
        if at > end + 1e-9:
            underruns, stalled, end = underruns + 1, stalled + at - end, at
        end += duration
    return Playback(underruns, stalled)
