"""The language model: a pre-norm decoder with grouped-query attention, three-axis rope and mixture-of-experts layers.

Text, image and audio tokens each have their own router; the three router matrices are one (`gates`), of whose logits a
token uses those of its modality. `forward` is the engine contract `llm` of docs/DESIGN.md, section 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from ming_trt.config import LLMConfig
from ming_trt.models import ops
from ming_trt.models.weights import Concat, Stack, Tensor, WeightSource

TEXT, IMAGE, AUDIO = 0, 1, 2
STEP_INPUTS = (
    "input_ids",
    "features",
    "feature_index",
    "modality",
    "position_ids",
    "write_index",
    "attention_mask",
    "logit_index",
)


def input_names(config: LLMConfig) -> list[str]:
    """Names of `MingLLM.forward`'s inputs, in order."""
    return [*STEP_INPUTS, *(f"past_{part}_{i}" for i in range(config.num_layers) for part in ("key", "value"))]


def output_names(config: LLMConfig) -> list[str]:
    """Names of `MingLLM.forward`'s outputs, in order."""
    caches = (f"present_{part}_{i}" for i in range(config.num_layers) for part in ("key", "value"))
    return ["logits", "hidden", "embeds", *caches]


class RMSNorm(nn.Module):
    """`cast(weight * x32 / sqrt(mean(x32^2) + eps))`: the weight is multiplied in float32, before the one cast."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal by the mask that is passed in; keys and values live in caches that the caller owns."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.config = config
        width = config.query_width + 2 * config.kv_width
        self.query_key_value = nn.Linear(config.hidden_size, width, bias=False)
        self.dense = nn.Linear(config.query_width, config.hidden_size, bias=False)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [B, heads, S, D], k and v [B, kv_heads, S, D], not rotated yet."""
        c = self.config
        q, k, v = self.query_key_value(x).split((c.query_width, c.kv_width, c.kv_width), dim=-1)
        q = q.unflatten(-1, (c.num_heads, c.head_dim)).transpose(1, 2)
        k = k.unflatten(-1, (c.num_kv_heads, c.head_dim)).transpose(1, 2)
        v = v.unflatten(-1, (c.num_kv_heads, c.head_dim)).transpose(1, 2)
        return q, k, v

    def rotate(self, q: torch.Tensor, k: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        c = self.config
        rotated: tuple[torch.Tensor, torch.Tensor] = ops.mrope(
            q, k, position_ids, c.rope_theta, c.rope_kind, list(c.rope_sections)
        )
        return rotated

    def forward(
        self,
        x: torch.Tensor,
        position_ids: torch.Tensor,
        write_index: torch.Tensor,
        mask: torch.Tensor,
        past_key: torch.Tensor,
        past_value: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.project(x)
        q, k = self.rotate(q, k, position_ids)
        key = ops.kv_update(past_key, k, write_index)
        value = ops.kv_update(past_value, v, write_index)
        # The exporter takes the flag only where query heads do share key heads.
        shared = self.config.num_heads != self.config.num_kv_heads
        out = functional.scaled_dot_product_attention(q, key, value, attn_mask=mask, enable_gqa=shared)
        return self.dense(out.transpose(1, 2).flatten(2)), key, value


class SwiGLU(nn.Module):
    """The shared expert: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """Routed experts plus a shared one. A token's router is chosen by its modality code, before softmax and top-k."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.config = config
        experts, hidden, width = config.num_experts, config.hidden_size, config.expert_width
        self.gates = nn.Linear(hidden, 3 * experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))
        self.shared_experts = SwiGLU(hidden, config.shared_width)

    def router_logits(self, x: torch.Tensor, modality: torch.Tensor) -> torch.Tensor:
        """[..., E] for x [..., H] and codes [...]: 0 text, 1 image, 2 audio."""
        text, image, audio = self.gates(x).chunk(3, dim=-1)
        code = modality.unsqueeze(-1)
        return torch.where(code == AUDIO, audio, torch.where(code == IMAGE, image, text))

    def route(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Expert ids and weights (float32), best first, for logits [N, E]."""
        return ops.route(logits, self.config.top_k, self.config.normalize_top_k)

    def forward(self, x: torch.Tensor, modality: torch.Tensor) -> torch.Tensor:
        c = self.config
        flat = x.flatten(0, 1)
        logits = self.router_logits(x, modality).flatten(0, 1)
        routed = ops.sparse_moe(flat, logits, self.gate_up, self.down, c.top_k, c.normalize_top_k)
        return routed.view_as(x) + self.shared_experts(x)


class DecoderLayer(nn.Module):
    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MoE(config)

    def forward(
        self,
        x: torch.Tensor,
        modality: torch.Tensor,
        position_ids: torch.Tensor,
        write_index: torch.Tensor,
        mask: torch.Tensor,
        past_key: torch.Tensor,
        past_value: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attended, key, value = self.attention(
            self.input_layernorm(x), position_ids, write_index, mask, past_key, past_value
        )
        x = x + attended
        x = x + self.mlp(self.post_attention_layernorm(x), modality)
        return x, key, value


class MingLLM(nn.Module):
    """See the module's docstring and `forward`."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, input_ids: torch.Tensor, features: torch.Tensor, feature_index: torch.Tensor) -> torch.Tensor:
        """[B, S, H]: row `feature_index` of `features` where that is not negative, else the embedding of the id."""
        tokens = self.word_embeddings(input_ids.clamp(0, self.config.vocab_size - 1))
        rows = functional.embedding(feature_index.clamp(min=0), features.to(tokens.dtype))
        return torch.where((feature_index >= 0).unsqueeze(-1), rows, tokens)

    def forward(
        self,
        input_ids: torch.Tensor,
        features: torch.Tensor,
        feature_index: torch.Tensor,
        modality: torch.Tensor,
        position_ids: torch.Tensor,
        write_index: torch.Tensor,
        attention_mask: torch.Tensor,
        logit_index: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """One step over B rows of S tokens; shapes and order as `input_names`, `output_names` and the contract say.

        All but the caches, which have the type of the weights, is float32 or int64. `attention_mask` [B, 1, S, T] is
        true where token s may see cache place t; each row needs at least one.
        """
        embeds = self.embed(input_ids, features, feature_index)
        x = embeds
        present: list[torch.Tensor] = []
        for i, layer in enumerate(self.layers):
            x, key, value = layer(x, modality, position_ids, write_index, attention_mask, past[2 * i], past[2 * i + 1])
            present += [key, value]
        hidden = self.norm(x)
        wanted = hidden.gather(1, logit_index.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        return self.lm_head(wanted).float(), hidden.float(), embeds.float(), *present


def weight_map(config: LLMConfig, prefix: str = "model.") -> dict[str, WeightSource]:
    """Parameter of `MingLLM` -> official tensors (`prefix` + `model.layers...`)."""
    c = config
    base = f"{prefix}model."
    embedding = Tensor(f"{base}word_embeddings.weight", (c.vocab_size, c.hidden_size))
    sources: dict[str, WeightSource] = {
        "word_embeddings.weight": embedding,
        "norm.weight": Tensor(f"{base}norm.weight", (c.hidden_size,)),
        "lm_head.weight": embedding
        if c.tie_embeddings
        else Tensor(f"{prefix}lm_head.weight", (c.vocab_size, c.hidden_size)),
    }
    for i in range(c.num_layers):
        for name, source in _layer_map(c, f"{base}layers.{i}.").items():
            sources[f"layers.{i}.{name}"] = source
    return sources


def _layer_map(c: LLMConfig, official: str) -> dict[str, WeightSource]:
    hidden, width = c.hidden_size, c.expert_width
    mlp = f"{official}mlp."
    gates = ("gate", "image_gate", "audio_gate") if c.multi_gate else ("gate",) * 3
    experts = [f"{mlp}experts.{e}." for e in range(c.num_experts)]
    return {
        "input_layernorm.weight": Tensor(f"{official}input_layernorm.weight", (hidden,)),
        "attention.query_key_value.weight": Tensor(
            f"{official}attention.query_key_value.weight", (c.query_width + 2 * c.kv_width, hidden)
        ),
        "attention.dense.weight": Tensor(f"{official}attention.dense.weight", (hidden, c.query_width)),
        "post_attention_layernorm.weight": Tensor(f"{official}post_attention_layernorm.weight", (hidden,)),
        "mlp.gates.weight": Concat(tuple(Tensor(f"{mlp}{gate}.weight", (c.num_experts, hidden)) for gate in gates)),
        "mlp.gate_up": Stack(
            tuple(
                Concat(tuple(Tensor(f"{e}{half}_proj.weight", (width, hidden)) for half in ("gate", "up")))
                for e in experts
            )
        ),
        "mlp.down": Stack(tuple(Tensor(f"{e}down_proj.weight", (hidden, width)) for e in experts)),
        "mlp.shared_experts.gate_proj.weight": Tensor(
            f"{mlp}shared_experts.gate_proj.weight", (c.shared_width, hidden)
        ),
        "mlp.shared_experts.up_proj.weight": Tensor(f"{mlp}shared_experts.up_proj.weight", (c.shared_width, hidden)),
        "mlp.shared_experts.down_proj.weight": Tensor(
            f"{mlp}shared_experts.down_proj.weight", (hidden, c.shared_width)
        ),
    }


@dataclass(frozen=True, slots=True)
class StepTrace:
    """What a step computes on the way: `layer_hidden` has the residual stream after each layer."""

    outputs: tuple[torch.Tensor, ...]
    layer_hidden: list[torch.Tensor]


@torch.no_grad()
def trace(model: MingLLM, *inputs: torch.Tensor) -> StepTrace:
    """Runs a step and keeps the residual stream after every layer."""
    kept: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: kept.append(out[0])) for layer in model.layers]
    try:
        return StepTrace(model(*inputs), kept)
    finally:
        for hook in hooks:
            hook.remove()
