"""Runs a benchmark: scenarios x loads against one server, and gives the report as JSON-ready values."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from ming_trt import __version__
from ming_trt.bench.ceiling import ServedModel, shares
from ming_trt.bench.hops import account
from ming_trt.bench.load import MAX_TOGETHER, Interrupted, Load, run_load
from ming_trt.bench.machine import Ceiling, environment, measure_ceiling
from ming_trt.bench.media import Medium, find_media
from ming_trt.bench.metrics import Slo, summaries, totals
from ming_trt.bench.samples import Sample, measure
from ming_trt.bench.scenarios import Scenario, choose
from ming_trt.bench.server import ModelCount, ServerView
from ming_trt.bench.traces import Tracing, summarize_traces
from ming_trt.errors import InputError, MingError, ServeError
from ming_trt.models.cost import Cost
from ming_trt.serving.answer import Answer
from ming_trt.serving.client import Client
from ming_trt.serving.graph import ENSEMBLE
from ming_trt.serving.local_memory import is_local

SCHEMA = 1
KIND = "ming-trt bench"
# What `stopped` says after Ctrl-C.
INTERRUPTED = "it was interrupted (Ctrl-C)"
# Without rates of the user's: these shares of the best throughput that was seen.
AUTO_RATES = (0.5, 0.8)
# Triton counts a request only after its last response went out.
_SETTLE_S = 2.0
# Requests that count, those of the warm-up, and traced ones ask different questions.
_STREAMS = 3
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure. `rates` None: `AUTO_RATES` of the best closed-loop throughput; empty: none.

    `requests` and `warmup` are per scenario and load; the warm-up is thrown away. `traces`: so many further requests
    are traced by the server, if it can; their latencies are in no other figure. After `seconds` no more requests are
    sent at a load (0: no limit; a quarter of it for the warm-up and for traces). `steps`: denoising steps of a picture
    (0: as the server likes). `bundle`: what the server serves, for MBU and MFU.
    """

    url: str
    scenarios: tuple[str, ...] = ()
    concurrency: tuple[int, ...] = (1, 2, 4)
    rates: tuple[float, ...] | None = None
    requests: int = 20
    warmup: int = 2
    traces: int = 5
    seconds: float = 60.0
    max_tokens: int = 32
    steps: int = 8
    seed: int = 0
    slo: Slo = field(default_factory=Slo)
    media: Path | None = None
    bundle: Path | None = None

    def __post_init__(self) -> None:
        for name in ("requests", "max_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give at least 1")
        for name in ("warmup", "traces", "seconds", "steps", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"--{name} is {getattr(self, name):g}: give 0 or more")
        for name, value in self.slo.as_dict().items():
            if not 0 <= value < math.inf:
                raise InputError(f"the objective {name} is {value:g}: give seconds, 0 or more")
        if not self.concurrency and not self.rates:
            raise InputError("there is no load to measure: give --concurrency or --rate")
        for number in self.concurrency:
            if not 1 <= number <= MAX_TOGETHER:
                raise InputError(f"--concurrency has {number}: give 1 to {MAX_TOGETHER}")
        for rate in self.rates or ():
            if not 0 < rate < math.inf:
                raise InputError(f"--rate has {rate:g}: give requests per second, more than 0")


def run(options: Options, progress: Progress = lambda line: None) -> dict[str, Any]:
    """The report. Raises `ServeError` if the server does not answer, or if no request at all succeeded.

    If the server goes away meanwhile, or after Ctrl-C, the report has what was measured until then, and `stopped` says
    why it ends. Ctrl-C before any load has a result raises `KeyboardInterrupt`.
    """
    model = ServedModel.of(options.bundle) if options.bundle else None
    media = find_media(options.media)
    with Client(options.url) as client, ServerView(options.url) as view:
        if not client.ready():
            view.counts()  # says what is wrong, if the server is not there at all
            raise ServeError(f"the server at {options.url} is not ready: wait until its models are loaded")
        server = view.describe()
        chosen, skipped = choose(options.scenarios, media, view.inputs(), client.outputs())
        if not chosen:
            raise InputError(f"no scenario can run: {'; '.join(f'{n}: {why}' for n, why in skipped.items())}")
        # Before the load: afterwards the server's caches would be cold, and while it runs they would compete.
        ceiling = measure_ceiling() if is_local(options.url) else None
        tracing = Tracing(view)
        points, stopped = list[dict[str, Any]](), ""
        try:
            for scenario in chosen:
                measuring = _Scenario(options, client, view, tracing, scenario, media, progress)
                for point in measuring.points(model, ceiling):
                    points.append(point)  # one by one: what was measured stays when the server goes
            view.counts()  # after the last load nobody else would notice that it went
        except (ServeError, KeyboardInterrupt) as error:
            if not points:
                raise
            stopped = str(error) if isinstance(error, ServeError) else INTERRUPTED
            done = {point["scenario"] for point in points}
            skipped |= {scenario.name: stopped for scenario in chosen if scenario.name not in done}
    if not any(point["totals"]["succeeded"] for point in points):
        errors = {sentence for point in points for sentence in point["totals"]["errors"]}
        raise ServeError(f"no request succeeded: {min(errors)}")
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "version": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "options": _described(options, media),
        "environment": environment(),
        "server": server,
        "manifest": dict(model.manifest) if model else None,
        "ceiling": ceiling.as_dict() if ceiling else None,
        "traces": ("--traces is 0" if not options.traces else tracing.why_not) or "by the server",
        "stopped": stopped,
        "points": points,
        "skipped": skipped,
    }


