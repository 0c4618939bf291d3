"""Model `speech`: pieces of text to audio. Not a step of the graph: `postprocess` calls it, a few times per answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from ming_trt.errors import CancelledError, EngineError, UnavailableError
from ming_trt.processing.speech_text import Piece
from ming_trt.processing.voice import Voice
from ming_trt.runtime.audio_contract import to_pcm
from ming_trt.runtime.cancel import CancelBoard
from ming_trt.runtime.heard import Allowance
from ming_trt.runtime.speech import Speech, SpeechChunk, open_speech
from ming_trt.runtime.speech_clock import Lane
from ming_trt.runtime.voices import Voices
from ming_trt.serving.stages.base import Array, Inputs, Stage, board_folder, inputs, json_array, read, read_json
from ming_trt.serving.stages.presence import Presence
from ming_trt.serving.stages.stream import CallStream

_POLL_SECONDS = 0.05
MAX_ANSWERS = 64
"""Answers that are spoken at the same time: each has two threads and a cache of the talker."""
# Answers that failed are remembered, as a call for them may still be on its way.
_REMEMBERED = 1024


@dataclass(slots=True)
class Call:
    """A call of the model: pieces of an answer, in which it is call `number`; `last` ends the answer's text."""

    stream: CallStream
    number: int
    pieces: list[Piece]
    last: bool


class Session:
    """The calls for one answer: their pieces in order for the talker, and whose audio a chunk is.

    `lane` has what the time until the latest chunk went into.
    """

    def __init__(self, request_id: str, board: CancelBoard, sample_rate: int, ahead: float) -> None:
        self.id, self._rate = request_id, sample_rate
        self._allowance = Allowance(board, request_id, ahead)
        self.open: list[Call] = []
        self._owners: list[Call] = []  # by the number of the piece
        self._calls: dict[int, Call] = {}
        self._arrived = threading.Condition()
        self._board = board
        self.lane = Lane()
        self._complete: float | None = None  # when the last text came

    def add(self, call: Call) -> None:
        """A further call, in any order."""
        with self._arrived:
            self._calls[call.number] = call
            if call.last:
                self._complete = perf_counter()
            self.open.append(call)
            self._arrived.notify()

    def cancelled(self) -> bool:
        return self._board.is_cancelled(self.id)

    def pieces(self) -> Iterator[Piece]:
        """All pieces of the answer in order, as they come. Raises `CancelledError`."""
        number = 0
        while True:
            with self._arrived:
                while number not in self._calls:
                    if self.cancelled():
                        raise CancelledError(f"request '{self.id}' was cancelled")
                    self._arrived.wait(_POLL_SECONDS)
                call = self._calls.pop(number)
            self._owners += [call] * len(call.pieces)
            yield from call.pieces
            if call.last:
                return
            number += 1

    def send(self, chunk: SpeechChunk) -> None:
        """Sends a chunk to the call whose piece it speaks, when the client has room for it. Raises `CancelledError`."""
        self._allowance.spend(len(chunk.audio) / self._rate)
        self.lane.lap("listener")
        call = self._owners[chunk.piece]
        ends = chunk.last and self._owners.index(call) + len(call.pieces) == chunk.piece + 1
        state = {"piece": chunk.piece, "text": chunk.text, "seconds": chunk.seconds, "last": chunk.last}
        state |= {"codes": chunk.codes, "sample_rate": self._rate}
        if chunk.last:
            state["clock"] = self._clock()
        arrays: dict[str, Array] = {"audio": to_pcm(chunk.audio), "state": json_array(state)}
        call.stream.send(arrays, last=ends)
        if ends:
            self.open.remove(call)

    def _clock(self) -> dict[str, dict[str, float] | None]:
        """Seconds by label since the first call, and since the last text has come."""
        path, complete = self.lane.path, self._complete
        return {"whole": path.split(), "after_text": None if complete is None else path.split(complete)}


