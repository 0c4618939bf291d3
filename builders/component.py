"""What the build graph needs to know of an engine.

One module of this package per engine gives one object with this interface; `builders.build` turns it into steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    from builders.precision import Scheme
    from ming_trt.checkpoint import Checkpoint
    from ming_trt.config import MingConfig
    from ming_trt.models.weights import WeightSource

Feeds = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How a graph is made. Everything here is part of a step's content key.

    `target` is who will run it: "onnxruntime" (contrib operators are allowed) or "tensorrt" (standard operators and
    local functions of domain `ming`). `precision` is "fp32", "fp16", "bf16", "int8", "int4" or "w8a8"; the last three
    are schemes of target "onnxruntime": 8 or 4 bits for weights alone, and 8 bits for weights and activations.

    Of target "tensorrt" alone: `scheme` says how numbers are held and overrides `precision`; `ranges` maps linear
    layers to the largest magnitude of their inputs, or one for each range of steps, for FP8; `fixed` gives symbols a
    number; `lowered` names operators that are written in basic ones (`builders/tensorrt_graph.py`).
    """

    target: str = "onnxruntime"
    precision: str = "fp32"
    scheme: Scheme | None = None
    ranges: tuple[tuple[str, float | tuple[float, ...]], ...] = ()
    fixed: tuple[tuple[str, int], ...] = ()
    lowered: tuple[str, ...] = ()

    @property
    def float_precision(self) -> str:
        """The type of activations and of weights that are not quantised: "fp32", "fp16" or "bf16"."""
        if self.scheme is not None:
            return self.scheme.floats
        return self.precision if self.precision in ("fp16", "bf16") else "fp32"


class Component(Protocol):
    """An engine: where its weights come from, how it becomes a graph, and how it is checked."""

    @property
    def name(self) -> str:
        """Engine name, also its folder in the bundle."""
        ...

    def needs(self, config: MingConfig, checkpoint: Checkpoint) -> str | None:
        """None if `checkpoint` holds what this engine is made from, else why not, in one sentence. Reads headers."""
        ...

    def config_key(self, config: MingConfig) -> Mapping[str, Any]:
        """What the graph depends on, as JSON values: equal keys give equal graphs."""
        ...

    def sources(self, config: MingConfig) -> Mapping[str, WeightSource]:
        """Parameter name -> where in the checkpoint it comes from. Their digests are part of the content key."""
        ...

    def export(
        self, config: MingConfig, checkpoint: Checkpoint, folder: Path, options: ExportOptions
    ) -> Mapping[str, Any]:
        """Writes `folder/model.onnx` and `folder/model.onnx.data`; memory is bounded by the largest tensor.

        Returns facts for the manifest (JSON values): `inputs` and `outputs` (name -> {"dtype", "shape"}, symbols for
        dynamic sizes), `opset`, `operators` (domain:type -> count), and what else the runtime must know, e.g. the
        LLM's `cache`.
        """
        ...

    def reference(self, config: MingConfig, checkpoint: Checkpoint) -> torch.nn.Module:
        """The torch definition in float32 with its weights; takes the engine's inputs in the engine's order."""
        ...

    def sample_feeds(self, config: MingConfig, rng: np.random.Generator) -> Feeds:
        """Small inputs by name for the numerics gate, valid for any weights."""
        ...
