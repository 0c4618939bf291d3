"""Stands in for TensorRT-LLM's symbols with shapes and types only, so that the network definition can run anywhere.

It knows which weights a layer declares, what shapes and types an operator takes and gives, and nothing of values. It
follows release 1.2.1 where `signatures.NETWORK` points, strongly typed: an operator whose operands differ in type, a
width that does not fit or a missing input raises `ShapeError`. Dimensions are numbers or names of dynamic sizes.
What it cannot show is in docs/gpu-first-run.md.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ming_trt.trtllm.recorder_layers import (
    Attention,
    AttentionMaskType,
    ColumnLinear,
    Embedding,
    Linear,
    Module,
    ModuleList,
    MoeConfig,
    PositionEmbeddingType,
    QuantMode,
    RankMapping,
    RmsNorm,
    RowLinear,
    SharedMoE,
    SideStreamIDType,
)
from ming_trt.trtllm.recorder_tensors import OPERATORS, TOKENS, Dim, Shape, ShapeError, Tensor

__all__ = [
    "DecoderLayerList",
    "DecoderModelForCausalLM",
    "Module",
    "MoeConfig",
    "PretrainedConfig",
    "Shape",
    "ShapeError",
    "SharedMoE",
    "recorder",
]


class PretrainedConfig:
    """Keys of config.json as attributes."""

    def __init__(self, *, mapping: Any, quantization: Any, position_embedding_type: str, **kwargs: Any) -> None:
        self.mapping = RankMapping(**mapping)
        self.quantization = SimpleNamespace(**quantization)
        algo, cache = self.quantization.quant_algo, self.quantization.kv_cache_quant_algo
        self.quant_mode = QuantMode(algo == "FP8", cache == "FP8")
        self.position_embedding_type = PositionEmbeddingType.from_string(position_embedding_type)
        for name, value in kwargs.items():
            setattr(self, name, value)

    def set_rank(self, rank: int) -> None:
        self.mapping.rank = rank

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class DecoderLayerList(ModuleList):
    def __init__(self, cls: Any, config: Any) -> None:
        super().__init__([cls(config, i) for i in range(config.num_hidden_layers)])

    def forward(self, hidden_states: Tensor, use_cache: bool = False, **kwargs: Any) -> Any:
        given = {name: value for name, value in kwargs.items() if value is not None}
        presents = []
        for layer in self:
            hidden_states, present = layer(hidden_states, use_cache=use_cache, **given)
            presents.append(present)
        return hidden_states, presents


class DecoderModelForCausalLM(Module):
    """Linear layers become FP8 after construction, but for those that config.json excludes by name."""

    def __init__(self, config: Any, transformer: Module, lm_head: Linear) -> None:
        self.config = config
        self.transformer = transformer
        self.lm_head = lm_head
        if config.quant_mode.fp8:
            for name, module in self.named_modules():
                excluded = any(fnmatch.fnmatchcase(name, p) for p in config.quantization.exclude_modules)
                if isinstance(module, Linear) and not excluded:
                    module.scaled()

    def prepare_inputs(self, *, mrope_rotary_cos_sin_size: int = 0, prompt_table: bool = True) -> dict[str, Any]:
        """The inputs of a step of packed tokens."""
        marked: dict[str, tuple[Shape, str]] = {}

        def tensor(dtype: str, *shape: Dim) -> Tensor:
            return Tensor(shape, dtype, marked)

        inputs: dict[str, Any] = {
            "input_ids": tensor("int32", TOKENS),
            "position_ids": tensor("int32", TOKENS),
            "use_cache": True,
            "last_token_ids": tensor("int32", "requests"),
            "kv_cache_params": SimpleNamespace(),
            "attention_params": SimpleNamespace(),
        }
        if mrope_rotary_cos_sin_size:
            inputs["mrope_params"] = SimpleNamespace(
                mrope_rotary_cos_sin=tensor("float32", "requests", mrope_rotary_cos_sin_size),
                mrope_position_deltas=tensor("int32", "requests", 1),
            )
        if prompt_table:
            inputs["prompt_embedding_table"] = tensor(self.config.dtype, "rows", self.config.hidden_size)
            inputs["prompt_tasks"] = tensor("int32", TOKENS)
            inputs["prompt_vocab_size"] = tensor("int32", 1)
        return inputs

    def forward(self, input_ids: Tensor, last_token_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        forward: Callable[..., Any] = self.transformer.forward  # type: ignore[attr-defined]
        hidden, _ = forward(input_ids=input_ids, **kwargs)
        last = hidden.like(("requests", hidden.shape[-1]))
        logits: Tensor = self.lm_head(last)
        logits.mark_output("logits", self.config.logits_dtype)
        return logits, last, hidden


def recorder() -> Any:
    """A namespace with the names of `signatures.NETWORK` that a network definition needs."""
    layers = (
        SideStreamIDType,
        AttentionMaskType,
        Module,
        Attention,
        ColumnLinear,
        RowLinear,
        Embedding,
        RmsNorm,
        SharedMoE,
        MoeConfig,
        PretrainedConfig,
        DecoderLayerList,
        DecoderModelForCausalLM,
    )
    return SimpleNamespace(
        **OPERATORS,
        **{layer.__name__: layer for layer in layers},
        MODEL_MAP={},
        pad_vocab_size=lambda vocab_size, tp_size: -(-vocab_size // tp_size) * tp_size,
        default_net=lambda: SimpleNamespace(plugin_config=SimpleNamespace(paged_kv_cache=True)),
    )
