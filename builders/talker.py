"""The talker's engine: one step over a batch of cache slots (docs/DESIGN.md, section 4.1, `talker`)."""

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
from ming_trt.models import talker
from ming_trt.speech_config import FOLDER, TalkerConfig, load_talker_config

if TYPE_CHECKING:
    from ming_trt.checkpoint import Checkpoint
    from ming_trt.config import MingConfig
    from ming_trt.models.weights import WeightSource


class Talker(MainShardComponent):
    """Component `talker`."""

    name = "talker"
    marker = "talker.model.model.embed_tokens.weight"

    def needs(self, config: MingConfig, checkpoint: Checkpoint) -> str | None:
        if not (checkpoint.folder / FOLDER / "config.json").is_file():
            return f"the checkpoint has no {FOLDER}/config.json"
        return super().needs(config, checkpoint)

    def config_key(self, config: MingConfig) -> Mapping[str, Any]:
        return asdict(load_talker_config(config.folder))

    def sources(self, config: MingConfig) -> Mapping[str, WeightSource]:
        return talker.weight_map(load_talker_config(config.folder))

    def module(self, config: MingConfig) -> torch.nn.Module:
        return talker.Talker(load_talker_config(config.folder))

    def graph(self, config: MingConfig, options: ExportOptions) -> ir.Model:
        dtype, c = TORCH_DTYPES[options.float_precision], load_talker_config(config.folder)
        with torch.device("meta"):
            module = self.module(config).to(dtype)
            inputs = _example_inputs(c, dtype)
        return export_graph(module, inputs, _dynamic_axes(c), talker.output_names(c), translations())

    def facts(self, config: MingConfig, options: ExportOptions) -> Mapping[str, Any]:
        c = load_talker_config(config.folder)
        return {
            "cache": {
                "layers": c.layers,
                "kv_heads": c.kv_heads,
                "head_dim": c.head_dim,
                "dtype": DTYPES[options.float_precision].name.lower(),
            },
            "vocab_size": c.vocab_size,
            "text_vocab": c.text_vocab,
            "speaker_dim": c.speaker_dim,
            "thinker_hidden": c.thinker_hidden,
        }

    def sample_feeds(self, config: MingConfig, rng: np.random.Generator) -> Feeds:
        """Two ragged slots: six tokens after two that are in the cache, and four after none, with all kinds of rows."""
        c = load_talker_config(config.folder)
        batch, steps, capacity, written = 2, 6, 11, np.array([2, 0])
        place = written[:, None] + np.arange(steps)
        index = np.full((batch, steps), -1)
        speaker, thinker = index.copy(), index.copy()
        speaker[0, 1], speaker[1, 2], thinker[0, 3:5] = 1, 0, (2, 0)
        feeds: Feeds = {
            "audio_ids": rng.integers(0, c.vocab_size, (batch, steps)),
            "text_ids": rng.integers(0, c.text_vocab, (batch, steps)),
            "speaker": rng.standard_normal((2, c.speaker_dim)).astype(np.float32),
            "speaker_index": speaker,
            "thinker": rng.standard_normal((3, c.thinker_hidden)).astype(np.float32),
            "thinker_index": thinker,
            "position_ids": place,
            "write_index": written,
            "attention_mask": (np.arange(capacity) <= place[:, :, None])[:, None],
            "logit_index": np.array([[0, 5], [3, 1]]),
        }
        for name in talker.input_names(c)[len(feeds) :]:
            past = rng.standard_normal((batch, c.kv_heads, capacity, c.head_dim)).astype(np.float32)
            feeds[name] = past * (np.arange(capacity) < written[:, None])[:, None, :, None]
        return {name: np.ascontiguousarray(value) for name, value in feeds.items()}


def _example_inputs(c: TalkerConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Shapes B, S, T, K, P, R that differ from each other, so that none is taken for another."""
    batch, steps, capacity, wanted, speakers, rows = 2, 5, 7, 3, 4, 11
    cache = (batch, c.kv_heads, capacity, c.head_dim)
    step = {
        "audio_ids": torch.zeros(batch, steps, dtype=torch.long),
        "text_ids": torch.zeros(batch, steps, dtype=torch.long),
        "speaker": torch.zeros(speakers, c.speaker_dim),
        "speaker_index": torch.zeros(batch, steps, dtype=torch.long),
        "thinker": torch.zeros(rows, c.thinker_hidden),
        "thinker_index": torch.zeros(batch, steps, dtype=torch.long),
        "position_ids": torch.zeros(batch, steps, dtype=torch.long),
        "write_index": torch.zeros(batch, dtype=torch.long),
        "attention_mask": torch.zeros(batch, 1, steps, capacity, dtype=torch.bool),
        "logit_index": torch.zeros(batch, wanted, dtype=torch.long),
    }
    return step | {name: torch.zeros(cache, dtype=dtype) for name in talker.input_names(c)[len(step) :]}


def _dynamic_axes(c: TalkerConfig) -> dict[str, dict[int, str]]:
    tokens = {0: "B", 1: "S"}
    axes: dict[str, dict[int, str]] = {
        "audio_ids": tokens,
        "text_ids": tokens,
        "speaker": {0: "P"},
        "speaker_index": tokens,
        "thinker": {0: "R"},
        "thinker_index": tokens,
        "position_ids": tokens,
        "write_index": {0: "B"},
        "attention_mask": {0: "B", 2: "S", 3: "T"},
        "logit_index": {0: "B", 1: "K"},
    }
    return axes | {name: {0: "B", 2: "T"} for name in talker.input_names(c)[len(axes) :]}


COMPONENT = Talker()
