"""A client of the server: asks, streams the answer, cancels.

    with Client("localhost:8001") as client:
        for delta in client.ask("What is in the picture?", images=["cat.jpg"]):
            print(delta.text, end="")

Neither numpy nor torch is needed. Media are sent as the files they are; the server decodes them.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from grpc.experimental import ChannelOptions
from tritonclient.grpc import service_pb2, service_pb2_grpc

from ming_trt.errors import InputError, MingError, ServeError
from ming_trt.serving.answer import Answer, server_error
from ming_trt.serving.graph import ENSEMBLE
from ming_trt.serving.leases import Leases
from ming_trt.serving.local_memory import Region, is_local, share
from ming_trt.serving.wire import infer_request, json_object, raw_tensors

DEFAULT_URL = "localhost:8001"
# The server ends a request whose client has not been heard of for this long.
LEASE_S = 15.0
# Seconds of sound that may be on their way beyond what was read here.
AHEAD_S = 20.0
Media = bytes | str | Path
_CONTROL_TIMEOUT_S = 10.0
# How long closing waits for streams that nobody reads any more.
_CLOSE_TIMEOUT_S = 2.0
_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A message then wakes the thread that reads it, and no other of Python's before.
    (ChannelOptions.SingleThreadedUnaryStream, 1),
]
# A question is one message. So the call that may stream both ways is made as one that streams answers only: it is the
# same to the server, and the question needs no thread that sends it.
_STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"


class Client:
    """A connection to a server, by its gRPC address. Threads may share it; each `ask` has a stream of its own."""

    def __init__(self, url: str = DEFAULT_URL) -> None:
        self.url = url.removeprefix("grpc://")
        self._channel = grpc.insecure_channel(self.url, options=_OPTIONS)
        self._draining: list[threading.Thread] = []
        self._leases = Leases()
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._stream = self._channel.unary_stream(
            _STREAM,
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )

    def close(self) -> None:
        """Ends the connection, and with it the answers that still stream."""
        for thread in self._draining:
            thread.join(_CLOSE_TIMEOUT_S)
        self._leases.close()
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
        draw: Mapping[str, Any] | None = None,
        speak: Mapping[str, Any] | None = None,
        voice: Media | None = None,
        request_id: str | None = None,
        lease_s: float = LEASE_S,
    ) -> Answer:
        """Asks one question and returns at once; the answer is read by iterating.

        Media are paths or the bytes of encoded files. Without `messages` the question is one user turn: images, videos,
        audios, then the text. With `messages` (docs/DESIGN.md, 4.2) their media parts take the files in order, kind by
        kind. `draw`: the answer is a picture (options: docs/image.md); `speak`: it is also spoken (docs/speech.md), by
        the voice in the recording `voice` if one is given. `lease_s` 0: the server goes on even without this client.
        Raises `InputError` for files that cannot be read; the iteration raises the server's errors.
        """
        if messages is not None and (text or system):
            raise InputError("'messages' come with 'text' or 'system': put everything into the messages")
        if messages is None:
            messages = _one_turn(text, len(images), len(videos), len(audios), system, video_options or {})
        name = request_id or uuid.uuid4().hex
        if speak is not None and lease_s > 0:
            speak = {"ahead": AHEAD_S, **speak}
        body = {"id": name, "messages": list(messages), "thinking": thinking, "task": task, "dialect": dialect}
        body |= {"sampling": dict(sampling or {}), "lease": lease_s, "draw": draw, "speak": speak}
        inputs = {"request": [json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")]}
        for kind, files in (("images", images), ("videos", videos), ("audios", audios)):
            if files:
                inputs[kind] = [_content(file) for file in files]
        if voice is not None:
            inputs["voice"] = [_content(voice)]
        regions = self._share(inputs)
        shared = {kind: (region.name, region.size) for kind, region in regions.items()}
        # Without names the server sends what it has: one that cannot draw says so in its own words.
        outputs = ("text", "state") if draw is None and speak is None else ()
        request = infer_request(ENSEMBLE, inputs, outputs, shared)
        request.id = name.encode("utf-8", "replace").decode()  # by this name Triton's traces and log know it
        ahead = (speak or {}).get("ahead")
        ahead_s = float(ahead) if isinstance(ahead, int | float) else 0.0
        return Answer(self, name, request, lease_s, list(regions.values()), ahead_s)

    def control(self, op: str, request_id: str, seconds: float = 0.0) -> dict[str, Any]:
        """Cancels ("cancel") or renews ("renew") a request of any client by its id, or says how many `seconds` of its
        sound were taken ("heard"); the server's reply."""
        body = json.dumps({"op": op, "id": request_id, "seconds": seconds}).encode()
        request = infer_request("cancel", {"request": [body]}, ("state",))
        try:
            response = self._stub.ModelInfer(request, timeout=_CONTROL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise self._explain(error) from None
        except ValueError:
            raise ServeError(f"the connection to {self.url} was closed here: open another Client") from None
        return json_object(raw_tensors(response).get("state", b""), "state")

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

    def _later(self, work: Callable[[], None]) -> None:
        """Does it in the background; `close` waits a little for it."""
        thread = threading.Thread(target=work, name="drain", daemon=True)
        self._draining = [each for each in self._draining if each.is_alive()] + [thread]
        thread.start()

    def _share(self, inputs: Mapping[str, Sequence[bytes]]) -> dict[str, Region]:
        if not is_local(self.url):
            return {}
        regions = {name: share(self._stub, items) for name, items in inputs.items()}
        return {name: region for name, region in regions.items() if region is not None}

    def _explain(self, error: Any) -> MingError:
        details = str(error.details())
        if error.code() == grpc.StatusCode.UNAVAILABLE and ("connect" in details or "resolving" in details):
            return ServeError(f"no server answers at {self.url}: start one with `ming-trt serve REPO`, or give --url")
        if error.code() == grpc.StatusCode.UNAVAILABLE or "Stream removed" in details:
            return ServeError(f"the connection to {self.url} broke off ({details}): see whether the server still runs")
        return server_error(details)


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
