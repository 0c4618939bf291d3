"""Engines from codec codes to waveform: `flow_encoder`, `flow_estimator`, `f0_predictor`,
`vocoder` (docs/DESIGN.md, section 4.1)."""

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
from builders.functions import translations
from builders.lowering_speech import lower_decoder
from builders.main_shard import MainShardComponent
from builders.tensors import TORCH_DTYPES
from ming_trt.models import detokenizer_weights as weights
from ming_trt.models.flow import FlowEncoder, encoder_caches
from ming_trt.models.flow_estimator import FlowEstimator, estimator_caches
from ming_trt.models.hift import F0Predictor, Vocoder, reach
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
        dtype, speech = TORCH_DTYPES[options.float_precision], load_speech_config(config.folder)
        with torch.device("meta"):
            module = self.module(config).to(dtype)
            examples = self.examples(speech)
            for name, shape in self.caches(speech).items():
                axes = {0: "B", 2: "T"} if -1 in shape else {0: "B"}
                sizes = [_CAPACITY if size < 0 else size for size in shape]
                examples[f"past_{name}"] = torch.zeros(_BATCH, *sizes, dtype=dtype), axes
        inputs = {name: value for name, (value, _) in examples.items()}
        dynamic = {name: axes for name, (_, axes) in examples.items()}
        outputs = (*self.outputs, *(f"present_{name}" for name in self.caches(speech)))
        return export_graph(module, inputs, dynamic, outputs, translations())

    def model(self, config: MingConfig, checkpoint: Checkpoint, options: ExportOptions) -> ir.Model:
        """See `MainShardComponent.model`."""
        model = super().model(config, checkpoint, options)
        if options.target == "onnxruntime":
            lower_decoder(model, options.precision, self.keep_float)
        return model

    def caches(self, config: SpeechConfig) -> dict[str, tuple[int, ...]]:
        """Name and shape, without the batch, of what is carried from part to part; -1 = T."""
        return {}

    @abstractmethod
    def examples(self, config: SpeechConfig) -> dict[str, tuple[torch.Tensor, dict[int, str]]]:
        """Inputs but for caches, on the current device, with the names of their dynamic axes."""

    def cache_feeds(self, config: SpeechConfig, capacity: int, written: int, rng: np.random.Generator) -> Feeds:
        """Caches of two rows whose first `written` places hold something."""
        feeds: Feeds = {}
        for name, shape in self.caches(config).items():
            values = rng.standard_normal((2, *(capacity if size < 0 else size for size in shape))).astype(np.float32)
            if -1 in shape:
                values[:, :, written:] = 0
            feeds[f"past_{name}"] = values
        return feeds


# Sizes of the examples; they differ from each other and from the fixed ones, so that none is taken for another.
_BATCH, _LENGTH, _CAPACITY = 2, 7, 11


