"""A server of the graph in this process: its stages sleep for known times, and it counts like Triton.

The gRPC interface is the real one, so client, statistics and accounting are the ones that users run. What it really
slept is kept in `slept` (milliseconds by hop and part, one entry per request), since a busy machine oversleeps.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

STAGES = ("preprocess", "vision_encoder", "audio_encoder", "llm", "postprocess")


@dataclass
class Delays:
    """Seconds. `stall`: an extra pause before the token in the middle. `fail_every`: every so manieth request ends
    with an error after its prefill (0: none). `die_after`: with the request after so many the server ends (0: never).
    `interrupt_after`: with that one this process gets Ctrl-C, and from it on requests hang until they are cancelled.
    """

    preprocess: float = 0.0
    preprocess_queue: float = 0.0
    vision_encoder: float = 0.0
    audio_encoder: float = 0.0
    llm_queue: float = 0.0
    prefill: float = 0.0
    token: float = 0.0
    postprocess: float = 0.0
    network: float = 0.0
    stall: float = 0.0
    fail_every: int = 0
    die_after: int = 0
    interrupt_after: int = 0


@dataclass
class _Counter:
    succeeded: int = 0
    failed: int = 0
    total: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class FakeServer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Use as a context manager; `url` is its address."""

    def __init__(self, delays: Delays, outputs: tuple[str, ...] = ("text", "state")) -> None:
        self.delays = delays
        self.slept: dict[str, list[float]] = defaultdict(list)
        self.most = 0
        self.cancelled: set[str] = set()
        self._outputs = outputs
        self._running = self._requests = 0
        self._lock = threading.Lock()
        self._counters = {name: _Counter() for name in (*STAGES, "ming", "cancel")}

    def __enter__(self) -> FakeServer:
        self._server = grpc.server(ThreadPoolExecutor(32))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.url = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(0).wait()

    def ModelReady(self, request: Any, context: Any) -> Any:
        return pb.ModelReadyResponse(ready=True)

    def ServerMetadata(self, request: Any, context: Any) -> Any:
        return pb.ServerMetadataResponse(name="fake", version="2.51.0")

    def ModelMetadata(self, request: Any, context: Any) -> Any:
        answer = pb.ModelMetadataResponse(name="ming")
        for name in ("request", "images", "videos", "audios"):
            answer.inputs.add(name=name, datatype="BYTES", shape=[-1])
        for name in self._outputs:
            answer.outputs.add(name=name, datatype="BYTES", shape=[1])
        return answer

    def ModelConfig(self, request: Any, context: Any) -> Any:
        answer = pb.ModelConfigResponse()
        answer.config.name, answer.config.backend = request.name, "python"
        return answer

    def TraceSetting(self, request: Any, context: Any) -> Any:
        answer = pb.TraceSettingResponse()
        answer.settings["trace_mode"].value.append("triton")
        return answer

    def ModelStatistics(self, request: Any, context: Any) -> Any:
        answer = pb.ModelStatisticsResponse()
        with self._lock:
            for name, counter in self._counters.items():
                stats = answer.model_stats.add(name=name, version="1").inference_stats
                stats.success.count, stats.success.ns = counter.succeeded, int(1e9 * counter.total)
                stats.fail.count = counter.failed
                for part, seconds in counter.parts.items():
                    getattr(stats, part).ns = int(1e9 * seconds)
                    getattr(stats, part).count = counter.succeeded
        return answer

    def ModelInfer(self, request: Any, context: Any) -> Any:
        body = json.loads(request.raw_input_contents[0][4:])
        if body["op"] == "cancel":
            self.cancelled.add(body["id"])
        return _response({"state": json.dumps({"ok": True}).encode()}, final=True).infer_response

    def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        for request in requests:
            with self._lock:
                self._requests += 1
                number = self._requests
                self._running += 1
                self.most = max(self.most, self._running)
            try:
                yield from self._answer(request, number)
            finally:
                with self._lock:
                    self._running -= 1

    def _answer(self, request: Any, number: int) -> Iterator[Any]:
        delays, arrived = self.delays, time.perf_counter()
        if delays.die_after and number > delays.die_after:
            self._server.stop(0)
            return
        tensors = {t.name: raw for t, raw in zip(request.inputs, request.raw_input_contents, strict=False)}
        body = json.loads(tensors["request"][4:])
        if delays.interrupt_after and number > delays.interrupt_after:
            if number == delays.interrupt_after + 1:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            while body["id"] not in self.cancelled:
                time.sleep(0.01)
            yield pb.ModelStreamInferResponse(error_message="in ensemble 'ming', CancelledError: it was cancelled")
            return
        waited = self._sleep("preprocess queue", delays.preprocess_queue)
        worked = self._sleep("preprocess compute", delays.preprocess)
        self._count("preprocess", queue=waited, compute_infer=worked)
        for name, kinds in (("vision_encoder", ("images", "videos")), ("audio_encoder", ("audios",))):
            present = any(kind in tensors or any(t.name == kind for t in request.inputs) for kind in kinds)
            worked = self._sleep(f"{name} compute", getattr(delays, name)) if present else 0.0
            self._count(name, compute_infer=worked)
        self._count("llm")
        timings = {
            "queue": self._sleep("llm queue", delays.llm_queue),
            "prefill": self._sleep("llm prefill", delays.prefill),
        }
        if delays.fail_every and number % delays.fail_every == 0:
            with self._lock:
                self._counters["ming"].failed += 1
            yield pb.ModelStreamInferResponse(
                error_message="in ensemble 'ming', EngineError: the llm failed: report it"
            )
            return
        tokens, decode, last = int(body["sampling"]["max_tokens"]), 0.0, 0.0
        for index in range(tokens):
            if index:
                stall = delays.stall if index == tokens // 2 else 0.0
                decode += self._sleep("", delays.token + stall)
            state = {"index": index, "token_ids": [65], "finish_reason": None}
            if index < tokens - 1:
                yield _response({"text": b"A", "state": json.dumps(state).encode()})
        last = self._sleep("postprocess compute", delays.postprocess)
        self._count("postprocess", compute_infer=last)
        self.slept["llm decode"].append(1000 * decode)
        state |= {
            "finish_reason": "length",
            "usage": {"prompt_tokens": 10, "completion_tokens": tokens},
            "timings": {**timings, "first_token": sum(timings.values()), "decode": decode},
        }
        with self._lock:
            counter = self._counters["ming"]
            counter.succeeded += 1
            counter.total += time.perf_counter() - arrived
        self._sleep("network", delays.network)
        yield _response({"text": b"A", "state": json.dumps(state).encode()}, final=True)

    def _sleep(self, hop: str, seconds: float) -> float:
        started = time.perf_counter()
        if seconds:
            time.sleep(seconds)
        slept = time.perf_counter() - started
        if hop:
            self.slept[hop].append(1000 * slept)
        return slept

    def _count(self, name: str, **parts: float) -> None:
        with self._lock:
            counter = self._counters[name]
            counter.succeeded += 1
            counter.total += sum(parts.values())
            for part, seconds in parts.items():
                counter.parts[part] += seconds


def _response(items: dict[str, bytes], final: bool = False) -> Any:
    message = pb.ModelStreamInferResponse()
    response = message.infer_response
    response.model_name = "ming"
    response.parameters["triton_final_response"].bool_param = final
    for name, value in items.items():
        response.outputs.add(name=name, datatype="BYTES", shape=[1])
        response.raw_output_contents.append(len(value).to_bytes(4, "little") + value)
    return message
