"""An answer of the server as it streams: its pieces, its end, its lease, and how much of its sound was taken."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc

from ming_trt.errors import MingError, ServeError, parse_error
from ming_trt.serving.graph import ENSEMBLE
from ming_trt.serving.local_memory import Region, release
from ming_trt.serving.wire import first_item, json_object, raw_tensors

if TYPE_CHECKING:
    from ming_trt.serving.client import Client

# How long a stream that nobody reads any more may take to end.
_DRAIN_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer: its text (may be empty) and the server's state (`index`, `finish_reason`, ...).

    `image`: a PNG file, of the picture or (`preview`) of what it looks like so far; `audio`: 16-bit samples, mono,
    little end first, at `sample_rate`. `progress`: denoising steps that are done, and all.
    """

    text: str
    state: Mapping[str, Any]
    image: bytes | None = None
    audio: bytes = b""

    @property
    def progress(self) -> tuple[int, int] | None:
        return (int(self.state["step"]), int(self.state["steps"])) if "step" in self.state else None

    @property
    def preview(self) -> bool:
        return "preview" in self.state

    @property
    def sample_rate(self) -> int:
        return int(self.state.get("speech", {}).get("sample_rate", 0))


class Answer:
    """The answer to one question, as it comes. Iterate over it once; leaving its `with`, or `cancel`, ends it early.

    After the end: `text`, `finish_reason` ("stop" or "length"), `usage` and `timings` as the server gave them, and the
    client's own clock: `first_token_s` until the first text, `first_audio_s` until the first sound, `seconds` in all.
    Of a request with `draw`: `image` (PNG) and `picture` (seed, size asked for and given, steps, seconds of each part).
    Of one with `speak`: `speaking`, the clock of the model that spoke (docs/DESIGN.md, 4.2).
    """

    def __init__(
        self,
        client: Client,
        request_id: str,
        request: Any,
        lease_s: float,
        regions: Sequence[Region] = (),
        ahead_s: float = 0.0,
    ) -> None:
        self.id = request_id
        self.text = ""
        self.finish_reason: str | None = None
        self.usage: Mapping[str, Any] = {}
        self.timings: Mapping[str, Any] = {}
        self.image: bytes | None = None
        self.picture: Mapping[str, Any] = {}
        self.speaking: Mapping[str, Any] = {}
        self.first_token_s: float | None = None
        self.first_audio_s: float | None = None
        self.seconds = 0.0
        self._client = client
        self._ended = threading.Event()
        self._lost = ""
        self._regions = list(regions)
        self._ahead_s = ahead_s
        self._heard_s = self._told_s = 0.0
        self._complete = False
        self._started = time.perf_counter()
        self._call = client._stream(request)
        self._deltas = self._read()
        if lease_s > 0:
            client._leases.add(self, lease_s)

    def __iter__(self) -> Iterator[Delta]:
        return self._deltas

    def __next__(self) -> Delta:
        return next(self._deltas)

    def __enter__(self) -> Answer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._deltas.close()
        self._stop()

    def cancel(self) -> None:
        """Asks the server to end the request; harmless after its end. The iteration then ends with `CancelledError`."""
        if not self._ended.is_set():
            self._client.control("cancel", self.id)

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
            "picture": dict(self.picture),
            "speaking": dict(self.speaking),
            "first_token_s": self.first_token_s,
            "first_audio_s": self.first_audio_s,
            "seconds": self.seconds,
            # The first token belongs to the prefill.
            "tokens_per_s": (tokens - 1) / decode if tokens > 1 and self.first_token_s and decode > 0 else None,
        }

    def _read(self) -> Generator[Delta, None, None]:
        failure: MingError | None = None
        try:
            for message in self._call:
                # Read on to the end of the stream, also after an error: see `_drain`.
                if message.error_message:
                    failure = failure or server_error(message.error_message)
                    continue
                delta = self._delta(message.infer_response)
                if delta is not None:
                    yield delta
                    self._hear(delta)
            self._complete = True
        except grpc.RpcError as error:
            self._complete, failure = True, self._explain(error)
        finally:
            self._stop()
        if failure is None and self.finish_reason is None:
            failure = ServeError("the server ended the answer without a finish reason: look into its log")
        if failure is not None:
            raise failure

    def _hear(self, delta: Delta) -> None:
        """Tells the server how much sound was taken, so that it sends more: the back-pressure of a slow reader."""
        if not delta.audio or not self._ahead_s:
            return
        self._heard_s += len(delta.audio) / 2 / delta.sample_rate
        if self._heard_s - self._told_s >= self._ahead_s / 4:
            self._tell()

    def _tell(self) -> None:
        heard = self._heard_s
        with contextlib.suppress(MingError):  # it is said again with the next renewal of the lease
            self._client.control("heard", self.id, heard)
            self._told_s = heard

    def _stop(self) -> None:
        """The end of this answer for its reader; if that is not the end of the stream, it is read to there unseen."""
        if self._ended.is_set():
            return
        self.seconds = time.perf_counter() - self._started
        self._ended.set()
        if self._complete:
            release(self._regions)
        else:
            self._client._later(self._drain)

    def _drain(self) -> None:
        """Cancels the request and waits for the end of its stream.

        Ending the stream from here is what one would expect, but Triton 2.51 then keeps the request, and with it the
        ensemble, in memory for ever. Shared memory, too, is in use until the request has ended.
        """
        emergency = threading.Timer(_DRAIN_TIMEOUT_S, self._call.cancel)
        emergency.daemon = True
        emergency.start()
        with contextlib.suppress(MingError):
            self._client.control("cancel", self.id)
        with contextlib.suppress(grpc.RpcError):
            for _ in self._call:
                pass
        emergency.cancel()
        release(self._regions)

    def _delta(self, response: Any) -> Delta | None:
        found = raw_tensors(response)
        if "text" not in found or "state" not in found:
            return None
        text, state = first_item(found["text"]).decode("utf-8", "replace"), json_object(found["state"], "state")
        image = first_item(found["image"]) if found.get("image") else None
        audio = found.get("audio", b"")
        now = time.perf_counter() - self._started
        if text and self.first_token_s is None:
            self.first_token_s = now
        if audio and self.first_audio_s is None:
            self.first_audio_s = now
        if image is not None and "picture" in state:
            self.image, self.picture = image, state["picture"]
        self.speaking = state.get("speech", {}).get("clock") or self.speaking
        self.text += text
        if state.get("finish_reason"):
            self.finish_reason = str(state["finish_reason"])
            self.usage, self.timings = state.get("usage") or {}, state.get("timings") or {}
        return Delta(text, state, image, audio)

    def _explain(self, error: Any) -> MingError:
        if self._lost:
            return ServeError(self._lost)
        return self._client._explain(error)

    @property
    def ended(self) -> bool:
        """Whether nobody reads this answer any more."""
        return self._ended.is_set()

    def renew(self, lease_s: float) -> None:
        """Tells the server that this answer is still wanted, and looks whether it still works on it (`leases.py`)."""
        try:
            reply = self._client.control("renew", self.id, lease_s)
        except MingError:
            return  # the stream itself reports a server that is gone
        if self._heard_s > self._told_s:
            self._tell()
        if reply.get("lost") and not self.ended:
            self._lost = f"the server lost request '{self.id}', since its model '{reply['lost']}' died: ask again"
            self._call.cancel()


def server_error(message: str) -> MingError:
    """The server's sentence as the error that the stage raised.

    A stream's errors carry no status (asking for one by the header `triton_grpc_error` crashes Triton 2.51), so the
    stages put the name of the error before the sentence.
    """
    message = message.removeprefix(f"in ensemble '{ENSEMBLE}', ").split("\n")[0].strip()
    if "is not healthy" in message:
        return ServeError("a process of the server died just now and is being started again: ask again in a moment")
    return parse_error(message) or ServeError(message or "the server failed without a word: look into its log")
