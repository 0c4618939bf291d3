"""What a caller of the LLM gets: a handle to its request, and events that arrive on it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Literal

from ming_trt.errors import MingError
from ming_trt.runtime.engine import Array

log = logging.getLogger(__name__)

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class HiddenEvent:
    """Rows of the prefill that the request asked for, before its first token.

    `positions` int64 [n] in the prompt; `hidden` f32 [n, H] after the last norm; `embeds` f32 [n, H] as they entered
    layer 0.
    """

    positions: Array
    hidden: Array
    embeds: Array


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """New tokens of the answer. `index`: place of the first of them in the answer.

    `context_ids`: up to three tokens of the answer before them, for characters whose bytes are split between tokens.
    `text_length`: where a stop string begins inside the text of these tokens, the number of characters before it;
    else None.
    """

    token_ids: tuple[int, ...]
    index: int
    context_ids: tuple[int, ...] = ()
    text_length: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of tokens. The end token is not counted, tokens that a stop string swallowed are."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds. `queue`: until a slot was free; `prefill`: from then to the first token; `first_token`: their sum;
    `decode`: from the first token to the end."""

    queue: float
    prefill: float
    first_token: float
    decode: float


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """The end of a good answer: "stop" (end token or stop string) or "length" (max_tokens, or the context is full).

    `context_ids`: the last tokens that were sent; if they end inside a character, decoding nothing behind them as final
    gives what is left of it. Empty where a stop string ended the text.
    """

    reason: FinishReason
    usage: Usage
    timings: Timings
    context_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ErrorEvent:
    """The end of a failed or cancelled request (`CancelledError`)."""

    error: MingError


Event = HiddenEvent | TokenEvent | FinishEvent | ErrorEvent


class Handle:
    """One submitted request. Iterate over it from any one thread: the last event is a FinishEvent or an ErrorEvent.

    Events wait here without limit (an answer is short, and `max_tokens` bounds it), so a slow reader delays nobody.
    Tokens that arrive faster than they are read come as one TokenEvent.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._cancelled = threading.Event()
        self._dealt_with = threading.Event()
        self._ahead: Event | None = None
        self._ended = False

    def cancel(self) -> None:
        """Asks for the end: the slot is free at the next step. Harmless after the end."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    def put(self, event: Event) -> None:
        """Used by the LLM's worker."""
        self._events.put(event)

    def wait_for_reader(self, seconds: float) -> bool:
        """Used by the LLM's worker: until the reader has dealt with the first tokens and wants more, or that long.
        Whether it has."""
        return self._dealt_with.wait(seconds)

    def __iter__(self) -> Iterator[Event]:
        while not self._ended:
            event = self._next()
            self._ended = isinstance(event, FinishEvent | ErrorEvent)
            yield event
            if not isinstance(event, HiddenEvent) and not self._dealt_with.is_set():
                self._dealt_with.set()

    def _next(self) -> Event:
        """The next event, with the tokens that wait behind it if it is of tokens. What was read too far stays here."""
        event, self._ahead = self._ahead or self._events.get(), None
        while isinstance(event, TokenEvent) and event.text_length is None:
            if self._events.empty():  # nobody else takes events out
                return event
            self._ahead = self._events.get()
            if not isinstance(self._ahead, TokenEvent) or self._ahead.text_length is not None:
                return event
            event, self._ahead = replace(event, token_ids=event.token_ids + self._ahead.token_ids), None
        return event

    def result(self) -> tuple[list[int], FinishEvent]:
        """Waits for the end. All token ids and the FinishEvent; raises the error of an ErrorEvent."""
        ids: list[int] = []
        for event in self:
            if isinstance(event, TokenEvent):
                ids += event.token_ids
            elif isinstance(event, ErrorEvent):
                raise event.error
            elif isinstance(event, FinishEvent):
                return ids, event
        raise AssertionError("a handle ends with a FinishEvent or an ErrorEvent")

    def deliver(self, on_event: Callable[[Event], None]) -> None:
        """Calls `on_event` for every event from a thread of this request; if it raises, the request is cancelled."""

        def drain() -> None:
            failed = False
            for event in self:
                if failed:
                    continue
                try:
                    on_event(event)
                except Exception:
                    log.exception("request %s: its receiver failed; the request is cancelled", self.request_id)
                    failed = True
                    self.cancel()

        threading.Thread(target=drain, name=f"events-{self.request_id}", daemon=True).start()
