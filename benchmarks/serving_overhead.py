"""Text through the whole server against the same pipeline in this process: what Triton costs per token and per answer.

Both run the same bundle with the same threads and the same kind of memory (huge pages, which the server asks for: the
script starts itself again with them), and answer the same questions in turns; each waits while the other works. A round
is one long answer, for the time per token, and several of two tokens to a short question, as each gives only one time
to the first token, from which the time of reading the prompt should not distract.
Two bundles: a language model of four layers at true width, whose token takes what four real layers take, and the mini
checkpoint, whose token takes less than a millisecond: the worst case, of which nothing is asked.

    python benchmarks/serving_overhead.py [--bundle DIR] [--seconds S] [--tokens N]
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import Row, arguments, finish, same_memory
from mini_server import mini_bundle, server_on, wide_bundle

from ming_trt.bench.metrics import InterTokenLatency, Metric, TimeToFirstToken
from ming_trt.bench.samples import Sample, measure
from ming_trt.bench.scenarios import SCENARIOS
from ming_trt.bench.stats import RESAMPLES, ratio_of_medians
from ming_trt.processing.request import parse_request
from ming_trt.runtime.pipeline import Pipeline
from ming_trt.serving.client import Client

# The server may take 5 % longer per token, and 5 ms more to the first one.
MOST_ITL, MOST_TTFT_MS = 1.05, 5.0
# Rounds before those that count, and the fewest of those; short answers in each.
_WARM, _LEAST, _SHORT = 1, 3, 12
_QUESTION = "What is a kite?"
Pair = tuple[Sample, Sample]


def main() -> None:
    options = arguments(
        str(__doc__),
        bundle={"type": Path, "default": None, "help": "what to serve instead"},
        tokens={"type": int, "default": 48, "help": "tokens of an answer"},
    )
    if options.bundle:
        bundles = {options.bundle.name: options.bundle}
    else:
        bundles = (
            {"mini": mini_bundle()} if options.tiny else {"four wide layers": wide_bundle(), "mini": mini_bundle()}
        )
    rows = []
    for name, bundle in bundles.items():
        share = 1.0 if len(bundles) == 1 else 0.15 if name == "mini" else 0.85
        long, short = both(bundle, options.seconds * share, options.tokens)
        rows += compared(name, long, short, asked=name != "mini" and not options.tiny)
    options.threads = 0
    note = "ratio: time in process / time through the server; added_ms: what the server adds, with its 95 % interval"
    finish("serving_overhead", rows, options, None, note)


def both(bundle: Path, seconds: float, tokens: int) -> tuple[list[Pair], list[Pair]]:
    """The same questions to the server and to the pipeline of this process, in turns: the samples of each question, of
    long and of short answers."""
    text = next(scenario for scenario in SCENARIOS if scenario.name == "text")
    long, short = list[Pair](), list[Pair]()
    with server_on(bundle) as server, Client(server.grpc_url) as client, Pipeline.open(bundle) as pipeline:

        def pair(number: int, length: int, **asked: str) -> Pair:
            request = {**text.request(number, 0, {}, length), **asked}
            # whoever is second finds the processor's caches warmed or cleared by the other
            if number % 2:
                served = ask(client, request)
                return served, in_process(pipeline, request)
            own = in_process(pipeline, request)
            return ask(client, request), own

        rounds, end = 0, float("inf")
        while rounds < _WARM + _LEAST or time.perf_counter() < end:
            first = rounds * (_SHORT + 1)
            answers = pair(first, tokens), [pair(first + number, 2, text=_QUESTION) for number in range(1, _SHORT + 1)]
            if rounds >= _WARM:
                long.append(answers[0])
                short += answers[1]
            elif rounds == _WARM - 1:
                end = time.perf_counter() + seconds
            rounds += 1
    return long, short


def compared(name: str, long: Sequence[Pair], short: Sequence[Pair], asked: bool) -> list[Row]:
    """A row per metric. Of the first token not the ratio counts but what is added."""
    rows = []
    metrics: tuple[tuple[Metric, Sequence[Pair]], ...] = ((InterTokenLatency(), long), (TimeToFirstToken(), short))
    for metric, pairs in metrics:
        theirs, ours = ([v for pair in pairs for v in metric.of(pair[side])] for side in (0, 1))
        ratio, added = ratio_of_medians(theirs, ours), added_ms(theirs, ours)
        more = {"added_ms": added[0], "added_95": f"{added[1]:.2f} to {added[2]:.2f}", "requests": len(pairs)}
        medians = float(np.median(theirs)), float(np.median(ours))
        what = f"{name}: {metric.title}"
        row = Row(what, medians[0], "in process", medians[1], ratio.value, ratio.low, ratio.high, more=more)
        if asked and metric.name == "itl":
            row.target = 1 / MOST_ITL
        elif asked:
            row.note = f"at most {MOST_TTFT_MS:g} ms more: {'reached' if added[0] <= MOST_TTFT_MS else 'not reached'}"
            row.more["asked"] = row.note
        rows.append(row)
    return rows


def added_ms(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float]:
    """What the server adds to the median, with its 95 % bootstrap interval. Where both have one value of each question,
    the questions are drawn, both sides together: what slows the machine for a while slows both."""
    rng = np.random.default_rng(0)
    one, two = np.asarray(theirs), np.asarray(ours)
    drawn = rng.integers(0, len(one), (RESAMPLES, len(one)))
    other = drawn if len(one) == len(two) else rng.integers(0, len(two), (RESAMPLES, len(two)))
    low, high = np.percentile(np.median(one[drawn], axis=1) - np.median(two[other], axis=1), (2.5, 97.5))
    return float(np.median(one) - np.median(two)), float(low), float(high)


def ask(client: Client, arguments: dict[str, Any]) -> Sample:
    """The question to the server."""
    sample = measure(lambda: client.ask(**arguments), 0.0, time.perf_counter())
    if sample.error:
        raise SystemExit(sample.error)
    return sample


def in_process(pipeline: Pipeline, arguments: dict[str, Any]) -> Sample:
    """The same question to the pipeline of this process, timed in the same way."""
    body = {"id": "bench", "messages": [{"role": "user", "content": [{"type": "text", "text": arguments["text"]}]}]}
    started = time.perf_counter()
    request = parse_request(json.dumps({**body, "sampling": arguments["sampling"]}).encode())
    sample = Sample(0.0)
    for delta in pipeline.stream(request):
        if delta.token_ids:
            sample.arrivals.append((time.perf_counter() - started, len(delta.token_ids)))
    sample.seconds = time.perf_counter() - started
    return sample


if __name__ == "__main__":
    same_memory()
    main()