class _Scenario:
    """The measurements of one scenario."""

    def __init__(
        self,
        options: Options,
        client: Client,
        view: ServerView,
        tracing: Tracing,
        scenario: Scenario,
        media: Mapping[str, Medium],
        progress: Progress,
    ) -> None:
        self._options, self._client, self._view, self._tracing = options, client, view, tracing
        self._scenario, self._media, self._progress = scenario, media, progress
        self._going: set[Answer] = set()
        self._interrupted = self._abandoned = False

    def points(self, model: ServedModel | None, ceiling: Ceiling | None) -> Iterator[dict[str, Any]]:
        """All loads: concurrencies first, since they tell the rates. Raises `ServeError` where the server is gone, and
        `KeyboardInterrupt` after what was left of a load at Ctrl-C."""
        options, best = self._options, 0.0
        for number in options.concurrency:
            point = self._point(Load("concurrency", number), model, ceiling)
            best = max(best, point["totals"]["requests_per_s"])
            yield point
            self._go_on()
        rates: Sequence[float] = options.rates or ()
        if options.rates is None and best:
            rates = [share * best for share in AUTO_RATES]
        for rate in rates:
            yield self._point(Load("rate", rate), model, ceiling)
            self._go_on()

    def _go_on(self) -> None:
        if self._interrupted:
            raise KeyboardInterrupt

    def _point(self, load: Load, model: ServedModel | None, ceiling: Ceiling | None) -> dict[str, Any]:
        options = self._options
        # Other questions than those that count: a cache of prompts would make these look fast.
        together = load.value if load.kind == "concurrency" else 1
        limit = options.seconds or math.inf
        warm = Load("concurrency", together)
        self._load(warm, options.warmup, 1, limit / 4)
        before = self._counts()
        try:
            samples, wall = self._load(load, options.requests, 0, limit)
        except Interrupted as stop:
            if not any(sample.ok for sample in stop.samples):
                raise
            samples, wall, self._interrupted = stop.samples, stop.seconds, True
        after, traces = self._seen(load, before, samples)
        counts = {name: count.since(before.get(name, ModelCount())) for name, count in after.items()}
        metrics = summaries(samples, options.slo)
        good = [sample for sample in samples if sample.ok]
        accounting = account(samples, counts) if after else None
        point: dict[str, Any] = {
            "scenario": self._scenario.name,
            "title": self._scenario.title,
            "load": load.as_dict(),
            "totals": totals(samples, wall, options.slo),
            "prompt_tokens": fmean(sample.prompt_tokens for sample in good) if good else 0,
            "completion_tokens": fmean(sample.completion_tokens for sample in good) if good else 0,
            "metrics": metrics,
            "hops": accounting.as_dict() if accounting else None,
            "traces": traces,
            "ceiling": None,
            "samples": [sample.as_dict() for sample in samples],
        }
        if model and model.on_processor and ceiling and good:
            point["ceiling"] = shares(model, ceiling, load, metrics, good, *self._encoder(model, counts))
        self._progress(_line(self._scenario.name, load, point))
        return point

    def _load(self, load: Load, count: int, stream: int, limit: float) -> tuple[list[Sample], float]:
        return run_load(load, count, self._send(stream, count), self._options.seed, limit, self._abandon)

    def _seen(
        self, load: Load, before: Mapping[str, ModelCount], samples: Sequence[Sample]
    ) -> tuple[dict[str, ModelCount], dict[str, Any] | None]:
        """What the server has counted with these requests, and what its traces tell; nothing of what Ctrl-C left."""
        counts, traces = dict[str, ModelCount](), None
        if self._interrupted:
            return counts, traces
        try:
            counts = self._settled(before, len(samples))
            if any(sample.ok for sample in samples):
                traces = self._traced(load)
        except ServeError:
            counts = {}  # it ended meanwhile: its requests tell why, and who asks next finds nobody
        except KeyboardInterrupt:
            self._interrupted = True  # what was measured is complete
        return counts, traces

    def _traced(self, load: Load) -> dict[str, Any] | None:
        """What the server's traces tell of further requests at this load; None if it does not trace, `note` if it
        failed."""
        count = min(self._options.traces, self._options.requests)
        if not count or self._tracing.why_not:
            return None
        try:
            with self._tracing.on():
                limit = (self._options.seconds or math.inf) / 4
                samples, _ = self._load(load, count, 2, limit)
            return summarize_traces(self._tracing.read([sample.id for sample in samples]), samples)
        except ServeError as error:
            return {"requests": 0, "rows": [], "total_ms": 0.0, "timeline": None, "note": str(error)}

    def _encoder(self, model: ServedModel, counts: Mapping[str, ModelCount]) -> tuple[tuple[str, Cost] | None, float]:
        """What the scenario's encoder must do for a file, and the milliseconds that it took."""
        kind, draws = self._scenario.kind, self._scenario.gives == "image"
        encoder = model.encoder_cost(kind, self._media[kind], draws) if kind else None
        count = counts.get(encoder[0], ModelCount()) if encoder else ModelCount()
        return encoder, 1000 * count.parts["compute_infer"] / count.succeeded if count.succeeded else 0.0

    def _send(self, stream: int, requests: int) -> Callable[[int, float, float], Sample]:
        options = self._options
        seed = _STREAMS * options.seed + stream
        # made now, since it would count as time of the request
        sizes = (options.max_tokens, options.steps)
        prepared = [self._scenario.request(i, seed, self._media, *sizes) for i in range(requests)]

        def send(number: int, due: float, origin: float) -> Sample:
            asked: list[Answer] = []

            def ask() -> Answer:
                asked.append(self._client.ask(**prepared[number]))
                self._going.update(asked)
                if self._abandoned:  # just now
                    self._abandon()
                return asked[0]

            try:
                return measure(ask, due, origin)
            finally:
                self._going.difference_update(asked)

        return send

    def _abandon(self) -> None:
        """Has the server end what is under way."""
        self._abandoned = True
        for answer in list(self._going):
            with suppress(MingError):  # it is gone: then nothing is under way
                answer.cancel()

    def _counts(self) -> dict[str, ModelCount]:
        """The statistics once they stand still: the last request of the warm-up may not have been counted yet."""
        seen = self._view.counts()
        deadline = time.perf_counter() + _SETTLE_S
        while time.perf_counter() < deadline:
            time.sleep(0.05)
            again = self._view.counts()
            if again == seen:
                break
            seen = again
        return seen

    def _settled(self, before: Mapping[str, ModelCount], requests: int) -> dict[str, ModelCount]:
        """The statistics once all `requests` are in them, or after a while as they are."""
        deadline = time.perf_counter() + _SETTLE_S
        while True:
            counts = self._counts()
            seen = counts.get(ENSEMBLE, ModelCount()).since(before.get(ENSEMBLE, ModelCount()))
            if seen.succeeded + seen.failed >= requests or time.perf_counter() > deadline:
                return counts


def _line(name: str, load: Load, point: Mapping[str, Any]) -> str:
    counted, metrics = point["totals"], point["metrics"]
    text = f"{name}, {load}: {counted['succeeded']} of {counted['requests']} requests"
    for key in ("ttft", "itl", "e2e"):
        if key in metrics:
            text += f", {key} p50 {metrics[key]['p50']['value']:.1f} {metrics[key]['unit']}"
    errors = counted["errors"]
    return f"{text}; {max(errors, key=errors.__getitem__)}" if errors else text


def _described(options: Options, media: Mapping[str, Medium]) -> dict[str, Any]:
    return {
        "url": options.url,
        "concurrency": list(options.concurrency),
        "rates": "auto" if options.rates is None else list(options.rates),
        "requests": options.requests,
        "warmup": options.warmup,
        "traces": options.traces,
        "seconds": options.seconds,
        "max_tokens": options.max_tokens,
        "steps": options.steps,
        "seed": options.seed,
        "slo": options.slo.as_dict(),
        "media": {kind: medium.name for kind, medium in media.items()},
    }
