"""Model `postprocess`: tokens to text."""

from __future__ import annotations

from typing import Any

from ming_trt.runtime.stages import open_tokenizer
from ming_trt.serving.stages.base import Array, Stage, json_array, read, read_json, text_array


class PostprocessStage(Stage):
    """`token_ids`, `context_ids`, `llm_state` → `text` BYTES [1] (what the tokens add) and `state` BYTES [1].

    A character whose bytes are split between answers comes with its last byte; the context tells its beginning.
    """

    def load(self) -> None:
        self.tokenizer = open_tokenizer(self.bundle)

    def answer(self, request: Any) -> dict[str, Array]:
        state = read_json(request, "llm_state")
        tokens, context = read(request, "token_ids").tolist(), read(request, "context_ids").tolist()
        text = self.tokenizer.decode_delta(context, tokens, final=state["finish_reason"] is not None)
        cut = state.pop("cut")
        return {
            "text": text_array(text if cut is None else text[:cut]),
            "state": json_array({**state, "token_ids": tokens}),
        }
