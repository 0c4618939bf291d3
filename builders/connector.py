"""Engines between the LLM and the denoiser, run once per picture: `connector` and `condition` (docs/DESIGN.md, 4.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

from builders.component import ExportOptions, Feeds
from builders.export import export_graph
from builders.main_shard import MainShardComponent
from builders.tensors import TORCH_DTYPES
from ming_trt.image_config import condition_config, connector_config
from ming_trt.models import condition, connector
from ming_trt.models.weights import load_weights
from ming_trt.processing.query import USED

if TYPE_CHECKING:
    from ming_trt.checkpoint import Checkpoint
    from ming_trt.config import MingConfig
    from ming_trt.models.weights import WeightSource

QUERY_TOKENS_FILE = "query_tokens.npy"


def missing_folder(checkpoint: Checkpoint, *files: str) -> str | None:
    """None if the checkpoint has all `files`, else a sentence about the first that it lacks."""
    for file in files:
        if not (checkpoint.folder / file).exists():
            return f"the checkpoint has no '{file}'"
    return None


class Connector(MainShardComponent):
    """Component `connector`: rows of the last query scale to the condition.

    Beside the engine lies `query_tokens.npy`, f32 [336, LLM hidden]: the rows that enter the LLM for a picture.
    """

    name = "connector"
    marker = "mlp/proj_in.weight"

    def needs(self, config: MingConfig, checkpoint: Checkpoint) -> str | None:
        return missing_folder(checkpoint, "connector/config.json", "mlp") or super().needs(config, checkpoint)

    def config_key(self, config: MingConfig) -> Mapping[str, Any]:
        return asdict(connector_config(config))

    def sources(self, config: MingConfig) -> Mapping[str, WeightSource]:
        c = connector_config(config)
        return {**connector.weight_map(c), "query_tokens": connector.query_tokens(c.llm_hidden)}

    def export(
        self, config: MingConfig, checkpoint: Checkpoint, folder: Path, options: ExportOptions
    ) -> Mapping[str, Any]:
        facts = super().export(config, checkpoint, folder, options)
        rows = connector.query_tokens(config.llm.hidden_size).load(checkpoint, torch.float32)
        np.save(folder / QUERY_TOKENS_FILE, rows.numpy())
        return facts

    def reference(self, config: MingConfig, checkpoint: Checkpoint) -> torch.nn.Module:
        with torch.device("meta"):
            module = self.module(config)
        return load_weights(module, checkpoint, connector.weight_map(connector_config(config)))

    def module(self, config: MingConfig) -> torch.nn.Module:
        return connector.Connector(connector_config(config))

    def graph(self, config: MingConfig, options: ExportOptions) -> ir.Model:
        with torch.device("meta"):
            module = self.module(config).to(TORCH_DTYPES[options.float_precision])
            inputs = {"hidden": torch.zeros(2, USED, config.llm.hidden_size)}
        return export_graph(module, inputs, {"hidden": {0: "batch"}}, ["condition"])

    def facts(self, config: MingConfig, options: ExportOptions) -> Mapping[str, Any]:
        return {"tokens": USED, "query_tokens": QUERY_TOKENS_FILE}

    def sample_feeds(self, config: MingConfig, rng: np.random.Generator) -> Feeds:
        return {"hidden": rng.standard_normal((2, USED, config.llm.hidden_size)).astype(np.float32)}


class Condition(MainShardComponent):
    """Component `condition`: the condition to what the denoiser is told of the prompt."""

    name = "condition"
    marker = "mlp/mlp.fc1.weight"

    def needs(self, config: MingConfig, checkpoint: Checkpoint) -> str | None:
        return missing_folder(checkpoint, "transformer/config.json", "mlp") or super().needs(config, checkpoint)

    def config_key(self, config: MingConfig) -> Mapping[str, Any]:
        return asdict(condition_config(config))

    def sources(self, config: MingConfig) -> Mapping[str, WeightSource]:
        return condition.weight_map(condition_config(config))

    def module(self, config: MingConfig) -> torch.nn.Module:
        return condition.Condition(condition_config(config))

    def graph(self, config: MingConfig, options: ExportOptions) -> ir.Model:
        with torch.device("meta"):
            module = self.module(config).to(TORCH_DTYPES[options.float_precision])
            inputs = {"condition": torch.zeros(2, USED, config.llm.hidden_size)}
        return export_graph(module, inputs, {"condition": {0: "batch"}}, ["context", "pooled"])

    def facts(self, config: MingConfig, options: ExportOptions) -> Mapping[str, Any]:
        return {"tokens": USED}

    def sample_feeds(self, config: MingConfig, rng: np.random.Generator) -> Feeds:
        rows = rng.standard_normal((2, USED, config.llm.hidden_size)).astype(np.float32)
        return {"condition": rows / np.linalg.norm(rows, axis=-1, keepdims=True)}


COMPONENT = Connector()
CONDITION = Condition()
