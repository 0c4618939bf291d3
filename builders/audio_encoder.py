"""The audio encoder's engine: the mel frames of one clip in, rows of the LLM out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

from builders.component import ExportOptions, Feeds
from builders.export import export_graph
from builders.main_shard import MainShardComponent
from builders.tensors import TORCH_DTYPES
from ming_trt.models.audio import OUTPUT_NAMES, AudioEncoder, weight_map

if TYPE_CHECKING:
    from ming_trt.config import MingConfig
    from ming_trt.models.weights import WeightSource


class Audio(MainShardComponent):
    """Component `audio_encoder`."""

    name = "audio_encoder"
    marker = "audio.conv1.weight"
    many_rows = True

    def config_key(self, config: MingConfig) -> Mapping[str, Any]:
        return {**asdict(config.audio), "llm_hidden_size": config.llm.hidden_size}

    def sources(self, config: MingConfig) -> Mapping[str, WeightSource]:
        return weight_map(config.audio, config.llm)

    def module(self, config: MingConfig) -> torch.nn.Module:
        return AudioEncoder(config.audio, config.llm)

    def graph(self, config: MingConfig, options: ExportOptions) -> ir.Model:
        with torch.device("meta"):
            module = self.module(config).to(TORCH_DTYPES[options.float_precision])
            mel = torch.empty(min(37, config.audio.max_frames), config.audio.num_mels)
        return export_graph(module, {"mel": mel}, {"mel": {0: "frames"}}, OUTPUT_NAMES)

    def facts(self, config: MingConfig, options: ExportOptions) -> Mapping[str, Any]:
        return {"max_frames": config.audio.max_frames, "num_mels": config.audio.num_mels}

    def sample_feeds(self, config: MingConfig, rng: np.random.Generator) -> Feeds:
        """An odd number of frames, so that both strided convolutions read past the end."""
        frames = min(61, config.audio.max_frames)
        return {"mel": rng.uniform(-1, 1, (frames, config.audio.num_mels)).astype(np.float32)}


COMPONENT = Audio()
