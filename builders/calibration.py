"""Ranges of the language model's activations, layer by layer, for FP8.

Samples run through the torch definition in float32 with the weights of one layer, and of its experts only one, in
memory at a time; what is kept between layers is the residual stream. So a machine with a few GiB calibrates the whole
model. Ranges are the largest magnitudes seen. The engine has one input scale for all experts of a layer, their maximum.
An expert that no token chose is measured on the tokens that came nearest to choosing it; `Ranges.unreached` names it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from builders.trtllm_layout import KV_SCALE, LAYER
from ming_trt.bundle import write_atomically
from ming_trt.checkpoint import Checkpoint
from ming_trt.config import LLMConfig
from ming_trt.errors import BuildError
from ming_trt.models.llm import AUDIO, IMAGE, TEXT, DecoderLayer, MoE, weight_map
from ming_trt.models.weights import Stack, WeightSource

MODALITIES = {TEXT: "text", IMAGE: "image", AUDIO: "audio"}
# tokens that stand in for those of an expert that none chose
_NEAREST = 16
_STATE, _HIDDEN = "calibration.json", "calibration.pt"


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt as it enters layer 0: `embeds` float32 [L, H], `modality` int64 [L], `positions` int64 [3, L]."""

    name: str
    embeds: torch.Tensor
    modality: torch.Tensor
    positions: torch.Tensor


