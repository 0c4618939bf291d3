"""What an engine's own config.json says that requests and the KV budget must fit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ming_trt.errors import BundleError
from ming_trt.runtime.sequence import LLMOptions


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """Positions of the rotary table, rows of a request's prompt table, type of its rows ("bfloat16" or "float32"),
    bytes of the KV cache per token over all ranks, and the number of ranks."""

    positions: int
    prompt_rows: int
    dtype: str
    kv_bytes_per_token: int
    ranks: int = 1


def engine_facts(folder: Path) -> EngineFacts:
    """Reads an engine's config.json. Raises `BundleError` if it is not one of this model's."""
    try:
        data = json.loads((folder / "config.json").read_text("utf-8"))
        model, build = data["pretrained_config"], data["build_config"]
        if not build["use_mrope"] or build["max_seq_len"] != model["max_position_embeddings"]:
            raise BundleError(f"the engine in '{folder}' was not built for three-axis rope: build it with ming-trt")
        item = 1 if model["quantization"]["kv_cache_quant_algo"] == "FP8" else 2
        per_token = 2 * model["num_hidden_layers"] * model["num_key_value_heads"] * model["head_size"] * item
        rows = build["max_prompt_embedding_table_size"] // build["max_batch_size"]
        ranks = int(model.get("mapping", {}).get("world_size", 1))
        return EngineFacts(model["max_position_embeddings"], rows, model["dtype"], per_token, ranks)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"'{folder}' holds no TensorRT-LLM engine ({error!r}): build one from the checkpoint"
        ) from None


def kv_tokens(facts: EngineFacts, options: LLMOptions) -> int:
    """Tokens of KV cache that the preset's budget allows. Raises `BundleError` if one request does not fit."""
    tokens = options.kv_budget // facts.kv_bytes_per_token
    if tokens < facts.positions:
        raise BundleError(
            f"a kv_budget of {options.kv_budget / 2**20:.0f} MiB holds {tokens} tokens and a request may have "
            f"{facts.positions}: raise it, or build with a smaller max_seq_len"
        )
    return min(tokens, options.slots * facts.positions)
