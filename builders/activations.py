"""Memory that an engine needs beside its weights: the definition run on `meta` tensors, watching what is alive.

A run becomes a list of allocations. For a back end that fuses operators the figure is what they hold at the same time:
an upper bound. For ONNX Runtime, which runs them one by one, the list is what its operators take (cuts and transposes
are copies, sums may be written over a summand, attention writes its scores out), and its arena is imitated
(`builders/arena.py`). Caches are updated in place and not counted.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from builders.arena import Event, arena_peak, live_peak
from builders.export import Signature

# What is bound to the memory of an input.
_IN_PLACE = "ming.kv_update"
# Inputs that are caches, which the KV budget counts.
_CACHES = ("past_",)
_ATTENTION = "scaled_dot_product"
# Views in torch that are operators with an output of their own in a graph.
_COPIES = ("transpose", "permute", "slice", "split", "narrow", "unbind", "select", "chunk")
# May be written over an input that nobody reads any more; copies of copies are none.
_OVER: tuple[str, ...] = (
    "add",
    "sub",
    "mul",
    "div",
    "neg",
    "relu",
    "silu",
    "sigmoid",
    "gelu",
    "tanh",
    "sin",
    "cos",
    "exp",
    "pow",
)
_OVER += ("sqrt", "rsqrt", "clamp", "clone", "leaky_relu", "elu", "where", "reciprocal", "_to_copy", "copy")


def activation_bytes(signature: Signature, sizes: Mapping[str, int], *, scores: bool) -> int:
    """Bytes at the given sizes of the dynamic axes (others keep those of the example).

    `scores`: as ONNX Runtime runs it, which writes the scores of attention out, [heads, queries, keys] in float32; else
    as a back end with fused kernels does (TensorRT).
    """
    inputs = {name: _resized(signature, name, sizes) for name in signature.inputs}
    given = sum(t.nbytes for name, t in inputs.items() if not name.startswith(_CACHES))
    watch = _Trace(signature.module, scores)
    with torch.inference_mode(), watch:
        signature.module(*inputs.values())
    events = watch.events()
    return given + (arena_peak(events) if scores else live_peak(events))


def cache_bytes(signature: Signature, sizes: Mapping[str, int]) -> int:
    """Bytes of the caches that the engine is given, at those sizes."""
    return sum(_resized(signature, name, sizes).nbytes for name in signature.inputs if name.startswith(_CACHES))


def _resized(signature: Signature, name: str, sizes: Mapping[str, int]) -> torch.Tensor:
    example = signature.inputs[name]
    symbols = signature.axes.get(name, {})
    shape = [sizes.get(symbols.get(axis, ""), size) for axis, size in enumerate(example.shape)]
    return torch.empty(shape, dtype=example.dtype, device="meta")


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what operators make, and when the last tensor that refers to it is gone."""

    def __init__(self, module: torch.nn.Module, copies: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._copies = copies
        self._weights = {p.untyped_storage()._cdata for p in (*module.parameters(), *module.buffers())}
        self._events: list[Event] = []
        # keys of the sizes that may take over one of those of the inputs
        self._over: dict[int, tuple[int, ...]] = {}
        self._next = 0
        self._users: dict[int, list[weakref.ref[torch.Tensor]]] = {}
        self._key_of: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._storage_key: dict[int, int] = {}

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ):
        result = func(*args, **(kwargs or {}))
        self._sweep()
        name = str(func).split(".")[1] if "." in str(func) else str(func)
        if str(func).startswith(_IN_PLACE):
            for tensor in _tensors(result):
                self._storage_key[tensor.untyped_storage()._cdata] = -1
            return result
        inputs = [tensor for value in (args, kwargs or {}) for tensor in _tensors(value)]
        for tensor in _tensors(result):
            self._note(name, tensor, inputs)
        if _ATTENTION in name and self._copies:
            self._during(*_scratch(args, inputs))
        return result

    def events(self) -> list[Event]:
        """The run, with outputs that are written over an input where ONNX Runtime may do so."""
        self._sweep()
        if not self._copies:
            return self._events
        sizes = {event.key: event.size for event in self._events if event.size}
        made: list[Event] = []
        taken: set[int] = set()
        for index, event in enumerate(self._events):
            if not event.size:
                if event.key not in taken:
                    made.append(event)
                continue
            gone = {after.key for after in _until_next(self._events, index)}
            over = [key for key in self._over.get(event.key, ()) if key in gone and sizes[key] == event.size]
            if over and over[0] not in taken:
                taken.add(over[0])
                made.append(Event(event.key, event.size, over[0]))
            else:
                made.append(event)
        return made

    def _note(self, name: str, tensor: torch.Tensor, inputs: list[torch.Tensor]) -> None:
        storage = tensor.untyped_storage()._cdata
        if storage in self._weights or self._storage_key.get(storage) == -1:
            return
        source = next((t for t in inputs if t.untyped_storage()._cdata == storage), None)
        if source is not None:
            copied = self._copies and name.startswith(_COPIES) and tensor.numel() and _rearranged(name, tensor, source)
            if not copied:
                # the same memory under another shape
                known = self._key(source)
                if known is not None:
                    self._use(known, tensor)
                return
        key = self._next
        self._next += 1
        size = tensor.nbytes if source is not None else tensor.untyped_storage().nbytes()
        if not size:
            return
        self._events.append(Event(key, size))
        self._use(key, tensor)
        if name.rstrip("_").startswith(_OVER):
            keys = (self._key(t) for t in inputs)
            self._over[key] = tuple(k for k in keys if k is not None)

    def _during(self, whole: int, parts: list[int]) -> None:
        """Takes `whole` and, meanwhile, one part after the other, of which each is needed for the next only."""
        sizes = [size for size in (whole, *parts) if size]
        keys = list(range(self._next, self._next + len(sizes)))
        self._next += len(sizes)
        first = len(sizes) - len(parts)
        for place, (key, size) in enumerate(zip(keys, sizes, strict=True)):
            self._events.append(Event(key, size))
            if place > first:
                self._events.append(Event(keys[place - 1]))
        self._events += [Event(key) for key in {*keys[:first], *keys[-1:]}]

    def _key(self, tensor: torch.Tensor) -> int | None:
        entry = self._key_of.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def _use(self, key: int, tensor: torch.Tensor) -> None:
        reference = weakref.ref(tensor)
        self._users.setdefault(key, []).append(reference)
        self._key_of[id(tensor)] = (reference, key)

    def _sweep(self) -> None:
        for key, users in list(self._users.items()):
            if all(user() is None for user in users):
                del self._users[key]
                self._events.append(Event(key))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    return (item for item in tree_iter(value) if isinstance(item, torch.Tensor))


def _rearranged(name: str, tensor: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether a view is more than another name: part of the source, or its axes in another order."""
    return tensor.numel() != source.numel() or name.startswith(("transpose", "permute"))


def _until_next(events: list[Event], index: int) -> Iterator[Event]:
    """What is given back between an allocation and the next."""
    for event in events[index + 1 :]:
        if event.size:
            return
        yield event


def _scratch(args: tuple[Any, ...], inputs: list[torch.Tensor]) -> tuple[int, list[int]]:
    """Bytes that attention writes besides its output: the mask as float32, and the scores.

    Where query heads share key heads a build writes it in basic operators (`builders/lowering.py`): products, their
    sums with the mask, and the softmax are tensors of their own.
    """
    query, key = args[0], args[1]
    scores = 4 * math.prod((*query.shape[:-1], key.shape[-2]))
    masks = sum(4 * tensor.numel() for tensor in inputs if tensor.dtype == torch.bool)
    grouped = bool(masks) and query.shape[1] != key.shape[1]
    return masks, [scores] * (3 if grouped else 1)
