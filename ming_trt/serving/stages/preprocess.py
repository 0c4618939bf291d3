"""Model `preprocess`: a request and its files to the arrays that the encoders and the LLM read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ming_trt.errors import InputError, UnavailableError
from ming_trt.processing.picture import prepare_picture
from ming_trt.processing.request import Request, parse_request
from ming_trt.processing.voice import decode_clip
from ming_trt.runtime.cancel import CancelBoard
from ming_trt.runtime.stages import open_processor
from ming_trt.serving.graph import DRAWING, SPEAKING, absent, can
from ming_trt.serving.stages.base import Array, Inputs, Stage, board_folder, read_bytes, text_array


class PreprocessStage(Stage):
    """Inputs and outputs: docs/DESIGN.md, 4.2. Without a modality its arrays have zero rows.

    A request with a lease gets its first one here, so that it also runs out for a request that still waits.
    """

    def load(self) -> None:
        self.processor = open_processor(self.bundle)
        self.board = CancelBoard(board_folder(self.repository))

    def answer(self, request: Inputs) -> dict[str, Array]:
        data = read_bytes(request, "request")[0]
        parsed = parse_request(data)
        if parsed.lease:
            self.board.renew(parsed.id, parsed.lease)
        try:
            return {
                "request_id": text_array(parsed.id),
                # As it came if it names itself: to write it anew takes as long as to check it.
                "options": text_array(data if parsed.id.encode() in data else parsed.to_json()),
                **self._arrays(parsed, request),
            }
        except Exception:
            self.board.forget(parsed.id)
            raise

    def _arrays(self, parsed: Request, request: Inputs) -> dict[str, Array]:
        self._refuse_absent(parsed)
        files = [read_bytes(request, name) for name in ("images", "videos", "audios")]
        added: dict[str, Array] = {}
        reference = np.zeros((0, 0, 3), np.uint8)
        if parsed.draw is None:
            prepared = self.processor.prepare(parsed, *files)
        else:
            picture = prepare_picture(self.processor, parsed, *files)
            prepared = picture.prompt
            if picture.reference is not None:
                reference = picture.reference.pixels
        if can(self.bundle.manifest.components, DRAWING):
            added["reference"] = reference
        if can(self.bundle.manifest.components, SPEAKING):
            added["voice_clip"] = voice_clip(parsed, read_bytes(request, "voice"))
        return {**prepared.tensors(), **added}

    def _refuse_absent(self, request: Request) -> None:
        for name, wanted, what in (("draw", request.draw, DRAWING), ("speak", request.speak, SPEAKING)):
            missing = absent(self.bundle.manifest.components, what) if wanted is not None else []
            if missing:
                raise UnavailableError(
                    f"this server cannot {name}, its bundle has no '{missing[0]}': build one with it"
                )


def voice_clip(request: Request, files: Sequence[bytes]) -> Array:
    """The reference clip f32 [n] at 16 kHz, or no samples. Raises `InputError` for an unusable one."""
    if not files:
        if request.speak is not None and request.speak.voice_text is not None:
            raise InputError("'voice_text' came without a reference clip: send its file in 'voice', or leave it out")
        return np.zeros(0, np.float32)
    if request.speak is None or len(files) > 1:
        why = f"{len(files)} files came" if len(files) > 1 else "the request has no 'speak'"
        raise InputError(f"'voice' takes the file of one reference clip for a spoken answer, and {why}: send one")
    if not (request.speak.voice_text or "").strip():
        raise InputError("a reference clip needs the text that it says: send it as 'voice_text'")
    return decode_clip(files[0])
