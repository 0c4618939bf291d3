"""One decoder, stepped by our runtime's engine and by torch, with the same weights: what the LLM benchmarks time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_model import OFFICIAL_VOCABULARY, RandomCheckpoint, config, engine_file
from torch.nn import functional

from builders.llm import LLM
from ming_trt.config import LLMConfig, MingConfig
from ming_trt.models import ops, rope
from ming_trt.models.cost import HEAD, llm_step
from ming_trt.models.llm import MingLLM, input_names, weight_map
from ming_trt.models.weights import load_weights
from ming_trt.runtime.onnxruntime import OnnxRuntimeEngine

Step = Callable[[], object]


def step_inputs(config: LLMConfig, tokens: int, past: int, batch: int, capacity: int) -> dict[str, Any]:
    """Arrays of one step behind `past` tokens, by the names of the contract; text only, caches filled with noise."""
    rng = np.random.default_rng(0)
    place = past + np.arange(tokens)
    arrays: dict[str, Any] = {
        "input_ids": rng.integers(0, config.vocab_size, (batch, tokens)),
        "features": np.zeros((1, config.hidden_size), np.float32),
        "feature_index": np.full((batch, tokens), -1),
        "modality": np.zeros((batch, tokens), np.int64),
        "position_ids": np.broadcast_to(place, (3, batch, tokens)).copy(),
        "write_index": np.full(batch, past),
        "attention_mask": np.broadcast_to(
            (np.arange(capacity) <= place[:, None])[None, None], (batch, 1, tokens, capacity)
        ).copy(),
        "logit_index": np.full((batch, 1), tokens - 1),
    }
    for name in input_names(config)[len(arrays) :]:
        cache = rng.standard_normal((batch, config.num_kv_heads, capacity, config.head_dim), dtype=np.float32)
        cache[:, :, past:] = 0
        arrays[name] = cache
    return arrays


class OurStep:
    """A step by the project's engine, caches in place, as the server runs it."""

    def __init__(self, file: Path, threads: int) -> None:
        self.engine = OnnxRuntimeEngine(file, "llm", threads=threads)

    def step(self, arrays: dict[str, Any]) -> Step:
        """Call it to run the step again."""
        into = {n.replace("past_", "present_", 1): array for n, array in arrays.items() if n.startswith("past_")}
        return lambda: self.engine.run(arrays, ["logits"], into)

    def close(self) -> None:
        self.engine.close()


def head_engines(tiny: bool, threads: int) -> dict[str, tuple[OurStep, LLMConfig]]:
    """Two int8 engines of one layer, `wide` with the official vocabulary and `narrow` with a small one: the difference
    of their steps is the projection."""
    models = {"wide": _one_layer(tiny, wide=True), "narrow": _one_layer(tiny, wide=False)}
    return {name: (OurStep(engine_file(LLM(), model, "int8"), threads), model.llm) for name, model in models.items()}


def head_bytes(tiny: bool) -> float:
    """What the projection reads more in the wide engine, in 8 bits with a float32 scale for 128 weights."""
    wide, narrow = (llm_step(_one_layer(tiny, wide=wide).llm, 1).weights[HEAD] for wide in (True, False))
    return (wide - narrow) * (1 + 4 / 128)


def _one_layer(tiny: bool, wide: bool) -> MingConfig:
    words = {"vocab_size": 8192 if tiny else OFFICIAL_VOCABULARY} if wide else {}
    return config(tiny, num_layers=1, **words)


def load_torch(config: LLMConfig, dtype: torch.dtype) -> MingLLM:
    """The definition with the same random weights in `dtype`."""
    with torch.device("meta"):
        module = MingLLM(config)
    load_weights(module, RandomCheckpoint(), weight_map(config), dtype)  # type: ignore[arg-type]
    return module


def torch_step(module: MingLLM, arrays: dict[str, Any], dtype: torch.dtype) -> Step:
    """The same step by torch; caches are written in place."""
    inputs = [torch.from_numpy(np.array(array)) for array in arrays.values()]
    inputs = [
        tensor.to(dtype) if name.startswith("past_") else tensor for name, tensor in zip(arrays, inputs, strict=True)
    ]

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return module(*inputs)[0]

    return run


def plain_mrope(q: Any, k: Any, position_ids: Any, theta: float, kind: str, sections: Any) -> Any:
    """`ming::mrope` without the custom operator, which `torch.compile` cannot look into."""
    cos, sin = (table.unsqueeze(1) for table in rope.cos_sin(position_ids, theta, kind, sections))
    return rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)


