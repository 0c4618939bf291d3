"""One rank's engine from an exported checkpoint, with TensorRT-LLM's own builder; needs 1.2.1 and the GPU.

This is the process that step `llm-engine` of a build starts for each rank (`builders/trtllm_engine.py`), since the
builder may crash and keeps its memory: `python -m ming_trt.trtllm.engine JOB.json`. Everything is checked before the
GPU is used: the release, the signatures, and that the network asks for just these weights.
"""

from __future__ import annotations

import ctypes
import json
import resource
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ming_trt.errors import BuildError, MingError
from ming_trt.presets import Profile
from ming_trt.trtllm import signatures
from ming_trt.trtllm.contract import check_checkpoint
from ming_trt.trtllm.model import register

CONFIG = "config.json"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Job:
    """What to build: `rank` of the checkpoint in folder `checkpoint`, into folder `output`. `settings` and `plugins` as
    `build_settings` and `plugin_settings` give them; the file `timing_cache` is read if it is there, and written; the
    file `result` gets the outcome."""

    checkpoint: str
    output: str
    rank: int
    settings: Mapping[str, Any]
    plugins: Mapping[str, Any]
    timing_cache: str
    result: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it went: `error` is one sentence, or "". Seconds of loading weights and of building; peak of host memory."""

    error: str = ""
    load_seconds: float = 0.0
    build_seconds: float = 0.0
    peak_bytes: int = 0


def engine_file(rank: int) -> str:
    """File name of a rank's engine, as the library names it."""
    return f"rank{rank}.engine"


def prompt_rows(profile: Profile, length: int) -> int:
    """Rows of the prompt table: of all slots at once, and twice as many places, since parity is the modality."""
    return 2 * profile.slots * min(profile.max_image_tokens, length)


def build_settings(config: Mapping[str, Any], profile: Profile) -> dict[str, Any]:
    """Arguments of TensorRT-LLM's `BuildConfig` but for plugins and caches. Pure: no library is needed."""
    length = config["max_position_embeddings"]
    return {
        "max_input_len": length - 1,
        "max_seq_len": length,
        "max_batch_size": profile.slots,
        "max_num_tokens": max(profile.prefill_chunk, profile.slots),
        "max_prompt_embedding_table_size": prompt_rows(profile, length),
        "strongly_typed": True,
        "use_mrope": True,
    }


def plugin_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `PluginConfig`: FP8 products run in TensorRT's own kernels, so there is no plugin for them."""
    dtype = config["dtype"]
    return {
        "gpt_attention_plugin": dtype,
        "moe_plugin": dtype,
        "gemm_plugin": None if config["quantization"]["quant_algo"] == "FP8" else dtype,
        "remove_input_padding": True,
        "paged_kv_cache": True,
        "use_paged_context_fmha": True,
    }


def build_rank(job: Job) -> Outcome:
    """Writes `rankN.engine`, and for rank 0 `config.json`. Raises `MingError`, before any work if it cannot be done."""
    differences = signatures.check()
    if differences:
        raise BuildError(f"TensorRT-LLM is not as relied on: {differences[0]}; reinstall release {signatures.VERSION}")
    checkpoint = Path(job.checkpoint)
    problems = check_checkpoint(checkpoint)
    if problems:
        raise BuildError(f"the checkpoint in '{checkpoint}' does not fit the network: {problems[0]}; export it again")
    api = signatures.load()
    definition = register(api)
    started = time.monotonic()
    loaded = definition.config.from_json_file(str(checkpoint / CONFIG))
    model = definition.model.from_checkpoint(str(checkpoint), rank=job.rank, config=loaded)
    ready = time.monotonic()
    # without a name for it, the builder would leave its timings in the working directory
    caches = {"output_timing_cache": job.timing_cache}
    if Path(job.timing_cache).is_file():
        caches["input_timing_cache"] = job.timing_cache
    settings = api.BuildConfig(plugin_config=api.PluginConfig(**job.plugins), **job.settings, **caches)
    engine = api.build(model, settings)
    engine.save(job.output)
    if not (Path(job.output) / engine_file(job.rank)).is_file():
        raise BuildError(f"the builder gave no {engine_file(job.rank)}: see its log")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Outcome("", round(ready - started, 1), round(time.monotonic() - ready, 1), peak)


def main(path: str) -> int:
    """Does the job of a file; the outcome is written even if the build fails."""
    # a build that was killed leaves no builder behind, which would write where the next one does
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    job = Job(**json.loads(Path(path).read_text("utf-8")))
    try:
        outcome = build_rank(job)
    except MingError as error:
        outcome = Outcome(str(error))
    except Exception as error:
        outcome = Outcome(
            f"TensorRT-LLM's builder failed ({type(error).__name__}: {' '.join(str(error).split())[:400]})"
        )
        Path(job.result).write_text(json.dumps(asdict(outcome)), "utf-8")
        raise
    Path(job.result).write_text(json.dumps(asdict(outcome)), "utf-8")
    if outcome.error:
        print(f"error: {outcome.error}", file=sys.stderr)
    return 1 if outcome.error else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
