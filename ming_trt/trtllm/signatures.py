"""Every symbol of TensorRT-LLM that this project uses, with the parameters it relies on, in one place for `doctor`.

The network definition and the serving model take their symbols from `load()` only, so what is not listed is not used.
`check()` compares the list with the installed package by `inspect`; it needs release 1.2.1 and no GPU. `READ` says
where each was read: the tag of 1.2.1 itself could not be, so the versions next to it stand for it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ming_trt.errors import UnavailableError

VERSION = "1.2.1"
_DISTRIBUTIONS = ("tensorrt_llm", "tensorrt-llm")


# Where a symbol was read: the first entry that `module.attribute` begins with.
READ: Mapping[str, str] = {
    "tensorrt_llm.functional": "functional.py at 19103620b86da1de (a fork of 1.3.0rc20)",
    "tensorrt_llm.module": "layers/linear.py at 2a9abd9536aa62ad (1.0 line; how it is used)",
    "tensorrt_llm.layers.moe": "layers/moe.py at c388fec7fe09ebd2 (1.2 line)",
    "tensorrt_llm.layers.ColumnLinear": "layers/linear.py at 2a9abd9536aa62ad (1.0 line)",
    "tensorrt_llm.layers.RowLinear": "layers/linear.py at 2a9abd9536aa62ad (1.0 line)",
    "tensorrt_llm.layers.Embedding": "layers/embedding.py, newest stored copy (1.x line)",
    "tensorrt_llm.layers.RmsNorm": "layers/__init__.py at db1d864bfe498467 (a fork of 1.3.0rc20; the name only)",
    "tensorrt_llm.layers": "layers/attention.py, newest stored copy, and layers/__init__.py at db1d864bfe498467",
    "tensorrt_llm.models": "models/modeling_utils.py, newest stored copy (1.x line)",
    "tensorrt_llm._utils": "models/modeling_utils.py, newest stored copy (how it is used)",
    "tensorrt_llm._common": "models/modeling_utils.py, newest stored copy (how it is used)",
    "tensorrt_llm.builder": "builder.py at 25ea9a02d41f86b0 (a fork of 1.3.0rc20)",
    "tensorrt_llm.plugin": "plugin/plugin.py at c20322ffd3dc0740 (1.2 line)",
    "tensorrt_llm.bindings.executor.Executor": "cpp/tensorrt_llm/nanobind/executor/executor.cpp at 1dd50d0741fa3bda, "
    "executorConfig.cpp at c40f1157d276de8e",
    "tensorrt_llm.bindings.executor.KvCacheConfig": "nanobind/executor/executorConfig.cpp at c40f1157d276de8e",
    "tensorrt_llm.bindings.executor.ParallelConfig": "nanobind/executor/executorConfig.cpp at c40f1157d276de8e",
    "tensorrt_llm.bindings.executor.OrchestratorConfig": "nanobind/executor/executorConfig.cpp at c40f1157d276de8e",
    "tensorrt_llm.bindings.executor.CommunicationMode": "triton_backend tensorrt_llm/1/model.py at 0d5352f5fc5f39ee",
    "tensorrt_llm.bindings.executor.BatchingType": "triton_backend tensorrt_llm/1/model.py at 0d5352f5fc5f39ee",
    "tensorrt_llm.bindings.executor.ModelType": "triton_backend tensorrt_llm/1/model.py at 0d5352f5fc5f39ee",
    "tensorrt_llm.bindings.executor": "nanobind/executor/request.cpp at 008b2b8d23af95e4",
}


@dataclass(frozen=True, slots=True)
class Symbol:
    """`module.attribute`. `parameters` are names that a call passes (by keyword or in this order); `members` are
    attributes that are read; `binding` marks compiled classes, whose parameters stand in their docstring only."""

    module: str
    attribute: str
    parameters: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    binding: bool = False


_F, _L, _M = "tensorrt_llm.functional", "tensorrt_llm.layers", "tensorrt_llm.models.modeling_utils"
_E = "tensorrt_llm.bindings.executor"

# What `ming_trt/trtllm/model.py` and `engine.py` are written against.
NETWORK: Mapping[str, Symbol] = {
    "cast": Symbol(_F, "cast", ("input", "dtype")),
    "where": Symbol(_F, "where", ("condition", "left", "right")),
    "gt": Symbol(_F, "gt", ("left", "right")),
    "eq": Symbol(_F, "eq", ("left", "right")),
    "op_and": Symbol(_F, "op_and", ("left", "right")),
    "sub": Symbol(_F, "sub", ("left", "right")),
    "mul": Symbol(_F, "mul", ("left", "right")),
    "floordiv": Symbol(_F, "floordiv", ("left", "right")),
    "unsqueeze": Symbol(_F, "unsqueeze", ("input", "axis")),
    "allreduce": Symbol(_F, "allreduce", ("tensor", "group")),
    "SideStreamIDType": Symbol(_F, "SideStreamIDType", members=("disable",)),
    "Module": Symbol("tensorrt_llm.module", "Module"),
    "Attention": Symbol(
        _L,
        "Attention",
        (
            "local_layer_idx",
            "hidden_size",
            "num_attention_heads",
            "num_kv_heads",
            "attention_head_size",
            "max_position_embeddings",
            "attention_mask_type",
            "bias",
            "dtype",
            "position_embedding_type",
            "rotary_embedding_base",
            "rotary_embedding_scaling",
            "tp_group",
            "tp_size",
            "tp_rank",
            "quant_mode",
        ),
    ),
    "AttentionMaskType": Symbol(_L, "AttentionMaskType", members=("causal",)),
    "ColumnLinear": Symbol(
        _L, "ColumnLinear", ("in_features", "out_features", "bias", "dtype", "tp_group", "tp_size", "gather_output")
    ),
    "RowLinear": Symbol(
        _L, "RowLinear", ("in_features", "out_features", "bias", "dtype", "tp_group", "tp_size", "strict_dtype")
    ),
    "Embedding": Symbol(_L, "Embedding", ("num_embeddings", "embedding_dim", "dtype")),
    "RmsNorm": Symbol(_L, "RmsNorm", ("normalized_shape", "eps", "dtype")),
    "SharedMoE": Symbol(
        "tensorrt_llm.layers.moe",
        "SharedMoE",
        (
            "moe_config",
            "hidden_size",
            "ffn_hidden_size",
            "hidden_act",
            "mapping",
            "bias",
            "dtype",
            "tp_group",
            "tp_size",
            "quant_mode",
            "use_shared_gate",
            "use_side_stream",
        ),
        ("renormalize", "default_routing", "forward_experts"),
    ),
    "MoeConfig": Symbol(
        "tensorrt_llm.layers.moe",
        "MoeConfig",
        ("num_experts", "shared_expert_intermediate_size", "top_k", "normalization_mode"),
        ("from_dict", "to_dict", "validate"),
    ),
    "PretrainedConfig": Symbol(_M, "PretrainedConfig", members=("from_json_file", "to_dict", "set_rank")),
    "DecoderLayerList": Symbol(_M, "DecoderLayerList", ("cls", "config")),
    "DecoderModelForCausalLM": Symbol(
        _M,
        "DecoderModelForCausalLM",
        ("config", "transformer", "lm_head"),
        ("from_checkpoint", "prepare_inputs", "forward"),
    ),
    "MODEL_MAP": Symbol("tensorrt_llm.models", "MODEL_MAP"),
    "pad_vocab_size": Symbol("tensorrt_llm._utils", "pad_vocab_size", ("vocab_size", "tp_size")),
    "default_net": Symbol("tensorrt_llm._common", "default_net"),
    "build": Symbol("tensorrt_llm.builder", "build", ("model", "build_config")),
    "BuildConfig": Symbol(
        "tensorrt_llm.builder",
        "BuildConfig",
        (
            "max_input_len",
            "max_seq_len",
            "max_batch_size",
            "max_num_tokens",
            "max_prompt_embedding_table_size",
            "strongly_typed",
            "plugin_config",
            "use_mrope",
            "input_timing_cache",
            "output_timing_cache",
        ),
    ),
    "PluginConfig": Symbol(
        "tensorrt_llm.plugin",
        "PluginConfig",
        (
            "gpt_attention_plugin",
            "moe_plugin",
            "gemm_plugin",
            "remove_input_padding",
            "paged_kv_cache",
            "use_paged_context_fmha",
        ),
    ),
}
# Parameters of methods that subclasses override or call, by class and method.
METHODS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("SharedMoE", "renormalize"): ("self", "logits"),
    ("SharedMoE", "default_routing"): ("self", "logits"),
    ("SharedMoE", "forward_experts"): (
        "self",
        "hidden_states",
        "token_selected_experts",
        "token_final_scales",
        "lora_layer_params",
        "side_stream_id",
    ),
    ("Attention", "forward"): (
        "hidden_states",
        "attention_mask",
        "use_cache",
        "mrope_params",
        "kv_cache_params",
        "attention_params",
    ),
    ("DecoderLayerList", "forward"): (
        "hidden_states",
        "use_cache",
        "attention_mask",
        "kv_cache_params",
        "attention_params",
        "mrope_params",
        "vision_token_mask",
    ),
    ("DecoderModelForCausalLM", "forward"): (
        "input_ids",
        "position_ids",
        "use_cache",
        "last_token_ids",
        "attention_mask",
        "kv_cache_params",
        "attention_params",
        "mrope_params",
        "hidden_states",
        "prompt_embedding_table",
        "prompt_tasks",
        "prompt_vocab_size",
    ),
    ("DecoderModelForCausalLM", "from_checkpoint"): ("ckpt_dir", "rank", "config"),
    ("DecoderModelForCausalLM", "prepare_inputs"): ("mrope_rotary_cos_sin_size",),
}
# What a serving model needs of the executor bindings.
EXECUTOR: Mapping[str, Symbol] = {
    "Executor": Symbol(
        _E,
        "Executor",
        ("model_path", "model_type", "executor_config"),
        ("enqueue_request", "await_responses", "cancel_request", "shutdown"),
        binding=True,
    ),
    "ExecutorConfig": Symbol(
        _E,
        "ExecutorConfig",
        (
            "max_beam_width",
            "kv_cache_config",
            "enable_chunked_context",
            "batching_type",
            "parallel_config",
            "additional_model_outputs",
        ),
        binding=True,
    ),
    "KvCacheConfig": Symbol(_E, "KvCacheConfig", ("enable_block_reuse", "max_tokens"), binding=True),
    "Request": Symbol(
        _E,
        "Request",
        (
            "input_token_ids",
            "max_tokens",
            "streaming",
            "sampling_config",
            "output_config",
            "end_id",
            "stop_words",
            "prompt_tuning_config",
            "mrope_config",
        ),
        binding=True,
    ),
    "MropeConfig": Symbol(_E, "MropeConfig", ("mrope_rotary_cos_sin", "mrope_position_deltas"), binding=True),
    "PromptTuningConfig": Symbol(_E, "PromptTuningConfig", ("embedding_table",), binding=True),
    "AdditionalModelOutput": Symbol(_E, "AdditionalModelOutput", ("name", "gather_context"), binding=True),
    "OutputConfig": Symbol(_E, "OutputConfig", ("exclude_input_from_output", "additional_model_outputs"), binding=True),
    "SamplingConfig": Symbol(
        _E,
        "SamplingConfig",
        ("beam_width", "temperature", "top_k", "top_p", "seed", "repetition_penalty", "no_repeat_ngram_size"),
        binding=True,
    ),
    "ParallelConfig": Symbol(_E, "ParallelConfig", ("communication_mode", "orchestrator_config"), binding=True),
    "OrchestratorConfig": Symbol(_E, "OrchestratorConfig", ("is_orchestrator", "worker_executable_path"), binding=True),
    "CommunicationMode": Symbol(_E, "CommunicationMode", members=("ORCHESTRATOR",), binding=True),
    "BatchingType": Symbol(_E, "BatchingType", members=("INFLIGHT",), binding=True),
    "ModelType": Symbol(_E, "ModelType", members=("DECODER_ONLY",), binding=True),
}


def read_at(symbol: Symbol) -> str:
    """Where the symbol's signature was read."""
    name = f"{symbol.module}.{symbol.attribute}"
    return next(place for prefix, place in READ.items() if name.startswith(prefix))


