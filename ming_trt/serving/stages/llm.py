"""Model `llm`: generates tokens for many requests at once; each has a stream of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ming_trt.config import load_config
from ming_trt.processing.request import Request, parse_request
from ming_trt.runtime.cancel import CancelBoard
from ming_trt.runtime.events import ErrorEvent, Event, FinishEvent, Handle, HiddenEvent, Timings, TokenEvent, Usage
from ming_trt.runtime.query_rows import insert_query_rows, open_query_rows, read_only
from ming_trt.runtime.sequence import GenerationRequest
from ming_trt.runtime.stages import open_llm
from ming_trt.serving.graph import DRAWING, can, empty_tensors
from ming_trt.serving.stages.base import Array, Inputs, Stage, board_folder, inputs, json_array, read, read_bytes
from ming_trt.serving.stages.presence import Presence
from ming_trt.serving.stages.stream import Stream, empty


class LLMStage(Stage):
    """Inputs and outputs: docs/DESIGN.md, 4.2.

    `llm_state` JSON: `id`, `index` (place of the first token in the answer), `cut` (characters before a stop string, or
    null), and, null until the end, `finish_reason`, `usage` and `timings`.
    """

    query_rows: Array | None = None
    # Empty arrays for the outputs that drawing and speaking add.
    nothing: Mapping[str, Array] = {}

    def load(self) -> None:
        folder = board_folder(self.repository)
        self.board, self.presence = CancelBoard(folder), Presence(folder)
        components = self.bundle.manifest.components
        if can(components, DRAWING):
            self.query_rows = open_query_rows(self.bundle)
        self.nothing = empty(empty_tensors(self.name, components, load_config(self.bundle.assets).llm.hidden_size))
        self.llm = open_llm(self.bundle, self.board)

    def finalize(self) -> None:
        """Called by the server before it unloads the model."""
        self.llm.close()

    def execute(self, requests: Sequence[Any]) -> None:  # type: ignore[override]
        """Hands each request to the LLM and returns at once; its answers come from a thread of its own."""
        for request in requests:
            stream, task, events = Stream(request.get_response_sender()), None, None
            try:
                given = inputs(request)
                task = Task.of(given)
                events = self._begin(task, given)
                name = f"stream-{task.id}"
                threading.Thread(target=self._answer, args=(stream, task, events), name=name, daemon=True).start()
            except Exception as error:  # noqa: BLE001 - the client must hear of it
                if isinstance(events, Handle):
                    events.cancel()
                stream.fail(self.name, error)
                if task is not None:
                    self._leave(task, failed=True)

    def _begin(self, task: Task, request: Inputs) -> Handle | Iterable[Event]:
        """Queues the request and gives its events."""
        if task.reads_aloud:
            return [FinishEvent("stop", Usage(0, 0), Timings(0.0, 0.0, 0.0, 0.0))]
        return self.llm.submit(generation_request(request, task, self.query_rows))

    def _answer(self, stream: Stream, task: Task, events: Handle | Iterable[Event]) -> None:
        """Sends the events of one request. Whatever happens, the final flag goes out: without it the client waits."""
        failed = True
        try:
            self.presence.enter(task.id, self.name)
            for event in events:
                arrays = task.outputs(event)
                if arrays:
                    stream.send({**self.nothing, **arrays}, last=isinstance(event, FinishEvent))
            failed = False
        except Exception as error:  # noqa: BLE001 - the client must hear of it
            if isinstance(events, Handle):
                events.cancel()
            stream.fail(self.name, error)
        finally:
            self._leave(task, failed)
            stream.end()

    def _leave(self, task: Task, failed: bool) -> None:
        """The request ends here. What goes on behind it is told if it must not, and forgets the request itself."""
        self.presence.leave(task.id, self.name)
        if failed and task.begun:
            self.board.cancel(task.id)
        elif failed or not task.goes_on:
            self.board.forget(task.id)


@dataclass(slots=True)
class Task:
    """A request at this stage. `later`: arrays that go out with the next answer; `begun`: whether answers went to a
    stage that goes on by itself, which is that of speech."""

    id: str
    options: Request
    reference: Array | None
    clip: Array | None
    later: dict[str, Array] = field(default_factory=dict)
    begun: bool = False

    @classmethod
    def of(cls, request: Inputs) -> Task:
        """From the tensors of `preprocess`."""
        options = parse_request(read_bytes(request, "options")[0])
        reference = read(request, "reference").copy() if options.draw else None
        clip = read(request, "voice_clip").copy() if options.speak else None
        return cls(read_bytes(request, "request_id")[0].decode(), options, reference, clip)

    @property
    def reads_aloud(self) -> bool:
        """Whether the text itself is spoken: then the LLM has nothing to do."""
        return self.options.speak is not None and self.options.speak.read

    @property
    def goes_on(self) -> bool:
        """Whether a stage after this one works on with the request, and forgets it in the end."""
        return self.options.draw is not None or self.options.speak is not None

    def outputs(self, event: Event) -> Mapping[str, Array]:
        """The tensors that tell `postprocess` of an event; none for events that wait for a later one."""
        if isinstance(event, ErrorEvent):
            raise event.error
        if isinstance(event, HiddenEvent):
            if self.options.draw is not None:
                self.later["image_hidden"] = event.hidden
            else:
                self.later["thinker_rows"] = event.hidden + event.embeds
            return {}
        state: dict[str, Any] = {"id": self.id, "index": None, "cut": None}
        state |= {"finish_reason": None, "usage": None, "timings": None}
        tokens: Sequence[int] = ()
        context: Sequence[int] = event.context_ids
        if isinstance(event, TokenEvent):
            tokens = event.token_ids
            state |= {"index": event.index, "cut": event.text_length}
        else:
            state |= {"finish_reason": event.reason, "usage": asdict(event.usage), "timings": asdict(event.timings)}
            state["index"] = event.usage.completion_tokens
        if self.options.draw is not None:
            # The end of reading a prompt that is not answered; what follows is a picture, or an error.
            state |= {"draw": asdict(self.options.draw), "finish_reason": "stop"}
            if self.reference is not None:
                self.later["image_reference"] = self.reference
        if self.options.speak is not None:
            text = self.options.messages[-1].text if self.reads_aloud else None
            state["speak"] = {**asdict(self.options.speak), "text": text}
            if not self.begun and self.clip is not None:
                self.later["speech_clip"] = self.clip
            self.begun = True
        later, self.later = self.later, {}
        return {
            "token_ids": np.array(tokens, np.int32),
            "context_ids": np.array(context, np.int32),
            "llm_state": json_array(state),
            **later,
        }


def generation_request(request: Inputs, task: Task, query_rows: Array | None) -> GenerationRequest:
    """The LLM's request from the tensors of the stages before it. Vision rows come before audio rows."""
    vision, audio = read(request, "vision_rows"), read(request, "audio_rows")
    features = np.concatenate([vision, audio])
    if task.options.draw is not None and query_rows is not None:
        features = insert_query_rows(features, len(vision), query_rows)
    generation = GenerationRequest(
        input_ids=read(request, "input_ids"),
        modality=read(request, "modality"),
        positions=read(request, "positions"),
        position_delta=int(read(request, "position_delta")[0]),
        feature_index=read(request, "feature_index"),
        features=features,
        sampling=task.options.sampling,
        request_id=task.id,
        want_hidden="all" if task.options.speak is not None else None,
    )
    return generation if task.options.draw is None else read_only(generation)
