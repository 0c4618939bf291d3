"""The memory that serving takes, item by item, whether it fits, and what would."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from builders import registry, trtllm
from builders.plan_engine import UTTERANCE, EnginePlan, Shapes, cache_bytes_per_token, engine_weights
from builders.tensorrt_profiles import fixed_sizes
from ming_trt import presets
from ming_trt.presets import Preset
from ming_trt.serving.graph import REQUIRED_COMPONENTS, stages_for

if TYPE_CHECKING:
    from ming_trt.config import MingConfig

# Resident memory of the server and of each stage's process when it is ready, without weights: Python, its packages,
# ONNX Runtime, and the graphs of its engines. Measured with the mini bundle (benchmarks/memory.py).
SERVER = 45 * 2**20
PROCESSES: Mapping[str, int] = {
    "preprocess": 70 * 2**20,
    "vision_encoder": 92 * 2**20,
    "audio_encoder": 91 * 2**20,
    "llm": 108 * 2**20,
    "postprocess": 86 * 2**20,
    "cancel": 55 * 2**20,
    "image": 98 * 2**20,
    "speech": 98 * 2**20,
}
# The process of each engine that has none of its own.
_STAGES: Mapping[str, str] = {
    **dict.fromkeys(("connector", "condition", "dit", "vae_encoder", "vae_decoder"), "image"),
    **dict.fromkeys(("talker", "flow_encoder", "flow_estimator", "f0_predictor", "vocoder"), "speech"),
}
# These give working memory back after a run: their engines' is not needed at the same time.
SHRINKING = ("vision_encoder", "audio_encoder", "image")
# A graph has operators that its definition has not (shapes, casts, transposes): 1.1 to 1.4 of the imitated arena,
# measured with all engines.
_UNSEEN = 1.25
# Code of ONNX Runtime's kernels that is paged in when a process first runs an engine.
_KERNELS = 6 * 2**20
# A CUDA context with the libraries' kernels, in each process that uses the GPU: an estimate.
_CONTEXT = 512 * 2**20
# One captured step: its nodes and launch parameters, for each layer. An estimate; the graphs share one pool.
_GRAPH_LAYER = 256 * 2**10


@dataclass(frozen=True, slots=True)
class Item:
    """A part of the memory that serving takes."""

    what: str
    size: int


@dataclass(frozen=True, slots=True)
class Needs:
    """The memory of serving, on the fullest GPU or on the machine, and its KV cache over all of them."""

    kv_bytes: int
    kv_bytes_per_token: int
    items: tuple[Item, ...]

    @property
    def total(self) -> int:
        return sum(item.size for item in self.items)

    @classmethod
    def of(cls, engines: list[EnginePlan], config: MingConfig, preset: Preset, parallel: tuple[int, int]) -> Needs:
        """Adds up the engines that will be served."""
        ranks = max(parallel)
        model = next((engine for engine in engines if engine.name in ("llm", trtllm.NAME)), None)
        token = cache_bytes_per_token(config, preset) if model else 0
        longest = min(preset.profile.max_seq_len, config.llm.max_positions)
        if model and model.name == "llm" and preset.target != "onnxruntime":
            longest = fixed_sizes("llm", preset.profile)["T"]
        kv = token * preset.profile.slots * longest
        items = [Item(f"the weights of {engine.name}", engine.weight_bytes_per_gpu) for engine in engines]
        if kv:
            # with more GPUs than key/value heads a head lies on several
            items.append(Item("the KV cache", kv // min(ranks, config.llm.num_kv_heads)))
        if model and model.name == trtllm.NAME:
            items += [Item(what, size) for what, size in trtllm.request_bytes(preset, config.llm).items()]
        others = (engine for engine in engines if engine is not model and engine.name not in UTTERANCE)
        items += [Item(f"the caches of {engine.name}", engine.cache_bytes) for engine in others]
        items.append(Item("the caches of the flow", _flow_caches(engines, preset)))
        if preset.target == trtllm.TARGET:
            items.append(Item("copies of caches", _copied_caches(engines, preset)))
        stages = stages_for([*(engine.name for engine in engines), *(["llm"] if model else [])])
        if preset.target == "onnxruntime":
            items += _activations(engines)
            started = SERVER + sum((PROCESSES[s.name] + _KERNELS * bool(s.component)) * s.instances for s in stages)
            items.append(Item("the processes", started))
        else:
            items += [Item(f"the activations of {engine.name}", engine.activation_bytes) for engine in engines]
            contexts = sum(stage.instances for stage in stages if stage.component)
            items.append(Item("the CUDA contexts (estimate)", _CONTEXT * contexts))
            items.append(Item("the CUDA graphs (estimate)", _graphs(model, config, preset)))
        return cls(kv, token, tuple(item for item in items if item.size))


def stream_bytes(engines: Iterable[EnginePlan]) -> int:
    """Caches of one streamed utterance that is as long as the profiles allow."""
    return sum(engine.cache_bytes for engine in engines if engine.name in UTTERANCE)


def _flow_caches(engines: Iterable[EnginePlan], preset: Preset) -> int:
    """What all streams take of their budget, and the whole utterance that is decoded beside them, without caches for
    each step. On a GPU a stream takes all of its own from the start, so that whole ones fit or none."""
    flow = [engine for engine in engines if engine.name in UTTERANCE]
    stream, slots = stream_bytes(flow), preset.profile.slots
    if not stream:
        return 0
    whole = sum(engine.cache_bytes // UTTERANCE[engine.name][1] for engine in flow)
    if preset.target == "onnxruntime":
        return min(slots * stream, preset.flow_budget) + whole
    return min(slots, preset.flow_budget // stream) * stream + whole


def _copied_caches(engines: Iterable[EnginePlan], preset: Preset) -> int:
    """TensorRT-LLM's container has a TensorRT that writes no cache in place: each engine has a buffer for those of one
    run, from where they are copied."""
    at_once = {**{name: sets for name, (_, sets) in UTTERANCE.items()}, "talker": preset.profile.slots}
    return sum(engine.cache_bytes // at_once[engine.name] for engine in engines if engine.name in at_once)


def working_bytes(activations: int) -> int:
    """What an engine takes on ONNX Runtime beside weights and caches, for `activations` bytes of its definition."""
    return int(activations * _UNSEEN)


def _activations(engines: list[EnginePlan]) -> list[Item]:
    """Working memory on ONNX Runtime: of all engines of a process, or of the largest where it is given back."""
    items = []
    for engine in engines:
        stage = _STAGES.get(engine.name, engine.name)
        largest = max(engines_of(stage, engines), key=lambda e: e.activation_bytes)
        if stage not in SHRINKING or engine is largest:
            items.append(Item(f"the activations of {engine.name}", working_bytes(engine.activation_bytes)))
    return items


def engines_of(stage: str, engines: Iterable[EnginePlan]) -> list[EnginePlan]:
    """Those that run in the process of `stage`."""
    return [engine for engine in engines if _STAGES.get(engine.name, engine.name) == stage and not engine.reason]


def process_bytes(stage: str, engines: Iterable[EnginePlan], cache: int = 0) -> int:
    """Peak of resident memory of the process of `stage` on ONNX Runtime, with `cache` bytes of caches in use."""
    own = engines_of(stage, engines)
    weights = sum(engine.weight_bytes for engine in own)
    return PROCESSES[stage] + _KERNELS + weights + cache + sum(item.size for item in _activations(own))


def _graphs(model: EnginePlan | None, config: MingConfig, preset: Preset) -> int:
    """Decoding is captured for batches of 1, 2, 4 … slots; the pool holds the largest step's working memory."""
    if model is None:
        return 0
    captured = preset.profile.slots.bit_length() + (preset.profile.slots & (preset.profile.slots - 1) > 0)
    decode = next((way.activation_bytes for way in model.profiles if way.name == "decode"), 0)
    return decode + captured * config.llm.num_layers * _GRAPH_LAYER


