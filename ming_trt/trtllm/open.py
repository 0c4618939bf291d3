"""Opens the TensorRT-LLM engine of a bundle: checks the stamp, configures the executor, and starts the service.

An engine of several ranks runs in TensorRT-LLM's orchestrator mode: this process is the orchestrator, and the executor
starts a worker process for each GPU through MPI. So `ming-trt serve` starts one server whatever the number of GPUs.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from ming_trt.bundle import Bundle
from ming_trt.config import load_config
from ming_trt.errors import UnavailableError
from ming_trt.processing.tokenizer import Tokenizer
from ming_trt.runtime.cancel import CancelBoard
from ming_trt.runtime.engine import open_engine
from ming_trt.runtime.sequence import LLMOptions
from ming_trt.trtllm import signatures, stamp
from ming_trt.trtllm.facts import engine_facts, kv_tokens
from ming_trt.trtllm.model import EMBEDS_OUTPUT, HIDDEN_OUTPUT
from ming_trt.trtllm.rope_table import COMPONENT, EngineTable, HostTable, RopeTable
from ming_trt.trtllm.service import ExecutorLLM

# Open MPI refuses to start processes as root unless both are set; containers run as root.
_AS_ROOT = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
_WORKERS = ("bin/executorWorker", "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker")


def open_service(bundle: Bundle, options: LLMOptions, board: CancelBoard | None = None) -> ExecutorLLM:
    """The bundle's engine, running, with the limits of its preset. Needs TensorRT-LLM 1.2.1 and the GPU.

    Raises `UnavailableError` or `BundleError`, in one sentence, before the GPU is used.
    """
    entry = bundle.component("llm")
    folder = bundle.path / entry.model
    facts = engine_facts(folder)
    tokens = kv_tokens(facts, options)
    stamp.check(stamp.EngineStamp.from_facts(entry.facts))
    config = load_config(bundle.assets).llm
    api = signatures.load(signatures.EXECUTOR)
    executor = api.Executor(str(folder), api.ModelType.DECODER_ONLY, executor_config(api, tokens, facts.ranks))
    decoder = Tokenizer.from_checkpoint(bundle.assets) if (bundle.assets / "tokenizer.json").is_file() else None
    tables: RopeTable = HostTable(config, facts.positions)
    if bundle.has(COMPONENT):
        tables = EngineTable(open_engine(bundle, COMPONENT), config, facts.positions)
    return ExecutorLLM(executor, api, config, facts, options, decoder, board, tables)


def executor_config(api: Any, kv_tokens: int, ranks: int) -> Any:
    """What the executor is told: KV budget in tokens, chunked prompts, the two outputs, and how ranks are started."""
    parallel = {}
    if ranks > 1:
        if os.geteuid() == 0:
            for name in _AS_ROOT:
                os.environ.setdefault(name, "1")
        orchestrator = api.OrchestratorConfig(is_orchestrator=True, worker_executable_path=str(worker_program()))
        mode = api.CommunicationMode.ORCHESTRATOR
        parallel["parallel_config"] = api.ParallelConfig(communication_mode=mode, orchestrator_config=orchestrator)
    return api.ExecutorConfig(
        max_beam_width=1,
        # rows of a reused prefix are never computed, and requests may want hidden states of all of them
        kv_cache_config=api.KvCacheConfig(enable_block_reuse=False, max_tokens=kv_tokens),
        enable_chunked_context=True,
        batching_type=api.BatchingType.INFLIGHT,
        additional_model_outputs=[api.AdditionalModelOutput(name, True) for name in (HIDDEN_OUTPUT, EMBEDS_OUTPUT)],
        **parallel,
    )


def worker_program() -> Path:
    """TensorRT-LLM's worker executable, of the package or of Triton's backend. Raises `UnavailableError`."""
    spec = importlib.util.find_spec("tensorrt_llm")
    package = Path(spec.origin).parent if spec is not None and spec.origin else Path("tensorrt_llm")
    for name in _WORKERS:
        # an absolute path stands for itself
        if (package / name).is_file():
            return package / name
    raise UnavailableError(
        f"an engine of several GPUs needs TensorRT-LLM's worker program, which is neither at '{package / _WORKERS[0]}' "
        f"nor at '{_WORKERS[1]}': use its Triton container"
    )
