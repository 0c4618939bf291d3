"""The service around the executor: what requests become, and what responses become.

The executor here is a script: it shows the service's own logic (coding, stops, cancellation, limits, ends), and nothing
of TensorRT-LLM.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ming_trt.config import load_config
from ming_trt.errors import BundleError, CancelledError, EngineError, InputError, UnavailableError
from ming_trt.golden.cases import Cases
from ming_trt.golden.tokenizer import ByteTokenizer
from ming_trt.processing.request import Sampling
from ming_trt.runtime.events import FinishEvent, HiddenEvent, TokenEvent
from ming_trt.runtime.sequence import GenerationRequest, LLMOptions
from ming_trt.trtllm.facts import EngineFacts, engine_facts, kv_tokens
from ming_trt.trtllm.rope_table import rope_table
from ming_trt.trtllm.service import ExecutorLLM, sampling_config
from ming_trt.trtllm.signatures import EXECUTOR
from tests.conftest import UNDERSTANDING

CONFIG = load_config(UNDERSTANDING / "checkpoint").llm
FACTS = EngineFacts(positions=64, prompt_rows=20, dtype="bfloat16", kv_bytes_per_token=1024)
EOS = 300
OPTIONS = LLMOptions(eos_token_ids=(EOS,), max_seq_len=64, slots=2, max_waiting=2, kv_budget=2**20)


def _value(name: str) -> Any:
    """A class that takes the listed parameters, in order or by name, and keeps them."""

    class Value:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given = {**dict(zip(EXECUTOR[name].parameters, args, strict=False)), **kwargs}
            assert set(given) <= set(EXECUTOR[name].parameters), name
            vars(self).update(given)

    for member in EXECUTOR[name].members:
        setattr(Value, member, member)
    return Value


API = SimpleNamespace(**{name: _value(name) for name in EXECUTOR})


class Script:
    """Answers every request with `tokens`, one a response, then the final flag; `hold` waits for it to be set."""

    def __init__(self, tokens: list[int], hold: threading.Event | None = None, fault: str = "") -> None:
        self.tokens, self.hold, self.fault = tokens, hold, fault
        self.requests: dict[int, Any] = {}
        self.cancelled: list[int] = []
        self.down = self.refuses = False
        self._places: dict[int, int] = {}
        self.outputs: list[Any] = []

    def enqueue_request(self, request: Any) -> int:
        number = len(self.requests) + 1
        self.requests[number] = request
        self._places[number] = 0
        return number

    def cancel_request(self, number: int) -> None:
        if self.refuses:
            raise RuntimeError("dead")
        self.cancelled.append(number)

    def shutdown(self) -> None:
        self.down = True

    def await_responses(self, timeout: Any) -> list[Any]:
        time.sleep(0.001)
        if self.fault == "raise":
            self.fault = ""
            raise RuntimeError("out of memory")
        if self.hold is not None and not self.hold.is_set():
            return []
        return [self._next(number) for number in list(self._places)]

    def _next(self, number: int) -> Any:
        place = self._places[number]
        last = place == len(self.tokens) - 1 or number in self.cancelled or bool(self.fault)
        result = SimpleNamespace(
            output_token_ids=[[self.tokens[place]]], is_final=last, additional_outputs=self.outputs if not place else []
        )
        self._places[number] += 1
        if last:
            del self._places[number]
        fault = self.fault
        return SimpleNamespace(request_id=number, has_error=lambda: bool(fault), error_msg=fault, result=result)


@pytest.fixture
def decoder() -> ByteTokenizer:
    return ByteTokenizer.from_cases(Cases(UNDERSTANDING).index)


def service(script: Script, decoder: Any = None, board: Any = None) -> ExecutorLLM:
    return ExecutorLLM(script, API, CONFIG, FACTS, OPTIONS, decoder, board)


def text(**sampling: Any) -> GenerationRequest:
    return GenerationRequest(np.array([5, 6, 7]), sampling=Sampling(**sampling), request_id="r")


@pytest.fixture
def running(decoder: ByteTokenizer) -> Iterator[Any]:
    opened: list[ExecutorLLM] = []

    def run(tokens: list[int], **script: Any) -> tuple[Script, ExecutorLLM]:
        made = Script(tokens, **script)
        opened.append(service(made, decoder))
        return made, opened[-1]

    yield run
    for each in opened:
        each.close()


def test_answer_up_to_the_end_token(running: Any) -> None:
    script, llm = running([65, 66, 67, EOS])
    ids, finish = llm.submit(text()).result()
    assert ids == [65, 66, 67]
    assert (finish.reason, finish.usage.prompt_tokens, finish.usage.completion_tokens) == ("stop", 3, 3)
    request = script.requests[1]
    assert request.input_token_ids == [5, 6, 7] and request.end_id == EOS and request.streaming is True
    assert request.sampling_config.top_k == 1
    # an identity table, although nothing but text is in the prompt
    table = rope_table(CONFIG, np.tile(np.arange(3), (3, 1)), 0, FACTS.positions)
    assert np.array_equal(request.mrope_config.mrope_rotary_cos_sin.numpy(), table)
    assert request.mrope_config.mrope_position_deltas == 0
    assert not hasattr(request, "prompt_tuning_config")


def test_length_limit_and_ignored_end(running: Any) -> None:
    script, llm = running([65, EOS, 66])
    ids, finish = llm.submit(text(max_tokens=3, ignore_eos=True)).result()
    assert ids == [65, EOS, 66] and finish.reason == "length"
    assert not hasattr(script.requests[1], "end_id") and script.requests[1].max_tokens == 3


def test_stop_string_cancels_the_executor(running: Any) -> None:
    script, llm = running([ord(c) for c in "hello END more text"])
    events = list(llm.submit(text(stop=("END",))))
    tokens = [token for event in events if isinstance(event, TokenEvent) for token in event.token_ids]
    assert bytes(tokens).decode().startswith("hello ")
    assert "more" not in bytes(tokens).decode()
    assert isinstance(events[-1], FinishEvent) and events[-1].reason == "stop"
    assert script.cancelled == [1]


def test_media_are_coded(running: Any) -> None:
    script, llm = running([EOS])
    features = np.arange(3 * CONFIG.hidden_size, dtype=np.float32).reshape(3, -1) / 1000
    request = GenerationRequest(
        np.array([5, 9, 9, 9, 6]),
        np.array([0, 1, 2, 1, 0]),
        np.tile(np.arange(5), (3, 1)),
        -2,
        np.array([-1, 0, 1, 2, -1]),
        features,
    )
    llm.submit(request).result()
    sent = script.requests[1]
    v = CONFIG.vocab_size
    assert sent.input_token_ids == [5, v, v + 1, v + 2, 6]
    table = sent.prompt_tuning_config.embedding_table
    assert table.dtype == torch.bfloat16
    assert torch.equal(table, torch.from_numpy(features).bfloat16())
    assert sent.mrope_config.mrope_position_deltas == -2


def test_hidden_rows(running: Any) -> None:
    script, llm = running([65, EOS])
    rows = torch.randn(3, CONFIG.hidden_size).bfloat16()
    script.outputs = [
        SimpleNamespace(name="context_hidden", output=rows),
        SimpleNamespace(name="context_embeds", output=rows + 1),
    ]
    request = dataclasses.replace(text(), want_hidden=np.array([0, 2]))
    first = next(iter(llm.submit(request)))
    assert isinstance(first, HiddenEvent) and first.positions.tolist() == [0, 2]
    assert np.array_equal(first.hidden, rows.float().numpy()[[0, 2]])
    names = [(o.name, o.gather_context) for o in script.requests[1].output_config.additional_model_outputs]
    assert names == [("hidden", True), ("embeds", True)]
    rows[1, 5] = float("nan")
    with pytest.raises(EngineError, match="not finite"):
        llm.submit(dataclasses.replace(text(), want_hidden="all")).result()
    script.outputs = []
    with pytest.raises(EngineError, match="no 'hidden' of 3 rows"):
        llm.submit(dataclasses.replace(text(), want_hidden="all")).result()


def test_cancellation_by_handle_and_board(decoder: ByteTokenizer) -> None:
    hold = threading.Event()
    script = Script([65, EOS], hold)
    board = SimpleNamespace(is_cancelled=lambda request_id: request_id == "r")
    with service(script, decoder, board) as llm:
        with pytest.raises(CancelledError):
            llm.submit(text()).result()
        other = llm.submit(dataclasses.replace(text(), request_id="other"))
        other.cancel()
        with pytest.raises(CancelledError):
            other.result()
        assert script.cancelled == [1, 2]
        hold.set()
        # the executor's last words on ended requests are dropped, and a new one runs
        assert llm.submit(dataclasses.replace(text(), request_id="third")).result()[0] == [65]
    assert script.down


def test_executor_errors_end_requests_and_not_the_service(running: Any) -> None:
    script, llm = running([65, EOS], fault="no room")
    with pytest.raises(EngineError, match="refused the request: no room"):
        llm.submit(text()).result()
    script.fault, script.refuses = "raise", True
    with pytest.raises(EngineError, match=r"failed \(RuntimeError: out of memory\)"):
        llm.submit(text()).result()
    script.refuses = False
    assert llm.submit(text()).result()[0] == [65]


def test_limits_of_the_service(decoder: ByteTokenizer) -> None:
    hold = threading.Event()
    llm = service(Script([EOS], hold), decoder)
    with pytest.raises(InputError, match="the limit for prompt and answer is 64"):
        llm.submit(GenerationRequest(np.zeros(64, np.int64)))
    handles = [llm.submit(text()) for _ in range(4)]
    with pytest.raises(UnavailableError, match="4 requests wait or run already"):
        llm.submit(text())
    llm.close()
    for handle in handles:
        with pytest.raises(CancelledError, match="shutting down"):
            handle.result()
    with pytest.raises(UnavailableError, match="shutting down"):
        llm.submit(text())


def test_sampling() -> None:
    sampled = sampling_config(API, Sampling(temperature=0.5, top_k=9, top_p=0.8, seed=3, repetition_penalty=1.1), False)
    assert vars(sampled) == {
        "beam_width": 1,
        "temperature": 0.5,
        "top_k": 9,
        "top_p": 0.8,
        "seed": 3,
        "repetition_penalty": 1.1,
    }
    with pytest.raises(InputError, match="repetition_penalty and no_repeat_ngram_size would count"):
        sampling_config(API, Sampling(repetition_penalty=1.1, no_repeat_ngram_size=3), True)
    assert vars(sampling_config(API, Sampling(), True)) == {"beam_width": 1, "top_k": 1}
    # the executor takes the best token unless it is told a limit, and has one seed for all
    plain = [vars(sampling_config(API, Sampling(temperature=0.5), False)) for _ in range(2)]
    assert plain[0]["top_p"] == 1 and "top_k" not in plain[0]
    assert plain[0]["seed"] != plain[1]["seed"] and 0 <= plain[0]["seed"] < 2**64


def _engine(folder: Path, **build: Any) -> Path:
    model = {
        "max_position_embeddings": 4096,
        "dtype": "bfloat16",
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "head_size": 128,
        "quantization": {"kv_cache_quant_algo": None},
    }
    settings = {"use_mrope": True, "max_seq_len": 4096, "max_batch_size": 8, "max_prompt_embedding_table_size": 65536}
    (folder / "config.json").write_text(json.dumps({"pretrained_config": model, "build_config": settings | build}))
    return folder


def test_engine_facts_and_kv_budget(tmp_path: Path) -> None:
    """56 KiB a token in bf16, as the specification has it; a budget that cannot hold one request is one sentence."""
    facts = engine_facts(_engine(tmp_path))
    assert facts == EngineFacts(4096, 8192, "bfloat16", 56 * 1024, 1)
    assert kv_tokens(facts, dataclasses.replace(OPTIONS, kv_budget=2**40)) == 2 * 4096
    with pytest.raises(BundleError, match="a kv_budget of 100 MiB holds 1828 tokens and a request may have 4096"):
        kv_tokens(facts, dataclasses.replace(OPTIONS, kv_budget=100 * 2**20))
    with pytest.raises(BundleError, match="not built for three-axis rope"):
        engine_facts(_engine(tmp_path, use_mrope=False))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BundleError, match="holds no TensorRT-LLM engine"):
        engine_facts(tmp_path)