def problem(
    needs: Needs,
    engines: list[EnginePlan],
    limit: int,
    preset: Preset,
    config: MingConfig,
    parallel: tuple[int, int],
    shapes: Shapes,
) -> str:
    """Why the plan cannot be built or served in `limit` bytes (0 = any), in one sentence, or ""."""
    profile = preset.profile
    if needs.kv_bytes > preset.kv_budget:
        other = _nearest(engines, needs.total, limit, preset, config, parallel, shapes) if limit else ""
        return (
            f"the KV cache of {profile.slots} slots of {profile.max_seq_len} tokens needs {gib(needs.kv_bytes)}, above "
            f"the preset's kv_budget of {gib(preset.kv_budget)}: lower max_seq_len or slots, or raise kv_budget"
            + (f"; or {other}" if other else "")
        )
    stream = stream_bytes(engines)
    if preset.target != "onnxruntime" and stream > preset.flow_budget:
        return (
            f"speech in parts holds {gib(stream)} for each stream on this target, above the preset's flow_budget of "
            f"{gib(preset.flow_budget)}: raise it, or build the flow engines in a smaller precision"
        )
    if not limit or needs.total <= limit:
        return ""
    largest = max(needs.items, key=lambda item: item.size)
    remedy = _nearest(engines, needs.total, limit, preset, config, parallel, shapes)
    return (
        f"serving needs {gib(needs.total)} and {gib(limit)} are there; the largest item is {largest.what} with "
        f"{gib(largest.size)}: {remedy}"
    )


