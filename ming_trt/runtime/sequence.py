"""What is asked of the LLM, and the state of one request on its way."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ming_trt.errors import ConfigError, InputError
from ming_trt.processing.request import Sampling
from ming_trt.runtime.engine import Array
from ming_trt.runtime.events import Handle
from ming_trt.runtime.sampler import Sampler
from ming_trt.runtime.stop import StopMatcher, TextDecoder

IntArray = npt.NDArray[np.integer[Any]]
NO_FEATURE = -1


@dataclass(frozen=True, slots=True)
class LLMOptions:
    """Limits of the service (see `ming_trt.presets.Profile`); `kv_budget` bytes, 0 = any; `max_waiting` requests
    queue at most."""

    eos_token_ids: tuple[int, ...] = ()
    max_seq_len: int = 8192
    slots: int = 4
    prefill_chunk: int = 512
    kv_budget: int = 0
    max_waiting: int = 1024

    def __post_init__(self) -> None:
        for name in ("max_seq_len", "slots", "prefill_chunk", "max_waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt for the LLM, as the stages before it leave it.

    `input_ids` int [L]; `modality` int [L] (0 text, 1 image and video, 2 audio); `positions` int [3, L]; a generated
    token at place i (counted from the start of the prompt) gets the position i + `position_delta` on all axes;
    `feature_index` int [L] (row of `features`, -1 = the id's own embedding); `features` f32 [R, H], R may be 0.
    Without `modality`, `positions` and `feature_index` the prompt is plain text. `want_hidden`: the prefill rows for
    a HiddenEvent ("all", or places in the prompt).
    """

    input_ids: IntArray
    modality: IntArray | None = None
    positions: IntArray | None = None
    position_delta: int = 0
    feature_index: IntArray | None = None
    features: Array | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop_token_ids: tuple[int, ...] = ()
    request_id: str = ""
    want_hidden: Literal["all"] | IntArray | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way: what was read and written so far. Arrays are int64 and f32, checked, of the engine's
    dtypes."""

    handle: Handle
    sampling: Sampling
    sampler: Sampler
    stop_ids: frozenset[int]
    matcher: StopMatcher | None
    ids: npt.NDArray[np.int64]  # prompt, then room for the answer
    modality: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    position_delta: int
    feature_index: npt.NDArray[np.int64]
    features: npt.NDArray[np.float32]
    prompt_length: int
    wanted: npt.NDArray[np.int64] | None
    length: int  # tokens known: prompt and answer
    limit: int  # `length` at which the answer ends
    slot: int = -1
    read: int = 0  # tokens of the prompt in the cache
    sent: int = 0  # tokens of the answer that went out
    ended: bool = False
    hidden: list[tuple[Array, Array]] = field(default_factory=list)
    submitted: float = field(default_factory=perf_counter)
    admitted: float = 0.0
    first_token: float = 0.0
    looked: float = 0.0  # when it was last looked whether another process has cancelled it

    @property
    def history(self) -> npt.NDArray[np.int64]:
        """Prompt and answer so far, int64 [length]."""
        return self.ids[: self.length]

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return self.length - self.prompt_length


def prepare(
    request: GenerationRequest,
    handle: Handle,
    options: LLMOptions,
    vocabulary: int,
    hidden: int,
    decoder: TextDecoder | None,
) -> Sequence:
    """Checks a request and turns it into a sequence of the engine's dtypes. Raises `InputError`.

    `vocabulary` and `hidden` are the engine's V and H.
    """
    prompt = _vector("input_ids", request.input_ids)
    length = prompt.size
    if length == 0:
        raise InputError("the prompt is empty: send at least one token")
    if length >= options.max_seq_len:
        raise InputError(
            f"the prompt has {length} tokens and the limit for prompt and answer is {options.max_seq_len}: "
            "shorten it, or build with a larger profile.max_seq_len"
        )
    _check_range("input_ids", prompt, 0, vocabulary)
    features = np.zeros((0, hidden), np.float32) if request.features is None else request.features
    if features.ndim != 2 or features.shape[1] != hidden:
        raise InputError(f"'features' has the shape {list(features.shape)}: the engine takes [R, {hidden}]")
    index = _vector("feature_index", request.feature_index, length, NO_FEATURE)
    _check_range("feature_index", index, NO_FEATURE, features.shape[0])
    modality = _vector("modality", request.modality, length, 0)
    _check_range("modality", modality, 0, 3)
    positions = np.broadcast_to(np.arange(length), (3, length)) if request.positions is None else request.positions
    if positions.shape != (3, length):
        raise InputError(f"'positions' has the shape {list(positions.shape)}: the prompt needs [3, {length}]")
    wanted = None
    if request.want_hidden is not None:
        wanted = np.arange(length)
        if not isinstance(request.want_hidden, str):
            wanted = np.unique(_vector("want_hidden", request.want_hidden))
        _check_range("want_hidden", wanted, 0, length)
    sampling = request.sampling
    if sampling.stop and decoder is None:
        raise InputError("'stop' needs a tokenizer and this LLM was opened without one: leave 'stop' out")
    limit = min(length + sampling.max_tokens, options.max_seq_len)
    ids = np.empty(limit, np.int64)
    ids[:length] = prompt
    return Sequence(
        handle=handle,
        sampling=sampling,
        sampler=Sampler(sampling),
        stop_ids=frozenset(() if sampling.ignore_eos else options.eos_token_ids) | {*request.stop_token_ids},
        matcher=StopMatcher(sampling.stop, decoder) if sampling.stop and decoder else None,
        ids=ids,
        modality=modality,
        positions=np.ascontiguousarray(positions, np.int64),
        position_delta=request.position_delta,
        feature_index=index,
        # The engine wants a row even if no token points to it.
        features=np.ascontiguousarray(features if features.shape[0] else np.zeros((1, hidden)), np.float32),
        prompt_length=length,
        wanted=wanted,
        length=length,
        limit=limit,
    )


def _vector(name: str, values: Array | None, length: int | None = None, default: int = 0) -> Array:
    if values is None:
        return np.full(length or 0, default, np.int64)
    array = np.asarray(values)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer) or (length is not None and array.size != length):
        size = "L" if length is None else length
        raise InputError(f"'{name}' is {array.dtype} {list(array.shape)}: give whole numbers, [{size}]")
    return array.astype(np.int64)


def _check_range(name: str, values: Array, low: int, stop: int) -> None:
    if values.size and not (values.min() >= low and values.max() < stop):
        worst = values.min() if values.min() < low else values.max()
        raise InputError(f"'{name}' holds {worst}: it must be at least {low} and below {stop}")
