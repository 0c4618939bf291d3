"""Component `llm-checkpoint`: the language model as a TensorRT-LLM 1.2.1 checkpoint, in bf16 or FP8, by ranks.

Two steps. `llm-calibration` (FP8 only) gives the ranges of activations as facts; `llm-checkpoint` writes `config.json`
and `rankN.safetensors`. Neither needs a GPU or TensorRT-LLM. Both keep their half-done work in the bundle's cache and
go on there after a crash. On the GPU machine the same build makes `llm-engine` of them (`builders/trtllm_engine.py`),
and the other engines as plans of TensorRT.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from builders import registry, trtllm_engine
from builders.code import code_version, tool_versions
from builders.steps import Context, Step, digest, peak_memory
from builders.trtllm_layout import Layout, layout, parallel
from ming_trt.config import LLMConfig
from ming_trt.errors import BuildError
from ming_trt.presets import Preset
from ming_trt.trtllm.engine import prompt_rows
from ming_trt.trtllm.rope_table import COMPONENT as ROPE

if TYPE_CHECKING:
    from builders.calibration_samples import Source
    from builders.trtllm_rope import RopeTableEngine
    from builders.trtllm_write import Moved
    from builders.workspace import Record
    from ming_trt.checkpoint import Checkpoint
    from ming_trt.config import MingConfig
    from ming_trt.models.weights import WeightSource

NAME, CALIBRATION, ENGINE = "llm-checkpoint", "llm-calibration", trtllm_engine.NAME
GATE = f"gate:{NAME}"
# the engine of other targets, in whose place these stand
_REPLACED = "llm"
# keys of a preset's precision table that are no engines of `builders.registry`
PRECISIONS = (NAME, "kv_cache")
TARGET = "tensorrt-llm"
ARCHITECTURE = "MingForCausalLM"
DEFAULT_MEMORY = 4 << 30
_TOOLS = ("torch", "numpy")
_MARKER = "model.model.word_embeddings.weight"


class LLMCheckpoint:
    """What the build needs to know of the component besides its steps."""

    name = NAME

    def needs(self, config: MingConfig, checkpoint: Checkpoint) -> str | None:
        """None if the checkpoint holds the language model, else why not, in one sentence."""
        return None if _MARKER in checkpoint else f"the checkpoint has no tensor '{_MARKER}'"

    def sources(self, config: MingConfig) -> Mapping[str, WeightSource]:
        """The official tensors that are exported."""
        from ming_trt.models.llm import weight_map

        return weight_map(config.llm)


COMPONENT = LLMCheckpoint()
Made: TypeAlias = "LLMCheckpoint | RopeTableEngine"


def components() -> dict[str, Any]:
    """What this target's steps give, by the step's name."""
    from builders import trtllm_rope

    return {NAME: COMPONENT, ENGINE: COMPONENT, ROPE: trtllm_rope.ENGINE}


def max_positions(preset: Preset, llm: LLMConfig) -> int:
    """The served length: sizes the engine's rotary table, of which every request carries one."""
    return min(preset.profile.max_seq_len, llm.max_positions)


def kv_bytes(preset: Preset, llm: LLMConfig) -> int:
    """Memory of the KV cache of all slots at full length, over all GPUs."""
    item = {"bf16": 2, "fp8": 1}[kv_precision(preset)]
    return 2 * llm.num_layers * llm.kv_width * item * preset.profile.slots * max_positions(preset, llm)


def request_bytes(preset: Preset, llm: LLMConfig) -> dict[str, int]:
    """What TensorRT-LLM's runtime sets aside on every GPU for the requests of all slots, beside the KV cache."""
    rows = prompt_rows(preset.profile, max_positions(preset, llm))
    return {
        "the prompt table": 2 * rows * llm.hidden_size,
        "the rotary tables": 4 * preset.profile.slots * max_positions(preset, llm) * llm.head_dim,
    }


def kv_precision(preset: Preset) -> str:
    """The type of the KV cache: bf16 unless the preset asks for fp8, which needs an FP8 model's calibration."""
    chosen = preset.precision.get("kv_cache", "bf16")
    return chosen if preset.precision_of(NAME) == "fp8" else "bf16"


