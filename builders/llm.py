"""The language model's engine: one step over a batch of cache slots (docs/DESIGN.md, section 4.1, `llm`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

from builders.component import ExportOptions, Feeds
from builders.export import export_graph
from builders.functions import translations
from builders.main_shard import MainShardComponent
from builders.tensors import DTYPES, TORCH_DTYPES
from ming_trt.models.llm import MingLLM, input_names, output_names, weight_map

if TYPE_CHECKING:
    from ming_trt.config import LLMConfig, MingConfig
    from ming_trt.models.weights import WeightSource


class LLM(MainShardComponent):
    """Component `llm`."""

    name = "llm"
    marker = "model.model.word_embeddings.weight"
    # the routers choose experts: an error there is not small
    keep_float = (".gates.",)

    def config_key(self, config: MingConfig) -> Mapping[str, Any]:
        return asdict(config.llm)

    def sources(self, config: MingConfig) -> Mapping[str, WeightSource]:
        return weight_map(config.llm)

    def module(self, config: MingConfig) -> torch.nn.Module:
        return MingLLM(config.llm)

    def graph(self, config: MingConfig, options: ExportOptions) -> ir.Model:
        dtype = TORCH_DTYPES[options.float_precision]
        with torch.device("meta"):
            module = self.module(config).to(dtype)
            inputs = _example_inputs(config.llm, dtype)
        return export_graph(module, inputs, _dynamic_axes(config.llm), output_names(config.llm), translations())

    def facts(self, config: MingConfig, options: ExportOptions) -> Mapping[str, Any]:
        c = config.llm
        return {
            "cache": {
                "layers": c.num_layers,
                "kv_heads": c.num_kv_heads,
                "head_dim": c.head_dim,
                "dtype": DTYPES[options.float_precision].name.lower(),
                "max_positions": c.max_positions,
            },
            "vocab_size": c.vocab_size,
            "hidden_size": c.hidden_size,
        }

    def sample_feeds(self, config: MingConfig, rng: np.random.Generator) -> Feeds:
        """Two ragged slots: five tokens after three that are in the cache, and three after none, of all modalities."""
        c = config.llm
        batch, steps, capacity, written = 2, 5, 12, np.array([3, 0])
        place = written[:, None] + np.arange(steps)
        modality = rng.integers(0, 3, (batch, steps))
        rows = rng.standard_normal((batch * steps, c.hidden_size)).astype(np.float32)
        feature_index = np.where(modality > 0, np.arange(batch * steps).reshape(batch, steps), -1)
        feeds: Feeds = {
            "input_ids": rng.integers(0, c.vocab_size, (batch, steps)),
            "features": rows / np.linalg.norm(rows, axis=1, keepdims=True),
            "feature_index": feature_index,
            "modality": modality,
            # axes far apart, so that a frequency read from the wrong one shows
            "position_ids": rng.integers(0, 64, (3, batch, steps)),
            "write_index": written,
            "attention_mask": (np.arange(capacity) <= place[:, :, None])[:, None],
            "logit_index": np.array([[0, 4], [2, 1]]),
        }
        for name in input_names(c)[len(feeds) :]:
            past = rng.standard_normal((batch, c.num_kv_heads, capacity, c.head_dim)).astype(np.float32)
            # nothing is in the places that are not written yet
            past *= (np.arange(capacity) < written[:, None])[:, None, :, None]
            feeds[name] = past
        return {name: np.ascontiguousarray(value) for name, value in feeds.items()}


def _example_inputs(c: LLMConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Shapes B, S, T, K, R that differ from each other, so that none is taken for another."""
    batch, steps, capacity, wanted, rows = 2, 5, 7, 3, 11
    cache = (batch, c.num_kv_heads, capacity, c.head_dim)
    step = {
        "input_ids": torch.zeros(batch, steps, dtype=torch.long),
        "features": torch.zeros(rows, c.hidden_size),
        "feature_index": torch.zeros(batch, steps, dtype=torch.long),
        "modality": torch.zeros(batch, steps, dtype=torch.long),
        "position_ids": torch.zeros(3, batch, steps, dtype=torch.long),
        "write_index": torch.zeros(batch, dtype=torch.long),
        "attention_mask": torch.zeros(batch, 1, steps, capacity, dtype=torch.bool),
        "logit_index": torch.zeros(batch, wanted, dtype=torch.long),
    }
    return step | {name: torch.zeros(cache, dtype=dtype) for name in input_names(c)[len(step) :]}


def _dynamic_axes(c: LLMConfig) -> dict[str, dict[int, str]]:
    tokens = {0: "B", 1: "S"}
    axes: dict[str, dict[int, str]] = {
        "input_ids": tokens,
        "features": {0: "R"},
        "feature_index": tokens,
        "modality": tokens,
        "position_ids": {1: "B", 2: "S"},
        "write_index": {0: "B"},
        "attention_mask": {0: "B", 2: "S", 3: "T"},
        "logit_index": {0: "B", 1: "K"},
    }
    return axes | {name: {0: "B", 2: "T"} for name in input_names(c)[len(axes) :]}


COMPONENT = LLM()
