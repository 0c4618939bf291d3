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
from ming_trt.image_config import DiTConfig, VAEConfig, dit_config, vae_config
from ming_trt.models.cost import Cost, audio, llm_step, total, vision
from ming_trt.models.cost_image import dit, vae_decoder, vae_encoder
from ming_trt.models.cost_speech import talker_step
from ming_trt.processing.draw import DrawOptions
from ming_trt.runtime.flow_match import Guidance
from ming_trt.speech_config import TalkerConfig, load_talker_config

# Of a drawing: the parts that its own clock tells, and the engine of each. What is left of a part's time (the file's
# pixels, the guidance) is small beside the engine's.
_DRAWN = {"encode": "vae_encoder", "denoise": "dit", "decode": "vae_decoder"}
_TALKER = "talker"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a server serves, from its bundle. `precisions`: those of its engines, by name. `picture` and `talker`: None
    if it does not draw or speak, or is of a time when bundles did not say how large these are."""

    config: MingConfig
    precisions: Mapping[str, str]
    manifest: Mapping[str, Any]
    picture: tuple[DiTConfig, VAEConfig] | None = None
    talker: TalkerConfig | None = None

    @property
    def precision(self) -> str:
        """That of the language model."""
        return self.precisions["llm"]

    @property
    def on_processor(self) -> bool:
        """Whether the engines run on the processor, whose ceiling is the one that is measured."""
        return bool(self.manifest.get("target", "onnxruntime") == "onnxruntime")

    @classmethod
    def of(cls, folder: Path) -> ServedModel:
        """Reads the bundle at `folder`. Raises `BundleError` or `ConfigError`."""
        bundle = Bundle.open(folder)
        precisions = {name: bundle.component(name).precision for name in ("llm", *ENCODERS)}
        more = [name for name in (*_DRAWN.values(), _TALKER) if bundle.has(name)]
        precisions |= {name: bundle.component(name).precision for name in more}
        digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
        facts = {
            "sha256": digest,
            "model": dict(bundle.manifest.model),
            "target": bundle.manifest.target,
            "precision": bundle.manifest.precision,
            "versions": dict(bundle.manifest.versions),
            "gate": bundle.manifest.gate,
        }
        config, picture = load_config(folder / ASSETS), None
        if "dit" in precisions and (folder / ASSETS / "transformer" / "config.json").exists():
            picture = dit_config(config, stored_tables=True), vae_config(config)
        talker = load_talker_config(folder / ASSETS) if _TALKER in precisions else None
        return cls(config, precisions, facts, picture, talker)

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
    """MBU of decoding, MFU of the prefill, of the encoder and of the parts of a drawing, with the times that the
    ceiling allows (ms). Of a spoken answer only that time for an id of the talker's: how long one took is not known,
    since the talker works while text arrives and earlier codes become sound.

    `samples`: requests that succeeded; a step of decoding took what the language model's own clock says. Under load
    steps are shared: as many sequences as the load has at once are assumed in each, none is known for a rate.
    `encoder`: the one that the scenario's file goes through, with what it must do; `encoder_ms`: its mean time.
    """
    found: dict[str, Any] = {"precision": model.precision}
    rates = (ceiling.read_bytes_per_s, ceiling.float32_flops_per_s)
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
            "least_ms": 1000 * step.seconds(model.precision, *rates),
            "mbu": size / took / ceiling.read_bytes_per_s,
        }
    if prefill:
        cost = llm_step(model.config.llm, max(1, int(prompt)))
        seconds = prompt / prefill["p50"]["value"]
        found["prefill"] = {
            "flops": cost.flops,
            "least_ms": 1000 * cost.seconds(model.precision, *rates),
            "mfu": cost.flops / seconds / ceiling.float32_flops_per_s,
        }
    if encoder and encoder_ms > 0:
        name, work = encoder
        found[name] = _computing(work, encoder_ms / 1000, model.precisions[name], ceiling)
    for part, name in _DRAWN.items():
        drawn = [sample for sample in samples if sample.drawing.get(part) and sample.drawn]
        # Pictures that are drawn together share their steps, and a request's clock has those of the others in it.
        alone = part != "denoise" or (load.kind == "concurrency" and load.value == 1)
        if drawn and alone and model.picture:
            work = total(_drawing(model.picture, part, sample) for sample in drawn)
            seconds = sum(sample.drawing[part] for sample in drawn)
            found[f"image {part}"] = _computing(work, seconds, model.precisions[name], ceiling, len(drawn))
    if model.talker and any(sample.sounds for sample in samples):
        precision, work = model.precisions[_TALKER], talker_step(model.talker)
        found["talker, an id"] = {
            "precision": precision,
            "bytes": work.bytes(precision),
            "flops": work.flops,
            "least_ms": 1000 * work.seconds(precision, *rates),
        }
    return found


def _computing(work: Cost, seconds: float, precision: str, ceiling: Ceiling, requests: int = 1) -> dict[str, Any]:
    """What is limited by products: `work` and `seconds` of so many requests."""
    least = work.seconds(precision, ceiling.read_bytes_per_s, ceiling.float32_flops_per_s)
    return {
        "precision": precision,
        "flops": work.flops / requests,
        "least_ms": 1000 * least / requests,
        "mfu": work.flops / seconds / ceiling.float32_flops_per_s,
    }


def _drawing(picture: tuple[DiTConfig, VAEConfig], part: str, sample: Sample) -> Cost:
    """What a part of that picture must do; scenarios leave the guidance as the server has it."""
    (denoiser, vae), edits = picture, "encode" in sample.drawing
    height, width = sample.drawn["height"], sample.drawn["width"]
    if part == "encode":
        return vae_encoder(vae, height, width)
    latent = height // vae.factor, width // vae.factor
    if part == "decode":
        return vae_decoder(vae, *latent)
    options = DrawOptions()
    branches = Guidance(options.cfg, options.image_cfg, options.cfg_mode).branches(edits)
    return dit(denoiser, *latent, len(branches), edits) * sample.drawn["steps"]
