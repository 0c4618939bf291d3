"""The language model as a TensorRT-LLM 1.2.1 network: a decoder with three routers a layer and three-axis rope.

`define(api)` makes the classes from the symbols of `signatures.load()`. Their weights are those that
`builders/trtllm_layout.py` names. What is particular:

* Modality: ids from `vocab_size` on are rows of the prompt table; even rows are pictures, odd rows sounds
  (`prompt_table.py`). The masks are computed from the ids once and handed to every layer.
* Routing: three float32 routers, one chosen per token before top-k, then TensorRT-LLM's own expert plugin.
* Rope: `mrope` inputs of the attention plugin, sized by `max_position_embeddings`. The stock builder gives them to
  models of certain names only, so `prepare_inputs` asks for them here.
* Additional outputs for all tokens of a step: post-norm hidden states, and embeddings as they enter layer 0.

Tensor and expert parallelism are the library's own (`mapping` in the checkpoint's config.json).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ming_trt.errors import BuildError

ARCHITECTURE = "MingForCausalLM"
# additional outputs, [tokens, hidden size] of every step: after the last norm, and as they enter layer 0
HIDDEN_OUTPUT, EMBEDS_OUTPUT = "hidden", "embeds"


@dataclass(frozen=True, slots=True)
class Definition:
    """The classes made by `define`: the configuration and the model, which is what a checkpoint is loaded into."""

    config: Any
    model: Any


def modality_masks(api: Any, input_ids: Any, vocab_size: int) -> tuple[Any, Any]:
    """(picture, sound): bool [T, 1] for packed ids int32 [T]. Text, and every generated token, is false in both."""
    row = api.sub(input_ids, vocab_size)
    media = api.gt(row, -1)
    odd = api.sub(row, api.mul(api.floordiv(row, 2), 2))
    picture = api.op_and(media, api.eq(odd, 0))
    sound = api.op_and(media, api.eq(odd, 1))
    return api.unsqueeze(picture, -1), api.unsqueeze(sound, -1)


def define(api: Any) -> Definition:
    """Makes the classes from `api`, a namespace with the names of `signatures.NETWORK`."""

    class MingConfig(api.PretrainedConfig):  # type: ignore[misc]
        """The checkpoint's config.json."""

        def __init__(
            self, *, moe: Any, moe_intermediate_size: int, rotary_base: float, rotary_scaling: Any, **kwargs: Any
        ) -> None:
            config = api.MoeConfig.from_dict(dict(moe)) if isinstance(moe, dict) else moe
            self.moe = config.validate()
            self.moe_intermediate_size = moe_intermediate_size
            self.rotary_base = rotary_base
            self.rotary_scaling = rotary_scaling
            super().__init__(**kwargs)

        def to_dict(self) -> dict[str, Any]:
            output: dict[str, Any] = super().to_dict()
            return {**output, "moe": self.moe.to_dict()}

    class ThreeRouterMoE(api.SharedMoE):  # type: ignore[misc]
        """Routed experts plus a shared one; the constructor's arguments keep their names, since quantisation reads
        them back from attributes."""

        def __init__(self, moe_config: Any, hidden_size: int, **kwargs: Any) -> None:
            super().__init__(
                moe_config, hidden_size, bias=False, use_shared_gate=False, use_side_stream=False, **kwargs
            )
            for name in ("image_router", "audio_router"):
                router = api.RowLinear(
                    hidden_size,
                    moe_config.num_experts,
                    bias=False,
                    dtype="float32",
                    tp_group=None,
                    tp_size=1,
                    strict_dtype=True,
                )
                setattr(self, name, router)

        def forward(self, hidden_states: Any, masks: tuple[Any, Any]) -> Any:
            picture, sound = masks
            x = api.cast(hidden_states, "float32")
            media = api.where(picture, self.image_router(x), self.router(x))
            logits = api.where(sound, self.audio_router(x), media)
            # mode 1 renormalises over the chosen experts, 0 keeps the softmax over all
            route = self.renormalize if self.moe_config.normalization_mode == 1 else self.default_routing
            experts, scales = route(logits)
            routed = self.forward_experts(hidden_states, experts, scales, None, api.SideStreamIDType.disable)
            output = routed + self.shared_expert(hidden_states)
            if self.tp_size > 1 and self.tp_group is not None:
                output = api.allreduce(output, self.tp_group)
            return output

    class DecoderLayer(api.Module):  # type: ignore[misc]
        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__()
            mapping = config.mapping
            split = {"tp_group": mapping.tp_group, "tp_size": mapping.tp_size}
            norm = {"normalized_shape": config.hidden_size, "eps": config.norm_epsilon, "dtype": config.dtype}
            self.input_layernorm = api.RmsNorm(**norm)
            self.attention = api.Attention(
                local_layer_idx=layer_idx,
                hidden_size=config.hidden_size,
                attention_head_size=config.head_size,
                num_attention_heads=config.num_attention_heads,
                num_kv_heads=config.num_key_value_heads,
                max_position_embeddings=config.max_position_embeddings,
                dtype=config.dtype,
                attention_mask_type=api.AttentionMaskType.causal,
                bias=False,
                position_embedding_type=config.position_embedding_type,
                rotary_embedding_base=config.rotary_base,
                rotary_embedding_scaling=config.rotary_scaling,
                tp_rank=mapping.tp_rank,
                quant_mode=config.quant_mode,
                **split,
            )
            self.post_layernorm = api.RmsNorm(**norm)
            self.mlp = ThreeRouterMoE(
                config.moe,
                config.hidden_size,
                ffn_hidden_size=config.moe_intermediate_size,
                hidden_act=config.hidden_act,
                mapping=mapping,
                dtype=config.dtype,
                quant_mode=config.quant_mode,
                **split,
            )

        def forward(
            self,
            hidden_states: Any,
            attention_mask: Any = None,
            use_cache: bool = False,
            kv_cache_params: Any = None,
            attention_params: Any = None,
            mrope_params: Any = None,
            vision_token_mask: Any = None,
        ) -> Any:
            """`vision_token_mask` is the pair of masks: the one keyword that the layer list hands through as it is."""
            attended = self.attention(
                self.input_layernorm(hidden_states),
                attention_mask=attention_mask,
                use_cache=use_cache,
                mrope_params=mrope_params,
                kv_cache_params=kv_cache_params,
                attention_params=attention_params,
            )
            attended, presents = attended if use_cache else (attended, None)
            x = hidden_states + attended
            x = x + self.mlp(self.post_layernorm(x), vision_token_mask)
            return (x, presents) if use_cache else x

    class MingModel(api.Module):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.vocab_size, self.dtype = config.vocab_size, config.dtype
            self.vocab_embedding = api.Embedding(config.vocab_size, config.hidden_size, dtype=config.dtype)
            self.layers = api.DecoderLayerList(DecoderLayer, config)
            self.ln_f = api.RmsNorm(normalized_shape=config.hidden_size, eps=config.norm_epsilon, dtype=config.dtype)

        def forward(
            self,
            input_ids: Any,
            position_ids: Any = None,
            use_cache: bool = False,
            attention_mask: Any = None,
            kv_cache_params: Any = None,
            attention_params: Any = None,
            mrope_params: Any = None,
            prompt_embedding_table: Any = None,
            prompt_tasks: Any = None,
            prompt_vocab_size: Any = None,
        ) -> Any:
            """`position_ids` is not read: positions are in the rotary table."""
            table = (prompt_embedding_table, prompt_tasks, prompt_vocab_size)
            x = self.vocab_embedding(input_ids, *(table if prompt_embedding_table is not None else ()))
            x.mark_output(EMBEDS_OUTPUT, self.dtype)
            result = self.layers.forward(
                x,
                use_cache=use_cache,
                attention_mask=attention_mask,
                kv_cache_params=kv_cache_params,
                attention_params=attention_params,
                mrope_params=mrope_params,
                vision_token_mask=modality_masks(api, input_ids, self.vocab_size),
            )
            if use_cache:
                x, presents = result
                return self.ln_f(x), tuple(presents)
            return self.ln_f(result)

    class MingForCausalLM(api.DecoderModelForCausalLM):  # type: ignore[misc]
        config_class = MingConfig

        def __init__(self, config: Any) -> None:
            mapping = config.mapping
            if mapping.pp_size != 1:
                raise BuildError(
                    f"the checkpoint asks for {mapping.pp_size} pipeline stages: export it with --tp, --ep"
                )
            head = api.ColumnLinear(
                config.hidden_size,
                api.pad_vocab_size(config.vocab_size, mapping.tp_size),
                bias=False,
                dtype=config.dtype,
                tp_group=mapping.tp_group,
                tp_size=mapping.tp_size,
                gather_output=True,
            )
            super().__init__(config, MingModel(config), head)

        def prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
            size = self.config.max_position_embeddings * self.config.rotary_embedding_dim
            kwargs.setdefault("mrope_rotary_cos_sin_size", size)
            return super().prepare_inputs(*args, **kwargs)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if not api.default_net().plugin_config.paged_kv_cache:
                raise BuildError("the network is built for the paged KV cache only: leave paged_kv_cache on")
            logits, last, hidden = super().forward(*args, **kwargs)
            hidden.mark_output(HIDDEN_OUTPUT, self.config.dtype)
            return logits, last, hidden

    return Definition(MingConfig, MingForCausalLM)


def register(api: Any) -> Definition:
    """Defines the classes and enters them where the library looks an architecture up."""
    definition = define(api)
    api.MODEL_MAP[ARCHITECTURE] = definition.model
    return definition
