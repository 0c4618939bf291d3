"""The talker: a Qwen2 decoder that reads two streams at once, audio ids and text ids, whose embeddings are summed.

`forward` is the engine contract `talker` of docs/DESIGN.md, section 4.1: a step over cache slots, like the LLM's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ming_trt.models import qwen2
from ming_trt.models import weights as w
from ming_trt.models.norm import RMSNorm
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


class _Body(nn.Module):
    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(qwen2.Layer(config) for _ in range(config.layers))
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
        table = qwen2.rope_table(position_ids.unsqueeze(1), self.config.head_dim, self.config.theta)
        present: list[Tensor] = []
        for i, layer in enumerate(self.model.layers):
            cache = qwen2.Cache(past[2 * i], past[2 * i + 1], write_index, attention_mask)
            x, key, value = layer(x, table, cache)
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
