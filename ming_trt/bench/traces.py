"""Triton's traces of single requests: where each was at which moment, down to the microsecond.

A server on this machine that `ming-trt serve` started can be asked, while it runs, to trace; it writes one file per
request. Its timestamps are of the clock that the client reads as well, so the time from the client's question to the
end of its answer is cut, without gaps, at the moments at which the server noted something. That is the difference to
the statistics (`hops.py`), which know sums only: there, time that two stages share counts twice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ming_trt.bench.hops import CLIENT, ENCODERS, REST
from ming_trt.bench.samples import Sample
from ming_trt.bench.server import ServerView
from ming_trt.errors import ServeError
from ming_trt.serving.graph import ENSEMBLE
from ming_trt.serving.local_memory import is_local

# A trace is written when the request has left the server, which is soon after its client has read the end.
_PATIENCE_S = 3.0
_ON = {"trace_level": "TIMESTAMPS", "trace_rate": "1", "trace_count": "-1", "log_frequency": "1"}
# Starts and ends of the parts of a step, as Triton notes them.
_PARTS = (
    ("queue", "QUEUE_START", "COMPUTE_START"),
    ("input", "COMPUTE_START", "COMPUTE_INPUT_END"),
    ("compute", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START"),
    ("output", "COMPUTE_OUTPUT_START", "COMPUTE_END"),
)


@dataclass(frozen=True, slots=True)
class Span:
    """One call of one model: event -> times in seconds (an event of a stream comes several times)."""

    model: str
    times: Mapping[str, tuple[float, ...]]

    def at(self, event: str) -> float:
        """When `event` was noted first. Raises `ServeError` if it was not."""
        if event not in self.times:
            raise ServeError(f"the trace of '{self.model}' has no {event}: its file may not be complete")
        return self.times[event][0]

    @property
    def start(self) -> float:
        return self.at("REQUEST_START")


@dataclass(frozen=True, slots=True)
class Trace:
    """One request: its `id`, the ensemble's span, and those of the calls below it in the order of their start."""

    id: str
    whole: Span
    steps: tuple[Span, ...]

    def of(self, model: str) -> list[Span]:
        """The calls of one model; of `postprocess` one for each answer of the language model."""
        return [span for span in self.steps if span.model == model]


def read_trace(text: str) -> list[Trace]:
    """The requests of one trace file. Raises ValueError if it is not JSON, `ServeError` if it is no trace."""
    heads: dict[int, dict[str, Any]] = {}
    times: dict[int, dict[str, list[float]]] = {}
    try:
        for entry in json.loads(text):
            number = int(entry["id"])
            if "model_name" in entry:
                heads[number] = entry
            for stamp in entry.get("timestamps", ()):
                times.setdefault(number, {}).setdefault(stamp["name"], []).append(stamp["ns"] / 1e9)
    except (TypeError, KeyError) as error:
        raise ServeError(
            f"a trace of the server is not as Triton writes it ({error}): look at the server's version"
        ) from None
    spans = {
        number: Span(head["model_name"], {name: tuple(sorted(all_)) for name, all_ in times.get(number, {}).items()})
        for number, head in heads.items()
    }
    found = []
    for number, head in heads.items():
        if head["model_name"] == ENSEMBLE and "parent_id" not in head:
            below = [spans[other] for other in heads if _root(other, heads) == number and other != number]
            ordered = tuple(sorted((span for span in below if span.times), key=lambda span: span.start))
            found.append(Trace(str(head.get("request_id", "")), spans[number], ordered))
    return found


def _root(number: int, heads: Mapping[int, Mapping[str, Any]]) -> int:
    while "parent_id" in heads[number] and int(heads[number]["parent_id"]) in heads:
        number = int(heads[number]["parent_id"])
    return number


