"""Model `postprocess`: tokens to text; for requests that ask for it, the picture or the speech that belongs to it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from ming_trt.runtime.cancel import CancelBoard
from ming_trt.runtime.stages import open_tokenizer
from ming_trt.serving.graph import DRAWING, SPEAKING, can
from ming_trt.serving.stages.base import Array, Inputs, Stage, board_folder, inputs, json_array, read, read_json
from ming_trt.serving.stages.presence import Presence
from ming_trt.serving.stages.speaking import Reply, Speaker
from ming_trt.serving.stages.stream import Stream, call, output


class PostprocessStage(Stage):
    """`token_ids`, `context_ids`, `llm_state` → `text` BYTES [1] (what the tokens add) and `state` BYTES [1].

    A character whose bytes are split between answers comes with its last byte; the context tells its beginning.

    Where the bundle can draw or speak the model is decoupled: pictures and sound follow their text as responses with an
    empty `text`. The answer's `finish_reason` comes with the last of them.
    """

    media = False

    def load(self) -> None:
        self.tokenizer = open_tokenizer(self.bundle)
        self.media = any(can(self.bundle.manifest.components, what) for what in (DRAWING, SPEAKING))
        if self.media:
            folder = board_folder(self.repository)
            self.board, self.presence = CancelBoard(folder), Presence(folder)
            self.speaker = Speaker(self.board, self.presence)

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:  # type: ignore[override]
        """Called by the server. Text goes out at once; what takes longer comes from threads."""
        if not self.media:
            return super().execute(requests)
        for request in requests:
            stream = Stream(request.get_response_sender())
            try:
                self._stream(inputs(request), stream)
            except Exception as error:  # noqa: BLE001 - the client must hear of it
                stream.fail(self.name, error)
        return None

    def answer(self, request: Inputs) -> dict[str, Array]:
        text, state = self._decode(request)
        return output(text, state)

    def _decode(self, request: Inputs) -> tuple[str, dict[str, Any]]:
        """The text that the tokens add, and the state for the client, with what is private."""
        state = read_json(request, "llm_state")
        tokens, context = read(request, "token_ids").tolist(), read(request, "context_ids").tolist()
        text = self.tokenizer.decode_delta(context, tokens, final=state["finish_reason"] is not None)
        return text[: state["cut"]], {**state, "token_ids": tokens}

    def _stream(self, request: Inputs, stream: Stream) -> None:
        text, state = self._decode(request)
        if state.get("draw") is not None:
            arrays = {name: read(request, name).copy() for name in ("image_hidden", "image_reference")}
            threading.Thread(target=self._draw, args=(stream, state, arrays), name="draw", daemon=True).start()
        elif state.get("speak") is not None:
            arrays = {name: read(request, name).copy() for name in ("thinker_rows", "speech_clip")}
            self.speaker.say(Reply(stream, text, state, arrays))
        else:
            stream.send(output(text, state), last=True)

    def _draw(self, stream: Stream, state: dict[str, Any], arrays: dict[str, Array]) -> None:
        """Sends the steps, previews and the picture of model `image`."""
        name = str(state["id"])
        self.presence.enter(name, self.name)
        try:
            asked = {"request": json_array({"id": name, "draw": state["draw"]}), **arrays}
            going = {**state, "finish_reason": None, "usage": None, "timings": None}
            for progress, found in call("image", asked, "image"):
                last = "picture" in progress
                stream.send(output("", {**(state if last else going), **progress}, **found), last)
        except Exception as error:  # noqa: BLE001 - the client must hear of it
            stream.fail(self.name, error)
        finally:
            self.presence.leave(name, self.name)
            self.board.forget(name)
            stream.end()
