"""From hidden states of the query tokens to a picture: the stages around the denoiser, and one step of its loop.

`ImageEngines` holds the five engines; `ImageJob` is one picture on its way. Who steps which jobs together, and when, is
`image_worker.py`'s business.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ming_trt.bundle import DRAWING_ENGINES
from ming_trt.errors import BundleError, EngineError, InputError
from ming_trt.processing.draw import DrawOptions
from ming_trt.processing.image_size import FittedSize, requested_size
from ming_trt.processing.query import USED
from ming_trt.processing.reference import Reference
from ming_trt.runtime.engine import Arrays, Engine, check_finite, open_engine, place
from ming_trt.runtime.flow_match import F32, Branch, FlowMatchSchedule, Guidance, euler_step, initial_noise

if TYPE_CHECKING:
    from ming_trt.bundle import Bundle

PATCH = 2  # latent positions a side of one token of the denoiser
MAX_PLACED = 32  # inputs that are kept where the denoiser computes
SEEDS = 65535  # random seeds are drawn from [0, SEEDS), as the reference does


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """hidden: f32 [256, H], post-norm LLM rows of the last query scale. `noise` f32 [C, h, w] replaces the seed's."""

    hidden: F32
    options: DrawOptions = field(default_factory=DrawOptions)
    reference: Reference | None = None
    request_id: str = ""
    noise: F32 | None = None

    @property
    def size(self) -> FittedSize:
        """The size that will be drawn."""
        if self.reference is not None:
            return self.reference.size
        return requested_size(self.options.height, self.options.width)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the denoiser is told of a prompt: context f32 [256, d] and pooled f32 [d]."""

    context: F32
    pooled: F32


@dataclass(frozen=True, slots=True)
class Picture:
    """pixels: u8 [H, W, 3]. `seconds`: per stage (condition, encode, denoise, decode)."""

    pixels: npt.NDArray[np.uint8]
    seed: int
    size: FittedSize
    steps: int
    seconds: Mapping[str, float]


@dataclass(slots=True, eq=False)
class ImageJob:
    """One picture on its way. latent: f32 [C, h, w] after `done` steps; reference: its latent, same shape."""

    request: ImageRequest
    seed: int
    prompt: Prompt
    reference: F32 | None
    latent: F32
    sigmas: F32
    times: F32
    guidance: Guidance
    seconds: dict[str, float]
    velocity: F32 | None = None
    done: int = 0

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.done == len(self.times)

    @property
    def group(self) -> tuple[int, int, bool]:
        """Jobs of equal groups can share a step: latent height, width, and whether there is a reference."""
        return self.latent.shape[1], self.latent.shape[2], self.reference is not None


class ImageEngines:
    """The engines of the picture path. Not for several threads at once."""

    def __init__(self, engines: Mapping[str, Engine], schedule: FlowMatchSchedule, factor: int, channels: int) -> None:
        missing = [name for name in DRAWING_ENGINES if name not in engines]
        if missing:
            raise BundleError(f"no engine '{missing[0]}': build the bundle from a checkpoint with the picture folders")
        self.engines = engines
        self.schedule = schedule
        self.factor = factor
        self.channels = channels
        self._negative: Prompt | None = None
        self._held: tuple[Any, Arrays] | None = None
        self._placed: dict[tuple[Any, ...], Any] = {}

    @classmethod
    def open(cls, bundle: Bundle, *, threads: int = 0, shrink_memory: bool = True) -> ImageEngines:
        """From a bundle; every output is checked for values that are not finite. `shrink_memory` frees working memory
        after each run."""
        engines = {
            name: open_engine(
                bundle, name, threads=threads, finite=bundle.component(name).outputs, shrink_memory=shrink_memory
            )
            for name in DRAWING_ENGINES
        }
        dit, vae = bundle.component("dit").facts, bundle.component("vae_decoder").facts
        return cls(engines, schedule_of(dit), int(vae["factor"]), int(vae["channels"]))

    def close(self) -> None:
        """Frees all engines."""
        for engine in self.engines.values():
            engine.close()

    def condition(self, hidden: F32) -> tuple[F32, Prompt]:
        """The condition f32 [256, H] of `hidden` [256, H], and what the denoiser is told of it."""
        check_finite("llm", {"hidden": hidden}, ("hidden",))
        condition: F32 = self.engines["connector"].run({"hidden": np.asarray(hidden, np.float32)[None]})["condition"]
        return condition[0], self._told(condition)

    def negative(self, width: int) -> Prompt:
        """The prompt of the branches without condition: a zero condition (the same for all requests)."""
        if self._negative is None:
            self._negative = self._told(np.zeros((1, USED, width), np.float32))
        return self._negative

    def _told(self, condition: F32) -> Prompt:
        out = self.engines["condition"].run({"condition": condition})
        return Prompt(out["context"][0], out["pooled"][0])

    def encode(self, reference: Reference) -> F32:
        """The latent f32 [C, h, w] of a reference picture."""
        latent: F32 = self.engines["vae_encoder"].run({"image": reference.vae_input()})["latent"][0]
        return latent

    def start(self, request: ImageRequest) -> ImageJob:
        """Everything that happens once per picture, before the first step. Raises `InputError`, `EngineError`."""
        options, size = request.options, request.size
        sigmas, times = self.schedule.levels(options.steps)
        seed = secrets.randbelow(SEEDS) if options.seed < 0 else options.seed
        shape = (self.channels, size.height // self.factor, size.width // self.factor)
        noise = initial_noise(seed, shape) if request.noise is None else request.noise
        if noise.shape != shape:
            raise InputError(f"noise of shape {list(noise.shape)}: a picture of this size needs {list(shape)}")
        began = perf_counter()
        self.negative(request.hidden.shape[-1])
        _, prompt = self.condition(request.hidden)
        conditioned = perf_counter()
        reference = None if request.reference is None else self.encode(request.reference)
        seconds = {"condition": conditioned - began, "encode": perf_counter() - conditioned, "denoise": 0.0}
        guidance = Guidance(options.cfg, options.image_cfg, options.cfg_mode)
        return ImageJob(request, seed, prompt, reference, noise, sigmas, times, guidance, seconds)

    def step(self, jobs: Sequence[ImageJob]) -> None:
        """One denoising step of every job, in one run of the denoiser. All are of one `group` and unfinished."""
        began = perf_counter()
        if len({job.group for job in jobs}) != 1:
            raise EngineError("jobs of different sizes cannot share a denoising step: step them one group at a time")
        branches = [job.guidance.branches(job.reference is not None) for job in jobs]
        velocity = self.engines["dit"].run(self._rows(jobs, branches))["velocity"]
        first, moved = 0, []
        for job, names in zip(jobs, branches, strict=True):
            parts = dict(zip(names, velocity[first : first + len(names)], strict=True))
            first += len(names)
            guided = job.guidance.combine(parts, job.reference is not None)
            latent = euler_step(job.latent, guided, job.sigmas[job.done], job.sigmas[job.done + 1])
            check_finite("dit", {"latent": latent}, ("latent",))
            moved.append((guided, latent))
        # no job moves unless all can, so that a failed step may be taken again
        for job, (guided, latent) in zip(jobs, moved, strict=True):
            job.velocity, job.latent = guided, latent
            job.done += 1
            job.seconds["denoise"] += perf_counter() - began
        if any(job.finished for job in jobs):
            self._held = None

    def _rows(self, jobs: Sequence[ImageJob], branches: Sequence[Sequence[Branch]]) -> Arrays:
        """The denoiser's inputs: for each job its guidance branches."""
        rows = [(job, *branch) for job, names in zip(jobs, branches, strict=True) for branch in names]
        if self._held is None or self._held[0] != rows:
            self._held = rows, {name: self._place(name, array) for name, array in self._constant(rows).items()}
        return {
            "latent": np.stack([job.latent for job, _, _ in rows]),
            "time": np.array([job.times[job.done] for job, _, _ in rows], np.float32),
            **self._held[1],
        }

    def _place(self, name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Where the denoiser takes it from. One place for each shape: captured steps belong to places."""
        key = name, array.shape
        placed = place(self.engines["dit"], array, self._placed.pop(key, None))
        if placed is not array:
            self._placed[key] = placed
            while len(self._placed) > MAX_PLACED:
                del self._placed[next(iter(self._placed))]
        return placed

    def _constant(self, rows: Sequence[tuple[ImageJob, bool, bool]]) -> Arrays:
        """Those inputs that stay the same while the same jobs share a step: where the engine has memory of its own they
        go there once."""
        jobs = [job for job, _, _ in rows]
        height, width, referenced = jobs[0].group
        negative = self.negative(jobs[0].request.hidden.shape[-1])
        told = [job.prompt if conditioned else negative for job, conditioned, _ in rows]
        tokens = height * width // PATCH**2
        none = np.zeros((self.channels, height, width) if referenced else (self.channels, PATCH, PATCH), np.float32)
        return {
            "context": np.stack([prompt.context for prompt in told]),
            "pooled": np.stack([prompt.pooled for prompt in told]),
            "reference": np.stack(
                [
                    job.reference if with_reference and job.reference is not None else none
                    for job, _, with_reference in rows
                ]
            ),
            "token_index": np.arange(2 * tokens if referenced else tokens),
        }

    def decode(self, latent: F32) -> F32:
        """The picture f32 [3, H, W] in [0, 1] of a latent [C, h, w]."""
        image = self.engines["vae_decoder"].run({"latent": latent[None]})["image"][0]
        unit: F32 = np.clip(image / np.float32(2) + np.float32(0.5), 0, 1)
        return unit

    def preview(self, job: ImageJob) -> npt.NDArray[np.uint8]:
        """u8 [H, W, 3]: the picture that the last step's velocity points to."""
        if job.velocity is None:
            raise EngineError("there is no preview before the first denoising step: take one step first")
        return to_pixels(self.decode(euler_step(job.latent, job.velocity, job.sigmas[job.done], np.float32(0))))

    def finish(self, job: ImageJob) -> Picture:
        """Decodes a finished job."""
        began = perf_counter()
        pixels = to_pixels(self.decode(job.latent))
        seconds = {**job.seconds, "decode": perf_counter() - began}
        return Picture(pixels, job.seed, job.request.size, len(job.times), seconds)


def schedule_of(facts: Mapping[str, Any]) -> FlowMatchSchedule:
    """The schedule that the builder of `dit` noted."""
    return FlowMatchSchedule(float(facts["schedule"]["shift"]), int(facts["schedule"]["train_steps"]))


def to_pixels(unit: F32) -> npt.NDArray[np.uint8]:
    """f32 [3, H, W] in [0, 1] to u8 [H, W, 3], rounded to the nearest level (ties to even)."""
    levels: npt.NDArray[np.uint8] = np.rint(unit * np.float32(255)).astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(1, 2, 0))
