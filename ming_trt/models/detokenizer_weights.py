"""Where the weights of flow and vocoder come from: the `.pt` files of the checkpoint's talker folder."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ming_trt.models.flow import FlowEncoder
from ming_trt.models.flow_estimator import FlowEstimator
from ming_trt.models.hift import F0Predictor, Vocoder
from ming_trt.models.weights import Tensor, WeightNorm, WeightSource
from ming_trt.speech_config import FLOW_FILE, FOLDER, HIFT_FILE, FlowConfig, HiftConfig


def encoder_weights(config: FlowConfig) -> dict[str, WeightSource]:
    """Parameter of `FlowEncoder` -> tensors of the flow's file."""
    return _same_names(FlowEncoder, config, f"{FOLDER}/{FLOW_FILE}/")


def estimator_weights(config: FlowConfig) -> dict[str, WeightSource]:
    """Parameter of `FlowEstimator` -> tensors of the flow's file."""
    return _same_names(FlowEstimator, config, f"{FOLDER}/{FLOW_FILE}/decoder.estimator.")


def f0_weights(config: HiftConfig) -> dict[str, WeightSource]:
    """Parameter of `F0Predictor` -> tensors of the vocoder's file."""
    return _without_norm(_same_names(F0Predictor, config, f"{_hift(config)}f0_predictor."), config)


def vocoder_weights(config: HiftConfig) -> dict[str, WeightSource]:
    """Parameter of `Vocoder` -> tensors of the vocoder's file."""
    return _without_norm(_same_names(Vocoder, config, _hift(config)), config)


def _hift(config: HiftConfig) -> str:
    return f"{FOLDER}/{HIFT_FILE}/{config.prefix}"


# The spelling of a direction -> that of its length.
_LENGTHS = {"weight_v": "weight_g", "parametrizations.weight.original1": "parametrizations.weight.original0"}
_PLAIN = ("m_source.l_linear.", "source_downs.", "classifier.")


def _without_norm(sources: Mapping[str, WeightSource], config: HiftConfig) -> dict[str, WeightSource]:
    """Reads normalised weights in the file's spelling; those of `_PLAIN` are stored as they are."""
    found = dict(sources)
    for name, source in sources.items():
        if name.endswith("weight") and config.weight_norm in _LENGTHS and not name.startswith(_PLAIN):
            stored = source.names[0].removesuffix(".weight")
            sizes = (source.shape[0], *(1 for _ in source.shape[1:]))
            length = Tensor(f"{stored}.{_LENGTHS[config.weight_norm]}", sizes)
            found[name] = WeightNorm((length, Tensor(f"{stored}.{config.weight_norm}", source.shape)))
    return found


def _same_names(kind: type[torch.nn.Module], config: FlowConfig | HiftConfig, prefix: str) -> dict[str, WeightSource]:
    with torch.device("meta"):
        module = kind(config)
    return {name: Tensor(prefix + name, tuple(value.shape)) for name, value in module.named_parameters()}