def config_json(
    llm: LLMConfig, made: Layout, precision: str, positions: int, *, fp8_cache: bool = False
) -> dict[str, Any]:
    """The checkpoint's `config.json`; `positions` is the served length. What TensorRT-LLM does not know stays as an
    attribute of its config object. Precision "fp32" is for comparisons with float32 references."""
    fp8 = precision == "fp8"
    return {
        "architecture": ARCHITECTURE,
        "dtype": "float32" if precision == "fp32" else "bfloat16",
        "logits_dtype": "float32",
        "vocab_size": llm.vocab_size,
        "hidden_size": llm.hidden_size,
        "num_hidden_layers": llm.num_layers,
        "num_attention_heads": llm.num_heads,
        "num_key_value_heads": llm.num_kv_heads,
        "head_size": llm.head_dim,
        "hidden_act": "swiglu",
        "intermediate_size": llm.shared_width,
        "norm_epsilon": llm.norm_eps,
        "position_embedding_type": "mrope",
        "rotary_base": llm.rope_theta,
        "rotary_embedding_dim": llm.head_dim,
        "rotary_scaling": {"type": "mrope", "kind": llm.rope_kind, "mrope_section": list(llm.rope_sections)},
        "max_position_embeddings": positions,
        "moe": {
            "num_experts": llm.num_experts,
            "top_k": llm.top_k,
            "shared_expert_intermediate_size": llm.shared_width,
            "normalization_mode": 1 if llm.normalize_top_k else 0,
        },
        "moe_intermediate_size": llm.expert_width,
        "qwen_type": "qwen2_vl",
        "qk_layernorm": False,
        "bias": False,
        "attn_bias": False,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "share_embedding_table": False,
        "mapping": made.parallel.mapping(),
        "quantization": {
            "quant_algo": "FP8" if fp8 else None,
            "kv_cache_quant_algo": "FP8" if fp8_cache else None,
            "exclude_modules": ["*lm_head", "*router", "*vocab_embedding"] if fp8 else None,
        },
    }


def beside(preset: Preset) -> Preset:
    """The preset of the engines that are served beside the language model: plans of TensorRT."""
    return replace(preset, target="tensorrt")


def others(only: tuple[str, ...]) -> tuple[str, ...]:
    """Of the selected names those of other engines; all of them if nothing is selected."""
    if only:
        return tuple(name for name in only if name not in (NAME, ENGINE))
    return tuple(name for name in registry.COMPONENTS if name != _REPLACED)


def with_engine(only: tuple[str, ...]) -> bool:
    """Whether the selection holds the engine."""
    return not only or ENGINE in only


def check_selection(only: tuple[str, ...]) -> None:
    """Raises `MingError` if the selection is none for target tensorrt-llm, or cannot be built on this machine."""
    if _REPLACED in only:
        raise BuildError(f"target {TARGET} has no engine '{_REPLACED}': name {NAME}, or {ENGINE}")
    registry.check_names(others(only))
    if with_engine(only):
        trtllm_engine.check()


def check_bundle(folder: Path, records: Mapping[str, Record]) -> None:
    """Raises `BuildError` if the folder holds engines of another target, which this build would replace."""
    for name, record in records.items():
        ours = name in (NAME, CALIBRATION, ENGINE, ROPE, "assets") or name.startswith("gate:")
        if not ours and "plan" not in record.facts:
            raise BuildError(f"'{folder}' holds {name} for another target: build {NAME} into a folder of its own")


def steps(
    preset: Preset,
    config: MingConfig,
    checkpoint: Checkpoint,
    cache: Path,
    *,
    tensor_parallel: int = 1,
    expert_parallel: int = 1,
    calibration: Path | None = None,
    max_host_memory: int = 0,
    engine: bool = False,
) -> list[Step]:
    """The component's steps, everything checked: tensors, parallelism, KV budget, calibration data, memory; with
    `engine` those of the engine too."""
    from ming_trt.models.weights import check_sources, source_names

    reason = COMPONENT.needs(config, checkpoint)
    if reason:
        raise BuildError(f"{NAME} cannot be built: {reason}; give the folder of the whole checkpoint")
    llm = config.llm
    spread = parallel(llm, tensor_parallel, expert_parallel)
    sources = COMPONENT.sources(config)
    check_sources(sources, checkpoint)
    made = layout(llm, spread)
    precision = preset.precision_of(NAME)
    _check_kv(preset, llm)
    limit = max_host_memory or DEFAULT_MEMORY
    _check_estimate(made, precision, limit)
    result = []
    needs: tuple[str, ...] = ()
    chosen = None
    if precision == "fp8":
        from builders.calibration_samples import choose

        chosen = choose(calibration, checkpoint.root)
    # everything that can be refused is; this reads all weights the first time
    weights = checkpoint.digest(source_names(sources), cache)
    if chosen is not None:
        result.append(_calibration(chosen, config, checkpoint, weights, cache, limit))
        needs = (CALIBRATION,)
    fp8_cache = kv_precision(preset) == "fp8"
    content = config_json(llm, made, precision, max_positions(preset, llm), fp8_cache=fp8_cache)
    key = digest([weights, content, precision, code_version("builders.trtllm"), tool_versions(_TOOLS)])

    def export(context: Context) -> Mapping[str, Any]:
        return _export(context, made, checkpoint, precision, content, weights, cache / NAME, key, limit)

    result.append(Step(NAME, key, export, needs, output=NAME))
    gate_key = digest([code_version("builders.trtllm_verify"), tool_versions(_TOOLS)])

    def gate(context: Context) -> Mapping[str, Any]:
        from builders.trtllm_verify import verify

        report = verify(context.inputs[NAME], config, checkpoint, preset.thresholds(NAME))
        _check_peak(GATE, limit)
        return report.as_dict()

    result.append(Step(GATE, gate_key, gate, (NAME,)))
    if engine:
        from builders import trtllm_rope

        result += trtllm_rope.steps(beside(preset), llm, max_positions(preset, llm), cache)
        result += trtllm_engine.steps(preset, content, cache)
    return result


