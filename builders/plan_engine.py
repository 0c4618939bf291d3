"""One engine of a plan: its weights, inputs, profiles and working memory, from its definition without weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from builders import registry, trtllm
from builders.component import Component, ExportOptions
from builders.reference import reference_bytes
from builders.sizes import weight_bytes
from ming_trt.errors import BuildError, CheckpointError, ConfigError
from ming_trt.presets import Preset
from ming_trt.runtime.detokenizer import STEPS

if TYPE_CHECKING:
    from builders.headers import HeaderCheckpoint
    from ming_trt.config import MingConfig

# Rows and sets of the caches of an utterance that is streamed; guidance makes two rows, each Euler step has a set.
UTTERANCE = {"flow_encoder": (1, 1), "flow_estimator": (2, STEPS)}
# parameter -> shape, of each engine of a plan
Shapes = dict[str, dict[str, tuple[int, ...]]]
_NAMES = {"torch.float32": "f32", "torch.float16": "f16", "torch.bfloat16": "bf16", "torch.int64": "i64"}
_NAMES |= {"torch.bool": "bool", "torch.int32": "i32"}


@dataclass(frozen=True, slots=True)
class ProfilePlan:
    """One way an engine is run: symbol of an input's shape -> smallest, typical and largest size.

    `activation_bytes`: what it holds beside weights and caches, at typical sizes on ONNX Runtime, whose memory follows
    the requests, and at the largest on TensorRT, which sets it aside.
    """

    name: str
    sizes: Mapping[str, tuple[int, int, int]]
    activation_bytes: int


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """One engine, or the `reason` why there is none. Sizes in bytes, of the fullest GPU where there are several.

    `inputs` maps names to type and shape (caches once), with a symbol for every dynamic size. `reference_bytes` is what
    the torch definition holds at least while the gate compares with it; `cache_bytes` what the engine carries from call
    to call, for every slot of a decoder, for one streamed utterance in the flow.
    """

    name: str
    precision: str = ""
    parameters: int = 0
    weight_bytes: int = 0
    weight_bytes_per_gpu: int = 0
    largest_tensor: int = 0
    largest_tensor_bytes: int = 0
    reference_bytes: int = 0
    inputs: Mapping[str, str] = field(default_factory=dict)
    profiles: tuple[ProfilePlan, ...] = ()
    cache_bytes: int = 0
    reason: str = ""

    @property
    def activation_bytes(self) -> int:
        """Working memory of the profile that needs most."""
        return max((profile.activation_bytes for profile in self.profiles), default=0)


def engine_plan(
    name: str,
    config: MingConfig,
    checkpoint: HeaderCheckpoint,
    preset: Preset,
    only: tuple[str, ...],
    parallel: tuple[int, int],
    shapes: Shapes,
) -> EnginePlan:
    """The plan of engine `name` (or of the TensorRT-LLM checkpoint), with a reason if there will be none.

    The shapes of its parameters are added to `shapes`.
    """
    from ming_trt.models.weights import check_sources

    export = name == trtllm.NAME
    component = registry.component("llm" if export else name)
    if only and name not in only:
        return EnginePlan(name, reason="not selected")
    try:
        reason = component.needs(config, checkpoint)
        if reason:
            return EnginePlan(name, reason=reason)
        sources = component.sources(config)
        check_sources(sources, checkpoint)
    except (CheckpointError, ConfigError) as error:
        if checkpoint.complete:
            raise
        # headers or an index alone may say too little of a part
        return EnginePlan(name, reason=f"too little is known of it: {error}")
    own = shapes[name] = {parameter: source.shape for parameter, source in sources.items()}
    # what is read at once is one tensor of the checkpoint, not the stack that it becomes part of
    read = {n: info for source in sources.values() for n in source.names for info in (checkpoint.info(n),)}
    largest = max((math.prod(info.shape) for info in read.values() if min(info.shape, default=0) >= 0), default=0)
    largest = largest or max(math.prod(shape) for shape in own.values())
    weights = per_gpu = engine_weights(component, own, preset)
    if export:
        weights, per_gpu = _exported(config, preset, parallel)
    inputs, profiles, caches = _shapes(component, config, preset)
    return EnginePlan(
        name,
        preset.precision_of(name),
        sum(math.prod(shape) for shape in own.values()),
        weights,
        per_gpu,
        largest,
        4 * largest,
        reference_bytes(component, config)[1],
        inputs,
        profiles,
        caches,
    )


def engine_weights(component: Component, shapes: Mapping[str, tuple[int, ...]], preset: Preset) -> int:
    """Bytes of weights of those `shapes` as the preset stores them."""
    precision = preset.precision_of(component.name)
    keep, by_column = getattr(component, "keep_float", ()), getattr(component, "many_rows", False)
    return sum(weight_bytes(name, shape, preset.target, precision, keep, by_column) for name, shape in shapes.items())


def _exported(config: MingConfig, preset: Preset, parallel: tuple[int, int]) -> tuple[int, int]:
    """Bytes of all rank files, and of the largest. Raises `BuildError` if the model cannot be spread like that."""
    from builders.trtllm_layout import layout
    from builders.trtllm_layout import parallel as spread_over
    from builders.trtllm_write import entries
    from ming_trt.checkpoint import ITEM_SIZE

    spread = spread_over(config.llm, *parallel)
    made = layout(config.llm, spread)
    precision, fp8_cache = preset.precision_of(trtllm.NAME), trtllm.kv_precision(preset) == "fp8"
    ranks = [
        sum(
            math.prod(e.shape) * ITEM_SIZE[e.dtype]
            for e in entries(made, precision, rank, fp8_cache=fp8_cache).values()
        )
        for rank in range(spread.ranks)
    ]
    return sum(ranks), max(ranks)


def _shapes(
    component: Component, config: MingConfig, preset: Preset
) -> tuple[dict[str, str], tuple[ProfilePlan, ...], int]:
    """Inputs, profiles and bytes of caches; nothing for an engine that is not exported from a definition."""
    graph = getattr(component, "graph", None)
    if graph is None:
        return {}, (), 0
    from builders.activations import activation_bytes, cache_bytes
    from builders.export import signature_of
    from builders.tensorrt_profiles import fixed_sizes, phases

    floats = preset.precision_of(component.name)
    floats = {"fp8": "bf16"}.get(floats, floats if floats in ("fp16", "bf16") else "fp32")
    options = ExportOptions("onnxruntime", floats)
    signature = signature_of(lambda: graph(config, options))
    inputs: dict[str, str] = {}
    for name, example in signature.inputs.items():
        # one of the caches stands for all
        shown = f"{name.rstrip('0123456789')}N" if name.startswith("past_") else name
        shape = ", ".join(str(size) for size in signature.shape(name))
        inputs.setdefault(shown, f"{_NAMES.get(str(example.dtype), str(example.dtype))} [{shape}]")
    facts = component.facts(config, options)  # type: ignore[attr-defined]
    try:
        ways = phases(component.name, preset.profile, facts)
    except BuildError:
        # an engine that TensorRT does not build has no profiles, but may run on ONNX Runtime
        if preset.target != "onnxruntime":
            raise
        return inputs, (), 0
    # caches hold whole requests, also where a profile allows any capacity
    capacity = {"T": preset.profile.max_seq_len}
    if preset.target != "onnxruntime":
        capacity |= fixed_sizes(component.name, preset.profile)
    # ONNX Runtime writes the scores of attention out, the fused kernels of TensorRT do not
    scores, which = (True, 1) if preset.target == "onnxruntime" else (False, 2)
    profiles = []
    caches = 0
    for way in ways:
        sizes = capacity | {name: size[which] for name, size in way.sizes.items()}
        profiles.append(ProfilePlan(way.name, dict(way.sizes), activation_bytes(signature, sizes, scores=scores)))
        # a slot of the talker is a request of the language model, which it follows one at a time
        rows, sets = UTTERANCE.get(component.name, (preset.profile.slots, 1))
        sizes |= {"B": rows, "T": way.sizes.get("T", (0, 0, capacity["T"]))[2]}
        caches = max(caches, sets * cache_bytes(signature, sizes))
    return inputs, tuple(profiles), caches


def cache_bytes_per_token(config: MingConfig, preset: Preset) -> int:
    """Bytes of the language model's KV cache for one token, over all layers and GPUs."""
    llm = config.llm
    sizes: dict[str, int] = {"fp16": 2, "bf16": 2, "fp8": 1}
    if preset.target == "onnxruntime":
        number = 4
    elif preset.target == trtllm.TARGET:
        number = sizes[trtllm.kv_precision(preset)]
    else:
        number = sizes.get(preset.precision.get("kv_cache", preset.precision_of("llm")), 4)
    return 2 * llm.num_layers * llm.kv_width * number
