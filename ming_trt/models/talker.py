"""The talker: a Qwen2 decoder that reads two streams at once, audio ids and text ids, whose embeddings are summed.

`forward` is the engine contract `talker` of docs/DESIGN.md, section 4.1: a step over cache slots, like the LLM's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ming_trt.models import ops
from ming_trt.models import weights as w
from ming_trt.models.llm import RMSNorm, SwiGLU
from ming_trt.models.rope import inverse_frequencies, rotate
from ming_trt.speech_config import TalkerConfig

STEP_INPUTS = (
    "audio_ids",
    "text_ids",
    "speaker",
    "speaker_index",
    "thinker",
    "thinker_index",
    "position_ids",
    "write_index",
    "attention_mask",
    "logit_index",
)


def input_names(config: TalkerConfig) -> list[str]:
    """Names of `Talker.forward`'s inputs, in order."""
    return [*STEP_INPUTS, *(f"past_{part}_{i}" for i in range(config.layers) for part in ("key", "value"))]


def output_names(config: TalkerConfig) -> list[str]:
    """Names of `Talker.forward`'s outputs, in order."""
    return ["logits", *(f"present_{part}_{i}" for i in range(config.layers) for part in ("key", "value"))]


class _Attention(nn.Module):
    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden, self.heads * self.head_dim)
        self.k_proj = nn.Linear(config.hidden, self.kv_heads * self.head_dim)
        self.v_proj = nn.Linear(config.hidden, self.kv_heads * self.head_dim)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden, bias=False)

    def forward(
        self, x: Tensor, table: tuple[Tensor, Tensor], write_index: Tensor, mask: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        q = rotate(self.q_proj(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2), *table)
        k = rotate(self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2), *table)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        key, value = ops.kv_update(key, k, write_index), ops.kv_update(value, v, write_index)
        out = functional.scaled_dot_product_attention(q, key, value, attn_mask=mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), key, value


class _Layer(nn.Module):
    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, config.eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.eps)
        self.mlp = SwiGLU(config.hidden, config.intermediate)

    def forward(
        self, x: Tensor, table: tuple[Tensor, Tensor], write_index: Tensor, mask: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        attended, key, value = self.self_attn(self.input_layernorm(x), table, write_index, mask, key, value)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), key, value


class _Body(nn.Module):
    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.eps)


class Talker(nn.Module):
    """See the module's docstring and `forward`."""

    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _Body(config)
        self.lm_head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        self.vp_head = nn.Linear(config.speaker_dim, config.hidden)
        self.thinker_to_talker_proj = nn.Linear(config.thinker_hidden, config.hidden)

    def embed(
        self,
        audio_ids: Tensor,
        text_ids: Tensor,
        speaker: Tensor,
        speaker_index: Tensor,
        thinker: Tensor,
        thinker_index: Tensor,
    ) -> Tensor:
        """[B, S, hidden]: both streams summed, and in their place the rows that an index other than -1 names."""
        x = self.model.embed_tokens(audio_ids) + self.model.embed_tokens(text_ids)
        for rows, index in (
            (self.vp_head(speaker.to(x.dtype)), speaker_index),
            (self.thinker_to_talker_proj(thinker.to(x.dtype)), thinker_index),
        ):
            chosen = functional.embedding(index.clamp(min=0), rows)
            x = torch.where((index >= 0).unsqueeze(-1), chosen, x)
        return x

    def forward(
        self,
        audio_ids: Tensor,
        text_ids: Tensor,
        speaker: Tensor,
        speaker_index: Tensor,
        thinker: Tensor,
        thinker_index: Tensor,
        position_ids: Tensor,
        write_index: Tensor,
        attention_mask: Tensor,
        logit_index: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:
        """One step over B slots of S tokens; shapes and order as `input_names`, `output_names` and the contract say."""
        x = self.embed(audio_ids, text_ids, speaker, speaker_index, thinker, thinker_index)
        inverse = inverse_frequencies(self.config.head_dim, self.config.theta, x.device)
        angle = position_ids[:, None, :, None].float() * inverse
        table = angle.cos(), angle.sin()
        present: list[Tensor] = []
        for i, layer in enumerate(self.model.layers):
            x, key, value = layer(x, table, write_index, attention_mask, past[2 * i], past[2 * i + 1])
            present += [key, value]
        hidden = self.model.norm(x)
        wanted = hidden.gather(1, logit_index.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        return self.lm_head(wanted).float(), *present


def weight_map(config: TalkerConfig, prefix: str = "talker.") -> dict[str, w.WeightSource]:
    """Parameter of `Talker` -> official tensors of the root shards."""
    with torch.device("meta"):
        module = Talker(config)
    sources: dict[str, w.WeightSource] = {}
    for name, parameter in module.named_parameters():
        shape = tuple(parameter.shape)
        if name == "vp_head.weight":
            sources[name] = w.Reshape(w.Tensor(f"{prefix}vp_head.weight", (*shape, 1)), shape)
        elif name.startswith(("model.", "lm_head.")):
            official = "model.embed_tokens.weight" if config.tied and name == "lm_head.weight" else name
            sources[name] = w.Tensor(f"{prefix}model.{official}", shape)
        else:
            sources[name] = w.Tensor(f"{prefix}{name}", shape)
    return sources
