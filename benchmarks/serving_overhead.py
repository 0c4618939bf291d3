"""Text through the whole server against the same pipeline in this process: what Triton costs per token and per answer.

Both run the same bundle with the same threads and answer the same questions in turns; each waits while the other works.
The mini checkpoint's steps take about a millisecond, so its ratio is the worst case: name a larger bundle by --bundle.

    python benchmarks/serving_overhead.py [--bundle DIR] [--seconds S]
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from harness import Row, arguments, finish
from mini_server import mini_bundle, server_on

from ming_trt.bench.metrics import InterTokenLatency, TimeToFirstToken
from ming_trt.bench.samples import Sample, measure
from ming_trt.bench.scenarios import SCENARIOS
from ming_trt.bench.stats import ratio_of_medians
from ming_trt.processing.request import parse_request
from ming_trt.runtime.pipeline import Pipeline
from ming_trt.serving.client import Client

# The server may take 5 % longer per token, and 5 ms more to the first one.
GOAL_ITL, GOAL_TTFT_MS = 1 / 1.05, 5.0


def main() -> None:
    options = arguments(
        str(__doc__),
        bundle={"type": Path, "default": None, "help": "what to serve; default: the mini checkpoint"},
        tokens={"type": int, "default": 64, "help": "tokens of an answer"},
    )
    bundle = options.bundle or mini_bundle()
    text = next(scenario for scenario in SCENARIOS if scenario.name == "text")
    samples: dict[str, list[Sample]] = {"server": [], "process": []}
    with server_on(bundle) as server, Client(server.grpc_url) as client, Pipeline.open(bundle) as pipeline:
        number, end = 0, time.perf_counter() + options.seconds
        while number < 10 or time.perf_counter() < end:
            request = text.request(number, 0, {}, options.tokens)
            one = measure(lambda asked=request: client.ask(**asked), 0.0, time.perf_counter())  # type: ignore[misc]
            two = in_process(pipeline, request)
            if one.error:
                raise SystemExit(one.error)
            # the first ones warm both up
            if number >= 3:
                samples["server"].append(one)
                samples["process"].append(two)
            number += 1
    rows = []
    for metric, what in ((InterTokenLatency(), "inter-token latency"), (TimeToFirstToken(), "time to first token")):
        server_ms, process_ms = ([v for s in samples[side] for v in metric.of(s)] for side in ("server", "process"))
        ratio = ratio_of_medians(server_ms, process_ms)
        ours, peer = sorted(server_ms)[len(server_ms) // 2], sorted(process_ms)[len(process_ms) // 2]
        goal = GOAL_ITL if metric.name == "itl" and not options.tiny else 0
        row = Row(
            what, ours, "in process", peer, ratio.value, ratio.low, ratio.high, goal, more={"added_ms": ours - peer}
        )
        if metric.name == "ttft":
            row.more["goal"] = f"at most {GOAL_TTFT_MS:g} ms more"
        rows.append(row)
    options.threads = 0
    note = (
        f"bundle: {'the mini checkpoint' if options.bundle is None else bundle.name}; ratio: time in process / server"
    )
    finish("serving_overhead", rows, options, None, note)


def in_process(pipeline: Pipeline, arguments: dict[str, Any]) -> Sample:
    """The same question to the pipeline of this process, timed in the same way."""
    body = {"id": "bench", "messages": [{"role": "user", "content": [{"type": "text", "text": arguments["text"]}]}]}
    request = parse_request(json.dumps({**body, "sampling": arguments["sampling"]}).encode())
    sample, started = Sample(0.0), time.perf_counter()
    for delta in pipeline.stream(request):
        if delta.token_ids:
            sample.arrivals.append((time.perf_counter() - started, len(delta.token_ids)))
    sample.seconds = time.perf_counter() - started
    return sample


if __name__ == "__main__":
    main()
