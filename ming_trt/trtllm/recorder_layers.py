"""Layers of a recorded network: the weights that each declares, and what shapes and types it takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import Enum, IntEnum
from typing import Any

from ming_trt.trtllm.recorder_tensors import TOKENS, ShapeError, Tensor, expect


@dataclass
class Parameter:
    """A weight that a module declares."""

    shape: tuple[int, ...]
    dtype: str


class Module:
    """Attributes that are modules or parameters have names; calling it is `forward`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward: Callable[..., Any] = self.forward  # type: ignore[attr-defined]
        return forward(*args, **kwargs)

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield prefix + name, value
                yield from value.named_modules(f"{prefix}{name}.")

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        for path, module in (("", self), *self.named_modules()):
            for name, value in vars(module).items():
                if isinstance(value, Parameter):
                    yield f"{path}.{name}" if path else name, value


class ModuleList(Module):
    """Modules by number."""

    def __init__(self, modules: list[Module]) -> None:
        for i, module in enumerate(modules):
            setattr(self, str(i), module)

    def __iter__(self) -> Iterator[Module]:
        return iter(value for value in vars(self).values() if isinstance(value, Module))


@dataclass
class RankMapping:
    """Ranks as config.json states them, seen from one."""

    world_size: int
    tp_size: int
    pp_size: int
    moe_tp_size: int
    moe_ep_size: int
    rank: int = 0

    def __post_init__(self) -> None:
        if self.tp_size * self.pp_size != self.world_size or self.moe_tp_size * self.moe_ep_size != self.tp_size:
            raise ShapeError(f"the mapping {self} does not multiply to its world size")

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def tp_group(self) -> list[int]:
        return list(range(self.tp_size))


@dataclass(frozen=True)
class QuantMode:
    fp8: bool
    fp8_cache: bool


class Linear(Module):
    """[.., inputs] to [.., outputs], both as this rank has them. `scaled` makes it FP8 with two scales."""

    def __init__(self, inputs: int, outputs: int, dtype: str, result: int) -> None:
        self.inputs, self.result, self.dtype = inputs, result, dtype
        self.weight = Parameter((outputs, inputs), dtype)

    def scaled(self) -> None:
        self.weight = Parameter(self.weight.shape, "fp8")
        self.activation_scaling_factor = Parameter((1,), "float32")
        self.weights_scaling_factor = Parameter((1,), "float32")

    def forward(self, x: Tensor) -> Tensor:
        expect("the input of a linear layer", x, (*x.shape[:-1], self.inputs), self.dtype)
        return x.like((*x.shape[:-1], self.result))


class ColumnLinear(Linear):
    """The output is split over ranks."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: str = "float32",
        tp_group: Any = None,
        tp_size: int = 1,
        gather_output: bool = True,
    ) -> None:
        _even("output features", out_features, tp_size)
        local = out_features // tp_size
        super().__init__(in_features, local, dtype, out_features if gather_output else local)


class RowLinear(Linear):
    """The input is split over ranks."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: str = "float32",
        tp_group: Any = None,
        tp_size: int = 1,
        strict_dtype: bool = False,
        is_expert: bool = False,
    ) -> None:
        _even("input features", in_features, tp_size)
        super().__init__(in_features // tp_size, out_features, dtype, out_features)


def _even(what: str, size: int, parts: int) -> None:
    if size % parts:
        raise ShapeError(f"{size} {what} do not divide by {parts}")


class RmsNorm(Module):
    def __init__(self, normalized_shape: int, eps: float, dtype: str) -> None:
        self.weight = Parameter((normalized_shape,), dtype)

    def forward(self, x: Tensor) -> Tensor:
        expect("the input of a norm", x, (*x.shape[:-1], *self.weight.shape), self.weight.dtype)
        return x


class Embedding(Module):
    """With a prompt table (rows, tasks, vocabulary size) as the builder's prompt-tuning embedding."""

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: str) -> None:
        self.weight = Parameter((num_embeddings, embedding_dim), dtype)

    def forward(self, ids: Tensor, *table: Tensor) -> Tensor:
        expect("the ids", ids, (TOKENS,), "int32")
        width = self.weight.shape[1]
        if table:
            rows, tasks, vocabulary = table
            expect("the prompt table", rows, ("rows", width), self.weight.dtype)
            expect("the prompt tasks", tasks, (TOKENS,), "int32")
            expect("the prompt vocabulary size", vocabulary, (1,), "int32")
        return ids.like((TOKENS, width), self.weight.dtype)


class PositionEmbeddingType(Enum):
    mrope = "mrope"

    @staticmethod
    def from_string(name: str) -> PositionEmbeddingType:
        return PositionEmbeddingType(name)


class SideStreamIDType(IntEnum):
    disable = 0


class AttentionMaskType(IntEnum):
    causal = 1


