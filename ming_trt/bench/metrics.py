"""Metrics: small classes with a unit. Each gives the numbers of one request; failed requests are never asked.

A new metric is a class here and its name in `METRICS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from ming_trt.bench.samples import Sample, playback
from ming_trt.bench.stats import summarize


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must keep to count for goodput, seconds: time to its first token, mean time per token after it,
    time to the first sound of a spoken answer, and for the whole answer. The last two may be 0: any time will do."""

    first_token: float = 1.0
    per_token: float = 0.1
    total: float = 0.0
    first_audio: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """JSON-ready."""
        return {
            "first_token_s": self.first_token,
            "per_token_s": self.per_token,
            "first_audio_s": self.first_audio,
            "total_s": self.total,
        }

    def kept_by(self, sample: Sample) -> bool:
        """Whether the request succeeded in time."""
        first, gap = TimeToFirstToken().of(sample), InterTokenLatency().of(sample)
        if not sample.ok or (self.total and sample.seconds > self.total):
            return False
        if sample.picture:  # has no tokens: only the whole counts
            return True
        if self.first_audio and sample.sounds and sample.sounds[0][0] > self.first_audio:
            return False
        return bool(first) and first[0] <= 1000 * self.first_token and (not gap or gap[0] <= 1000 * self.per_token)


class Metric(Protocol):
    """`name` in JSON, `title` for people, `unit`, and whether a lower number is `better`."""

    name: str
    title: str
    unit: str
    lower_is_better: bool

    def of(self, sample: Sample) -> Sequence[float]:
        """The numbers of one successful request; none where the metric has no meaning."""
        ...


class TimeToFirstToken:
    """From when the request was due to the first message with tokens."""

    name, title, unit, lower_is_better = "ttft", "time to first token", "ms", True

    def of(self, sample: Sample) -> Sequence[float]:
        return [] if sample.first_token is None else [1000 * sample.first_token]


class InterTokenLatency:
    """The mean time per token after the first message, one number per request."""

    name, title, unit, lower_is_better = "itl", "inter-token latency", "ms", True

    def of(self, sample: Sample) -> Sequence[float]:
        if len(sample.arrivals) < 2:
            return []
        tokens = sum(count for _, count in sample.arrivals[1:])
        return [1000 * (sample.arrivals[-1][0] - sample.arrivals[0][0]) / tokens]


class MessageGap:
    """Every pause between two messages with tokens: what a reader sees, and where stalls show."""

    name, title, unit, lower_is_better = "gap", "gap between messages", "ms", True

    def of(self, sample: Sample) -> Sequence[float]:
        times = [at for at, _ in sample.arrivals]
        return [1000 * (after - before) for before, after in pairwise(times)]


class EndToEnd:
    """From when the request was due to the end of its stream."""

    name, title, unit, lower_is_better = "e2e", "end to end", "ms", True

    def of(self, sample: Sample) -> Sequence[float]:
        return [1000 * sample.seconds]


class DecodeRate:
    """Tokens per second after the first, as one user sees them."""

    name, title, unit, lower_is_better = "tokens_per_s", "tokens of one user", "tokens/s", False

    def of(self, sample: Sample) -> Sequence[float]:
        return [1000 / gap for gap in InterTokenLatency().of(sample) if gap > 0]


class PromptRate:
    """Tokens of the prompt per second of prefill, by the language model's own clock."""

    name, title, unit, lower_is_better = "prompt_tokens_per_s", "prompt tokens", "tokens/s", False

    def of(self, sample: Sample) -> Sequence[float]:
        prefill = sample.engine.get("prefill", 0.0)
        return [sample.prompt_tokens / prefill] if prefill > 0 else []


class Underruns:
    """How often someone who reads at the pace of the objective, from the first token on, would have had to wait."""

    name, title, unit, lower_is_better = "underruns", "underruns", "per answer", True

    def __init__(self, pace: float) -> None:
        self.pace = pace

    def of(self, sample: Sample) -> Sequence[float]:
        pieces = [(at, tokens * self.pace) for at, tokens in sample.arrivals]
        return [float(playback(pieces).underruns)] if pieces else []


class TimeToFirstAudio:
    """From when the request was due to the first sound."""

    name, title, unit, lower_is_better = "ttfa", "time to first audio", "ms", True

    def of(self, sample: Sample) -> Sequence[float]:
        return [1000 * sample.sounds[0][0]] if sample.sounds else []


class RealTimeFactor:
    """Time until the last sound came, per second of audio: below 1 the answer is made faster than it is heard."""

    name, title, unit, lower_is_better = "rtf", "real-time factor", "s/s", True

    def of(self, sample: Sample) -> Sequence[float]:
        heard = sum(seconds for _, seconds in sample.sounds)
        return [sample.sounds[-1][0] / heard] if heard else []


class PlaybackUnderruns:
    """How often a listener, from the first sound on, would have heard a gap."""

    name, title, unit, lower_is_better = "audio_underruns", "playback underruns", "per answer", True

    def of(self, sample: Sample) -> Sequence[float]:
        return [float(playback(sample.sounds).underruns)] if sample.sounds else []


class ImageLatency:
    """From when the request was due to the finished picture."""

    name, title, unit, lower_is_better = "image", "finished picture", "ms", True

    def of(self, sample: Sample) -> Sequence[float]:
        return [1000 * sample.picture] if sample.picture else []


def metrics(slo: Slo) -> tuple[Metric, ...]:
    """All metrics, in the order in which reports show them."""
    return (
        TimeToFirstToken(),
        InterTokenLatency(),
        MessageGap(),
        EndToEnd(),
        DecodeRate(),
        PromptRate(),
        Underruns(slo.per_token),
        TimeToFirstAudio(),
        RealTimeFactor(),
        PlaybackUnderruns(),
        ImageLatency(),
    )


def summaries(samples: Sequence[Sample], slo: Slo) -> dict[str, dict[str, Any]]:
    """Name -> unit and statistics of every metric that has numbers, over the successful requests."""
    good = [sample for sample in samples if sample.ok]
    found = {}
    for metric in metrics(slo):
        summary = summarize([metric.of(sample) for sample in good])
        if summary is not None:
            head = {"title": metric.title, "unit": metric.unit, "lower_is_better": metric.lower_is_better}
            found[metric.name] = {**head, **summary.as_dict()}
    return found


def totals(samples: Sequence[Sample], wall: float, slo: Slo) -> dict[str, Any]:
    """What the server did in `wall` seconds: rates over all requests, goodput, and errors by their sentence."""
    good = [sample for sample in samples if sample.ok]
    kept = sum(slo.kept_by(sample) for sample in good)
    return {
        "requests": len(samples),
        "succeeded": len(good),
        "errors": dict(Counter(sample.error for sample in samples if not sample.ok)),
        "wall_s": wall,
        "requests_per_s": len(good) / wall if wall > 0 else 0.0,
        "tokens_per_s": sum(sample.completion_tokens for sample in good) / wall if wall > 0 else 0.0,
        "images_per_minute": 60 * sum(bool(sample.picture) for sample in good) / wall if wall > 0 else 0.0,
        "goodput_per_s": kept / wall if wall > 0 else 0.0,
        "goodput_share": kept / len(samples) if samples else 0.0,
        "late_s": max((sample.late for sample in samples), default=0.0),
    }
