"""A client of the server: asks, streams the answer, cancels.

    with Client("localhost:8001") as client:
        for delta in client.ask("What is in the picture?", images=["cat.jpg"]):
            print(delta.text, end="")

Neither numpy nor torch is needed. Media are sent as the files they are; the server decodes them.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from ming_trt import errors
from ming_trt.errors import CancelledError, InputError, MingError, ServeError
from ming_trt.serving.graph import ENSEMBLE
from ming_trt.serving.local_memory import Region, is_local, release, share
from ming_trt.serving.wire import bytes_tensor, infer_request, is_final, json_tensor

DEFAULT_URL = "localhost:8001"
# The server ends a request whose client has not been heard of for this long.
LEASE_S = 15.0
Media = bytes | str | Path
_CONTROL_TIMEOUT_S = 10.0
# How long closing waits for the server to let go of a cancelled request's shared memory.
_CLOSE_TIMEOUT_S = 2.0
_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer: its text (may be empty) and the server's state (`index`, `finish_reason`, ...)."""

    text: str
    state: Mapping[str, Any]


class Answer:
    """The answer to one question, as it comes. Iterate over it once; `cancel` (or leaving its `with`) ends it early.

    After the end: `text`, `finish_reason` ("stop" or "length"), `usage` and `timings` as the server gave them, and the
    client's own clock: `first_token_s` until the first text, `seconds` in all.
    """

    def __init__(
        self, client: Client, request_id: str, request: Any, lease_s: float, regions: Sequence[Region] = ()
    ) -> None:
        self.id = request_id
        self.text = ""
        self.finish_reason: str | None = None
        self.usage: Mapping[str, Any] = {}
        self.timings: Mapping[str, Any] = {}
        self.first_token_s: float | None = None
        self.seconds = 0.0
        self._client = client
        self._ended = threading.Event()
        self._lost = ""
        self._regions = list(regions)
        self._cancelled = False
        self._final = False
        self._started = time.perf_counter()
        self._call = client._stub.ModelStreamInfer(iter([request]))
        self._deltas = self._read()
        if lease_s > 0:
            threading.Thread(target=self._renew, args=(lease_s,), name=f"lease-{request_id}", daemon=True).start()

    def __iter__(self) -> Iterator[Delta]:
        return self._deltas

    def __next__(self) -> Delta:
        return next(self._deltas)

    def __enter__(self) -> Answer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Ends the request at the server and here; harmless after its end."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._cancelled = True
        try:
            self._client.control("cancel", self.id)
        finally:
            self._stop()

    def read_all(self) -> str:
        """Waits for the end; the whole text."""
        for _ in self._deltas:
            pass
        return self.text

    def summary(self) -> dict[str, Any]:
        """The finished answer as JSON-ready values; times in seconds, by the client's clock unless named `timings`."""
        tokens = int(self.usage.get("completion_tokens", 0))
        decode = self.seconds - (self.first_token_s or 0.0)
        return {
            "id": self.id,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "usage": dict(self.usage),
            "timings": dict(self.timings),
            "first_token_s": self.first_token_s,
            "seconds": self.seconds,
            # The first token belongs to the prefill.
            "tokens_per_s": (tokens - 1) / decode if tokens > 1 and self.first_token_s and decode > 0 else None,
        }

    def _read(self) -> Iterator[Delta]:
        try:
            for message in self._call:
                if message.error_message:
                    raise _error(message.error_message)
                delta = self._delta(message.infer_response)
                if delta is not None:
                    yield delta
                if is_final(message.infer_response):
                    self._final = True
                    break
        except grpc.RpcError as error:
            raise self._explain(error) from None
        finally:
            self.seconds = time.perf_counter() - self._started
            # Reached early if the caller drops the iterator: the stream ends, and the lease is no longer renewed.
            self._ended.set()
            self._stop()
        if self._cancelled:
            raise CancelledError(f"request '{self.id}' was cancelled")
        if self.finish_reason is None:
            raise ServeError("the server ended the answer without a finish reason: look into its log")

    def _stop(self) -> None:
        """Ends the stream, and gives back shared memory, which the server keeps in use until the request has ended."""
        self._call.cancel()
        regions, self._regions = self._regions, []
        if regions and self._final:
            release(regions)
        elif regions:
            self._client._release_later(regions)

    def _delta(self, response: Any) -> Delta | None:
        texts, state = bytes_tensor(response, "text"), json_tensor(response, "state")
        if texts is None or state is None:
            return None
        text = texts[0].decode("utf-8", "replace")
        if text and self.first_token_s is None:
            self.first_token_s = time.perf_counter() - self._started
        self.text += text
        if state.get("finish_reason"):
            self.finish_reason = str(state["finish_reason"])
            self.usage, self.timings = state.get("usage") or {}, state.get("timings") or {}
        return Delta(text, state)

    def _explain(self, error: Any) -> MingError:
        if self._lost:
            return ServeError(self._lost)
        if self._cancelled:
            return CancelledError(f"request '{self.id}' was cancelled")
        return self._client._explain(error)

    def _renew(self, lease_s: float) -> None:
        while not self._ended.wait(lease_s / 3):
            try:
                reply = self._client.control("renew", self.id, lease_s)
            except MingError:
                continue  # the stream itself reports a server that is gone
            if reply.get("lost") and not self._ended.is_set():
                self._lost = f"the server lost request '{self.id}', since its model '{reply['lost']}' died: ask again"
                self._call.cancel()
                return


