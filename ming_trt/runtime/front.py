"""The front of an LLM service, whatever runs behind it: requests are checked and admitted, tokens become events.

A subclass has the engine: it takes sequences in (`_enqueue`), gives each of their tokens to `_take`, and may be told of
their end (`_ended`). Everything that a client sees of a service is made here, so that back ends cannot differ in it.
"""

from __future__ import annotations

import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from time import perf_counter
from typing import Any, Self

from ming_trt.errors import CancelledError, MingError, UnavailableError
from ming_trt.processing.tokenizer import CONTEXT_TOKENS
from ming_trt.runtime.cancel import CancelBoard
from ming_trt.runtime.events import ErrorEvent, Event, FinishEvent, FinishReason, Handle, Timings, TokenEvent, Usage
from ming_trt.runtime.sequence import GenerationRequest, LLMOptions, Sequence, prepare
from ming_trt.runtime.stop import TextDecoder

# Least time between two looks whether another process has cancelled a request: on cold caches a look takes a tenth of a
# millisecond, while the engine stands still.
_LOOK_SECONDS = 0.05


class Front(ABC):
    """`submit` from any thread. `vocabulary` and `hidden` are the engine's; `decoder` is needed for stop strings only;
    `board` is where cancellations from other processes are seen."""

    def __init__(
        self,
        options: LLMOptions,
        vocabulary: int,
        hidden: int,
        decoder: TextDecoder | None = None,
        board: CancelBoard | None = None,
    ) -> None:
        self.options = options
        self._vocabulary, self._hidden = vocabulary, hidden
        self._decoder, self._board = decoder, board
        self._load = 0
        self._closing = False
        # guards the two above and whatever a subclass shares between `_enqueue` and its thread
        self._wake = threading.Condition()

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None] | None = None) -> Handle:
        """Queues a request. Iterate over the handle, or give `on_event`, which is called from a thread of the
        request's own.

        Raises `InputError` for a prompt that the engine cannot take, `UnavailableError` if the queue is full or the
        LLM closed.
        """
        handle = Handle(request.request_id or uuid.uuid4().hex)
        sequence = prepare(request, handle, self.options, self._vocabulary, self._hidden, self._decoder)
        coded = self._code(sequence)
        with self._wake:
            if self._closing:
                raise UnavailableError("the LLM is shutting down: send the request to a running server")
            if self._load >= self.options.max_waiting + self.options.slots:
                raise UnavailableError(f"{self._load} requests wait or run already: try again later")
            self._enqueue(sequence, coded)
            self._load += 1
            self._wake.notify()
        if on_event is not None:
            handle.deliver(on_event)
        return handle

    @abstractmethod
    def close(self) -> None:
        """Cancels what is left and stops. Closing twice is harmless."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _code(self, sequence: Sequence) -> Any:
        """What `_enqueue` needs beside the sequence, made outside the lock. May raise `InputError`."""
        return None

    @abstractmethod
    def _enqueue(self, sequence: Sequence, coded: Any) -> None:
        """Takes a sequence in; under the lock."""

    def _ended(self, sequence: Sequence) -> None:  # noqa: B027 - not every engine has something to do then
        """The sequence has ended, whyever; called once, before its last event goes out."""

    def _ending(self, sequence: Sequence, closing: bool) -> CancelledError | None:
        """Why the sequence must end now, if its client does not want it any more or the service closes."""
        handle = sequence.handle
        if closing:
            why = "the server is shutting down"
        elif handle.cancelled or self._cancelled_elsewhere(sequence):
            why = "its client cancelled it, or its lease ran out"
        else:
            return None
        return CancelledError(f"request '{handle.request_id}' has ended: {why}")

    def _cancelled_elsewhere(self, sequence: Sequence) -> bool:
        if self._board is None:
            return False
        now = perf_counter()
        if now - sequence.looked < _LOOK_SECONDS:
            return False
        sequence.looked = now
        return self._board.is_cancelled(sequence.handle.request_id)

    def _take(self, sequence: Sequence, token: int) -> None:
        """The next token of an answer: sends what may go out, and ends the sequence if it was the last."""
        if token in sequence.stop_ids:
            return self._finish(sequence, "stop")
        sequence.ids[sequence.length] = token
        sequence.length += 1
        if sequence.matcher is None:
            self._send(sequence, [token])
        else:
            tokens, cut = sequence.matcher.push(token)
            self._send(sequence, tokens, cut)
            if cut is not None:
                return self._finish(sequence, "stop", cut=True)
        if sequence.length >= sequence.limit:
            self._finish(sequence, "length")

    def _finish(self, sequence: Sequence, reason: FinishReason, cut: bool = False) -> None:
        if sequence.matcher is not None and not cut:
            self._send(sequence, sequence.matcher.flush())
        self._release(sequence)
        queue, prefill = sequence.admitted - sequence.submitted, sequence.first_token - sequence.admitted
        timings = Timings(queue, prefill, queue + prefill, perf_counter() - sequence.first_token)
        usage = Usage(sequence.prompt_length, sequence.generated)
        sequence.handle.put(FinishEvent(reason, usage, timings, () if cut else _context(sequence)))

    def _fail(self, sequence: Sequence, error: MingError) -> None:
        """Ends a sequence with an error, unless it has ended."""
        if not sequence.ended:
            self._release(sequence)
            sequence.handle.put(ErrorEvent(error))

    def _send(self, sequence: Sequence, tokens: list[int], cut: int | None = None) -> None:
        if not tokens:
            return
        sequence.handle.put(TokenEvent(tuple(tokens), sequence.sent, _context(sequence), cut))
        sequence.sent += len(tokens)

    def _release(self, sequence: Sequence) -> None:
        sequence.ended = True
        self._ended(sequence)
        with self._wake:
            self._load -= 1


def _context(sequence: Sequence) -> tuple[int, ...]:
    """The last tokens of the answer that went out."""
    answer = sequence.ids[sequence.prompt_length :]
    return tuple(answer[max(0, sequence.sent - CONTEXT_TOKENS) : sequence.sent].tolist())
