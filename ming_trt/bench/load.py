"""Load on a server: so many requests at once (closed loop), or so many per second (open loop)."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ming_trt.bench.samples import Sample

# Sends request number n, due so many seconds after `origin` (a time of `time.perf_counter`).
Send = Callable[[int, float, float], Sample]

# Requests that may be under way, a thread each: above it those of an open loop start late, which the samples tell.
MAX_TOGETHER = 256


class Interrupted(KeyboardInterrupt):
    """Ctrl-C under load. `samples` and `seconds` are as of `run_load`, of the requests that had ended before."""

    def __init__(self, samples: list[Sample], seconds: float) -> None:
        super().__init__()
        self.samples, self.seconds = samples, seconds


@dataclass(frozen=True, slots=True)
class Load:
    """`kind` "concurrency": `value` requests at any time; "rate": `value` requests per second, arriving at random."""

    kind: Literal["concurrency", "rate"]
    value: float

    def __str__(self) -> str:
        return f"{self.value:g} at once" if self.kind == "concurrency" else f"{self.value:.3g} per second"

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "value": self.value}


def run_load(
    load: Load,
    requests: int,
    send: Send,
    seed: int,
    seconds: float = math.inf,
    abandon: Callable[[], None] = lambda: None,
) -> tuple[list[Sample], float]:
    """Sends `requests` requests, after `seconds` no more; their samples in the order of the requests, and the seconds
    from the first to the last end. At least one per place of a closed loop is sent.

    At Ctrl-C no more are sent, `abandon` is called to end those that are under way, and `Interrupted` is raised.
    """
    if load.kind == "concurrency":
        together, run = int(load.value), _Run(requests, send)
        return run.wait(lambda pool: _closed(pool, run, together, requests, seconds), together, abandon)
    # only as many as arrive in that time, so that the rate holds within it
    times = arrival_times(load.value, max(1, int(min(requests, load.value * seconds))), seed)
    run = _Run(len(times), send)
    return run.wait(lambda pool: _open(pool, run, times), min(MAX_TOGETHER, len(times)), abandon)


def arrival_times(rate: float, requests: int, seed: int) -> list[float]:
    """A Poisson process of `requests` arrivals in `requests` / `rate` seconds: independent users, and yet the rate that
    was asked for, however few they are. Equal seeds give equal times; the first request comes at once."""
    later = np.sort(np.random.default_rng(seed).uniform(0, requests / rate, requests - 1))
    return [0.0, *(float(at) for at in later)]


class _Run:
    """The requests of one load: `send` notes each under its number."""

    def __init__(self, requests: int, send: Send) -> None:
        self._send, self._samples = send, list[Sample | None]([None] * requests)
        self.stopped = threading.Event()
        self.origin = time.perf_counter()

    def send(self, number: int, due: float) -> None:
        if self.stopped.is_set():
            return
        self._samples[number] = self._send(number, due, self.origin)

    def wait(
        self, start: Callable[[ThreadPoolExecutor], list[Future[None]]], threads: int, abandon: Callable[[], None]
    ) -> tuple[list[Sample], float]:
        """Sends what `start` puts into the pool, and waits for all of it."""
        with ThreadPoolExecutor(threads, "bench") as pool:
            self.origin = time.perf_counter()
            try:
                for future in start(pool):
                    future.result()
            except KeyboardInterrupt:
                self.stopped.set()
                result = self._result()  # before any of them fails for that reason
                abandon()
                raise Interrupted(*result) from None
        return self._result()

    def _result(self) -> tuple[list[Sample], float]:
        return [sample for sample in self._samples if sample is not None], time.perf_counter() - self.origin


def _closed(pool: ThreadPoolExecutor, run: _Run, concurrency: int, requests: int, seconds: float) -> list[Future[None]]:
    numbers = itertools.count()
    lock = threading.Lock()

    def work() -> None:
        while not run.stopped.is_set():
            with lock:
                number = next(numbers)
            passed = time.perf_counter() - run.origin
            if number >= requests or (number >= concurrency and passed > seconds):
                return
            run.send(number, passed)

    return [pool.submit(work) for _ in range(concurrency)]


def _open(pool: ThreadPoolExecutor, run: _Run, times: Sequence[float]) -> list[Future[None]]:
    futures = []
    for number, due in enumerate(times):
        time.sleep(max(0.0, run.origin + due - time.perf_counter()))
        futures.append(pool.submit(run.send, number, due))
    return futures
