"""The spoken part of answers in `postprocess`: pieces of text go to model `speech` as they become complete, and its
audio goes to the client while further text comes.

Every piece of text arrives as a request of its own; the audio of what it completes is sent as its later responses. So a
request's audio waits for that of the one before it, and nothing waits for the audio but that of the next.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ming_trt.processing.speech_text import Piece, StreamSplitter, pieces_to_read
from ming_trt.runtime.cancel import CancelBoard
from ming_trt.serving.stages.base import Array, json_array
from ming_trt.serving.stages.presence import Presence
from ming_trt.serving.stages.stream import Stream, call, output

# Requests that ended early are remembered, as more of their text may come.
_REMEMBERED = 1024


@dataclass(slots=True)
class Reply:
    """A part of an answer: its text, the state for the client, and (with the first part) the rows `thinker_rows` of the
    LLM and the clip `speech_clip`. `stream` takes the responses to this part."""

    stream: Stream
    text: str
    state: dict[str, Any]
    arrays: Mapping[str, Array]

    @property
    def last(self) -> bool:
        """Whether the answer ends with it."""
        return self.state["finish_reason"] is not None


@dataclass(slots=True, eq=False)
class _Session:
    """A spoken answer. `calls` of `speech` were made, of which `running` go on."""

    id: str
    options: Mapping[str, Any]
    arrays: Mapping[str, Array]
    splitter: StreamSplitter = field(default_factory=StreamSplitter)
    calls: int = 0
    running: int = 0
    samples: int = 0
    before: threading.Event | None = None


class Speaker:
    """The spoken answers of this process."""

    def __init__(self, board: CancelBoard, presence: Presence) -> None:
        self._board, self._presence = board, presence
        self._sessions: dict[str, _Session] = {}
        self._ended: dict[str, None] = {}
        self._lock = threading.Lock()

    def say(self, reply: Reply) -> None:
        """Sends the text of a reply and has what it completes spoken. Returns at once."""
        session = self._session(reply)
        if session is None:  # the answer has failed already, and the client knows
            reply.stream.end()
            return
        try:
            found = self._pieces(session, reply)
        except Exception:
            self._end(session, failed=True)
            raise
        # A call without pieces closes a session of `speech` that earlier ones opened.
        if not found and not (reply.last and session.calls):
            if reply.last:
                self._end(session, failed=False)
            reply.stream.send(output(reply.text, {**reply.state, "audio_samples": 0}), last=True)
            return
        going = {**reply.state, "finish_reason": None, "usage": None, "timings": None} if reply.last else reply.state
        reply.stream.send(output(reply.text, going), last=False)
        before, session.before = session.before, threading.Event()
        arguments = (session, reply, self._request(session, found, reply.last), before, session.before)
        session.calls += 1
        session.running += 1
        threading.Thread(target=self._forward, args=arguments, name=f"speak-{session.id}", daemon=True).start()

    def _session(self, reply: Reply) -> _Session | None:
        name = str(reply.state["id"])
        with self._lock:
            if name in self._ended:
                return None
            if name not in self._sessions:
                self._sweep()
                self._sessions[name] = _Session(name, reply.state["speak"], reply.arrays)
                self._presence.enter(name, "postprocess")
            return self._sessions[name]

    def _sweep(self) -> None:
        """Drops answers whose text will never end: they were cancelled before anything was spoken."""
        for name, session in list(self._sessions.items()):
            if not session.running and self._board.is_cancelled(name):
                self._drop(name)

    def _pieces(self, session: _Session, reply: Reply) -> list[Piece]:
        if session.options["read"]:
            return pieces_to_read(str(session.options["text"]))
        found = session.splitter.feed(reply.text)
        return [*found, *session.splitter.finish()] if reply.last else found

    def _request(self, session: _Session, found: list[Piece], last: bool) -> dict[str, Array]:
        body = {key: session.options[key] for key in ("voice", "voice_text", "seed", "ahead")}
        body |= {"id": session.id, "number": session.calls, "pieces": [asdict(piece) for piece in found]}
        # The language of this text decides on the voice, where none is named.
        body |= {"text": session.options["text"] or session.splitter.opening, "last": last}
        arrays = {name: array if session.calls == 0 else array[:0] for name, array in session.arrays.items()}
        return {"request": json_array(body), **arrays}

    def _forward(
        self,
        session: _Session,
        reply: Reply,
        request: Mapping[str, Array],
        before: threading.Event | None,
        mine: threading.Event,
    ) -> None:
        """Sends the audio of one call, when that of the call before has gone out."""
        failed = True
        try:
            for state, arrays in call("speech", request, "audio"):
                if before is not None:
                    before.wait()
                session.samples += len(arrays["audio"])
                reply.stream.send(output("", {"id": session.id, "speech": state}, **arrays), last=False)
            if before is not None:
                before.wait()
            if reply.last:
                reply.stream.send(output("", {**reply.state, "audio_samples": session.samples}), last=True)
            failed = False
        except Exception as error:  # noqa: BLE001 - the client must hear of it
            reply.stream.fail("speech", error)
        finally:
            with self._lock:
                session.running -= 1
            if failed or reply.last:
                self._end(session, failed)
            mine.set()
            reply.stream.end()

    def _end(self, session: _Session, failed: bool) -> None:
        """The answer ends; after a failure the LLM and `speech` must end, too."""
        if failed:
            self._board.cancel(session.id)
        with self._lock:
            if failed:
                self._ended[session.id] = None
                while len(self._ended) > _REMEMBERED:
                    # Long after their end: what they left on the board goes with them.
                    self._board.forget(self._ended_first())
            self._drop(session.id, forget=not failed)

    def _ended_first(self) -> str:
        name = next(iter(self._ended))
        del self._ended[name]
        return name

    def _drop(self, name: str, forget: bool = True) -> None:
        if self._sessions.pop(name, None) is not None:
            self._presence.leave(name, "postprocess")
            if forget:
                self._board.forget(name)
