"""The whole understanding path in one process: a request and its files in, text out.

The server runs the same stages, each in a process of its own; this is what its answers are compared with.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ming_trt.bundle import Bundle
from ming_trt.processing.prepare import Prepared, Processor
from ming_trt.processing.request import Request, Sampling
from ming_trt.processing.tokenizer import TextCodec
from ming_trt.runtime.events import ErrorEvent, FinishEvent, Handle, TokenEvent
from ming_trt.runtime.front import Front
from ming_trt.runtime.sequence import GenerationRequest
from ming_trt.runtime.stages import (
    AudioEncoder,
    VisionEncoder,
    open_audio_encoder,
    open_llm,
    open_processor,
    open_vision_encoder,
)


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer: what its text gains, and the tokens that bring it. The last one has `finish`."""

    text: str
    token_ids: tuple[int, ...]
    finish: FinishEvent | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    finish: FinishEvent


class Pipeline:
    """The stages of a bundle. Threads may ask at the same time; their answers are decoded together."""

    def __init__(self, processor: Processor, vision: VisionEncoder, audio: AudioEncoder, llm: Front) -> None:
        self.processor, self.llm = processor, llm
        self._vision, self._audio = vision, audio
        self._encoding = threading.Lock()

    @classmethod
    def open(cls, bundle: Bundle | Path | str) -> Pipeline:
        """Opens every engine of the understanding path. Raises `BundleError` if one is not in the bundle."""
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        processor = open_processor(opened)
        return cls(processor, open_vision_encoder(opened), open_audio_encoder(opened), open_llm(opened))

    def close(self) -> None:
        """Ends running requests and frees the engines."""
        self.llm.close()
        self._vision.close()
        self._audio.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stream(
        self,
        request: Request,
        images: Sequence[bytes] = (),
        videos: Sequence[bytes | Path] = (),
        audios: Sequence[bytes] = (),
    ) -> Iterator[Delta]:
        """The answer as it comes; files in the order in which the messages mention them. Leaving the loop early cancels
        the request. Raises `MingError`. The request's `lease` is for servers and means nothing here."""
        prepared = self.processor.prepare(request, images, videos, audios)
        yield from deltas(self.submit(prepared, request.sampling, request.id), self.processor.tokenizer)

    def answer(
        self,
        request: Request,
        images: Sequence[bytes] = (),
        videos: Sequence[bytes | Path] = (),
        audios: Sequence[bytes] = (),
    ) -> Answer:
        """The whole answer at once. Raises `MingError`."""
        return join(self.stream(request, images, videos, audios))

    def submit(self, prepared: Prepared, sampling: Sampling, request_id: str = "") -> Handle:
        """Encodes the media of a prepared prompt and queues it."""
        asked = generation_request(prepared, self.features(prepared))
        return self.llm.submit(replace(asked, sampling=sampling, request_id=request_id))

    def features(self, prepared: Prepared) -> npt.NDArray[np.float32]:
        """Vision rows, then audio rows, f32 [R, H]."""
        with self._encoding:
            vision = self._vision(prepared.pixel_values, prepared.image_grid)
            audio = self._audio(prepared.mel, prepared.mel_lengths)
        return np.concatenate([vision, audio])


def generation_request(prepared: Prepared, features: npt.NDArray[np.float32]) -> GenerationRequest:
    """What the LLM is asked: a prepared prompt and the rows f32 [R, H] of its media."""
    return GenerationRequest(
        input_ids=prepared.input_ids,
        modality=prepared.modality,
        positions=prepared.positions,
        position_delta=int(prepared.position_delta[0]),
        feature_index=prepared.feature_index,
        features=features,
    )


def deltas(handle: Handle, codec: TextCodec) -> Iterator[Delta]:
    """Text of a request's events. Raises the error that ends it; leaving the loop early cancels it."""
    try:
        for event in handle:
            if isinstance(event, TokenEvent):
                text = codec.decode_delta(event.context_ids, event.token_ids, final=False)
                yield Delta(text[: event.text_length], event.token_ids)
            elif isinstance(event, FinishEvent):
                # A character that the answer leaves unfinished.
                yield Delta(codec.decode_delta(event.context_ids, (), final=True), (), event)
            elif isinstance(event, ErrorEvent):
                raise event.error
    finally:
        handle.cancel()


def join(parts: Iterator[Delta]) -> Answer:
    """All pieces of an answer as one."""
    text, ids, finish = "", list[int](), None
    for part in parts:
        text += part.text
        ids += part.token_ids
        finish = part.finish
    assert finish is not None
    return Answer(text, tuple(ids), finish)
