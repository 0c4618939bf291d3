"""The LLM as a service on TensorRT-LLM's executor: the interface and the events of `ming_trt.runtime.generator.LLM`.

The executor batches in flight, keeps the paged cache and samples; here requests are coded, stop strings matched,
cancellations passed on, and answers turned into events. One thread waits for the executor's responses.

Differences from the ONNX Runtime service, all said in an error or here: a repetition penalty or n-gram limit is refused
for prompts with media, since the executor would count the coded ids; logits are not seen, so only hidden rows are
checked for values that are not finite; the time in the queue counts as prefill.
"""

from __future__ import annotations

import json
import logging
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from ming_trt.bundle import Bundle
from ming_trt.config import LLMConfig, load_config
from ming_trt.errors import BundleError, CancelledError, EngineError, InputError, MingError, UnavailableError
from ming_trt.processing.request import Sampling
from ming_trt.processing.tokenizer import CONTEXT_TOKENS, Tokenizer
from ming_trt.runtime.cancel import CancelBoard
from ming_trt.runtime.events import (
    ErrorEvent,
    Event,
    FinishEvent,
    FinishReason,
    Handle,
    HiddenEvent,
    Timings,
    TokenEvent,
    Usage,
)
from ming_trt.runtime.sequence import GenerationRequest, LLMOptions, Sequence, prepare
from ming_trt.runtime.stop import TextDecoder
from ming_trt.trtllm import signatures
from ming_trt.trtllm.model import EMBEDS_OUTPUT, HIDDEN_OUTPUT
from ming_trt.trtllm.prompt_table import prompt_table
from ming_trt.trtllm.rope_table import rope_table

log = logging.getLogger(__name__)

