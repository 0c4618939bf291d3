"""Spoken answers in one process: the LLM's text goes, piece by piece, to the talker and the audio decoder.

The server runs the same steps, with the LLM and the speech engines in processes of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ming_trt.bundle import Bundle
from ming_trt.errors import InputError
from ming_trt.processing.request import Request
from ming_trt.processing.speech_text import Piece, StreamSplitter, pieces_to_read
from ming_trt.processing.voice import Voice, decode_clip
from ming_trt.runtime.events import ErrorEvent, FinishEvent, HiddenEvent, TokenEvent
from ming_trt.runtime.pipeline import Pipeline, generation_request
from ming_trt.runtime.speech import Speech, SpeechChunk, open_speech
from ming_trt.runtime.voices import Voices

Floats = npt.NDArray[np.float32]


class Narrator:
    """Speaks with a pipeline's LLM and encoders."""

    def __init__(self, pipeline: Pipeline, speech: Speech, voices: Voices) -> None:
        self.pipeline, self.speech, self.voices = pipeline, speech, voices

    @classmethod
    def open(cls, bundle: Bundle, pipeline: Pipeline) -> Narrator:
        """The speech engines of a bundle. Raises `BundleError` if it has none."""
        return cls(pipeline, *open_speech(bundle))

    def close(self) -> None:
        """Frees the models of reference clips; the pipeline stays open."""
        self.voices.close()

    def speak(
        self,
        request: Request,
        images: Sequence[bytes] = (),
        videos: Sequence[bytes | Path] = (),
        audios: Sequence[bytes] = (),
        clip: bytes | None = None,
    ) -> Iterator[SpeechChunk]:
        """The spoken answer, or the spoken text of the last message where the request says `read`; `clip` is the
        file of a recording whose voice is taken. Raises `MingError`."""
        options = request.speak
        if options is None:
            raise InputError("the request has no 'speak': add it, or ask for text")
        if options.read:
            text = request.messages[-1].text
            voice = self._voice(request, text, clip)
            yield from self.speech.speak(pieces_to_read(text), voice, seed=options.seed)
            return
        answer = self._answer(request, images, videos, audios)
        # The first text decides on the voice, and the rows of the prompt come before any text.
        text, found, thinker = next(answer, ("", [], None))
        rest = (piece for _, more, _ in answer for piece in more)
        if found:
            voice = self._voice(request, text, clip)
            spoken = (piece for group in (found, rest) for piece in group)
            yield from self.speech.speak(spoken, voice, thinker=thinker, seed=options.seed)

    def _voice(self, request: Request, text: str, clip: bytes | None) -> Voice:
        assert request.speak is not None
        if clip is not None:
            return self.voices.from_clip(decode_clip(clip), request.speak.voice_text or "")
        return self.voices.named(request.speak.voice, text)

    def _answer(
        self, request: Request, images: Sequence[bytes], videos: Sequence[bytes | Path], audios: Sequence[bytes]
    ) -> Iterator[tuple[str, list[Piece], Floats | None]]:
        """The text of the first piece, the pieces that came with a part of the answer, if any, and the LLM's rows of
        the prompt."""
        pipeline = self.pipeline
        prepared = pipeline.processor.prepare(request, images, videos, audios)
        asked = generation_request(prepared, pipeline.features(prepared))
        handle = pipeline.llm.submit(
            replace(asked, sampling=request.sampling, request_id=request.id, want_hidden="all")
        )
        splitter = StreamSplitter()
        thinker: Floats | None = None
        codec = pipeline.processor.tokenizer
        try:
            for event in handle:
                found: list[Piece] = []
                if isinstance(event, ErrorEvent):
                    raise event.error
                if isinstance(event, HiddenEvent):
                    thinker = np.asarray(event.hidden + event.embeds, np.float32)
                elif isinstance(event, TokenEvent):
                    part = codec.decode_delta(event.context_ids, event.token_ids, final=False)[: event.text_length]
                    found = splitter.feed(part)
                elif isinstance(event, FinishEvent):
                    part = codec.decode_delta(event.context_ids, (), final=True)
                    found = [*splitter.feed(part), *splitter.finish()]
                if found:
                    yield splitter.opening, found, thinker
        finally:
            handle.cancel()