def _nearest(
    engines: list[EnginePlan],
    total: int,
    limit: int,
    preset: Preset,
    config: MingConfig,
    parallel: tuple[int, int],
    shapes: Shapes,
) -> str:
    """What to do: the shipped preset of this target that uses most of `limit` and fits, or how far the next one is,
    and whether the language model and its encoders alone would fit.

    Working memory is taken as that of `preset`: others differ in the precision of weights, in slots and in lengths.
    """
    needed = {preset.name: total}
    for name in presets.names():
        other = presets.load(name)
        if other.target == preset.target and name != preset.name:
            found = Needs.of([_stored(engine, other, shapes) for engine in engines], config, other, parallel)
            if found.kv_bytes <= other.kv_budget:
                needed[name] = found.total
    fitting = {name: size for name, size in needed.items() if size <= limit and name != preset.name}
    if fitting:
        return f"take preset {max(fitting, key=lambda name: fitting[name])}"
    least = min(needed, key=lambda name: needed[name])
    remedy = f"no shipped preset fits, {least} comes nearest with {gib(needed[least])}"
    if least == preset.name:
        remedy = "no shipped preset needs less"
    chosen = presets.load(least) if least != preset.name else preset
    few = [_stored(engine, chosen, shapes) for engine in engines if engine.name in (*REQUIRED_COMPONENTS, trtllm.NAME)]
    if few and len(few) < len(engines):
        without = Needs.of(few, config, chosen, parallel).total
        if without <= limit:
            only = " ".join(f"--only {engine.name}" for engine in few)
            return f"{remedy}; without pictures and speech ({only}) that preset needs {gib(without)}"
    return f"{remedy}; take a larger machine, or leave engines out with --only"


def _stored(engine: EnginePlan, preset: Preset, shapes: Shapes) -> EnginePlan:
    """The engine with its weights as `preset` stores them; the precisions of TensorRT-LLM presets are equal."""
    if engine.name == trtllm.NAME:
        return engine
    weights = engine_weights(registry.component(engine.name), shapes[engine.name], preset)
    return replace(engine, weight_bytes_per_gpu=weights)


def gib(size: float) -> str:
    """A size for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