def installed() -> str:
    """The installed version of TensorRT-LLM, or ""."""
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def require() -> None:
    """Raises `UnavailableError` unless TensorRT-LLM 1.2.1 is installed."""
    version = installed()
    if not version:
        raise UnavailableError(
            f"TensorRT-LLM is not installed: use the Triton container that holds {VERSION} (docs/compatibility.md)"
        )
    if version != VERSION:
        raise UnavailableError(
            f"TensorRT-LLM {version} is installed and the engine needs {VERSION}, the last release that builds "
            "TensorRT engines like this one: use its container (docs/compatibility.md)"
        )


def load(symbols: Mapping[str, Symbol] = NETWORK) -> Any:
    """A namespace with every symbol of the list, imported. Raises `UnavailableError` if one is not there."""
    require()
    return SimpleNamespace(**{name: _resolve(symbol) for name, symbol in symbols.items()})


def check() -> list[str]:
    """What of the lists is not as relied on, one sentence each; empty if all is. Raises as `require`."""
    require()
    problems: list[str] = []
    found: dict[str, Any] = {}
    for name, symbol in {**NETWORK, **EXECUTOR}.items():
        try:
            found[name] = _resolve(symbol)
        except UnavailableError as error:
            problems.append(str(error))
            continue
        problems += _compare(f"{symbol.module}.{symbol.attribute}", found[name], symbol)
    for (owner, method), wanted in METHODS.items():
        function = getattr(found.get(owner), method, None)
        if function is not None:
            problems += _parameters(f"{owner}.{method}", function, wanted)
    return problems


def _resolve(symbol: Symbol) -> Any:
    try:
        return getattr(importlib.import_module(symbol.module), symbol.attribute)
    except (ImportError, AttributeError) as error:
        raise UnavailableError(
            f"TensorRT-LLM's {symbol.module}.{symbol.attribute} cannot be imported ({error}): "
            f"reinstall release {VERSION}"
        ) from None


def _compare(name: str, value: Any, symbol: Symbol) -> list[str]:
    problems = [f"{name} has no {member}" for member in symbol.members if not hasattr(value, member)]
    if symbol.binding and symbol.parameters:
        # compiled classes state their parameters in the docstring of the constructor
        text = f"{getattr(value.__init__, '__doc__', '')} {value.__doc__}"
        return problems + [f"{name} takes no '{p}'" for p in symbol.parameters if p not in text]
    if symbol.parameters:
        problems += _parameters(name, value, symbol.parameters)
    return problems


def _parameters(name: str, function: Any, wanted: tuple[str, ...]) -> list[str]:
    """Names that are missing, unless the function takes any keyword."""
    known = inspect.signature(function).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values()):
        return []
    return [f"{name} takes no '{parameter}'" for parameter in wanted if parameter not in known]