def written_in_place(cache: torch.Tensor, update: torch.Tensor, write_index: torch.Tensor) -> torch.Tensor:
    """`ming::kv_update` without a copy of the cache: what a serious torch implementation does."""
    slots = write_index.unsqueeze(1) + torch.arange(update.shape[2])
    index = slots[:, None, :, None].expand(-1, cache.shape[1], -1, cache.shape[3])
    return cache.scatter_(2, index, update)


def looped_experts(x: Any, logits: Any, gate_up: Any, down: Any, top_k: int, normalize: bool) -> torch.Tensor:
    """The official implementation's way: tokens sorted by expert, one product after the other."""
    experts, weights = ops.route(logits, top_k, normalize)
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=gate_up.shape[0]).tolist()
    outputs, start = [], 0
    sorted_x = x[order // top_k]
    for expert, count in enumerate(counts):
        if count:
            gate, up = functional.linear(sorted_x[start : start + count], gate_up[expert]).chunk(2, dim=-1)
            outputs.append(functional.linear(functional.silu(gate) * up, down[expert]))
            start += count
    gathered = torch.empty_like(torch.cat(outputs))
    gathered[order] = torch.cat(outputs)
    mixed = gathered.view(*experts.shape, -1).float() * weights.unsqueeze(-1)
    return mixed.sum(dim=1).to(x.dtype)


def grouped_experts(x: Any, logits: Any, gate_up: Any, down: Any, top_k: int, normalize: bool) -> torch.Tensor:
    """By torch's grouped product (bfloat16 only)."""
    experts, weights = ops.route(logits, top_k, normalize)
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=gate_up.shape[0]).cumsum(0).to(torch.int32)
    gate, up = torch._grouped_mm(x[order // top_k], gate_up.transpose(-2, -1), offs=ends).chunk(2, dim=-1)
    out = torch._grouped_mm(functional.silu(gate) * up, down.transpose(-2, -1), offs=ends)
    gathered = torch.empty_like(out)
    gathered[order] = out
    return (gathered.view(*experts.shape, -1).float() * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)


def gathered_experts(x: Any, logits: Any, gate_up: Any, down: Any, top_k: int, normalize: bool) -> torch.Tensor:
    """The chosen experts' matrices gathered: what `torch.compile` fuses into products of a matrix and a vector."""
    experts, weights = ops.route(logits, top_k, normalize)
    gate, up = torch.einsum("nkih,nh->nki", gate_up[experts], x).chunk(2, dim=-1)
    out = torch.einsum("nkhi,nki->nkh", down[experts], functional.silu(gate) * up)
    return (out.float() * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)


@contextmanager
def torch_operators(experts: Callable[..., torch.Tensor]) -> Iterator[None]:
    """While it lasts, the definition runs with these instead of its reference operators."""
    before = {name: getattr(ops, name) for name in ("mrope", "kv_update", "sparse_moe")}
    chosen = {"mrope": plain_mrope, "kv_update": written_in_place, "sparse_moe": experts}
    try:
        for name, function in chosen.items():
            setattr(ops, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(ops, name, function)


def with_operators(step: Step, experts: Callable[..., torch.Tensor]) -> Step:
    """`step` with `torch_operators` around each call."""

    def run() -> object:
        with torch_operators(experts):
            return step()

    return run


def torch_peers(
    module: MingLLM, arrays: dict[str, Any], dtype: torch.dtype, compiled: bool, threads: int
) -> dict[str, Step]:
    """torch's ways to run the step with the weights of `module`, which are of type `dtype`."""
    torch.set_num_threads(threads)
    name = str(dtype).removeprefix("torch.")
    ways = {f"torch eager {name}": looped_experts}
    if dtype is torch.bfloat16:
        ways[f"torch eager {name}, grouped"] = grouped_experts
    peers = {label: with_operators(torch_step(module, arrays, dtype), way) for label, way in ways.items()}
    if compiled:
        optimized: Any = torch.compile(module, dynamic=False)
        peers[f"torch.compile {name}"] = with_operators(torch_step(optimized, arrays, dtype), gathered_experts)
    return peers


def difference(ours: OurStep, module: MingLLM, dtype: torch.dtype, tokens: int = 32) -> float:
    """The relative error of our logits against torch's, the median over the tokens of a prompt.

    Candidates that do different work prove nothing; the logits of unrelated weights have an error of 1.4. The median,
    since rounding sometimes tips a router to another expert, and that token then differs by more.
    """
    arrays = step_inputs(module.config, tokens, 0, 1, tokens)
    arrays["logit_index"] = np.arange(tokens)[None]
    mine: Any = ours.step(arrays)()
    theirs: Any = with_operators(torch_step(module, arrays, dtype), looped_experts)()
    one, two = np.asarray(mine["logits"][0], np.float64), theirs[0].double().numpy()
    return float(np.median(np.linalg.norm(one - two, axis=1) / np.linalg.norm(two, axis=1)))
