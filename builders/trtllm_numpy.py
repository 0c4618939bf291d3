"""A model, in numpy, of what the TensorRT-LLM engine computes with an exported checkpoint, rank by rank.

It reads the rank files and nothing else, so it shows what was written: names, order of halves, slices of ranks, scales.
Sums over ranks are where the engine has an all-reduce. Products are float32 of dequantised values; FP8 inputs are
rounded to E4M3 as the engine's quantise nodes do. It is a check, not a runtime: one prompt, no cache.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from builders.trtllm_fp8 import MAX
from builders.trtllm_layout import INPUT_SCALE, LAYER, WEIGHT, WEIGHT_SCALE
from builders.trtllm_write import rank_file
from ming_trt.checkpoint import ITEM_SIZE, tensor_headers
from ming_trt.models.weights import TORCH_DTYPES
from ming_trt.trtllm.prompt_table import AUDIO, IMAGE, modality_of

Floats = npt.NDArray[np.float32]
# Told of every quantisable product: module, expert (or -1), rank, input, output.
Tap = Callable[[str, int, int, Floats, Floats], None]


class NumpyEngine:
    """The checkpoint in `folder`, opened. `activations=False` leaves the inputs of FP8 products as they are."""

    def __init__(self, folder: Path, *, activations: bool = True, tap: Tap = lambda *_: None) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
        self.mapping: dict[str, int] = self.config["mapping"]
        self.ranks = range(self.mapping["world_size"])
        files = [folder / rank_file(rank) for rank in self.ranks]
        self._names = [{info.name: info for info in tensor_headers(file)} for file in files]
        self._activations = activations
        self._tap = tap
        self.num_layers: int = self.config["num_hidden_layers"]
        self._eps: float = self.config["norm_epsilon"]
        self._experts: int = self.config["moe"]["num_experts"]

    def tensor(self, name: str, rank: int = 0, slot: int | None = None) -> Floats:
        """A stored tensor, or one entry of a stack, as float32 of the stored numbers (scales are not applied)."""
        info = self._names[rank][name]
        shape = info.shape if slot is None else info.shape[1:]
        size = ITEM_SIZE[info.dtype] * math.prod(shape)
        # read, not mapped: pages of a mapped file would count as this process's memory
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.offset + (slot or 0) * size)
            data = bytearray(file.read(size))
        values = torch.frombuffer(data, dtype=TORCH_DTYPES[info.dtype]).reshape(shape)
        array: Floats = values.float().numpy()
        return array

    def linear(self, x: Floats, module: str, rank: int, slot: int | None = None, expert: int = -1) -> Floats:
        """`x` times the rank's part of a module (of an expert's entry `slot`)."""
        weight = self.tensor(module + WEIGHT, rank, slot)
        if module + WEIGHT_SCALE not in self._names[rank]:
            y = x @ weight.T
        else:
            weight_scale = self.tensor(module + WEIGHT_SCALE, rank).reshape(-1)[slot or 0]
            scale = self.tensor(module + INPUT_SCALE, rank)[0]
            quantised = _e4m3(x / scale) * scale if self._activations else x
            y = (quantised @ weight.T) * weight_scale
        self._tap(module, expert, rank, x, y)
        return y

    def norm(self, x: Floats, module: str) -> Floats:
        """RMS norm with the module's weight."""
        scaled: Floats = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(self._eps))
        return scaled * self.tensor(module + WEIGHT)

    def attention(self, layer: int, x: Floats, table: Floats) -> Floats:
        """[L, H] of a layer's attention for its normed input; `table` is the request's rotary table."""
        name, size = LAYER.format(layer) + "attention.", self.config["head_size"]
        heads = self.config["num_attention_heads"] // len(self.ranks)
        kv = max(1, self.config["num_key_value_heads"] // len(self.ranks))
        cos, sin = np.moveaxis(table.reshape(-1, size // 2, 2)[: len(x), None], -1, 0)
        future = np.triu(np.full((len(x), len(x)), -np.inf, np.float32), 1)
        total = np.zeros_like(x)
        for rank in self.ranks:
            qkv = self.linear(x, name + "qkv", rank).reshape(len(x), heads + 2 * kv, size)
            q, k = (_rotate(part, cos, sin) for part in (qkv[:, :heads], qkv[:, heads : heads + kv]))
            k, v = (np.repeat(part, heads // kv, axis=1) for part in (k, qkv[:, heads + kv :]))
            scores = np.einsum("qhd,khd->hqk", q, k) / np.float32(np.sqrt(size)) + future
            mixed = np.einsum("hqk,khd->qhd", _softmax(scores), v).reshape(len(x), -1)
            total = total + self.linear(np.ascontiguousarray(mixed), name + "dense", rank)
        return total

    def router_logits(self, layer: int, x: Floats, modality: npt.NDArray[np.int64]) -> Floats:
        """[L, E]: each token's logits of the router of its modality."""
        name = LAYER.format(layer) + "mlp."
        text, image, audio = (self.linear(x, f"{name}{kind}router", 0) for kind in ("", "image_", "audio_"))
        code = modality[:, None]
        return np.where(code == AUDIO, audio, np.where(code == IMAGE, image, text))

    def moe(self, layer: int, x: Floats, modality: npt.NDArray[np.int64]) -> Floats:
        """[L, H] of a layer's experts and shared expert for their normed input."""
        name, logits = LAYER.format(layer) + "mlp.", self.router_logits(layer, x, modality)
        experts = np.argsort(-logits, axis=1, kind="stable")[:, : self.config["moe"]["top_k"]]
        if self.config["moe"]["normalization_mode"] == 1:
            scales = _softmax(np.take_along_axis(logits, experts, 1))
        else:
            scales = np.take_along_axis(_softmax(logits), experts, 1)
        groups = self.mapping["moe_ep_size"]
        local = self._experts // groups
        total = np.zeros_like(x)
        for rank in self.ranks:
            for slot in range(local):
                expert = rank % groups * local + slot
                token, place = np.nonzero(experts == expert)
                if len(token):
                    inner = _swiglu(self.linear(x[token], name + "fc", rank, slot, expert))
                    y = self.linear(inner, name + "proj", rank, slot, expert)
                    total[token] += y * scales[token, place, None]
            inner = _swiglu(self.linear(x, name + "shared_expert.fc", rank))
            total = total + self.linear(inner, name + "shared_expert.proj", rank)
        return total

    def embed(self, input_ids: npt.NDArray[np.int32], rows: Floats) -> Floats:
        """[L, H]: ids from the vocabulary's size on are rows of the prompt table."""
        size = self.config["vocab_size"]
        embeds = self.tensor("transformer.vocab_embedding.weight")[np.minimum(input_ids, size - 1)]
        media = input_ids >= size
        embeds[media] = rows[input_ids[media] - size]
        return embeds

    def forward(self, input_ids: npt.NDArray[np.int32], rows: Floats, table: Floats) -> tuple[Floats, Floats]:
        """Logits [L, V] and post-norm hidden states [L, H] of a coded prompt (`ming_trt.trtllm.prompt_table`)."""
        modality = modality_of(input_ids, self.config["vocab_size"])
        x = self.embed(input_ids, rows)
        for i in range(self.num_layers):
            name = LAYER.format(i)
            x = x + self.attention(i, self.norm(x, name + "input_layernorm"), table)
            x = x + self.moe(i, self.norm(x, name + "post_layernorm"), modality)
        hidden = self.norm(x, "transformer.ln_f")
        logits = np.concatenate([self.linear(hidden, "lm_head", rank) for rank in self.ranks], axis=1)
        return logits[:, : self.config["vocab_size"]], hidden


def _e4m3(x: Floats) -> Floats:
    return np.clip(x, -MAX, MAX).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def _rotate(x: Floats, cos: Floats, sin: Floats) -> Floats:
    low, high = np.split(x, 2, axis=-1)
    return np.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1)


def _softmax(x: Floats) -> Floats:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    result: Floats = e / e.sum(axis=-1, keepdims=True)
    return result


def _swiglu(x: Floats) -> Floats:
    """The first half is the plain one, the second is activated: TensorRT-LLM's order."""
    up, gate = np.split(x, 2, axis=-1)
    result: Floats = gate / (1 + np.exp(-gate)) * up
    return result