_WAIT = timedelta(milliseconds=20)
_JOIN_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine's config.json says that requests must fit: positions of the rotary table, rows of a request's
    prompt table, type of its rows ("bfloat16" or "float32"), bytes of the KV cache per token."""

    positions: int
    prompt_rows: int
    dtype: str
    kv_bytes_per_token: int


@dataclass(slots=True, eq=False)
class _Entry:
    """A request in the executor. `tensors` keeps its tables alive until its end."""

    sequence: Sequence
    tensors: list[Any] = field(default_factory=list)
    cancelled: bool = False


class ExecutorLLM:
    """Generates with a TensorRT-LLM `executor`; `api` holds the names of `signatures.EXECUTOR`. `submit` from any
    thread."""

    def __init__(
        self,
        executor: Any,
        api: Any,
        config: LLMConfig,
        facts: EngineFacts,
        options: LLMOptions,
        decoder: TextDecoder | None = None,
        board: CancelBoard | None = None,
    ) -> None:
        self.options = options
        self._executor, self._api, self._config, self._facts = executor, api, config, facts
        self._decoder, self._board = decoder, board
        self._entries: dict[int, _Entry] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="llm-executor", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None] | None = None) -> Handle:
        """Hands a request to the executor. Iterate over the handle, or give `on_event`.

        Raises `InputError` for a prompt that the engine cannot take, `UnavailableError` if the service is full or
        closed.
        """
        handle = Handle(request.request_id or uuid.uuid4().hex)
        c = self._config
        sequence = prepare(request, handle, self.options, c.vocab_size, c.hidden_size, self._decoder)
        entry = _Entry(sequence)
        coded = self._request(entry)
        with self._lock:
            if self._closing.is_set():
                raise UnavailableError("the LLM is shutting down: send the request to a running server")
            if len(self._entries) >= self.options.max_waiting + self.options.slots:
                raise UnavailableError(f"{len(self._entries)} requests wait or run already: try again later")
            # under the lock, so that a response cannot overtake its entry
            self._entries[self._executor.enqueue_request(coded)] = entry
        if on_event is not None:
            handle.deliver(on_event)
        return handle

    def close(self) -> None:
        """Cancels what is left, stops the thread and shuts the executor down. Closing twice is harmless."""
        if not self._closing.is_set():
            self._closing.set()
            self._thread.join(_JOIN_SECONDS)
            self._executor.shutdown()

    def __enter__(self) -> ExecutorLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, entry: _Entry) -> Any:
        """The executor's request: coded ids, prompt table, rotary table, sampling, outputs."""
        import torch

        s, c, api = entry.sequence, self._config, self._api
        media = bool((s.feature_index >= 0).any())
        prompt = s.ids[: s.prompt_length]
        coded = prompt_table(prompt, s.modality, s.feature_index, s.features, c.vocab_size, self._facts.prompt_rows)
        table = rope_table(c, s.positions, s.position_delta, self._facts.positions)
        rotary = torch.from_numpy(table)
        entry.tensors.append(rotary)
        options: dict[str, Any] = {}
        if len(coded.rows):
            rows = torch.from_numpy(coded.rows).to(getattr(torch, self._facts.dtype))
            entry.tensors.append(rows)
            options["prompt_tuning_config"] = api.PromptTuningConfig(embedding_table=rows)
        if s.wanted is not None:
            outputs = [api.AdditionalModelOutput(name, True) for name in (HIDDEN_OUTPUT, EMBEDS_OUTPUT)]
            options["output_config"] = api.OutputConfig(
                exclude_input_from_output=True, additional_model_outputs=outputs
            )
        else:
            options["output_config"] = api.OutputConfig(exclude_input_from_output=True)
        stops = sorted(s.stop_ids)
        if stops:
            options["end_id"] = stops[0]
            options["stop_words"] = [[token] for token in stops[1:]]
        return api.Request(
            input_token_ids=coded.input_ids.tolist(),
            max_tokens=max(1, s.limit - s.prompt_length),
            streaming=True,
            sampling_config=sampling_config(api, s.sampling, media),
            mrope_config=api.MropeConfig(rotary, s.position_delta),
            **options,
        )

    def _work(self) -> None:
        """Until closed: pass cancellations on, wait for responses, turn them into events."""
        while not self._closing.is_set():
            try:
                self._pass_cancellations()
                for response in self._executor.await_responses(_WAIT):
                    self._take(response)
            except Exception as error:
                log.exception("the LLM's executor failed")
                fault = EngineError(f"the LLM's executor failed ({type(error).__name__}: {error}): restart the server")
                self._end_all(fault)
        self._end_all(CancelledError("the request has ended: the server is shutting down"))

    def _pass_cancellations(self) -> None:
        with self._lock:
            entries = list(self._entries.items())
        for number, entry in entries:
            handle = entry.sequence.handle
            board = self._board is not None and self._board.is_cancelled(handle.request_id)
            if not entry.cancelled and (handle.cancelled or board):
                why = "its client cancelled it, or its lease ran out"
                self._cancel(number, entry)
                self._fail(entry, CancelledError(f"request '{handle.request_id}' has ended: {why}"))

    def _take(self, response: Any) -> None:
        with self._lock:
            entry = self._entries.get(response.request_id)
        if entry is None:
            return
        try:
            if response.has_error():
                raise EngineError(f"the LLM's executor refused the request: {response.error_msg}")
            if not entry.sequence.ended:
                self._result(response.request_id, entry, response.result)
        except MingError as error:
            self._cancel(response.request_id, entry)
            self._fail(entry, error)
        if response.has_error() or response.result.is_final:
            with self._lock:
                self._entries.pop(response.request_id, None)

    def _result(self, number: int, entry: _Entry, result: Any) -> None:
        s = entry.sequence
        if not s.first_token:
            s.first_token = perf_counter()
            if s.wanted is not None:
                s.handle.put(self._hidden(s, result))
        for token in result.output_token_ids[0]:
            if s.length >= s.limit:
                break
            if token in s.stop_ids:
                return self._finish(number, entry, "stop", result.is_final)
            s.ids[s.length] = token
            s.length += 1
            if s.matcher is None:
                self._send(s, [token])
                continue
            tokens, cut = s.matcher.push(token)
            self._send(s, tokens, cut)
            if cut is not None:
                return self._finish(number, entry, "stop", result.is_final, cut=True)
        if result.is_final or s.length >= s.limit:
            ended_early = s.length < s.limit
            self._finish(number, entry, "stop" if ended_early else "length", result.is_final)

    def _hidden(self, s: Sequence, result: Any) -> HiddenEvent:
        """The rows that were asked for. Raises `EngineError` if the engine gave others, or values not finite."""
        found = {output.name: output.output for output in result.additional_outputs}
        rows = []
        for name in (HIDDEN_OUTPUT, EMBEDS_OUTPUT):
            value = found.get(f"context_{name}")
            if value is None or value.shape[0] != s.prompt_length:
                raise EngineError(f"the engine gave no '{name}' of {s.prompt_length} rows: build it again")
            rows.append(value.float().cpu().numpy()[s.wanted])
            if not np.isfinite(rows[-1]).all():
                raise EngineError(f"the engine gave '{name}' with values that are not finite: look at this request")
        assert s.wanted is not None
        return HiddenEvent(s.wanted, rows[0], rows[1])

    def _send(self, s: Sequence, tokens: list[int], cut: int | None = None) -> None:
        if tokens:
            s.handle.put(TokenEvent(tuple(tokens), s.sent, _context(s), cut))
            s.sent += len(tokens)

    def _finish(self, number: int, entry: _Entry, reason: FinishReason, final: bool, cut: bool = False) -> None:
        s = entry.sequence
        if s.matcher is not None and not cut:
            self._send(s, s.matcher.flush())
        if not final:
            self._cancel(number, entry)
        s.ended = True
        prefill = s.first_token - s.submitted
        timings = Timings(0.0, prefill, prefill, perf_counter() - s.first_token)
        s.handle.put(FinishEvent(reason, Usage(s.prompt_length, s.generated), timings, () if cut else _context(s)))

    def _fail(self, entry: _Entry, error: MingError) -> None:
        if not entry.sequence.ended:
            entry.sequence.ended = True
            entry.sequence.handle.put(ErrorEvent(error))

    def _cancel(self, number: int, entry: _Entry) -> None:
        """Tells the executor once; its final response removes the entry."""
        if not entry.cancelled:
            entry.cancelled = True
            self._executor.cancel_request(number)

    def _end_all(self, error: MingError) -> None:
        with self._lock:
            entries, self._entries = dict(self._entries), {}
        for number, entry in entries.items():
            self._fail(entry, error)
            self._cancel(number, entry)


