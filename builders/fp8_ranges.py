"""Ranges of the inputs of linear layers, for static FP8 scales: the largest magnitude that samples show.

The language model's come from `builders/calibration.py`, layer by layer; the other definitions are run whole. The user
replaces the samples by a folder: `<folder>/<engine>/*.npz` with an engine's inputs by name, requests for the language
model as in `builders/calibration_samples.py`. Without one, feeds of the numerics gate are drawn from several seeds: the
ranges then describe random numbers in the model's input ranges, and the facts say so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from builders.component import Component, Feeds
from builders.verify import SEED
from ming_trt.errors import BuildError

if TYPE_CHECKING:
    from ming_trt.checkpoint import Checkpoint
    from ming_trt.config import MingConfig

SEEDS = 4
DRAWN = "feeds of the gate, drawn from seeds"
# calibration's name of an input -> the linear layers that read it
_LLM = {
    "attention.qkv": ("attention.query_key_value",),
    "attention.dense": ("attention.dense",),
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


def ranges(
    component: Component,
    config: MingConfig,
    checkpoint: Checkpoint,
    samples: Samples,
    folder: Path | None,
    scratch: Path,
) -> dict[str, float]:
    """Linear layer (by its module's name in the definition) -> largest magnitude of its input.

    `scratch` keeps the state of a long calibration, so that it goes on after an interruption.
    """
    if component.name == "llm":
        return _llm(config, checkpoint, samples, folder, scratch)
    if samples.files:
        feeds: Iterable[Feeds] = (_load(file) for file in samples.files)
    else:
        feeds = (component.sample_feeds(config, np.random.default_rng(SEED + k)) for k in range(SEEDS))
    return observe(component.reference(config, checkpoint), feeds)


def observe(module: torch.nn.Module, feeds: Iterable[Feeds]) -> dict[str, float]:
    """Runs the definition and keeps the largest magnitude of the input of each of its linear layers.

    Raises `BuildError` for values that are not finite, or if there was no sample.
    """
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
    count = 0
    try:
        with torch.inference_mode():
            for sample in feeds:
                module(*(torch.from_numpy(np.array(value)) for value in sample.values()))
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise BuildError("there is no sample to calibrate with: give some")
    return amax


def _load(file: Path) -> Feeds:
    with np.load(file) as arrays:
        return dict(arrays)


def _llm(
    config: MingConfig, checkpoint: Checkpoint, samples: Samples, folder: Path | None, scratch: Path
) -> dict[str, float]:
    from builders import calibration_samples
    from builders.calibration import calibrate
    from builders.trtllm_layout import LAYER

    prompts = calibration_samples.load(calibration_samples.choose(folder, checkpoint.root), config, checkpoint)
    found = calibrate(config.llm, checkpoint, prompts, scratch, samples.digest).amax
    return by_module(found, config.llm.num_layers, LAYER)


def by_module(found: Mapping[str, float], layers: int, prefix: str) -> dict[str, float]:
    """Renames calibrated ranges to the definition's modules."""
    return {
        f"layers.{i}.{module}": found[prefix.format(i) + source]
        for i in range(layers)
        for source, modules in _LLM.items()
        for module in modules
    }
