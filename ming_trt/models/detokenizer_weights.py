"""Where the weights of flow and vocoder come from: the `.pt` files of the checkpoint's talker folder."""

from __future__ import annotations

import torch

from ming_trt.models.flow import FlowEncoder, FlowEstimator
from ming_trt.models.hift import Vocoder
from ming_trt.models.weights import Tensor, WeightNorm, WeightSource
from ming_trt.speech_config import FLOW_FILE, FOLDER, HIFT_FILE, FlowConfig, HiftConfig


def encoder_weights(config: FlowConfig) -> dict[str, WeightSource]:
    """Parameter of `FlowEncoder` -> tensors of the flow's file."""
    return _same_names(FlowEncoder, config, f"{FOLDER}/{FLOW_FILE}/")


def estimator_weights(config: FlowConfig) -> dict[str, WeightSource]:
    """Parameter of `FlowEstimator` -> tensors of the flow's file."""
    return _same_names(FlowEstimator, config, f"{FOLDER}/{FLOW_FILE}/decoder.estimator.")


def vocoder_weights(config: HiftConfig) -> dict[str, WeightSource]:
    """Parameter of `Vocoder` -> tensors of the vocoder's file, in either spelling of weight norm."""
    base = f"{FOLDER}/{HIFT_FILE}/{config.prefix}"
    original = config.weight_norm
    lengths = {"weight_v": "weight_g", "parametrizations.weight.original1": "parametrizations.weight.original0"}
    sources = _same_names(Vocoder, config, base)
    for name, source in sources.items():
        owner, _, leaf = name.rpartition(".")
        if (
            leaf == "weight"
            and original in lengths
            and not owner.startswith(("m_source", "source_downs", "f0_predictor.classifier"))
        ):
            length = Tensor(f"{base}{owner}.{lengths[original]}", (source.shape[0], *(1 for _ in source.shape[1:])))
            sources[name] = WeightNorm((length, Tensor(f"{base}{owner}.{original}", source.shape)))
    return sources


def _same_names(kind: type[torch.nn.Module], config: FlowConfig | HiftConfig, prefix: str) -> dict[str, WeightSource]:
    with torch.device("meta"):
        module = kind(config)
    return {name: Tensor(prefix + name, tuple(value.shape)) for name, value in module.named_parameters()}