@dataclass
class Ranges:
    """Largest magnitude of each module's input (and of what enters the KV cache), by its name in the checkpoint;
    `unreached` maps a layer to the experts that no token chose; `tokens` counts tokens by modality."""

    amax: dict[str, float] = field(default_factory=dict)
    unreached: dict[str, list[int]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def see(self, name: str, values: torch.Tensor) -> None:
        """Widens the range of `name`. Raises `BuildError` for values that are not finite."""
        largest = float(values.abs().max()) if values.numel() else 0.0
        if not largest < float("inf"):
            raise BuildError(f"calibration gave values that are not finite at '{name}': check the samples")
        self.amax[name] = max(self.amax.get(name, 0.0), largest)

    def facts(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"amax": self.amax, "unreached": self.unreached, "tokens": self.tokens}


Report = Callable[[str], None]


@torch.inference_mode()
def calibrate(
    config: LLMConfig,
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    folder: Path,
    key: str,
    report: Report = lambda _: None,
) -> Ranges:
    """The ranges over `samples`. Goes on where a run with the same `key` ended: its state is in `folder`.

    Raises `BuildError` if there is no sample, or if one of the modalities that have a router is missing.
    """
    counts = {name: sum(int((s.modality == code).sum()) for s in samples) for code, name in MODALITIES.items()}
    lacking = [name for name, count in counts.items() if not count]
    if lacking:
        raise BuildError(
            f"the calibration samples hold no {' and no '.join(lacking)} tokens, whose experts would be guessed: "
            "add such samples"
        )
    ranges, hidden, first = _resume(folder, key)
    ranges.tokens = counts
    if not hidden:
        hidden = [sample.embeds.float() for sample in samples]
    sources = weight_map(config)
    for i in range(first, config.num_layers):
        hidden = _layer(config, checkpoint, sources, i, hidden, samples, ranges)
        _save(folder, key, ranges, hidden, i + 1)
        report(f"calibrated layer {i + 1} of {config.num_layers}")
    return ranges


def _layer(
    config: LLMConfig,
    checkpoint: Checkpoint,
    sources: dict[str, WeightSource],
    index: int,
    hidden: list[torch.Tensor],
    samples: Sequence[Sample],
    ranges: Ranges,
) -> list[torch.Tensor]:
    prefix, target = f"layers.{index}.", LAYER.format(index)
    with torch.device("meta"):
        layer = DecoderLayer(config)
    stacks = ("mlp.gate_up", "mlp.down")
    for name, _ in list(layer.named_parameters()):
        if name not in stacks:
            owner, _, leaf = name.rpartition(".")
            value = torch.nn.Parameter(sources[prefix + name].load(checkpoint, torch.float32), requires_grad=False)
            setattr(layer.get_submodule(owner), leaf, value)
    attended = [_attention(config, layer, x, s, ranges, target) for x, s in zip(hidden, samples, strict=True)]
    x = torch.cat(attended)
    normed = layer.post_attention_layernorm(x)
    ranges.see(f"{target}mlp.fc", normed)
    ranges.see(f"{target}mlp.shared_expert.fc", normed)
    modality = torch.cat([sample.modality for sample in samples])
    logits = layer.mlp.router_logits(normed, modality)
    gate_up, down = (sources[prefix + name] for name in stacks)
    assert isinstance(gate_up, Stack) and isinstance(down, Stack)
    routed, unreached = _experts(layer.mlp, checkpoint, gate_up, down, normed, logits, ranges, f"{target}mlp.proj")
    if unreached:
        ranges.unreached[str(index)] = unreached
    shared = layer.mlp.shared_experts
    inner = functional.silu(shared.gate_proj(normed)) * shared.up_proj(normed)
    ranges.see(f"{target}mlp.shared_expert.proj", inner)
    result = x + (routed + shared.down_proj(inner))
    return list(result.split([len(h) for h in hidden]))


def _attention(
    config: LLMConfig, layer: DecoderLayer, x: torch.Tensor, sample: Sample, ranges: Ranges, target: str
) -> torch.Tensor:
    """`x` plus attention over it, causal; notes the inputs of both linears and what the cache would hold."""
    length = len(x)
    normed = layer.input_layernorm(x)
    ranges.see(f"{target}attention.qkv", normed)
    hook = layer.attention.dense.register_forward_pre_hook(
        lambda _, args: ranges.see(f"{target}attention.dense", args[0])
    )
    cache = torch.zeros(1, config.num_kv_heads, length, config.head_dim)
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    try:
        out, key, value = layer.attention(
            normed[None], sample.positions[:, None], torch.zeros(1, dtype=torch.long), mask, cache, cache
        )
    finally:
        hook.remove()
    ranges.see(target + KV_SCALE, key)
    ranges.see(target + KV_SCALE, value)
    return x + out[0]


def _experts(
    moe: MoE,
    checkpoint: Checkpoint,
    gate_up: Stack,
    down: Stack,
    x: torch.Tensor,
    logits: torch.Tensor,
    ranges: Ranges,
    name: str,
) -> tuple[torch.Tensor, list[int]]:
    """`ops.sparse_moe` with one expert's weights in memory at a time, and the experts that got no token."""
    experts, weights = moe.route(logits)
    total = torch.zeros_like(x)
    unreached = []
    for e, (first, second) in enumerate(zip(gate_up.sources, down.sources, strict=True)):
        token, place = (experts == e).nonzero(as_tuple=True)
        reached = len(token) > 0
        if not reached:
            unreached.append(e)
            token = logits[:, e].topk(min(_NEAREST, len(x))).indices
        gate, up = functional.linear(x[token], first.load(checkpoint, torch.float32)).chunk(2, dim=-1)
        inner = functional.silu(gate) * up
        ranges.see(name, inner)
        if not reached:
            continue
        out = functional.linear(inner, second.load(checkpoint, torch.float32))
        total.index_add_(0, token, out * weights[token, place].unsqueeze(-1))
    return total, unreached


def _resume(folder: Path, key: str) -> tuple[Ranges, list[torch.Tensor], int]:
    try:
        state = json.loads((folder / _STATE).read_text("utf-8"))
        if state["key"] != key:
            return Ranges(), [], 0
        hidden = torch.load(folder / _hidden(state["layers"]), weights_only=True)
        return Ranges(state["amax"], state["unreached"], {}), hidden, state["layers"]
    except (FileNotFoundError, ValueError, KeyError):
        # never begun, or torn by a crash: from the first layer
        return Ranges(), [], 0


def _save(folder: Path, key: str, ranges: Ranges, hidden: list[torch.Tensor], layers: int) -> None:
    """The residual streams go to a file of their own name first; the state that names it replaces the old one last."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(hidden, folder / _hidden(layers))
    write_atomically(folder / _STATE, json.dumps({"key": key, "layers": layers, **ranges.facts()}))
    (folder / _hidden(layers - 1)).unlink(missing_ok=True)


def _hidden(layers: int) -> str:
    return f"{layers}.{_HIDDEN}"