def sampling_config(api: Any, sampling: Sampling, media: bool) -> Any:
    """The executor's sampling. Temperature 0 is greedy. Raises `InputError` for penalties on a prompt with media."""
    penalties: dict[str, Any] = {}
    if sampling.repetition_penalty != 1:
        penalties["repetition_penalty"] = sampling.repetition_penalty
    if sampling.no_repeat_ngram_size:
        penalties["no_repeat_ngram_size"] = sampling.no_repeat_ngram_size
    if penalties and media:
        raise InputError(
            f"{' and '.join(penalties)} would count the coded ids of pictures and sounds on this engine: leave it out"
        )
    if sampling.temperature == 0:
        return api.SamplingConfig(beam_width=1, top_k=1, **penalties)
    chosen: dict[str, Any] = {"temperature": sampling.temperature, **penalties}
    if sampling.top_k:
        chosen["top_k"] = sampling.top_k
    if sampling.top_p < 1:
        chosen["top_p"] = sampling.top_p
    if sampling.seed is not None:
        chosen["seed"] = sampling.seed
    return api.SamplingConfig(beam_width=1, **chosen)


def engine_facts(folder: Path) -> EngineFacts:
    """Reads an engine's config.json. Raises `BundleError` if it is not one of this model's."""
    try:
        data = json.loads((folder / "config.json").read_text("utf-8"))
        model, build = data["pretrained_config"], data["build_config"]
        if not build["use_mrope"] or build["max_seq_len"] != model["max_position_embeddings"]:
            raise BundleError(f"the engine in '{folder}' was not built for three-axis rope: build it with ming-trt")
        item = 1 if model["quantization"]["kv_cache_quant_algo"] == "FP8" else 2
        per_token = 2 * model["num_hidden_layers"] * model["num_key_value_heads"] * model["head_size"] * item
        rows = build["max_prompt_embedding_table_size"] // build["max_batch_size"]
        return EngineFacts(model["max_position_embeddings"], rows, model["dtype"], per_token)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"'{folder}' holds no TensorRT-LLM engine ({error!r}): build one from the checkpoint"
        ) from None


def kv_tokens(facts: EngineFacts, options: LLMOptions) -> int:
    """Tokens of KV cache that the preset's budget allows. Raises `BundleError` if one request does not fit."""
    tokens = options.kv_budget // facts.kv_bytes_per_token
    if tokens < facts.positions:
        raise BundleError(
            f"a kv_budget of {options.kv_budget / 2**20:.0f} MiB holds {tokens} tokens and a request may have "
            f"{facts.positions}: raise it, or build with a smaller max_seq_len"
        )
    return min(tokens, options.slots * facts.positions)


def open_service(folder: Path, bundle: Bundle, options: LLMOptions, board: CancelBoard | None = None) -> ExecutorLLM:
    """The engine in `folder`, running, with the limits of the bundle's preset. Needs TensorRT-LLM 1.2.1 and the GPU.

    Raises `UnavailableError`, `BundleError`.
    """
    facts = engine_facts(folder)
    tokens = kv_tokens(facts, options)
    api = signatures.load(signatures.EXECUTOR)
    outputs = [api.AdditionalModelOutput(name, True) for name in (HIDDEN_OUTPUT, EMBEDS_OUTPUT)]
    settings = api.ExecutorConfig(
        max_beam_width=1,
        kv_cache_config=api.KvCacheConfig(enable_block_reuse=False, max_tokens=tokens),
        enable_chunked_context=True,
        batching_type=api.BatchingType.INFLIGHT,
        additional_model_outputs=outputs,
    )
    executor = api.Executor(str(folder), api.ModelType.DECODER_ONLY, settings)
    decoder = Tokenizer.from_checkpoint(bundle.assets) if (bundle.assets / "tokenizer.json").is_file() else None
    return ExecutorLLM(executor, api, load_config(bundle.assets).llm, facts, options, decoder, board)


def _context(s: Sequence) -> tuple[int, ...]:
    answer = s.ids[s.prompt_length :]
    return tuple(answer[max(0, s.sent - CONTEXT_TOKENS) : s.sent].tolist())