class Client:
    """A connection to a server, by its gRPC address. Threads may share it; each `ask` has a stream of its own."""

    def __init__(self, url: str = DEFAULT_URL) -> None:
        self.url = url.removeprefix("grpc://")
        self._channel = grpc.insecure_channel(self.url, options=_OPTIONS)
        self._releasing: list[threading.Thread] = []
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def close(self) -> None:
        """Ends the connection, and with it the answers that still stream."""
        for thread in self._releasing:
            thread.join(_CLOSE_TIMEOUT_S)
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(
        self,
        text: str = "",
        *,
        images: Sequence[Media] = (),
        videos: Sequence[Media] = (),
        audios: Sequence[Media] = (),
        messages: Sequence[Mapping[str, Any]] | None = None,
        system: str | None = None,
        sampling: Mapping[str, Any] | None = None,
        video_options: Mapping[str, Any] | None = None,
        thinking: bool = False,
        task: str | None = None,
        dialect: str | None = None,
        request_id: str | None = None,
        lease_s: float = LEASE_S,
    ) -> Answer:
        """Asks one question and returns at once; the answer is read by iterating.

        Media are paths or the bytes of encoded files. Without `messages` the question is one user turn: images, videos,
        audios, then the text. With `messages` (docs/DESIGN.md, 4.2) their media parts take the files in order, kind by
        kind. `lease_s` 0: the server goes on even if this client vanishes. Raises `InputError` for files that cannot be
        read; the iteration raises the server's errors.
        """
        if messages is not None and (text or system):
            raise InputError("'messages' come with 'text' or 'system': put everything into the messages")
        if messages is None:
            messages = _one_turn(text, len(images), len(videos), len(audios), system, video_options or {})
        name = request_id or uuid.uuid4().hex
        body = {"id": name, "messages": list(messages), "thinking": thinking, "task": task, "dialect": dialect}
        body |= {"sampling": dict(sampling or {}), "lease": lease_s}
        inputs = {"request": [json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")]}
        for kind, files in (("images", images), ("videos", videos), ("audios", audios)):
            if files:
                inputs[kind] = [_content(file) for file in files]
        regions = self._share(inputs)
        shared = {kind: (region.name, region.size) for kind, region in regions.items()}
        request = infer_request(ENSEMBLE, inputs, ("text", "state"), shared)
        return Answer(self, name, request, lease_s, list(regions.values()))

    def control(self, op: str, request_id: str, seconds: float = 0.0) -> dict[str, Any]:
        """Cancels ("cancel") or renews ("renew") a request of any client by its id; the server's reply."""
        body = json.dumps({"op": op, "id": request_id, "seconds": seconds}).encode()
        request = infer_request("cancel", {"request": [body]}, ("state",))
        try:
            response = self._stub.ModelInfer(request, timeout=_CONTROL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise self._explain(error) from None
        except ValueError:
            raise ServeError(f"the connection to {self.url} was closed here: open another Client") from None
        return json_tensor(response, "state") or {}

    def ready(self, timeout_s: float = 5.0) -> bool:
        """Whether the server answers and the ensemble is loaded."""
        request = service_pb2.ModelReadyRequest(name=ENSEMBLE)
        try:
            return bool(self._stub.ModelReady(request, timeout=timeout_s).ready)
        except grpc.RpcError:
            return False

    def outputs(self) -> tuple[str, ...]:
        """Names of the ensemble's outputs: which kinds of answers this server gives. Raises `ServeError`."""
        request = service_pb2.ModelMetadataRequest(name=ENSEMBLE)
        try:
            metadata = self._stub.ModelMetadata(request, timeout=_CONTROL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise self._explain(error) from None
        return tuple(output.name for output in metadata.outputs)

    def _release_later(self, regions: Sequence[Region]) -> None:
        thread = threading.Thread(target=release, args=(regions,), name="release", daemon=True)
        self._releasing = [each for each in self._releasing if each.is_alive()] + [thread]
        thread.start()

    def _share(self, inputs: Mapping[str, Sequence[bytes]]) -> dict[str, Region]:
        if not is_local(self.url):
            return {}
        regions = {name: share(self._stub, items) for name, items in inputs.items()}
        return {name: region for name, region in regions.items() if region is not None}

    def _explain(self, error: Any) -> MingError:
        if error.code() == grpc.StatusCode.UNAVAILABLE and "connect" in str(error.details()):
            return ServeError(f"no server answers at {self.url}: start one with `ming-trt serve REPO`, or give --url")
        return _error(str(error.details()))


def _one_turn(
    text: str, images: int, videos: int, audios: int, system: str | None, video_options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image"}] * images + [{"type": "video", **video_options}] * videos
    parts += [{"type": "audio"}] * audios
    # An empty text beside media is no part; alone it is, so that the server refuses it with its sentence.
    if text or not parts:
        parts.append({"type": "text", "text": text})
    turns = [{"role": "system", "content": system}] if system is not None else []
    return [*turns, {"role": "user", "content": parts}]


def _content(file: Media) -> bytes:
    if isinstance(file, bytes):
        return file
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise InputError(f"'{file}' cannot be read ({error.strerror}): give the path of a file") from None


def _error(message: str) -> MingError:
    """The server's sentence as the error that the stage raised.

    A stream's errors carry no status (asking for one by the header `triton_grpc_error` crashes Triton 2.51), so the
    stages put the name of the error before the sentence.
    """
    message = message.removeprefix(f"in ensemble '{ENSEMBLE}', ").split("\n")[0].strip()
    if "is not healthy" in message:
        return ServeError("a process of the server died just now and is being started again: ask again in a moment")
    name, _, sentence = message.partition(": ")
    kind = getattr(errors, name, None) if name.isidentifier() else None
    if isinstance(kind, type) and issubclass(kind, MingError):
        return kind(sentence)
    return ServeError(message or "the server failed without a word: look into its log")
