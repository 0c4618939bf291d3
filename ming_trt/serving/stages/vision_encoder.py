"""Model `vision_encoder`: patches of pictures and videos to rows for the LLM."""

from __future__ import annotations

from ming_trt.runtime.stages import open_vision_encoder
from ming_trt.serving.stages.base import Array, Inputs, Stage, read


class VisionEncoderStage(Stage):
    """`pixel_values`, `image_grid` → `vision_rows`. Without patches its engine does not run."""

    def load(self) -> None:
        self.encoder = open_vision_encoder(self.bundle)

    def finalize(self) -> None:
        """Called by the server before it unloads the model."""
        self.encoder.close()

    def answer(self, request: Inputs) -> dict[str, Array]:
        return {"vision_rows": self.encoder(read(request, "pixel_values"), read(request, "image_grid"))}