class Attention(Module):
    """Packed tokens, paged cache, and the plugin's rotary table."""

    def __init__(
        self,
        *,
        local_layer_idx: int,
        hidden_size: int,
        num_attention_heads: int,
        num_kv_heads: int,
        attention_head_size: int,
        max_position_embeddings: int,
        attention_mask_type: AttentionMaskType,
        bias: bool,
        dtype: str,
        position_embedding_type: PositionEmbeddingType,
        rotary_embedding_base: float,
        rotary_embedding_scaling: Mapping[str, Any],
        tp_group: Any,
        tp_size: int,
        tp_rank: int,
        quant_mode: QuantMode,
    ) -> None:
        _even("attention heads", num_attention_heads, tp_size)
        heads, kv = num_attention_heads // tp_size, -(-num_kv_heads // tp_size)
        width = heads * attention_head_size
        split = {"bias": bias, "dtype": dtype, "tp_group": tp_group, "tp_size": tp_size}
        total = tp_size * (width + 2 * kv * attention_head_size)
        self.qkv = ColumnLinear(hidden_size, total, gather_output=False, **split)
        self.dense = RowLinear(tp_size * width, hidden_size, **split)
        self._width, self._table = width, max_position_embeddings * attention_head_size
        if not rotary_embedding_scaling.get("type") == position_embedding_type.value == "mrope":
            raise ShapeError("attention takes its rotary table only with position type and rotary scaling 'mrope'")
        if quant_mode.fp8_cache:
            self.kv_cache_scaling_factor = Parameter((1,), "float32")

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        use_cache: bool = False,
        mrope_params: Any = None,
        kv_cache_params: Any = None,
        attention_params: Any = None,
    ) -> tuple[Tensor, str] | Tensor:
        expect("the rotary table", mrope_params.mrope_rotary_cos_sin, ("requests", self._table), "float32")
        expect("the rotary deltas", mrope_params.mrope_position_deltas, ("requests", 1), "int32")
        qkv = self.qkv(hidden_states)
        result: Tensor = self.dense(qkv.like((*qkv.shape[:-1], self._width)))
        return (result, "present") if use_cache else result


@dataclass
class MoeConfig:
    num_experts: int = 0
    shared_expert_intermediate_size: int = 0
    top_k: int = 0
    normalization_mode: int = 1

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> MoeConfig:
        return cls(**config)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def validate(self) -> MoeConfig:
        return self


class ExpertStack(Module):
    """The matrices of this rank's experts; in FP8 one input scale for all and one weight scale each."""

    def __init__(self, experts: int, outputs: int, inputs: int, dtype: str, fp8: bool) -> None:
        self.weight = Parameter((experts, outputs, inputs), "fp8" if fp8 else dtype)
        if fp8:
            self.activation_scaling_factor = Parameter((1,), "float32")
            self.weights_scaling_factor = Parameter((experts, 1), "float32")


class MLP(Module):
    """Fused SwiGLU: `fc` has both halves."""

    def __init__(self, hidden: int, width: int, dtype: str, tp_group: Any, tp_size: int) -> None:
        split = {"bias": False, "dtype": dtype, "tp_group": tp_group, "tp_size": tp_size}
        self.fc = ColumnLinear(hidden, 2 * width, gather_output=False, **split)
        self.proj = RowLinear(width, hidden, is_expert=True, **split)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.fc(x)
        result: Tensor = self.proj(inner.like((*inner.shape[:-1], inner.shape[-1] // 2)))
        return result


class SharedMoE(Module):
    def __init__(
        self,
        moe_config: MoeConfig,
        hidden_size: int,
        ffn_hidden_size: int,
        hidden_act: str,
        mapping: RankMapping,
        bias: bool = True,
        dtype: str = "float32",
        tp_group: Any = None,
        tp_size: int = 1,
        quant_mode: Any = None,
        use_shared_gate: bool = False,
        use_side_stream: bool = False,
    ) -> None:
        if hidden_act != "swiglu" or bias or use_shared_gate:
            raise ShapeError("the mixture is a fused SwiGLU without bias and without a gate of the shared expert")
        self.moe_config, self.tp_size, self.tp_group = moe_config, tp_size, tp_group
        _even("experts", moe_config.num_experts, mapping.moe_ep_size)
        _even("features of an expert", ffn_hidden_size, mapping.moe_tp_size)
        local, width = moe_config.num_experts // mapping.moe_ep_size, ffn_hidden_size // mapping.moe_tp_size
        self.router = RowLinear(hidden_size, moe_config.num_experts, False, "float32", strict_dtype=True)
        self.fc = ExpertStack(local, 2 * width, hidden_size, dtype, quant_mode.fp8)
        self.proj = ExpertStack(local, hidden_size, width, dtype, quant_mode.fp8)
        self.shared_expert = MLP(hidden_size, moe_config.shared_expert_intermediate_size, dtype, tp_group, tp_size)
        self._hidden, self._dtype = hidden_size, dtype

    def renormalize(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        expect("the router logits", logits, (TOKENS, self.moe_config.num_experts), "float32")
        chosen = (TOKENS, self.moe_config.top_k)
        return logits.like(chosen, "int32"), logits.like(chosen)

    default_routing = renormalize

    def forward_experts(
        self,
        hidden_states: Tensor,
        token_selected_experts: Tensor,
        token_final_scales: Tensor,
        lora_layer_params: Any,
        side_stream_id: SideStreamIDType,
    ) -> Tensor:
        chosen = (TOKENS, self.moe_config.top_k)
        expect("the input of the experts", hidden_states, (TOKENS, self._hidden), self._dtype)
        expect("the chosen experts", token_selected_experts, chosen, "int32")
        expect("the scales of the chosen experts", token_final_scales, chosen, "float32")
        return hidden_states
