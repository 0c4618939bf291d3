"""Load on a server: so many requests at once (closed loop), or so many per second (open loop)."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ming_trt.bench.samples import Sample

# Sends request number n, due so many seconds after `origin` (a time of `time.perf_counter`).
Send = Callable[[int, float, float], Sample]

# Requests that may be under way, a thread each: above it those of an open loop start late, which the samples tell.
MAX_TOGETHER = 256


@dataclass(frozen=True, slots=True)
class Load:
    """`kind` "concurrency": `value` requests at any time; "rate": `value` requests per second, arriving at random."""

    kind: Literal["concurrency", "rate"]
    value: float

    def __str__(self) -> str:
        return f"{self.value:g} at once" if self.kind == "concurrency" else f"{self.value:.3g} per second"

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "value": self.value}


def run_load(load: Load, requests: int, send: Send, seed: int, seconds: float = math.inf) -> tuple[list[Sample], float]:
    """Sends `requests` requests, after `seconds` no more; their samples in the order of the requests, and the seconds
    from the first to the last end. At least one per place of a closed loop is sent."""
    if load.kind == "concurrency":
        return _closed(int(load.value), requests, send, seconds)
    # only as many as arrive in that time, so that the rate holds within it
    return _open(arrival_times(load.value, max(1, int(min(requests, load.value * seconds))), seed), send)


def arrival_times(rate: float, requests: int, seed: int) -> list[float]:
    """A Poisson process of `requests` arrivals in `requests` / `rate` seconds: independent users, and yet the rate that
    was asked for, however few they are. Equal seeds give equal times; the first request comes at once."""
    later = np.sort(np.random.default_rng(seed).uniform(0, requests / rate, requests - 1))
    return [0.0, *(float(at) for at in later)]


def _closed(concurrency: int, requests: int, send: Send, seconds: float) -> tuple[list[Sample], float]:
    samples: list[Sample | None] = [None] * requests
    numbers = itertools.count()
    lock = threading.Lock()
    origin = time.perf_counter()

    def work() -> None:
        while True:
            with lock:
                number = next(numbers)
            if number >= requests or (number >= concurrency and time.perf_counter() - origin > seconds):
                return
            samples[number] = send(number, time.perf_counter() - origin, origin)

    with ThreadPoolExecutor(concurrency, "bench") as pool:
        for future in [pool.submit(work) for _ in range(concurrency)]:
            future.result()
    return [sample for sample in samples if sample is not None], time.perf_counter() - origin


def _open(times: Sequence[float], send: Send) -> tuple[list[Sample], float]:
    with ThreadPoolExecutor(min(MAX_TOGETHER, len(times)), "bench") as pool:
        futures = []
        origin = time.perf_counter()
        for number, due in enumerate(times):
            time.sleep(max(0.0, origin + due - time.perf_counter()))
            futures.append(pool.submit(send, number, due, origin))
        samples = [future.result() for future in futures]
    return samples, time.perf_counter() - origin
