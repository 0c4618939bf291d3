"""Stands in for TensorRT-LLM's symbols with shapes and types only, so that the network definition can run anywhere.

It knows which weights a layer declares, what shapes and types an operator takes and gives, and nothing of values. It
follows release 1.2.1 where `signatures.NETWORK` points, strongly typed: an operator whose operands differ in type, a
width that does not fit or a missing input raises `ShapeError`. Dimensions are numbers or names of dynamic sizes.
What it cannot show is in docs/gpu-first-run.md.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import Enum, IntEnum
from types import SimpleNamespace
from typing import Any

from ming_trt.errors import MingError

Dim = int | str
Shape = tuple[Dim, ...]
TOKENS = "tokens"


class ShapeError(MingError):
    """A shape or a type that does not fit, in the network definition or in what it is given."""


@dataclass(eq=False)
class Tensor:
    """A value of the network: shape and type. `marked` collects the outputs of the network it belongs to."""

    shape: Shape
    dtype: str
    marked: dict[str, tuple[Shape, str]]

    def __add__(self, other: Tensor) -> Tensor:
        return elementwise("+", self, other)

    def mark_output(self, name: str, dtype: str) -> None:
        """Makes the value an output of the network, converted to `dtype`."""
        if name in self.marked:
            raise ShapeError(f"two outputs are named '{name}': rename one")
        self.marked[name] = (self.shape, dtype)

    def like(self, shape: Shape, dtype: str | None = None) -> Tensor:
        return Tensor(shape, dtype or self.dtype, self.marked)


def elementwise(what: str, left: Any, right: Any, dtype: str | None = None) -> Tensor:
    """Two tensors of one type, or a tensor and a number; sizes equal or 1."""
    tensors = [value for value in (left, right) if isinstance(value, Tensor)]
    if len({tensor.dtype for tensor in tensors}) != 1 or len({len(tensor.shape) for tensor in tensors}) != 1:
        raise ShapeError(f"{what} of {' and '.join(f'{t.dtype}{list(t.shape)}' for t in tensors)}")
    shape = tensors[0].shape
    for tensor in tensors[1:]:
        shape = tuple(_broadcast(what, a, b) for a, b in zip(shape, tensor.shape, strict=True))
    return tensors[0].like(shape, dtype)


def _broadcast(what: str, a: Dim, b: Dim) -> Dim:
    if a == b or b == 1:
        return a
    if a == 1:
        return b
    raise ShapeError(f"{what} of sizes {a} and {b}")


def expect(what: str, tensor: Any, shape: Shape, dtype: str) -> None:
    """Raises `ShapeError` unless `tensor` is just that."""
    if not isinstance(tensor, Tensor) or tensor.shape != shape or tensor.dtype != dtype:
        given = f"{tensor.dtype}{list(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
        raise ShapeError(f"{what} is {given}, expected {dtype}{list(shape)}")


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


def _cast(input: Tensor, dtype: str) -> Tensor:
    return input.like(input.shape, dtype)


def _where(condition: Tensor, left: Tensor, right: Tensor) -> Tensor:
    result = elementwise("where", left, right)
    if condition.dtype != "bool" or len(condition.shape) != len(result.shape):
        raise ShapeError(f"where of {list(result.shape)} by {condition.dtype}{list(condition.shape)}")
    shape = tuple(_broadcast("where", a, b) for a, b in zip(condition.shape, result.shape, strict=True))
    return result.like(shape)


def _compare(left: Any, right: Any) -> Tensor:
    return elementwise("a comparison", left, right, "bool")


def _number(left: Any, right: Any) -> Tensor:
    return elementwise("arithmetic", left, right)


def _and(left: Tensor, right: Tensor) -> Tensor:
    if left.dtype != "bool":
        raise ShapeError(f"a logical and of {left.dtype}")
    return elementwise("and", left, right)


def _unsqueeze(input: Tensor, axis: int) -> Tensor:
    if axis != -1:
        raise ShapeError(f"unsqueeze at axis {axis}")
    return input.like((*input.shape, 1))


def _allreduce(tensor: Tensor, group: list[int]) -> Tensor:
    return tensor


def recorder() -> Any:
    """A namespace with the names of `signatures.NETWORK` that a network definition needs."""
    return SimpleNamespace(
        cast=_cast,
        where=_where,
        gt=_compare,
        eq=_compare,
        op_and=_and,
        sub=_number,
        mul=_number,
        floordiv=_number,
        unsqueeze=_unsqueeze,
        allreduce=_allreduce,
        SideStreamIDType=SideStreamIDType,
        AttentionMaskType=AttentionMaskType,
        Module=Module,
        Attention=Attention,
        ColumnLinear=ColumnLinear,
        RowLinear=RowLinear,
        Embedding=Embedding,
        RmsNorm=RmsNorm,
        SharedMoE=SharedMoE,
        MoeConfig=MoeConfig,
        PretrainedConfig=PretrainedConfig,
        DecoderLayerList=DecoderLayerList,
        DecoderModelForCausalLM=DecoderModelForCausalLM,
        MODEL_MAP={},
        pad_vocab_size=lambda vocab_size, tp_size: -(-vocab_size // tp_size) * tp_size,
        default_net=lambda: SimpleNamespace(plugin_config=SimpleNamespace(paged_kv_cache=True)),
    )