def _calibration(
    chosen: Source, config: MingConfig, checkpoint: Checkpoint, weights: str, cache: Path, limit: int
) -> Step:
    key = digest([weights, chosen.digest, code_version("builders.calibration_samples"), tool_versions(_TOOLS)])

    def run(context: Context) -> Mapping[str, Any]:
        from builders.calibration import calibrate
        from builders.calibration_samples import describe, load

        context.report(f"calibrating with {chosen.what}")
        samples = load(chosen, config, checkpoint)
        folder = cache / CALIBRATION
        ranges = calibrate(config.llm, checkpoint, samples, folder, key, context.report)
        _check_peak(CALIBRATION, limit)
        shutil.rmtree(folder)
        return {"data": describe(chosen, samples), **ranges.facts()}

    return Step(CALIBRATION, key, run)


def _export(
    context: Context,
    made: Layout,
    checkpoint: Checkpoint,
    precision: str,
    content: Mapping[str, Any],
    weights: str,
    folder: Path,
    key: str,
    limit: int,
) -> Mapping[str, Any]:
    from builders.trtllm_file import JOURNAL
    from builders.trtllm_write import Exporter

    calibration = context.facts.get(CALIBRATION, {})
    # the ranges are part of what the files are made of
    key = digest([key, calibration])
    fp8_cache = content["quantization"]["kv_cache_quant_algo"] == "FP8"
    exporter = Exporter(checkpoint, made, precision, calibration.get("amax"), fp8_cache=fp8_cache)

    def report(moved: Moved) -> None:
        share = moved.written / moved.total
        context.report(f"{share:.0%} of {moved.total / 1e6:.0f} MB, reading {moved.rate:.0f} MB/s")

    exporter.run(folder, key, report)
    _check_peak(NAME, limit)
    (folder / JOURNAL).unlink()
    for path in sorted(folder.iterdir()):
        path.replace(context.work / path.name)
    folder.rmdir()
    (context.work / "config.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    facts: dict[str, Any] = {
        "precision": precision,
        "weights": weights,
        "inputs": {},
        "outputs": {},
        "model": f"{NAME}/config.json",
        # read back and compared here; no engine was made of it
        "rung": "typed",
        "tensorrt_llm": "1.2.1",
        "mapping": content["mapping"],
    }
    if calibration:
        facts["calibration"] = {"data": calibration["data"], "unreached_experts": calibration["unreached"]}
    return facts


def _check_kv(preset: Preset, llm: LLMConfig) -> None:
    needed = kv_bytes(preset, llm)
    if needed > preset.kv_budget:
        raise BuildError(
            f"the KV cache of {preset.profile.slots} slots of {max_positions(preset, llm)} tokens needs "
            f"{needed / 2**20:.1f} MiB, above the preset's kv_budget of {preset.kv_budget / 2**20:.1f} MiB: "
            "lower max_seq_len or slots, or raise kv_budget"
        )


def _check_estimate(made: Layout, precision: str, limit: int) -> None:
    from builders.trtllm_write import largest_part

    needed = peak_memory() + largest_part(made, precision)
    if needed > limit:
        raise BuildError(
            f"{NAME} needs about {needed / 2**20:.0f} MiB of memory, above --max-host-memory {limit / 2**20:.0f} MiB: "
            "raise the limit"
        )


def _check_peak(step: str, limit: int) -> None:
    peak = peak_memory()
    if peak > limit:
        raise BuildError(
            f"{step} took {peak / 2**20:.0f} MiB of memory, above --max-host-memory {limit / 2**20:.0f} MiB: "
            "raise the limit"
        )
