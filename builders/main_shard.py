"""What the components of the main checkpoint share: from a graph and a weight map to a saved engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

from builders.component import ExportOptions, Feeds
from builders.export import bind_weights, facts, save
from builders.functions import add_bodies
from builders.lowering import lower
from builders.tensorrt_graph import adapt
from builders.tensors import weight_streams
from ming_trt.models.weights import load_weights

if TYPE_CHECKING:
    from ming_trt.checkpoint import Checkpoint
    from ming_trt.config import MingConfig
    from ming_trt.models.weights import WeightSource


class MainShardComponent(ABC):
    """A `builders.component.Component` of the main checkpoint; subclasses say what is particular to an engine."""

    name: str
    # a tensor that a checkpoint with this component has
    marker: str
    # parts of the names of weights that a quantised precision leaves in float32
    keep_float: tuple[str, ...] = ()
    # whether every run has dozens of rows, so that quantising activations pays
    many_rows: bool = False

    def needs(self, config: MingConfig, checkpoint: Checkpoint) -> str | None:
        """None if the checkpoint has this component, else the reason in one sentence."""
        if self.marker in checkpoint:
            return None
        return f"the checkpoint has no tensor '{self.marker}'"

    @abstractmethod
    def config_key(self, config: MingConfig) -> Mapping[str, Any]:
        """See `Component.config_key`."""

    @abstractmethod
    def sources(self, config: MingConfig) -> Mapping[str, WeightSource]:
        """See `Component.sources`."""

    @abstractmethod
    def module(self, config: MingConfig) -> torch.nn.Module:
        """The torch definition, on torch's current default device."""

    @abstractmethod
    def graph(self, config: MingConfig, options: ExportOptions) -> ir.Model:
        """The exported graph, weights not bound."""

    @abstractmethod
    def facts(self, config: MingConfig, options: ExportOptions) -> Mapping[str, Any]:
        """What the runtime must know beside inputs and outputs."""

    @abstractmethod
    def sample_feeds(self, config: MingConfig, rng: np.random.Generator) -> Feeds:
        """See `Component.sample_feeds`."""

    def model(self, config: MingConfig, checkpoint: Checkpoint, options: ExportOptions) -> ir.Model:
        """The whole model for a target, weights bound but not read."""
        model = self.graph(config, options)
        bind_weights(model, weight_streams(self.sources(config), checkpoint, options.float_precision))
        if options.target == "onnxruntime":
            lower(model, options.precision, keep=self.keep_float, many_rows=self.many_rows)
        add_bodies(model, options.float_precision)
        if options.target == "tensorrt":
            adapt(model, options)
        return model

    def export(
        self, config: MingConfig, checkpoint: Checkpoint, folder: Path, options: ExportOptions
    ) -> Mapping[str, Any]:
        """See `Component.export`."""
        model = self.model(config, checkpoint, options)
        save(model, folder)
        return {**facts(model), **self.facts(config, options)}

    def reference(self, config: MingConfig, checkpoint: Checkpoint) -> torch.nn.Module:
        """See `Component.reference`."""
        with torch.device("meta"):
            module = self.module(config)
        return load_weights(module, checkpoint, self.sources(config))
