"""Model `image`: hidden states of the query tokens to a picture. Not a step of the graph: `postprocess` calls it."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ming_trt.errors import EngineError
from ming_trt.processing.draw import draw_options
from ming_trt.processing.image_size import FittedSize
from ming_trt.processing.reference import Reference
from ming_trt.runtime.cancel import CancelBoard
from ming_trt.runtime.events import ErrorEvent
from ming_trt.runtime.image import ImageRequest
from ming_trt.runtime.image_worker import ImageHandle, PictureEvent, PreviewEvent, StepEvent, open_image
from ming_trt.serving.stages.base import (
    Array,
    Inputs,
    Stage,
    board_folder,
    inputs,
    json_array,
    read,
    read_json,
    text_array,
)
from ming_trt.serving.stages.presence import Presence
from ming_trt.serving.stages.stream import CallStream

# Pictures are close to noise in their last bits; more effort makes the file little smaller and takes long.
_PNG_EFFORT = 3


class ImageStage(Stage):
    """`request` (JSON: `id`, `draw`), `image_hidden` f32 [256, H], `image_reference` u8 [h, w, 3] (no rows: none).

    Responses: `state` alone after each step (`step`, `steps`, `seconds`), with `image` (a PNG file) for a preview
    (`preview`: after which step) and at the end (`picture`: seed, sizes, steps, seconds of each part).
    """

    def load(self) -> None:
        folder = board_folder(self.repository)
        self.board, self.presence = CancelBoard(folder), Presence(folder)
        self.generator = open_image(self.bundle)

    def finalize(self) -> None:
        """Called by the server before it unloads the model."""
        self.generator.close()
        self.generator.engines.close()

    def execute(self, requests: Sequence[Any]) -> None:  # type: ignore[override]
        """Queues each request and returns at once; its answers come from a thread of its own."""
        for request in requests:
            stream = CallStream(request.get_response_sender())
            try:
                drawing = image_request(inputs(request))
                name = drawing.request_id
                handle = self.generator.submit(drawing, lambda name=name: self.board.is_cancelled(name))  # type: ignore[misc]
                threading.Thread(target=self._answer, args=(stream, handle), name=f"image-{name}", daemon=True).start()
            except Exception as error:  # noqa: BLE001 - the client must hear of it
                stream.fail(self.name, error)

    def _answer(self, stream: CallStream, handle: ImageHandle) -> None:
        name = handle.request.request_id
        self.presence.enter(name, self.name)
        try:
            for arrays, last in outputs_of(handle):
                stream.send(arrays, last)
        except EngineError as error:
            stream.fail(self.name, EngineError(f"stage 'image': {error}"))
        except Exception as error:  # noqa: BLE001 - the client must hear of it
            handle.cancel()
            stream.fail(self.name, error)
        finally:
            self.presence.leave(name, self.name)
            stream.end()


def image_request(request: Inputs) -> ImageRequest:
    """What is to be drawn, from the tensors of `postprocess`."""
    body, pixels = read_json(request, "request"), read(request, "image_reference")
    reference = None
    if len(pixels):
        height, width = pixels.shape[:2]
        reference = Reference(pixels.copy(), FittedSize(height, width, height, width))
    hidden = read(request, "image_hidden").copy()
    return ImageRequest(hidden, draw_options("draw", body["draw"]), reference, str(body["id"]))


def outputs_of(handle: ImageHandle) -> Iterator[tuple[dict[str, Array], bool]]:
    """The responses of a request, and whether each is the last. Raises the error that ends it."""
    options = handle.request.options
    for event in handle:
        if isinstance(event, ErrorEvent):
            raise event.error
        if isinstance(event, StepEvent):
            state = {"step": event.done, "steps": event.steps, "seconds": event.seconds}
            yield {"state": json_array(state)}, False
        elif isinstance(event, PreviewEvent):
            yield {"image": png(event.pixels), "state": json_array({"preview": event.done})}, False
        elif isinstance(event, PictureEvent):
            picture = event.picture
            facts: dict[str, Any] = {
                "seed": picture.seed,
                "asked": None if handle.request.reference else [options.width, options.height],
                "given": [picture.size.width, picture.size.height],
                "steps": picture.steps,
                "seconds": dict(picture.seconds),
            }
            yield {"image": png(picture.pixels), "state": json_array({"picture": facts})}, True


def png(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Array:
    """A BYTES [1] tensor with the PNG file of u8 [H, W, 3]."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=_PNG_EFFORT)
    return text_array(file.getvalue())
