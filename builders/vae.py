"""The autoencoder's engines: `vae_encoder` for reference pictures, `vae_decoder` for results (docs/DESIGN.md, 4.1)."""

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
from ming_trt.image_config import vae_config
from ming_trt.models import vae

if TYPE_CHECKING:
    from ming_trt.checkpoint import Checkpoint
    from ming_trt.config import MingConfig
    from ming_trt.models.weights import WeightSource


class VAE(MainShardComponent):
    """What both halves share. Pictures are f32 in [-1, 1], latents f32 in the denoiser's scale."""

    half: type[vae.VAEEncoder] | type[vae.VAEDecoder]

    def needs(self, config: MingConfig, checkpoint: Checkpoint) -> str | None:
        return missing_folder(checkpoint, "vae/config.json") or super().needs(config, checkpoint)

    def config_key(self, config: MingConfig) -> Mapping[str, Any]:
        return asdict(vae_config(config))

    def sources(self, config: MingConfig) -> Mapping[str, WeightSource]:
        return vae.weight_map(self.half, vae_config(config))

    def module(self, config: MingConfig) -> torch.nn.Module:
        return self.half(vae_config(config))

    def facts(self, config: MingConfig, options: ExportOptions) -> Mapping[str, Any]:
        c = vae_config(config)
        return {"factor": c.factor, "channels": c.latent_channels, "shift": c.shift, "scale": c.scale}


class VAEEncoder(VAE):
    """Component `vae_encoder`."""

    name = "vae_encoder"
    marker = "vae/encoder.conv_in.weight"
    half = vae.VAEEncoder

    def graph(self, config: MingConfig, options: ExportOptions) -> ir.Model:
        c = vae_config(config)
        with torch.device("meta"):
            module = self.module(config).to(TORCH_DTYPES[options.float_precision])
            inputs = {"image": torch.zeros(2, c.picture_channels, 5 * c.factor, 7 * c.factor)}
        return export_graph(module, inputs, {"image": {0: "batch", 2: "height", 3: "width"}}, ["latent"])

    def sample_feeds(self, config: MingConfig, rng: np.random.Generator) -> Feeds:
        c = vae_config(config)
        return {"image": rng.uniform(-1, 1, (1, c.picture_channels, 4 * c.factor, 6 * c.factor)).astype(np.float32)}


class VAEDecoder(VAE):
    """Component `vae_decoder`."""

    name = "vae_decoder"
    marker = "vae/decoder.conv_in.weight"
    half = vae.VAEDecoder

    def graph(self, config: MingConfig, options: ExportOptions) -> ir.Model:
        c = vae_config(config)
        with torch.device("meta"):
            module = self.module(config).to(TORCH_DTYPES[options.float_precision])
            inputs = {"latent": torch.zeros(2, c.latent_channels, 5, 7)}
        return export_graph(module, inputs, {"latent": {0: "batch", 2: "height", 3: "width"}}, ["image"])

    def sample_feeds(self, config: MingConfig, rng: np.random.Generator) -> Feeds:
        c = vae_config(config)
        return {"latent": rng.standard_normal((1, c.latent_channels, 4, 6)).astype(np.float32)}


ENCODER = VAEEncoder()
DECODER = VAEDecoder()
