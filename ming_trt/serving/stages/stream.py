"""Answers of decoupled models: the responses to one request, and calls of such models by others."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from ming_trt.errors import EngineError, MingError, parse_error
from ming_trt.serving.graph import Tensor
from ming_trt.serving.stages.base import Array, internal_error, json_array, tensors, text_array, triton_error

# Of `llm_state`, what the client has no use for.
_PRIVATE = ("cut", "draw", "speak")
log = logging.getLogger(__name__)


class Stream:
    """The responses to one request. The final flag goes with the last response, errors too: an error that is followed
    by a separate flag leaves the request in flight in an ensemble of Triton 2.51, which then does not stop in time."""

    def __init__(self, sender: Any) -> None:
        self._sender = sender
        self._ended = False

    def send(self, arrays: Mapping[str, Array], last: bool) -> None:
        """Sends a response; nothing may follow the `last` one."""
        self._send(pb.InferenceResponse(tensors(arrays)), last)

    def fail(self, stage: str, error: Exception) -> None:
        """Ends the stream with an error, unless it has ended; what is not a `MingError` is logged."""
        if not isinstance(error, MingError):
            log.error("stage %s failed", stage, exc_info=error)
        if not self._ended:
            triton = triton_error(error) if isinstance(error, MingError) else internal_error(stage, error)
            self._send(pb.InferenceResponse(error=triton), last=True)

    def end(self) -> None:
        """Sends the final flag, if it has not gone out."""
        if not self._ended:
            self._ended = True
            self._sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _send(self, response: Any, last: bool) -> None:
        self._ended = self._ended or last
        self._sender.send(response, flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0)


class CallStream(Stream):
    """The responses of a model that other stages call. Its errors travel as `state` `{"error": "NAME: SENTENCE"}`: the
    caller of a decoupled model never gets a real one in Triton 2.51, and waits for ever."""

    def fail(self, stage: str, error: Exception) -> None:
        if not isinstance(error, MingError):
            log.error("stage %s failed", stage, exc_info=error)
            error = EngineError(f"stage '{stage}' failed ({type(error).__name__}: {error}): look into the server's log")
        if not self._ended:
            self.send({"state": json_array({"error": f"{type(error).__name__}: {error}"})}, last=True)


def call(model: str, arrays: Mapping[str, Array], output: str) -> Iterator[tuple[dict[str, Any], dict[str, Array]]]:
    """Calls a decoupled model of this server with the outputs `state` and `output`; the state and the other arrays of
    its responses, as they come. Raises the error that ends them."""
    outputs = [output, "state"]
    request = pb.InferenceRequest(model_name=model, requested_output_names=outputs, inputs=tensors(arrays))
    for response in request.exec(decoupled=True):
        if response.has_error():
            message = response.error().message()
            raise parse_error(message) or EngineError(f"stage '{model}' failed ({message}): look into the server's log")
        found = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
        if found:
            state = json.loads(bytes(found.pop("state").reshape(-1)[0]))
            if "error" in state:
                raise parse_error(state["error"]) or EngineError(state["error"])
            yield state, found


def empty(outputs: Mapping[str, Tensor]) -> dict[str, Array]:
    """Arrays without elements for tensors that have nothing to tell: an ensemble wants all of a step's outputs."""
    return {name: np.zeros([max(size, 0) for size in t.shape], t.dtype) for name, t in outputs.items()}


def output(text: str, state: Mapping[str, Any], **arrays: Array) -> dict[str, Array]:
    """The outputs of one answer to the client: without what the stages tell each other in `state`."""
    public = dict(state)
    for key in _PRIVATE:
        public.pop(key, None)
    return {"text": text_array(text), "state": json_array(public), **arrays}
