"""Engines from codec codes to waveform: `flow_encoder`, `flow_estimator`, `vocoder` (docs/DESIGN.md, section 4.1)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from builders.component import ExportOptions, Feeds
from builders.export import export_graph
from builders.main_shard import MainShardComponent
from builders.tensors import TORCH_DTYPES
from ming_trt.models import detokenizer_weights as weights
from ming_trt.models.flow import FlowEncoder, FlowEstimator
from ming_trt.models.hift import Vocoder, reach
from ming_trt.speech_config import FlowConfig, HiftConfig, SpeechConfig, load_speech_config, missing_part

if TYPE_CHECKING:
    from ming_trt.checkpoint import Checkpoint
    from ming_trt.config import MingConfig
    from ming_trt.models.weights import WeightSource


class _Detokenizer(MainShardComponent):
    """What the three share: their weights lie in the talker folder's `.pt` files."""

    outputs: tuple[str, ...]

    def needs(self, config: MingConfig, checkpoint: Checkpoint) -> str | None:
        return missing_part(checkpoint.folder)

    def graph(self, config: MingConfig, options: ExportOptions) -> ir.Model:
        with torch.device("meta"):
            module = self.module(config).to(TORCH_DTYPES[options.float_precision])
            examples = self.examples(load_speech_config(config.folder))
            inputs = {name: value for name, (value, _) in examples.items()}
        return export_graph(module, inputs, {name: axes for name, (_, axes) in examples.items()}, self.outputs)

    @abstractmethod
    def examples(self, config: SpeechConfig) -> dict[str, tuple[torch.Tensor, dict[int, str]]]:
        """Inputs on the current device with the names of their dynamic axes."""


class Encoder(_Detokenizer):
    """Component `flow_encoder`."""

    name = "flow_encoder"
    outputs = ("mu", "spk")

    def config_key(self, config: MingConfig) -> Mapping[str, Any]:
        return asdict(_flow(config))

    def sources(self, config: MingConfig) -> Mapping[str, WeightSource]:
        return weights.encoder_weights(_flow(config))

    def module(self, config: MingConfig) -> torch.nn.Module:
        return FlowEncoder(_flow(config))

    def examples(self, config: SpeechConfig) -> dict[str, tuple[torch.Tensor, dict[int, str]]]:
        flow, batch, codes = config.flow, 2, 7
        return {
            "codes": (torch.zeros(batch, codes, dtype=torch.long), {0: "B", 1: "N"}),
            "ahead": (torch.zeros(batch, flow.look_ahead, dtype=torch.long), {0: "B"}),
            "look": (torch.zeros(batch, 1, 1), {0: "B"}),
            "mask": (torch.zeros(1, 1, codes, codes, dtype=torch.bool), {2: "N", 3: "N"}),
            "speaker": (torch.zeros(batch, flow.speaker_dim), {0: "B"}),
        }

    def facts(self, config: MingConfig, options: ExportOptions) -> Mapping[str, Any]:
        flow = _flow(config)
        return {
            "vocabulary": flow.vocabulary,
            "look_ahead": flow.look_ahead,
            "chunk": flow.chunk,
            "speaker_dim": flow.speaker_dim,
        }

    def sample_feeds(self, config: MingConfig, rng: np.random.Generator) -> Feeds:
        flow, codes = _flow(config), 23
        return {
            "codes": rng.integers(0, flow.vocabulary, (2, codes)),
            "ahead": rng.integers(0, flow.vocabulary, (2, flow.look_ahead)),
            "look": np.array([1, 0], np.float32)[:, None, None],
            "mask": _chunks(codes, 8),
            "speaker": rng.standard_normal((2, flow.speaker_dim)).astype(np.float32),
        }


