"""Model `audio_encoder`: mel frames of audio clips to rows for the LLM."""

from __future__ import annotations

from ming_trt.runtime.stages import open_audio_encoder
from ming_trt.serving.stages.base import Array, Inputs, Stage, read


class AudioEncoderStage(Stage):
    """`mel`, `mel_lengths` → `audio_rows`. Without frames its engine does not run."""

    def load(self) -> None:
        self.encoder = open_audio_encoder(self.bundle)

    def finalize(self) -> None:
        """Called by the server before it unloads the model."""
        self.encoder.close()

    def answer(self, request: Inputs) -> dict[str, Array]:
        return {"audio_rows": self.encoder(read(request, "mel"), read(request, "mel_lengths"))}
