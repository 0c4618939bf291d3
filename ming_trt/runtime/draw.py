"""Drawing in one process: the LLM reads the prompt with its query tokens, then the picture engines draw.

The server runs the same steps, with the LLM and the picture engines in processes of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ming_trt.bundle import Bundle
from ming_trt.errors import EngineError, InputError
from ming_trt.processing.picture import prepare_picture
from ming_trt.processing.prepare import Prepared
from ming_trt.processing.request import Request
from ming_trt.runtime.events import ErrorEvent
from ming_trt.runtime.image import ImageRequest, Picture
from ming_trt.runtime.image_worker import ImageEvent, ImageGenerator, PictureEvent, open_image
from ming_trt.runtime.pipeline import Pipeline, generation_request
from ming_trt.runtime.query_rows import hidden_rows, insert_query_rows, open_query_rows, read_only


class Painter:
    """Draws with a pipeline's LLM and encoders. `query_rows`: f32 [336, H], the learned rows of the query tokens."""

    def __init__(self, pipeline: Pipeline, generator: ImageGenerator, query_rows: npt.NDArray[np.float32]) -> None:
        self.pipeline, self.generator, self.query_rows = pipeline, generator, query_rows

    @classmethod
    def open(cls, bundle: Bundle, pipeline: Pipeline) -> Painter:
        """The picture engines of a bundle. Raises `BundleError` if it has none."""
        return cls(pipeline, open_image(bundle), open_query_rows(bundle))

    def close(self) -> None:
        """Ends running requests and frees the picture engines; the pipeline stays open."""
        self.generator.close()
        self.generator.engines.close()

    def stream(
        self,
        request: Request,
        images: Sequence[bytes] = (),
        videos: Sequence[bytes | Path] = (),
        audios: Sequence[bytes] = (),
    ) -> Iterator[ImageEvent]:
        """Steps, previews, and the picture at the end. Raises `MingError`; leaving the loop early cancels."""
        if request.draw is None:
            raise InputError("the request has no 'draw': add it, or ask for text")
        prepared = prepare_picture(self.pipeline.processor, request, images, videos, audios)
        hidden = self._read(prepared.prompt, request.id)
        handle = self.generator.submit(ImageRequest(hidden, request.draw, prepared.reference, request.id))
        try:
            for event in handle:
                if isinstance(event, ErrorEvent):
                    raise event.error
                yield event
        finally:
            handle.cancel()

    def picture(
        self,
        request: Request,
        images: Sequence[bytes] = (),
        videos: Sequence[bytes | Path] = (),
        audios: Sequence[bytes] = (),
    ) -> Picture:
        """The finished picture. Raises `MingError`."""
        for event in self.stream(request, images, videos, audios):
            if isinstance(event, PictureEvent):
                return event.picture
        raise EngineError("stage 'image' ended without a picture: look into its log")

    def _read(self, prompt: Prepared, request_id: str) -> npt.NDArray[np.float32]:
        """Hidden rows of the last query scale, by one prefill of the LLM."""
        merged = self.pipeline.processor.patch_shape.merge**2
        features = insert_query_rows(
            self.pipeline.features(prompt), len(prompt.pixel_values) // merged, self.query_rows
        )
        reading = replace(generation_request(prompt, features), request_id=request_id)
        return hidden_rows(self.pipeline.llm.submit(read_only(reading)))
