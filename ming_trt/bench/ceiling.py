"""What the machine could do at best beside what was measured: shares of memory bandwidth (MBU) and of the matrix rate
(MFU)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ming_trt.bench.hops import ENCODERS
from ming_trt.bench.load import Load
from ming_trt.bench.machine import Ceiling
from ming_trt.bench.media import Medium
from ming_trt.bench.samples import Sample
from ming_trt.bundle import ASSETS, MANIFEST, Bundle
from ming_trt.config import MingConfig, load_config
from ming_trt.errors import MingError
from ming_trt.models.cost import Cost, audio, llm_step, vision


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a server serves, from its bundle. `precisions`: those of the language model and the encoders, by name."""

    config: MingConfig
    precisions: Mapping[str, str]
    manifest: Mapping[str, Any]

    @property
    def precision(self) -> str:
        """That of the language model."""
        return self.precisions["llm"]

    @classmethod
    def of(cls, folder: Path) -> ServedModel:
        """Reads the bundle at `folder`. Raises `BundleError` or `ConfigError`."""
        bundle = Bundle.open(folder)
        precisions = {name: bundle.component(name).precision for name in ("llm", *ENCODERS)}
        digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
        facts = {
            "sha256": digest,
            "model": dict(bundle.manifest.model),
            "target": bundle.manifest.target,
            "precision": bundle.manifest.precision,
            "versions": dict(bundle.manifest.versions),
            "gate": bundle.manifest.gate,
        }
        return cls(load_config(folder / ASSETS), precisions, facts)

    def encoder_cost(self, kind: str, medium: Medium, draws: bool = False) -> tuple[str, Cost] | None:
        """The encoder that reads a file of that kind and what it must do, or None if the file is not understood here
        (a client need not have the server's libraries). `draws`: the answer is a picture, for which pictures are read
        at another size."""
        try:
            if kind == "audio":
                from ming_trt.processing.audio import process_audio

                frames = len(process_audio(medium.content, num_mels=self.config.audio.num_mels).mel)
                return ENCODERS[1], audio(self.config.audio, self.config.llm.hidden_size, frames)
            return ENCODERS[0], vision(self.config.vision, self.config.llm.hidden_size, self._grid(kind, medium, draws))
        except (MingError, ImportError):
            return None

    def _grid(self, kind: str, medium: Medium, draws: bool) -> tuple[int, int, int]:
        from ming_trt.processing.image import GENERATION_PASS, SECOND_PASS, process_image
        from ming_trt.processing.patches import PatchShape
        from ming_trt.processing.video import process_video

        config = self.config.vision
        shape = PatchShape(config.patch_size, config.temporal_patch, config.merge_size)
        if kind == "video":
            return process_video(medium.content, shape=shape).grid
        limits = GENERATION_PASS if draws else SECOND_PASS
        return process_image(medium.content, pixel_limits=limits, shape=shape).grid


def shares(
    model: ServedModel,
    ceiling: Ceiling,
    load: Load,
    metrics: Mapping[str, Mapping[str, Any]],
    samples: Sequence[Sample],
    encoder: tuple[str, Cost] | None = None,
    encoder_ms: float = 0.0,
) -> dict[str, Any]:
    """MBU of decoding, MFU of the prefill and of the encoder, with the times that the ceiling allows (ms).

    `samples`: requests that succeeded; a step of decoding took what the language model's own clock says. Under load
    steps are shared: as many sequences as the load has at once are assumed in each, none is known for a rate.
    `encoder`: the one that the scenario's file goes through, with what it must do; `encoder_ms`: its mean time.
    """
    found: dict[str, Any] = {"precision": model.precision}
    prefill = metrics.get("prompt_tokens_per_s")
    prompt = fmean(sample.prompt_tokens for sample in samples)
    answer = fmean(sample.completion_tokens for sample in samples)
    decoded = [sample for sample in samples if sample.completion_tokens > 1 and sample.engine.get("decode", 0.0) > 0]
    if decoded and load.kind == "concurrency":
        took = median(sample.engine["decode"] / (sample.completion_tokens - 1) for sample in decoded)
        step = llm_step(model.config.llm, 1, int(prompt + answer / 2), int(load.value))
        size = step.bytes(model.precision)
        found["decode"] = {
            "bytes": size,
            "flops": step.flops,
            "least_ms": 1000 * step.seconds(model.precision, ceiling.read_bytes_per_s, ceiling.float32_flops_per_s),
            "mbu": size / took / ceiling.read_bytes_per_s,
        }
    if prefill:
        cost = llm_step(model.config.llm, max(1, int(prompt)))
        seconds = prompt / prefill["p50"]["value"]
        found["prefill"] = {
            "flops": cost.flops,
            "least_ms": 1000 * cost.seconds(model.precision, ceiling.read_bytes_per_s, ceiling.float32_flops_per_s),
            "mfu": cost.flops / seconds / ceiling.float32_flops_per_s,
        }
    if encoder and encoder_ms > 0:
        name, work = encoder
        rates = (ceiling.read_bytes_per_s, ceiling.float32_flops_per_s)
        found[name] = {
            "precision": model.precisions[name],
            "flops": work.flops,
            "least_ms": 1000 * work.seconds(model.precisions[name], *rates),
            "mfu": work.flops / (encoder_ms / 1000) / ceiling.float32_flops_per_s,
        }
    return found