class Tracing:
    """Switches a server's tracing on and reads what it wrote. `why_not` says why it cannot, or nothing."""

    def __init__(self, view: ServerView) -> None:
        self._view = view
        self._before: dict[str, str] = {}
        self._file = Path()
        self.why_not = ""
        if not is_local(view.url):
            self.why_not = "the server is on another machine"
            return
        try:
            self._before = view.trace_settings()
        except ServeError as error:
            self.why_not = str(error)
            return
        self._file = Path(self._before.get("trace_file", ""))
        if self._before.get("trace_mode") != "triton" or not self._file.name:
            self.why_not = "the server was started without a file for traces"
        elif not self._file.parent.is_dir():
            self.why_not = f"the server's folder for traces, '{self._file.parent}', cannot be seen from here"

    @contextmanager
    def on(self) -> Iterator[None]:
        """While it lasts, every request is traced into a file of its own."""
        self._seen = set(self._files())
        self._view.trace_settings(**_ON)
        try:
            yield
        finally:
            back = {name: self._before[name] for name in _ON if name in self._before}
            self._view.trace_settings(**back)

    def read(self, ids: Sequence[str]) -> dict[str, Trace]:
        """The traces of these requests, by id, made since `on`; after a while without those that did not come."""
        wanted, found = set(ids), dict[str, Trace]()
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            for file in self._files():
                if file in self._seen:
                    continue
                try:
                    traces = read_trace(file.read_text("utf-8"))
                except ValueError:
                    continue  # it is being written
                self._seen.add(file)
                found |= {trace.id: trace for trace in traces if trace.id in wanted}
            if len(found) == len(wanted) or time.monotonic() > deadline:
                return found
            time.sleep(0.02)

    def _files(self) -> list[Path]:
        return sorted(self._file.parent.glob(f"{self._file.name}.*"))


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a request's time, seconds since it was due: no two overlap, and together they are all of it."""

    hop: str
    part: str
    start: float
    end: float


def pieces(trace: Trace, sample: Sample) -> list[Piece]:
    """The time of one request, cut at what the server noted on the path that its last answer took.

    Of the encoders the one that handed over last is on that path. What the language model did before its first answer
    is queue and prefill, told apart by its own clock. Drawing and speaking go on after the last text; how long each
    part took is known by their own clocks, in what order and where they waited is not: parts are in the order of the
    stages, and what is left is the last piece.
    Raises `ServeError` for a trace that is not of this graph, or whose clock is not the client's.
    """
    end = sample.clock + sample.seconds
    if not sample.clock <= trace.whole.start <= end:
        raise ServeError("the server's clock is not the client's: traces of this machine were expected")
    for model in ("preprocess", "llm", "postprocess"):
        if not trace.of(model):
            raise ServeError(f"a trace has no '{model}': is this a server of ming-trt?")
    cut = _Cut(sample.clock, end)
    cut.to(sample.clock + sample.late, "client", "started late")
    cut.to(trace.whole.start, CLIENT, "")
    encoders = [span for name in ENCODERS for span in trace.of(name)]
    chain = [trace.of("preprocess")[0]]
    if encoders:
        chain.append(max(encoders, key=lambda span: span.at("COMPUTE_OUTPUT_START")))
    llm, answers = trace.of("llm")[0], trace.of("postprocess")
    for span, after in zip(chain, [*chain[1:], llm], strict=True):
        _stage(cut, span)
        cut.to(after.start, span.model, "output")
    cut.to(llm.at("COMPUTE_INPUT_END"), "llm", "input")
    queue = sample.engine.get("queue", 0.0)
    cut.to(min(cut.at + queue, answers[0].start), "llm", "queue")
    cut.to(answers[0].start, "llm", "prefill")
    cut.to(answers[-1].start, "llm", "decode")
    _stage(cut, answers[-1])
    sent = trace.whole.times.get("GRPC_SEND_START", (cut.at,))[-1]
    # Triton does not trace what `postprocess` calls: it is what the server took after the text.
    called, parts = sample.called
    for part, seconds in parts.items():
        cut.to(min(cut.at + seconds, sent), called, part)
    cut.to(sent, called or "postprocess", "by difference" if called else "output")
    cut.to(end, CLIENT, "")
    return [Piece(p.hop, p.part, p.start - sample.clock, p.end - sample.clock) for p in cut.pieces]