class Estimator(_Detokenizer):
    """Component `flow_estimator`."""

    name = "flow_estimator"
    outputs = ("velocity",)

    def config_key(self, config: MingConfig) -> Mapping[str, Any]:
        return asdict(_flow(config))

    def sources(self, config: MingConfig) -> Mapping[str, WeightSource]:
        return weights.estimator_weights(_flow(config))

    def module(self, config: MingConfig) -> torch.nn.Module:
        return FlowEstimator(_flow(config))

    def examples(self, config: SpeechConfig) -> dict[str, tuple[torch.Tensor, dict[int, str]]]:
        mel, batch, frames = config.flow.mel, 2, 7
        frame = {0: "B", 2: "N"}
        return {
            "z": (torch.zeros(batch, mel, frames), frame),
            "mu": (torch.zeros(batch, mel, frames), frame),
            "spk": (torch.zeros(batch, mel), {0: "B"}),
            "cond": (torch.zeros(batch, mel, frames), frame),
            "time": (torch.zeros(batch), {0: "B"}),
            "mask": (torch.zeros(1, 1, frames, frames, dtype=torch.bool), {2: "N", 3: "N"}),
        }

    def facts(self, config: MingConfig, options: ExportOptions) -> Mapping[str, Any]:
        flow = _flow(config)
        return {"mel": flow.mel, "chunk": flow.chunk, "guidance": flow.guidance}

    def sample_feeds(self, config: MingConfig, rng: np.random.Generator) -> Feeds:
        mel, frames = _flow(config).mel, 21
        normal = {name: rng.standard_normal((2, mel, frames)).astype(np.float32) for name in ("z", "mu", "cond")}
        spk = 0.1 * rng.standard_normal((2, mel)).astype(np.float32)
        time = np.array([0.1, 0.7], np.float32)
        return {
            "z": normal["z"],
            "mu": normal["mu"],
            "spk": spk,
            "cond": normal["cond"],
            "time": time,
            "mask": _chunks(frames, 8),
        }


class HiftVocoder(_Detokenizer):
    """Component `vocoder`."""

    name = "vocoder"
    outputs = ("audio", "source", "f0", "cycles")

    def config_key(self, config: MingConfig) -> Mapping[str, Any]:
        return asdict(_hift(config))

    def sources(self, config: MingConfig) -> Mapping[str, WeightSource]:
        return weights.vocoder_weights(_hift(config))

    def module(self, config: MingConfig) -> torch.nn.Module:
        return Vocoder(_hift(config))

    def examples(self, config: SpeechConfig) -> dict[str, tuple[torch.Tensor, dict[int, str]]]:
        c, batch, frames = config.hift, 2, 7
        frame = {0: "B", 1: "T"}
        return {
            "mel": (torch.zeros(batch, c.mel, frames), {0: "B", 2: "T"}),
            "f0_given": (torch.zeros(batch, frames), frame),
            "f0_keep": (torch.zeros(batch, frames, dtype=torch.bool), frame),
            "phase": (torch.zeros(batch, c.harmonics + 1), {0: "B"}),
            "noise": (torch.zeros(batch, frames, c.hop, c.harmonics + 1), frame),
            "source_given": (torch.zeros(batch, frames, c.hop), frame),
            "source_keep": (torch.zeros(batch, frames, dtype=torch.bool), frame),
        }

    def facts(self, config: MingConfig, options: ExportOptions) -> Mapping[str, Any]:
        c = _hift(config)
        return {
            "sample_rate": c.sample_rate,
            "hop": c.hop,
            "mel": c.mel,
            "harmonics": c.harmonics + 1,
            "reach": reach(c),
        }

    def sample_feeds(self, config: MingConfig, rng: np.random.Generator) -> Feeds:
        """F0 is given but for the last frames: errors of a predicted one add up in the phase."""
        c, batch, frames = _hift(config), 2, 12
        given = np.where(rng.random((batch, frames)) < 0.8, rng.uniform(80, 300, (batch, frames)), 3.0)
        keep = np.broadcast_to(np.arange(frames) < frames - 2, (batch, frames))
        return {
            "mel": rng.normal(-4, 2, (batch, c.mel, frames)).astype(np.float32),
            "f0_given": given.astype(np.float32),
            "f0_keep": keep.copy(),
            "phase": rng.random((batch, c.harmonics + 1)).astype(np.float32),
            "noise": rng.standard_normal((batch, frames, c.hop, c.harmonics + 1)).astype(np.float32),
            "source_given": 0.1 * rng.standard_normal((batch, frames, c.hop)).astype(np.float32),
            "source_keep": np.broadcast_to(np.arange(frames) < 2, (batch, frames)).copy(),
        }


def _flow(config: MingConfig) -> FlowConfig:
    return load_speech_config(config.folder).flow


def _hift(config: MingConfig) -> HiftConfig:
    return load_speech_config(config.folder).hift


def _chunks(length: int, chunk: int) -> npt.NDArray[np.bool_]:
    """A mask of chunks [1, 1, length, length]."""
    place = np.arange(length)
    return (place < (place[:, None] // chunk + 1) * chunk)[None, None]


ENCODER = Encoder()
ESTIMATOR = Estimator()
VOCODER = HiftVocoder()
