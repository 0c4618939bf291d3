"""The vision encoder's engine: patches of all pictures of a request in, rows of the LLM out."""

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
from ming_trt.models.vision import INPUT_NAMES, OUTPUT_NAMES, VisionEncoder, weight_map
from ming_trt.processing.vision_index import vision_indices

if TYPE_CHECKING:
    from ming_trt.config import MingConfig
    from ming_trt.models.weights import WeightSource

_AXES: dict[str, dict[int, str]] = {
    "patches": {0: "N"},
    "patch_position": {0: "N"},
    "window_index": {0: "W"},
    "window_length": {0: "W"},
    "window_slot": {0: "N"},
    "frame_index": {0: "F", 1: "L"},
    "frame_length": {0: "F"},
    "frame_slot": {0: "N"},
}


class Vision(MainShardComponent):
    """Component `vision_encoder`."""

    name = "vision_encoder"
    marker = "vision.patch_embed.proj.weight"
    many_rows = True

    def config_key(self, config: MingConfig) -> Mapping[str, Any]:
        return {**asdict(config.vision), "llm_hidden_size": config.llm.hidden_size}

    def sources(self, config: MingConfig) -> Mapping[str, WeightSource]:
        return weight_map(config.vision, config.llm)

    def module(self, config: MingConfig) -> torch.nn.Module:
        return VisionEncoder(config.vision, config.llm)

    def graph(self, config: MingConfig, options: ExportOptions) -> ir.Model:
        with torch.device("meta"):
            module = self.module(config).to(TORCH_DTYPES[options.float_precision])
        # a picture and a smaller video, so that no two symbols have the same size
        feeds = _feeds(config, [[1, 10, 14], [2, 4, 6]])
        inputs = {
            name: torch.empty(array.shape, dtype=torch.float32 if name == "patches" else torch.long, device="meta")
            for name, array in feeds.items()
        }
        return export_graph(module, inputs, _AXES, OUTPUT_NAMES)

    def facts(self, config: MingConfig, options: ExportOptions) -> Mapping[str, Any]:
        c = config.vision
        return {"window_patches": c.window_patches, "merge_size": c.merge_size, "patch_width": c.patch_width}

    def sample_feeds(self, config: MingConfig, rng: np.random.Generator) -> Feeds:
        """A picture whose border windows are cut, and a video of two frame pairs."""
        c = config.vision
        side = c.merge_size * c.window_cells
        feeds = _feeds(config, [[1, side + c.merge_size, side + 2 * c.merge_size], [2, 2 * c.merge_size, side]])
        return {**feeds, "patches": rng.standard_normal(feeds["patches"].shape).astype(np.float32)}


def _feeds(config: MingConfig, grid: list[list[int]]) -> Feeds:
    """The inputs in order, with patches of zeros."""
    count = sum(t * h * w for t, h, w in grid)
    indices = vision_indices(grid, config.vision)
    patches = np.zeros((count, config.vision.patch_width), np.float32)
    return {name: patches if name == "patches" else indices[name] for name in INPUT_NAMES}


COMPONENT = Vision()
