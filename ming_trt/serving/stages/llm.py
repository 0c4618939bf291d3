"""Model `llm`: generates tokens for many requests at once; each has a stream of its own."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import triton_python_backend_utils as pb

from ming_trt.errors import EngineError, MingError
from ming_trt.processing.request import parse_request
from ming_trt.runtime.cancel import CancelBoard
from ming_trt.runtime.events import ErrorEvent, Event, FinishEvent, Handle, TokenEvent
from ming_trt.runtime.sequence import GenerationRequest
from ming_trt.runtime.stages import llm_options, open_llm
from ming_trt.serving.stages.base import (
    Array,
    Stage,
    board_folder,
    internal_error,
    json_array,
    read,
    read_bytes,
    tensors,
    triton_error,
)
from ming_trt.serving.stages.presence import Presence

if TYPE_CHECKING:
    from ming_trt.runtime.generator import LLM
    from ming_trt.trtllm.service import ExecutorLLM

log = logging.getLogger(__name__)

# Folder of a TensorRT-LLM engine that serves instead of the bundle's `llm`; the tensors stay the same.
ENGINE_VARIABLE = "MING_TRT_LLM_ENGINE"


class Stream:
    """The responses to one request. The final flag goes with the last response, errors too: an error that is followed
    by a separate flag leaves the request in flight in an ensemble of Triton 2.51, which then does not stop in time."""

    def __init__(self, sender: Any) -> None:
        self._sender = sender
        self._ended = False

    def send(self, response: Any, last: bool) -> None:
        """Sends a response; nothing may follow the `last` one."""
        self._ended = self._ended or last
        self._sender.send(response, flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0)

    def fail(self, error: Any) -> None:
        """Ends the stream with a `TritonError`."""
        self.send(pb.InferenceResponse(error=error), last=True)

    def end(self) -> None:
        """Sends the final flag, if it has not gone out."""
        if not self._ended:
            self._ended = True
            self._sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


class LLMStage(Stage):
    """Inputs and outputs: docs/DESIGN.md, 4.2.

    `llm_state` JSON: `id`, `index` (place of the first token in the answer), `cut` (characters before a stop string, or
    null), and, null until the end, `finish_reason`, `usage` and `timings`.
    """

    def load(self) -> None:
        folder = board_folder(self.repository)
        self.board, self.presence = CancelBoard(folder), Presence(folder)
        engine = os.environ.get(ENGINE_VARIABLE)
        self.llm: LLM | ExecutorLLM
        if engine:
            from ming_trt.trtllm.service import open_service

            self.llm = open_service(Path(engine), self.bundle, llm_options(self.bundle), self.board)
        else:
            self.llm = open_llm(self.bundle, self.board)

    def finalize(self) -> None:
        """Called by the server before it unloads the model."""
        self.llm.close()

    def execute(self, requests: Sequence[Any]) -> None:  # type: ignore[override]
        """Hands each request to the LLM and returns at once; its answers come from a thread of its own."""
        for request in requests:
            stream, request_id = Stream(request.get_response_sender()), ""
            try:
                generation = generation_request(request)
                request_id = generation.request_id
                self.presence.enter(request_id, self.name)
                handle = self.llm.submit(generation)
                name = f"stream-{request_id}"
                threading.Thread(target=self._answer, args=(stream, handle), name=name, daemon=True).start()
            except MingError as error:
                stream.fail(triton_error(error))
                self._forget(request_id)
            except Exception as error:
                log.exception("stage %s failed", self.name)
                stream.fail(internal_error(self.name, error))
                self._forget(request_id)

    def _answer(self, stream: Stream, handle: Handle) -> None:
        """Sends the events of one request. Whatever happens, the final flag goes out: without it the client waits."""
        try:
            for event in handle:
                if isinstance(event, ErrorEvent):
                    raise event.error
                arrays = outputs_of(handle.request_id, event)
                if arrays:
                    stream.send(pb.InferenceResponse(tensors(arrays)), last=isinstance(event, FinishEvent))
        except MingError as error:
            stream.fail(triton_error(error))
        except Exception as error:
            log.exception("stage %s failed", self.name)
            handle.cancel()
            stream.fail(internal_error(self.name, error))
        finally:
            stream.end()
            self._forget(handle.request_id)

    def _forget(self, request_id: str) -> None:
        self.presence.leave(request_id)
        self.board.forget(request_id)


def generation_request(request: Any) -> GenerationRequest:
    """The LLM's request from the tensors of the stages before it. Vision rows come before audio rows."""
    options = parse_request(read_bytes(request, "options")[0])
    return GenerationRequest(
        input_ids=read(request, "input_ids"),
        modality=read(request, "modality"),
        positions=read(request, "positions"),
        position_delta=int(read(request, "position_delta")[0]),
        feature_index=read(request, "feature_index"),
        features=np.concatenate([read(request, "vision_rows"), read(request, "audio_rows")]),
        sampling=options.sampling,
        request_id=read_bytes(request, "request_id")[0].decode(),
    )


def outputs_of(request_id: str, event: Event) -> Mapping[str, Array]:
    """The tensors that tell `postprocess` of an event; none for events that do not concern it."""
    state: dict[str, Any] = {"id": request_id, "index": None, "cut": None}
    state |= {"finish_reason": None, "usage": None, "timings": None}
    tokens: Sequence[int] = ()
    context: Sequence[int] = ()
    if isinstance(event, TokenEvent):
        tokens, context = event.token_ids, event.context_ids
        state |= {"index": event.index, "cut": event.text_length}
    elif isinstance(event, FinishEvent):
        state |= {"finish_reason": event.reason, "usage": asdict(event.usage), "timings": asdict(event.timings)}
        context, state["index"] = event.context_ids, event.usage.completion_tokens
    elif isinstance(event, ErrorEvent):
        raise EngineError("an error has no tensors")
    else:
        return {}
    return {
        "token_ids": np.array(tokens, np.int32),
        "context_ids": np.array(context, np.int32),
        "llm_state": json_array(state),
    }