class _Cut:
    """Cuts time from `at` to `end`; a moment that is past already cuts nothing off.

    The server may note that it sent the end after the client has read it: nothing of a request is later than its end.
    """

    def __init__(self, at: float, end: float) -> None:
        self.at, self.end = at, end
        self.pieces: list[Piece] = []

    def to(self, moment: float, hop: str, part: str) -> None:
        moment = min(moment, self.end)
        if moment > self.at:
            self.pieces.append(Piece(hop, part, self.at, moment))
            self.at = moment


def _stage(cut: _Cut, span: Span) -> None:
    cut.to(span.start, REST, "")
    for part, _, until in _PARTS[:3]:
        cut.to(span.at(until), span.model, part)


def summarize_traces(traces: Mapping[str, Trace], samples: Sequence[Sample]) -> dict[str, Any]:
    """JSON-ready: mean and median of each row over the traced requests (ms), and the median request's timeline.

    `rows` are as in `hops.Accounting`, in the order of the path; they add up to `total_ms`, the traced requests' mean
    time, since they are cut from it. Raises `ServeError` if nothing was traced.
    """
    good = [sample for sample in samples if sample.ok and sample.id in traces]
    if not good:
        raise ServeError("the server wrote no trace of a request that succeeded: look into its log")
    cuts = [pieces(traces[sample.id], sample) for sample in good]
    keys: dict[tuple[str, str], None] = {}
    for own in sorted(cuts, key=len, reverse=True):
        keys |= dict.fromkeys((piece.hop, piece.part) for piece in own)
    sums = [{key: 1000 * sum(p.end - p.start for p in own if (p.hop, p.part) == key) for key in keys} for own in cuts]
    rows = [
        {"hop": key[0], "part": key[1], "ms": fmean(own[key] for own in sums), "p50": median(own[key] for own in sums)}
        for key in keys
    ]
    middle = sorted(range(len(good)), key=lambda i: good[i].seconds)[len(good) // 2]
    return {
        "requests": len(good),
        "rows": rows,
        "total_ms": 1000 * fmean(sample.seconds for sample in good),
        "timeline": timeline(traces[good[middle].id], good[middle]),
    }


def timeline(trace: Trace, sample: Sample) -> dict[str, Any]:
    """Everything that one request went through, ms since it was due: also what ran beside its path."""

    def ms(moment: float) -> float:
        return round(1000 * (moment - sample.clock), 4)

    spans = [
        {"model": span.model, "part": part, "start": ms(span.at(start)), "end": ms(span.at(until))}
        for span in trace.steps
        if span.model != "llm"
        for part, start, until in _PARTS
    ]
    llm, answers = trace.of("llm")[0], trace.of("postprocess")
    taken, first, last = llm.at("COMPUTE_INPUT_END"), answers[0].start, answers[-1].start
    queued = min(taken + sample.engine.get("queue", 0.0), first)
    for part, start, until in (
        ("input", llm.start, taken), ("queue", taken, queued), ("prefill", queued, first), ("decode", first, last),
    ):  # fmt: skip
        spans.append({"model": "llm", "part": part, "start": ms(start), "end": ms(until)})
    sent = trace.whole.times.get("GRPC_SEND_START", (trace.whole.start,))[-1]
    called, parts = sample.called
    if called:
        began = answers[-1].at("COMPUTE_OUTPUT_START")
        for part, seconds in parts.items():
            until = min(began + seconds, sent)
            spans.append({"model": called, "part": part, "start": ms(began), "end": ms(until)})
            began = until
        spans.append({"model": called, "part": "by difference", "start": ms(began), "end": ms(sent)})
    return {
        "total_ms": round(1000 * sample.seconds, 4),
        "server": [ms(trace.whole.start), ms(sent)],
        "tokens": [round(1000 * at, 4) for at, _ in sample.arrivals],
        "spans": spans,
    }
