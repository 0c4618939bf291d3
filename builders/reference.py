"""The torch definition of an engine with its weights, layer by layer where they do not all fit into memory.

Layers are the members of module lists. A layer's weights are read when it is called and dropped when it returns, so a
definition takes the memory of its largest layer and of what lies outside the layers, not of the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from builders.component import Component, Feeds

if TYPE_CHECKING:
    import torch
    from torch.utils.hooks import RemovableHandle

    from ming_trt.checkpoint import Checkpoint
    from ming_trt.config import MingConfig
    from ming_trt.models.weights import WeightSource


def reference(
    component: Component,
    config: MingConfig,
    checkpoint: Checkpoint,
    memory: int,
    dtype: torch.dtype | None = None,
) -> torch.nn.Module | None:
    """The definition for `memory` bytes of float32 weights: whole if it fits, else layer by layer, else None.

    `dtype` of its weights: float32 by default.

    Raises `CheckpointError` for a tensor that is absent or of another shape.
    """
    import torch

    whole, streamed = reference_bytes(component, config)
    dtype = dtype or torch.float32
    if whole <= memory:
        return component.reference(config, checkpoint).to(dtype)
    if streamed > memory:
        return None
    with torch.device("meta"):
        module: torch.nn.Module = component.module(config)  # type: ignore[attr-defined]
    sources = component.sources(config)
    layers = _layers(module)
    for name, source in sources.items():
        if _layer_of(name, layers) is None:
            _set(module, name, source.load(checkpoint, dtype))
    for layer in layers:
        own = {name: source for name, source in sources.items() if _layer_of(name, layers) == layer}
        _stream(module, layer, own, checkpoint, dtype)
    return module.eval()


def reference_bytes(component: Component, config: MingConfig) -> tuple[int, int]:
    """Memory of the weights: all of them, and the most that are held layer by layer."""
    import torch

    sizes = {name: 4 * math.prod(source.shape) for name, source in component.sources(config).items()}
    build = getattr(component, "module", None)
    if build is None:
        return sum(sizes.values()), sum(sizes.values())
    with torch.device("meta"):
        layers = _layers(build(config))
    inside = dict.fromkeys(layers, 0)
    for name, size in sizes.items():
        layer = _layer_of(name, layers)
        if layer is not None:
            inside[layer] += size
    whole = sum(sizes.values())
    return whole, whole - sum(inside.values()) + max(inside.values(), default=0)


def _layers(module: torch.nn.Module) -> list[str]:
    """Names of the outermost members of module lists."""
    import torch

    found: list[str] = []
    for name, inner in module.named_modules():
        if not isinstance(inner, torch.nn.ModuleList) or _layer_of(name, found):
            continue
        # a list of lists is called by its members
        if not any(isinstance(member, torch.nn.ModuleList) for member in inner):
            found += [f"{name}.{index}" for index in range(len(inner))]
    return found


def _layer_of(name: str, layers: list[str]) -> str | None:
    return next((layer for layer in layers if name.startswith(f"{layer}.")), None)


def _set(module: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    import torch

    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))


def run_definition(module: torch.nn.Module, feeds: Feeds, hooks: Sequence[RemovableHandle] = ()) -> Any:
    """What a definition gives for `feeds`, which are in the order of its inputs. `hooks` are removed after the run."""
    import torch

    try:
        with torch.inference_mode():
            return module(*(torch.from_numpy(np.array(value)) for value in feeds.values()))
    finally:
        for hook in hooks:
            hook.remove()


def _stream(
    module: torch.nn.Module,
    layer: str,
    sources: Mapping[str, WeightSource],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
) -> None:
    """Gives `layer` its weights whenever it is called."""
    import torch

    def read(_layer: torch.nn.Module, _inputs: Any) -> None:
        for name, source in sources.items():
            _set(module, name, source.load(checkpoint, dtype))

    def drop(_layer: torch.nn.Module, _inputs: Any, _result: Any) -> None:
        for name, source in sources.items():
            _set(module, name, torch.empty(source.shape, device="meta"))

    inner = module.get_submodule(layer)
    inner.register_forward_pre_hook(read)
    inner.register_forward_hook(drop)
