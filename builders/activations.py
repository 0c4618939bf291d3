"""Memory that an engine needs beside its weights: the definition run on `meta` tensors, watching what is alive.

The figure is what the operators of the definition hold at the same time when they run one after the other: inputs,
outputs and everything between. A back end that fuses them needs less. Caches are updated in place and not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from builders.export import Signature

# What is bound to the memory of an input.
_IN_PLACE = "ming::kv_update"
# Inputs that are caches, which the KV budget counts.
_CACHES = ("past_",)
_ATTENTION = "scaled_dot_product"


def activation_bytes(signature: Signature, sizes: Mapping[str, int], *, scores: bool) -> int:
    """Bytes at the given sizes of the dynamic axes (others keep those of the example).

    `scores`: the back end writes the scores of attention out, [heads, queries, keys] in float32 (ONNX Runtime does,
    fused kernels of TensorRT do not).
    """
    inputs = {name: _resized(signature, name, sizes) for name in signature.inputs}
    given = sum(t.nbytes for name, t in inputs.items() if not name.startswith(_CACHES))
    watch = _Alive(scores)
    with torch.inference_mode(), watch:
        signature.module(*inputs.values())
    return given + watch.peak


def cache_bytes(signature: Signature, sizes: Mapping[str, int]) -> int:
    """Bytes of the caches that the engine is given, at those sizes."""
    return sum(_resized(signature, name, sizes).nbytes for name in signature.inputs if name.startswith(_CACHES))


def _resized(signature: Signature, name: str, sizes: Mapping[str, int]) -> torch.Tensor:
    example = signature.inputs[name]
    symbols = signature.axes.get(name, {})
    shape = [sizes.get(symbols.get(axis, ""), size) for axis, size in enumerate(example.shape)]
    return torch.empty(shape, dtype=example.dtype, device="meta")


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the storages that operators have made and that something still refers to."""

    def __init__(self, scores: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._scores = scores
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ):
        result = func(*args, **(kwargs or {}))
        name = str(func)
        gone = [key for key, entry in self._alive.items() if entry[0].expired()]  # type: ignore[no-untyped-call]
        for key in gone:
            del self._alive[key]
        if not name.startswith(_IN_PLACE.replace("::", ".")):
            for tensor in tree_iter(result):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                    self._alive.setdefault(storage._cdata, (reference, storage.nbytes()))
        during = 4 * math.prod((*args[0].shape[:-1], args[1].shape[-2])) if _ATTENTION in name and self._scores else 0
        self.peak = max(self.peak, during + sum(size for _, size in self._alive.values()))
        return result
