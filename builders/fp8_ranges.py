"""Ranges of the inputs of linear layers, for static FP8 scales: the largest magnitude that samples show; the denoiser's
for each range of steps (`builders/fp8_steps.py`).

The language model's come from `builders/calibration.py`, layer by layer; the other definitions are run whole. The user
replaces the samples by a folder: `<folder>/<engine>/*.npz` with an engine's inputs by name, requests for the language
model as in `builders/calibration_samples.py`. Without one, feeds of the numerics gate are drawn from several seeds: the
ranges then describe random numbers in the model's input ranges, and the facts say so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from builders.component import Component, Feeds
from builders.fp8 import Range
from builders.fp8_steps import TIME, ranges_of
from builders.reference import run_definition
from builders.verify import SEED
from ming_trt.errors import BuildError

if TYPE_CHECKING:
    from ming_trt.checkpoint import Checkpoint
    from ming_trt.config import MingConfig

SEEDS = 4
DRAWN = "feeds of the gate, drawn from seeds"
# largest value of the denoiser's `time`
_LAST_TIME = 1000.0
# calibration's name of an input -> the linear layers, or stacks of experts, that read it
_LLM = {
    "attention.qkv": ("attention.query_key_value",),
    "attention.dense": ("attention.dense",),
    "mlp.fc": ("mlp.gate_up",),
    "mlp.proj": ("mlp.down",),
    "mlp.shared_expert.fc": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "mlp.shared_expert.proj": ("mlp.shared_experts.down_proj",),
}


@dataclass(frozen=True, slots=True)
class Samples:
    """Where an engine's samples come from: `what` for the manifest, `digest` of all their bytes, the files (if any)."""

    what: str
    digest: str
    files: tuple[Path, ...] = ()


def choose(name: str, folder: Path | None, checkpoint: Path) -> Samples:
    """The samples of engine `name`. Raises `BuildError` if the folder has none for it."""
    if name == "llm":
        from builders import calibration_samples

        source = calibration_samples.choose(folder, checkpoint)
        return Samples(source.what, source.digest)
    if folder is None:
        return Samples(DRAWN, f"drawn-{SEED}-{SEEDS}")
    files = tuple(sorted((folder / name).glob("*.npz")))
    if not files:
        raise BuildError(
            f"the calibration folder '{folder}' has no '{name}/*.npz' with inputs of {name}: add some, or keep {name} "
            "in bf16"
        )
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return Samples(f"{len(files)} files of '{folder.name}/{name}'", digest.hexdigest(), files)


@dataclass(frozen=True, slots=True)
class Found:
    """`amax`: linear layer (by its module's name in the definition) -> largest magnitude of its input, or those of each
    range of steps; `facts` for the manifest."""

    amax: Mapping[str, Range]
    facts: Mapping[str, Any] = field(default_factory=dict)


def ranges(
    component: Component,
    config: MingConfig,
    checkpoint: Checkpoint,
    samples: Samples,
    folder: Path | None,
    scratch: Path,
    bounds: Sequence[float] = (),
) -> Found:
    """The ranges over the samples; with `bounds` of the input `time`, one for each range of steps.

    `scratch` keeps the state of a long calibration, so that it goes on after an interruption.
    """
    if component.name == "llm":
        return _llm(config, checkpoint, samples, folder, scratch)
    feeds: Iterable[Feeds]
    if samples.files:
        feeds = (_load(file) for file in samples.files)
    else:
        feeds = (component.sample_feeds(config, np.random.default_rng(SEED + k)) for k in range(SEEDS))
        feeds = _at_all_steps(feeds, bounds) if bounds else feeds
    module = component.reference(config, checkpoint)
    if not bounds:
        return Found(observe(module, feeds))
    return Found(observe_steps(module, feeds, bounds), {"time_bounds": list(bounds)})


