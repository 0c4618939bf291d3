"""The denoiser's engine: one evaluation over a batch of guidance branches and requests (docs/DESIGN.md, 4.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

from builders.component import ExportOptions, Feeds
from builders.connector import missing_folder
from builders.export import export_graph
from builders.main_shard import MainShardComponent
from builders.tensors import TORCH_DTYPES
from ming_trt.image_config import dit_config, schedule_config
from ming_trt.models import dit
from ming_trt.processing.query import USED

if TYPE_CHECKING:
    from ming_trt.checkpoint import Checkpoint
    from ming_trt.config import MingConfig
    from ming_trt.models.weights import WeightSource

DYNAMIC_AXES = {
    "latent": {0: "batch", 2: "height", 3: "width"},
    "time": {0: "batch"},
    "context": {0: "batch"},
    "pooled": {0: "batch"},
    "reference": {0: "batch", 2: "reference_height", 3: "reference_width"},
    "token_index": {0: "tokens"},
}


class DiT(MainShardComponent):
    """Component `dit`."""

    name = "dit"
    marker = "transformer/proj_out.weight"
    # one row per picture, or the output itself: an error there reaches every token, and there is nothing to gain
    keep_float = ("time_text_embed.", "norm1", "norm_out.", "proj_out.")
    many_rows = True

    def needs(self, config: MingConfig, checkpoint: Checkpoint) -> str | None:
        files = ("transformer/config.json", "scheduler/scheduler_config.json", "vae/config.json")
        return missing_folder(checkpoint, *files) or super().needs(config, checkpoint)

    def config_key(self, config: MingConfig) -> Mapping[str, Any]:
        return {"dit": asdict(dit_config(config)), "schedule": asdict(schedule_config(config))}

    def sources(self, config: MingConfig) -> Mapping[str, WeightSource]:
        return dit.weight_map(dit_config(config))

    def module(self, config: MingConfig) -> torch.nn.Module:
        return dit.DiT(dit_config(config))

    def graph(self, config: MingConfig, options: ExportOptions) -> ir.Model:
        c = dit_config(config)
        # sizes that differ from each other, so that none is taken for another
        batch, tokens = 2, 72
        with torch.device("meta"):
            module = self.module(config).to(TORCH_DTYPES[options.float_precision])
            inputs = {
                "latent": torch.zeros(batch, c.channels, 12, 20),
                "time": torch.zeros(batch),
                "context": torch.zeros(batch, USED, c.hidden),
                "pooled": torch.zeros(batch, c.hidden),
                "reference": torch.zeros(batch, c.channels, 6, 8),
                "token_index": torch.zeros(tokens, dtype=torch.long),
            }
        return export_graph(module, inputs, DYNAMIC_AXES, ["velocity"])

    def facts(self, config: MingConfig, options: ExportOptions) -> Mapping[str, Any]:
        c = dit_config(config)
        return {"channels": c.channels, "patch": c.patch, "schedule": asdict(schedule_config(config))}

    def sample_feeds(self, config: MingConfig, rng: np.random.Generator) -> Feeds:
        """Two rows at different times, with a reference picture, not square."""
        c = dit_config(config)
        height, width = min(10, c.patch * c.table_side), min(16, c.patch * c.table_side)
        tokens = height * width // c.patch**2

        def normal(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
            return rng.standard_normal(shape).astype(np.float32)

        return {
            "latent": normal(2, c.channels, height, width),
            "time": np.array([1000.0, 104.3228], np.float32),
            "context": normal(2, USED, c.hidden),
            "pooled": normal(2, c.hidden),
            "reference": normal(2, c.channels, height, width),
            "token_index": np.arange(2 * tokens),
        }


COMPONENT = DiT()