class SpeechStage(Stage):
    """`request` (JSON: `id`, `number` of the call, `pieces`, `last`, `text`, `voice`, `voice_text`, `seed`, `ahead`);
    with the first call `thinker_rows` f32 [L, H] and `speech_clip` f32 [n] at 16 kHz, else without rows.

    Responses: `audio` i16 [n] at the decoder's rate, and `state` (`piece`, its `text`, `seconds` since the first call,
    whether it is the `last` of the piece, and then `codes` and `clock`; `sample_rate`). `clock`: seconds by label
    (`speech_clock.LABELS`), of the `whole` time since the first call and of that `after_text`, which is since the last
    call came (null before); each adds up.
    """

    speech: Speech
    voices: Voices

    def load(self) -> None:
        folder = board_folder(self.repository)
        self.board, self.presence = CancelBoard(folder), Presence(folder)
        self.speech, self.voices = open_speech(self.bundle)
        self._sessions: dict[str, Session] = {}
        self._failed: dict[str, None] = {}
        self._lock = threading.Lock()

    def finalize(self) -> None:
        """Called by the server before it unloads the model."""
        self.voices.close()

    def execute(self, requests: Sequence[Any]) -> None:  # type: ignore[override]
        """Takes each call and returns at once; an answer's audio comes from threads of its own."""
        for request in requests:
            stream = CallStream(request.get_response_sender())
            try:
                self._take(inputs(request), stream)
            except Exception as error:  # noqa: BLE001 - the client must hear of it
                stream.fail(self.name, error)

    def _take(self, request: Inputs, stream: CallStream) -> None:
        body = read_json(request, "request")
        name = str(body["id"])
        call = Call(stream, int(body["number"]), [Piece(**piece) for piece in body["pieces"]], bool(body["last"]))
        with self._lock:
            if name in self._failed:
                raise CancelledError(f"the speech of request '{name}' has ended with an error")
            session = self._sessions.get(name)
            if session is None:
                if len(self._sessions) >= MAX_ANSWERS:
                    self._remember(name)
                    raise UnavailableError(f"{MAX_ANSWERS} answers are being spoken already: ask again later")
                session = Session(name, self.board, self.speech.sample_rate, float(body["ahead"]))
                self._sessions[name] = session
            session.add(call)
        if call.number == 0:
            rows, clip = read(request, "thinker_rows").copy(), read(request, "speech_clip").copy()
            arguments = (session, body, rows if len(rows) else None, clip)
            threading.Thread(target=self._speak, args=arguments, name=f"speech-{name}", daemon=True).start()

    def _voice(self, body: dict[str, Any], clip: Array) -> Voice:
        if len(clip):
            return self.voices.from_clip(clip, str(body["voice_text"]))
        return self.voices.named(body["voice"], str(body["text"]))

    def _speak(self, session: Session, body: dict[str, Any], thinker: Array | None, clip: Array) -> None:
        """Speaks a whole answer."""
        self.presence.enter(session.id, self.name)
        failure: Exception | None = None
        try:
            voice = self._voice(body, clip)
            session.lane.lap("voice")
            spoken = self.speech.speak(
                session.pieces(),
                voice,
                thinker=thinker,
                seed=int(body["seed"]),
                cancelled=session.cancelled,
                lane=session.lane,
            )
            for chunk in spoken:
                session.send(chunk)
        except EngineError as error:
            failure = EngineError(f"stage 'speech': {error}")
        except Exception as error:  # noqa: BLE001 - the client must hear of it
            failure = error
        finally:
            self._close(session, failure)

    def _remember(self, name: str) -> None:
        """That no more of this answer is spoken. The lock is held."""
        self._failed[name] = None
        while len(self._failed) > _REMEMBERED:
            del self._failed[next(iter(self._failed))]

    def _close(self, session: Session, failure: Exception | None) -> None:
        with self._lock:
            self._sessions.pop(session.id, None)
            if failure is not None:
                self._remember(session.id)
            left = list(session.open)
        for call in left:
            if failure is None:  # the call that only says that nothing more comes
                call.stream.end()
            else:
                call.stream.fail(self.name, failure)
        self.presence.leave(session.id, self.name)