def _at_all_steps(feeds: Iterable[Feeds], bounds: Sequence[float]) -> Iterator[Feeds]:
    """The samples at times of one range after the other, its end included."""
    edges = [0.0, *bounds, _LAST_TIME]
    for k, sample in enumerate(feeds):
        low, high = edges[k % (len(bounds) + 1) :][:2]
        rows = len(sample[TIME])
        yield {**sample, TIME: (low + (high - low) * np.arange(1, rows + 1) / rows).astype(np.float32)}


def observe(module: torch.nn.Module, feeds: Iterable[Feeds]) -> dict[str, float]:
    """Runs the definition and keeps the largest magnitude of the input of each of its linear layers.

    Raises `BuildError` for values that are not finite, or if there was no sample.
    """
    amax: dict[str, float] = {}
    for found, _ in _observed(module, feeds):
        amax = {name: max(value, amax.get(name, 0.0)) for name, value in found.items()}
    if not amax:
        raise BuildError("there is no sample to calibrate with: give some")
    return amax


def observe_steps(
    module: torch.nn.Module, feeds: Iterable[Feeds], bounds: Sequence[float]
) -> dict[str, tuple[float, ...]]:
    """`observe` for each range of `time`. A sample whose rows are at different times counts for each of their ranges.

    Raises `BuildError` also if no sample falls into one of the ranges.
    """
    amax: dict[str, list[float]] = {}
    seen: set[int] = set()
    for found, sample in _observed(module, feeds):
        chosen = ranges_of(sample[TIME], bounds)
        seen.update(chosen)
        for name, value in found.items():
            kept = amax.setdefault(name, [0.0] * (len(bounds) + 1))
            for index in chosen:
                kept[index] = max(kept[index], value)
    edges = [0.0, *bounds, _LAST_TIME]
    missing = [f"{edges[k]:g} to {edges[k + 1]:g}" for k in range(len(bounds) + 1) if k not in seen]
    if missing:
        raise BuildError(f"no calibration sample has a `time` from {', or from '.join(missing)}: add such samples")
    return {name: tuple(values) for name, values in amax.items()}


def _observed(module: torch.nn.Module, feeds: Iterable[Feeds]) -> Iterator[tuple[dict[str, float], Feeds]]:
    """The largest input of each linear layer in one sample after the other."""
    amax: dict[str, float] = {}

    def hook(name: str) -> torch.utils.hooks.RemovableHandle:
        def look(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            largest = float(inputs[0].abs().max())
            if not largest < float("inf"):
                raise BuildError(f"calibration gave values that are not finite at '{name}': check the samples")
            amax[name] = max(amax.get(name, 0.0), largest)

        return linears[name].register_forward_pre_hook(look)

    linears = {name: inner for name, inner in module.named_modules() if isinstance(inner, torch.nn.Linear)}
    handles = [hook(name) for name in linears]
    try:
        for sample in feeds:
            amax.clear()
            run_definition(module, sample)
            yield dict(amax), sample
    finally:
        for handle in handles:
            handle.remove()


def _load(file: Path) -> Feeds:
    with np.load(file) as arrays:
        return dict(arrays)


def _llm(config: MingConfig, checkpoint: Checkpoint, samples: Samples, folder: Path | None, scratch: Path) -> Found:
    from builders import calibration_samples
    from builders.calibration import calibrate
    from builders.trtllm_layout import LAYER

    prompts = calibration_samples.load(calibration_samples.choose(folder, checkpoint.root), config, checkpoint)
    found = calibrate(config.llm, checkpoint, prompts, scratch, samples.digest)
    facts = {"unreached_experts": found.unreached, "tokens": found.tokens}
    return Found(by_module(found.amax, config.llm.num_layers, LAYER), facts)


def by_module(found: Mapping[str, float], layers: int, prefix: str) -> dict[str, float]:
    """Renames calibrated ranges to the definition's modules."""
    return {
        f"layers.{i}.{module}": found[prefix.format(i) + source]
        for i in range(layers)
        for source, modules in _LLM.items()
        for module in modules
    }
