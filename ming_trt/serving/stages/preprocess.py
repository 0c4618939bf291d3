"""Model `preprocess`: a request and its files to the arrays that the encoders and the LLM read."""

from __future__ import annotations

from typing import Any

from ming_trt.processing.request import parse_request
from ming_trt.runtime.cancel import CancelBoard
from ming_trt.runtime.stages import open_processor
from ming_trt.serving.stages.base import Array, Stage, board_folder, read_bytes, text_array


class PreprocessStage(Stage):
    """Inputs and outputs: docs/DESIGN.md, 4.2. Without a modality its arrays have zero rows.

    A request with a lease gets its first one here, so that it also runs out for a request that still waits.
    """

    def load(self) -> None:
        self.processor = open_processor(self.bundle)
        self.board = CancelBoard(board_folder(self.repository))

    def answer(self, request: Any) -> dict[str, Array]:
        parsed = parse_request(read_bytes(request, "request")[0])
        if parsed.lease:
            self.board.renew(parsed.id, parsed.lease)
        files = [read_bytes(request, name) for name in ("images", "videos", "audios")]
        prepared = self.processor.prepare(parsed, *files)
        return {
            "request_id": text_array(parsed.id),
            "options": text_array(parsed.to_json()),
            **prepared.tensors(),
        }