class Encoder(_Detokenizer):
    """Component `flow_encoder`."""

    name = "flow_encoder"
    outputs = ("mu", "spk")
    keep_float = ("spk_embed_affine_layer", "encoder_proj")
    many_rows = True

    def config_key(self, config: MingConfig) -> Mapping[str, Any]:
        return asdict(_flow(config))

    def sources(self, config: MingConfig) -> Mapping[str, WeightSource]:
        return weights.encoder_weights(_flow(config))

    def module(self, config: MingConfig) -> torch.nn.Module:
        return FlowEncoder(_flow(config))

    def caches(self, config: SpeechConfig) -> dict[str, tuple[int, ...]]:
        return encoder_caches(config.flow)

    def examples(self, config: SpeechConfig) -> dict[str, tuple[torch.Tensor, dict[int, str]]]:
        flow = config.flow
        return {
            "codes": (torch.zeros(_BATCH, _LENGTH, dtype=torch.long), {0: "B", 1: "C"}),
            "ahead": (torch.zeros(_BATCH, flow.look_ahead, dtype=torch.long), {0: "B"}),
            "look": (torch.zeros(_BATCH, flow.look_ahead, 1), {0: "B"}),
            "write_index": (torch.zeros(_BATCH, dtype=torch.long), {0: "B"}),
            "mask": (torch.zeros(_BATCH, 1, _LENGTH, _CAPACITY, dtype=torch.bool), {0: "B", 2: "C", 3: "T"}),
            "speaker": (torch.zeros(_BATCH, flow.speaker_dim), {0: "B"}),
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
        """A part in the middle of two utterances, of which one ends with it."""
        speech, codes, written = load_speech_config(config.folder), 16, 8
        flow = speech.flow
        return {
            "codes": rng.integers(0, flow.vocabulary, (2, codes)),
            "ahead": rng.integers(0, flow.vocabulary, (2, flow.look_ahead)),
            "look": (np.arange(flow.look_ahead) < np.array([[flow.look_ahead], [1]])).astype(np.float32)[..., None],
            "write_index": np.full(2, written),
            "mask": _chunks(written, codes, 27, 8),
            "speaker": rng.standard_normal((2, flow.speaker_dim)).astype(np.float32),
            **self.cache_feeds(speech, 27, written, rng),
        }


class Estimator(_Detokenizer):
    """Component `flow_estimator`."""

    name = "flow_estimator"
    outputs = ("velocity",)
    # one row each, or the output itself
    keep_float = ("time_mlp", "mlp.1", "final_proj")
    many_rows = True

    def config_key(self, config: MingConfig) -> Mapping[str, Any]:
        return asdict(_flow(config))

    def sources(self, config: MingConfig) -> Mapping[str, WeightSource]:
        return weights.estimator_weights(_flow(config))

    def module(self, config: MingConfig) -> torch.nn.Module:
        return FlowEstimator(_flow(config))

    def caches(self, config: SpeechConfig) -> dict[str, tuple[int, ...]]:
        return estimator_caches(config.flow)

    def examples(self, config: SpeechConfig) -> dict[str, tuple[torch.Tensor, dict[int, str]]]:
        mel, frame = config.flow.mel, {0: "B", 2: "C"}
        return {
            "z": (torch.zeros(_BATCH, mel, _LENGTH), frame),
            "mu": (torch.zeros(_BATCH, mel, _LENGTH), frame),
            "spk": (torch.zeros(_BATCH, mel), {0: "B"}),
            "cond": (torch.zeros(_BATCH, mel, _LENGTH), frame),
            "time": (torch.zeros(_BATCH), {0: "B"}),
            "write_index": (torch.zeros(_BATCH, dtype=torch.long), {0: "B"}),
            "mask": (torch.zeros(_BATCH, 1, _LENGTH, _CAPACITY, dtype=torch.bool), {0: "B", 2: "C", 3: "T"}),
        }

    def facts(self, config: MingConfig, options: ExportOptions) -> Mapping[str, Any]:
        flow = _flow(config)
        return {"mel": flow.mel, "chunk": flow.chunk, "guidance": flow.guidance}

    def sample_feeds(self, config: MingConfig, rng: np.random.Generator) -> Feeds:
        """A part in the middle, one row without a condition."""
        speech, frames, written = load_speech_config(config.folder), 16, 8
        mel, given = speech.flow.mel, np.array([1, 0], np.float32)[:, None]
        normal = {name: rng.standard_normal((2, mel, frames)).astype(np.float32) for name in ("z", "mu", "cond")}
        return {
            "z": normal["z"],
            "mu": given[..., None] * normal["mu"],
            "spk": given * 0.1 * rng.standard_normal((2, mel)).astype(np.float32),
            "cond": given[..., None] * normal["cond"],
            "time": np.array([0.1, 0.7], np.float32),
            "write_index": np.full(2, written),
            "mask": _chunks(written, frames, 27, 8),
            **self.cache_feeds(speech, 27, written, rng),
        }


class Pitch(_Detokenizer):
    """Component `f0_predictor`."""

    name = "f0_predictor"
    outputs = ("f0",)

    def config_key(self, config: MingConfig) -> Mapping[str, Any]:
        return asdict(_hift(config))

    def sources(self, config: MingConfig) -> Mapping[str, WeightSource]:
        return weights.f0_weights(_hift(config))

    def module(self, config: MingConfig) -> torch.nn.Module:
        return F0Predictor(_hift(config))

    def examples(self, config: SpeechConfig) -> dict[str, tuple[torch.Tensor, dict[int, str]]]:
        return {"mel": (torch.zeros(_BATCH, config.hift.mel, _LENGTH), {0: "B", 2: "T"})}

    def facts(self, config: MingConfig, options: ExportOptions) -> Mapping[str, Any]:
        return {"reach": F0Predictor.LAYERS}

    def sample_feeds(self, config: MingConfig, rng: np.random.Generator) -> Feeds:
        return {"mel": rng.normal(-4, 2, (2, _hift(config).mel, 17)).astype(np.float32)}


class HiftVocoder(_Detokenizer):
    """Component `vocoder`."""

    name = "vocoder"
    outputs = ("audio", "source", "cycles")

    def config_key(self, config: MingConfig) -> Mapping[str, Any]:
        return asdict(_hift(config))

    def sources(self, config: MingConfig) -> Mapping[str, WeightSource]:
        return weights.vocoder_weights(_hift(config))

    def module(self, config: MingConfig) -> torch.nn.Module:
        return Vocoder(_hift(config))

    def examples(self, config: SpeechConfig) -> dict[str, tuple[torch.Tensor, dict[int, str]]]:
        c, frame = config.hift, {0: "B", 1: "T"}
        return {
            "mel": (torch.zeros(_BATCH, c.mel, _LENGTH), {0: "B", 2: "T"}),
            "f0": (torch.zeros(_BATCH, _LENGTH), frame),
            "phase": (torch.zeros(_BATCH, c.harmonics + 1), {0: "B"}),
            "noise": (torch.zeros(_BATCH, _LENGTH, c.hop, c.harmonics + 1), frame),
            "source_given": (torch.zeros(_BATCH, _LENGTH, c.hop), frame),
            "source_keep": (torch.zeros(_BATCH, _LENGTH, dtype=torch.bool), frame),
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
        c, batch, frames = _hift(config), 2, 12
        f0 = np.where(rng.random((batch, frames)) < 0.8, rng.uniform(80, 300, (batch, frames)), 3.0)
        return {
            "mel": rng.normal(-4, 2, (batch, c.mel, frames)).astype(np.float32),
            "f0": f0.astype(np.float32),
            "phase": rng.random((batch, c.harmonics + 1)).astype(np.float32),
            "noise": rng.standard_normal((batch, frames, c.hop, c.harmonics + 1)).astype(np.float32),
            "source_given": 0.1 * rng.standard_normal((batch, frames, c.hop)).astype(np.float32),
            "source_keep": np.broadcast_to(np.arange(frames) < 2, (batch, frames)).copy(),
        }


def _flow(config: MingConfig) -> FlowConfig:
    return load_speech_config(config.folder).flow


def _hift(config: MingConfig) -> HiftConfig:
    return load_speech_config(config.folder).hift


def _chunks(start: int, length: int, capacity: int, chunk: int) -> npt.NDArray[np.bool_]:
    """A mask of chunks for two rows, from place `start` on: [2, 1, length, capacity]."""
    query, key = start + np.arange(length)[:, None], np.arange(capacity)
    seen = (key < (query // chunk + 1) * chunk) & (key < start + length)
    return np.broadcast_to(seen, (2, 1, length, capacity)).copy()


ENCODER = Encoder()
ESTIMATOR = Estimator()
PITCH = Pitch()
VOCODER = HiftVocoder()
