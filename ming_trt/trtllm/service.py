"""The LLM as a service on TensorRT-LLM's executor: the interface and the events of `ming_trt.runtime.generator.LLM`.

The executor batches in flight, keeps the paged cache and samples; here requests are coded and responses taken apart.
One thread waits for the executor's responses.

Differences from the ONNX Runtime service, all said in an error or here: a repetition penalty or n-gram limit is refused
for prompts with media, since the executor would count the coded ids; logits are not seen, so only hidden rows are
checked for values that are not finite; the time in the queue counts as prefill.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from time import perf_counter
from typing import Any

import numpy as np

from ming_trt.config import LLMConfig
from ming_trt.errors import CancelledError, EngineError, InputError, MingError
from ming_trt.processing.request import Sampling
from ming_trt.runtime.cancel import CancelBoard
from ming_trt.runtime.events import HiddenEvent
from ming_trt.runtime.front import Front
from ming_trt.runtime.sequence import LLMOptions, Sequence
from ming_trt.runtime.stop import TextDecoder
from ming_trt.trtllm.facts import EngineFacts
from ming_trt.trtllm.model import EMBEDS_OUTPUT, HIDDEN_OUTPUT
from ming_trt.trtllm.prompt_table import prompt_table
from ming_trt.trtllm.rope_table import HostTable, RopeTable

log = logging.getLogger(__name__)

_WAIT = timedelta(milliseconds=20)
_JOIN_SECONDS = 60.0


@dataclass(slots=True, eq=False)
class _Entry:
    """A request in the executor. `tensors` keeps its tables alive until its end."""

    sequence: Sequence
    tensors: list[Any] = field(default_factory=list)
    cancelled: bool = False


class ExecutorLLM(Front):
    """Generates with a TensorRT-LLM `executor`; `api` holds the names of `signatures.EXECUTOR`; `tables` makes rotary
    tables, on the host if none is given."""

    def __init__(
        self,
        executor: Any,
        api: Any,
        config: LLMConfig,
        facts: EngineFacts,
        options: LLMOptions,
        decoder: TextDecoder | None = None,
        board: CancelBoard | None = None,
        tables: RopeTable | None = None,
    ) -> None:
        super().__init__(options, config.vocab_size, config.hidden_size, decoder, board)
        self._executor, self._api, self._config, self._facts = executor, api, config, facts
        self._tables = tables or HostTable(config, facts.positions)
        self._entries: dict[int, _Entry] = {}
        self._thread = threading.Thread(target=self._work, name="llm-executor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Cancels what is left, stops the thread and shuts the executor down. Closing twice is harmless."""
        with self._wake:
            if self._closing:
                return
            self._closing = True
        self._thread.join(_JOIN_SECONDS)
        self._executor.shutdown()
        self._tables.close()

    def _code(self, sequence: Sequence) -> tuple[_Entry, Any]:
        """The executor's request: coded ids, prompt table, rotary table, sampling, outputs."""
        import torch

        s, c, api = sequence, self._config, self._api
        # after the prompt the engine looks angles up in its own table, at place + delta
        if s.limit + s.position_delta > self._facts.positions:
            raise InputError(
                f"the answer would reach position {s.limit + s.position_delta} and the engine's rotary table ends at "
                f"{self._facts.positions}: shorten the prompt or lower max_tokens"
            )
        entry = _Entry(s)
        media = bool((s.feature_index >= 0).any())
        prompt = s.ids[: s.prompt_length]
        coded = prompt_table(prompt, s.modality, s.feature_index, s.features, c.vocab_size, self._facts.prompt_rows)
        rotary = torch.from_numpy(self._tables(s.positions, s.position_delta))
        entry.tensors.append(rotary)
        options: dict[str, Any] = {}
        if len(coded.rows):
            rows = torch.from_numpy(coded.rows).to(getattr(torch, self._facts.dtype))
            entry.tensors.append(rows)
            options["prompt_tuning_config"] = api.PromptTuningConfig(embedding_table=rows)
        outputs = {}
        if s.wanted is not None:
            names = (HIDDEN_OUTPUT, EMBEDS_OUTPUT)
            outputs["additional_model_outputs"] = [api.AdditionalModelOutput(name, True) for name in names]
        stops = sorted(s.stop_ids)
        if stops:
            options["end_id"] = stops[0]
        if stops[1:]:
            options["stop_words"] = [[token] for token in stops[1:]]
        request = api.Request(
            input_token_ids=coded.input_ids.tolist(),
            max_tokens=max(1, s.limit - s.prompt_length),
            streaming=True,
            sampling_config=sampling_config(api, s.sampling, media),
            output_config=api.OutputConfig(exclude_input_from_output=True, **outputs),
            mrope_config=api.MropeConfig(rotary, s.position_delta),
            **options,
        )
        return entry, request

    def _enqueue(self, sequence: Sequence, coded: tuple[_Entry, Any]) -> None:
        entry, request = coded
        sequence.admitted = sequence.submitted
        # under the lock, so that a response cannot overtake its entry
        self._entries[self._executor.enqueue_request(request)] = entry

    def _work(self) -> None:
        """Until closed: pass cancellations on, wait for responses, turn them into events."""
        while not self._closing:
            try:
                self._pass_cancellations()
                for response in self._executor.await_responses(timeout=_WAIT):
                    self._respond(response)
            except Exception as error:
                log.exception("the LLM's executor failed")
                fault = EngineError(f"the LLM's executor failed ({type(error).__name__}: {error}): restart the server")
                self._end_all(fault)
                time.sleep(_WAIT.total_seconds())
        self._end_all(CancelledError("the request has ended: the server is shutting down"))

    def _pass_cancellations(self) -> None:
        with self._wake:
            entries = list(self._entries.items())
        for number, entry in entries:
            if not entry.sequence.ended and (error := self._ending(entry.sequence, closing=False)) is not None:
                self._fail(entry.sequence, error)
            if entry.sequence.ended:
                self._cancel(number, entry)

    def _respond(self, response: Any) -> None:
        """A response of any request; the entry goes with the final one."""
        with self._wake:
            entry = self._entries.get(response.request_id)
        if entry is None:
            return
        s, failed = entry.sequence, response.has_error()
        final = failed or response.result.is_final
        try:
            if failed:
                raise EngineError(f"the LLM's executor refused the request: {response.error_msg}")
            if not s.ended:
                self._result(s, response.result)
        except MingError as error:
            self._fail(s, error)
        if final:
            with self._wake:
                self._entries.pop(response.request_id, None)
        elif s.ended:
            # by a stop string, or a fault: the executor would go on
            self._cancel(response.request_id, entry)

    def _result(self, s: Sequence, result: Any) -> None:
        if not s.first_token:
            s.first_token = perf_counter()
            if s.wanted is not None:
                s.handle.put(self._hidden_rows(s, result))
        if s.length >= s.limit:  # a prompt that is only to be read
            return self._finish(s, "length")
        for token in result.output_token_ids[0]:
            self._take(s, token)
            if s.ended:
                return
        if result.is_final:
            self._finish(s, "stop")

    def _hidden_rows(self, s: Sequence, result: Any) -> HiddenEvent:
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

    def _cancel(self, number: int, entry: _Entry) -> None:
        """Tells the executor once; its final response removes the entry."""
        if not entry.cancelled:
            entry.cancelled = True
            self._executor.cancel_request(number)

    def _end_all(self, error: MingError) -> None:
        with self._wake:
            entries, self._entries = dict(self._entries), {}
        for entry in entries.values():
            self._fail(entry.sequence, error)
        for number, entry in entries.items():
            try:
                self._cancel(number, entry)
            except Exception:  # a broken executor refuses this too, and clients know by now
                log.exception("the LLM's executor did not take a cancellation")


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
    # Without a limit the executor takes the best token, so the whole distribution is asked for by top_p = 1; and its
    # own seed is the same for every request.
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed % 2**64
    chosen: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": seed, **penalties}
    if sampling.top_k:
        chosen["top_k"] = sampling.top_k
    return api.SamplingConfig(beam_width=1, **chosen)
