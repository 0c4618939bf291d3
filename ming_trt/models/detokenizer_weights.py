"""Where the weights of flow and vocoder come from: the `.pt` files of the checkpoint's talker folder."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ming_trt.checkpoint import Checkpoint
from ming_trt.models.flow import FlowEncoder, FlowEstimator
from ming_trt.models.hift import Vocoder
from ming_trt.models.weights import Shape, Tensor, WeightSource
from ming_trt.speech_config import FLOW_FILE, FOLDER, HIFT_FILE, FlowConfig, HiftConfig


@dataclass(frozen=True, slots=True)
class WeightNorm(WeightSource):
    """`direction` scaled so that each entry of its first dimension has the length in `length` ([n, 1, ...])."""

    length: Tensor
    direction: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.length.names, *self.direction.names)

    @property
    def shape(self) -> Shape:
        return self.direction.shape

    def check(self, checkpoint: Checkpoint) -> None:
        self.length.check(checkpoint)
        self.direction.check(checkpoint)

    def fill(self, target: torch.Tensor, checkpoint: Checkpoint) -> None:
        direction = self.direction.load(checkpoint, torch.float32)
        length = self.length.load(checkpoint, torch.float32)
        norm = torch.linalg.vector_norm(direction, dim=tuple(range(1, direction.ndim)), keepdim=True)
        target.copy_(direction * (length / norm))


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
    length = {"weight_v": "weight_g", "parametrizations.weight.original1": "parametrizations.weight.original0"}
    sources = _same_names(Vocoder, config, base)
    for name, source in sources.items():
        owner, _, leaf = name.rpartition(".")
        if (
            leaf == "weight"
            and original in length
            and not owner.startswith(("m_source", "source_downs", "f0_predictor.classifier"))
        ):
            shape = source.shape
            sources[name] = WeightNorm(
                Tensor(f"{base}{owner}.{length[original]}", (shape[0], *(1 for _ in shape[1:]))),
                Tensor(f"{base}{owner}.{original}", shape),
            )
    return sources


def _same_names(kind: type[torch.nn.Module], config: FlowConfig | HiftConfig, prefix: str) -> dict[str, WeightSource]:
    with torch.device("meta"):
        module = kind(config)
    return {name: Tensor(prefix + name, tuple(value.shape)) for name, value in module.named_parameters()}
