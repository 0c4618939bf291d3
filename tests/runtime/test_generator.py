"""The LLM service against a twin of its engine without a cache: a fault of slots, masks or positions changes tokens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ming_trt.errors import CancelledError, ConfigError, EngineError, InputError, MingError, UnavailableError
from ming_trt.processing.request import Sampling
from ming_trt.runtime.cancel import CancelBoard
from ming_trt.runtime.engine import Engine
from ming_trt.runtime.events import ErrorEvent, Event, FinishEvent, Handle, HiddenEvent, TokenEvent
from ming_trt.runtime.generator import LLM
from ming_trt.runtime.sequence import GenerationRequest, LLMOptions

from . import tiny_llm

RNG = np.random.default_rng(7)
PROMPTS = [RNG.integers(0, tiny_llm.V, size).tolist() for size in (5, 23, 1, 12)]


class Letters:
    """A tokenizer of one letter a token: a..z, round and round."""

    def decode_delta(self, context_ids: Sequence[int], new_ids: Iterable[int], final: bool = False) -> str:
        return "".join(chr(ord("a") + token % 26) for token in new_ids)


class Spy:
    """An engine that calls `before` with the feeds of every step."""

    def __init__(self, engine: Engine, before: Callable[[Mapping[str, Any]], None]) -> None:
        self.engine, self.before = engine, before
        self.name, self.inputs, self.outputs = engine.name, engine.inputs, engine.outputs

    def run(self, feeds: Mapping[str, Any], outputs: Any = None, into: Any = None) -> dict[str, Any]:
        self.before(feeds)
        return self.engine.run(feeds, outputs, into)

    def close(self) -> None:
        self.engine.close()


def ask(prompt: Sequence[int], count: int = 12, request_id: str = "", **sampling: Any) -> GenerationRequest:
    return GenerationRequest(
        np.array(prompt, np.int32), sampling=Sampling(max_tokens=count, **sampling), request_id=request_id
    )


def tokens(engine: Engine, *requests: GenerationRequest, **options: Any) -> list[list[int]]:
    with LLM(engine, LLMOptions(**options), Letters()) as llm:
        return [handle.result()[0] for handle in [llm.submit(request) for request in requests]]


def failure(handle: Handle) -> MingError:
    last = list(handle)[-1]
    assert isinstance(last, ErrorEvent)
    return last.error


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.002)


@pytest.fixture
def llm(tiny_engine: Engine) -> Iterator[LLM]:
    with LLM(tiny_engine, LLMOptions(slots=3, prefill_chunk=8, max_seq_len=4096), Letters()) as llm:
        yield llm


def test_greedy_tokens_are_those_of_the_model_without_a_cache(tiny_engine: Engine) -> None:
    for prompt in PROMPTS:
        assert tokens(tiny_engine, ask(prompt)) == [tiny_llm.greedy(prompt, 12)]


def test_the_twin_model_answers_diversely() -> None:
    """Else the comparisons of this file would prove nothing."""
    answers = [tiny_llm.greedy(prompt, 12) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in answers}) == 4
    assert min(len(set(answer)) for answer in answers) >= 4


def test_requests_together_get_the_tokens_that_each_gets_alone(tiny_engine: Engine) -> None:
    expected = [tiny_llm.greedy(prompt, 12 + 3 * i) for i, prompt in enumerate(PROMPTS)]
    requests = [ask(prompt, 12 + 3 * i) for i, prompt in enumerate(PROMPTS)]
    for slots in (1, 2, 4):
        assert tokens(tiny_engine, *requests, slots=slots, prefill_chunk=4) == expected


def test_several_requests_share_a_step(tiny_engine: Engine) -> None:
    batches: list[int] = []
    engine = Spy(tiny_engine, lambda feeds: batches.append(feeds["input_ids"].shape[0]))
    tokens(engine, *(ask(prompt, 40) for prompt in PROMPTS), slots=4)
    assert max(batches) == 4


@pytest.mark.parametrize("chunk", [1, 3, 23, 512])
def test_a_prompt_read_in_chunks_gives_the_same_tokens(tiny_engine: Engine, chunk: int) -> None:
    assert tokens(tiny_engine, ask(PROMPTS[1]), prefill_chunk=chunk) == [tiny_llm.greedy(PROMPTS[1], 12)]


def test_a_long_prompt_does_not_stop_those_that_decode(tiny_engine: Engine) -> None:
    steps: list[tuple[int, int]] = []
    engine = Spy(tiny_engine, lambda feeds: steps.append(feeds["input_ids"].shape))
    long = RNG.integers(0, tiny_llm.V, 100).tolist()
    with LLM(engine, LLMOptions(slots=2, prefill_chunk=10)) as llm:
        first = llm.submit(ask(PROMPTS[0], 2000))
        next(iter(first))
        llm.submit(ask(long, 1)).result()
        first.cancel()
    chunks = [i for i, (_, size) in enumerate(steps) if size == 10]
    assert len(chunks) == 10
    assert all(steps[i + 1] == (1, 1) for i in chunks[:-1]), "a decode step comes between two chunks"


def test_the_cache_grows_under_running_sequences(tiny_engine: Engine) -> None:
    requests = [ask(PROMPTS[0], 150), ask(PROMPTS[2], 20)]
    expected = [tiny_llm.greedy(PROMPTS[0], 150), tiny_llm.greedy(PROMPTS[2], 20)]
    assert tokens(tiny_engine, *requests, max_seq_len=1000) == expected


def test_features_modality_and_positions_reach_the_engine(tiny_engine: Engine) -> None:
    prompt, delta = PROMPTS[3], -5
    length = len(prompt)
    arrays = {
        "modality": [0, 1, 1, 1, 0, 2, 2, 0, 0, 0, 0, 0],
        "index": [-1, 0, 1, 2, -1, 3, 4, -1, -1, -1, -1, -1],
        "positions": RNG.integers(0, 9, (3, length)),
        "rows": RNG.standard_normal((5, tiny_llm.H)).astype(np.float32),
    }
    request = GenerationRequest(
        np.array(prompt),
        modality=np.array(arrays["modality"], np.uint8),
        positions=arrays["positions"].astype(np.int32),
        position_delta=delta,
        feature_index=np.array(arrays["index"], np.int32),
        features=arrays["rows"],
        sampling=Sampling(max_tokens=9),
    )
    expected = tiny_llm.greedy(prompt, 9, delta, **arrays)
    assert expected != tiny_llm.greedy(prompt, 9)
    assert tokens(tiny_engine, request, prefill_chunk=5) == [expected]
    assert tokens(tiny_engine, ask(PROMPTS[1]), request, ask(PROMPTS[0]), prefill_chunk=5)[1] == expected


@pytest.mark.parametrize("wanted", ["all", np.array([11, 0, 4])])
def test_rows_of_the_prefill_are_given_on_request(tiny_engine: Engine, wanted: Any) -> None:
    request = GenerationRequest(np.array(PROMPTS[3]), sampling=Sampling(max_tokens=2), want_hidden=wanted)
    with LLM(tiny_engine, LLMOptions(prefill_chunk=5)) as llm:
        first, *rest = llm.submit(request)
    assert isinstance(first, HiddenEvent) and isinstance(rest[-1], FinishEvent)
    places = np.arange(12) if isinstance(wanted, str) else np.array([0, 4, 11])
    assert first.positions.tolist() == places.tolist()
    _, hidden, embeds = tiny_llm.forward(PROMPTS[3])
    # float32 against float64, values of order 1 and 10
    np.testing.assert_allclose(first.hidden, hidden[places], atol=1e-4)
    np.testing.assert_allclose(first.embeds, embeds[places], atol=1e-4)


def test_a_prompt_can_be_read_without_an_answer(llm: LLM) -> None:
    request = GenerationRequest(np.array(PROMPTS[0]), sampling=Sampling(max_tokens=0), want_hidden=np.array([4]))
    hidden, finish = llm.submit(request)
    assert isinstance(hidden, HiddenEvent) and hidden.hidden.shape == (1, tiny_llm.H)
    assert isinstance(finish, FinishEvent) and finish.usage.completion_tokens == 0


def test_the_end_token_ends_and_is_not_sent(tiny_engine: Engine) -> None:
    answer = tiny_llm.greedy(PROMPTS[0], 12)
    end = answer[5]
    upto = answer.index(end)
    with LLM(tiny_engine, LLMOptions(eos_token_ids=(end,))) as llm:
        ids, finish = llm.submit(ask(PROMPTS[0])).result()
        assert (ids, finish.reason) == (answer[:upto], "stop")
        assert (finish.usage.prompt_tokens, finish.usage.completion_tokens) == (5, upto)
        ids, finish = llm.submit(ask(PROMPTS[0], ignore_eos=True)).result()
        assert (ids, finish.reason) == (answer, "length")
        assert finish.timings.first_token > 0 and finish.timings.decode > 0


def test_an_answer_ends_where_the_context_is_full(tiny_engine: Engine) -> None:
    with LLM(tiny_engine, LLMOptions(max_seq_len=30, prefill_chunk=16)) as llm:
        ids, finish = llm.submit(ask(PROMPTS[1], 100)).result()
        assert (ids, finish.reason) == (tiny_llm.greedy(PROMPTS[1], 7), "length")
        with pytest.raises(InputError, match="30 tokens and the limit for prompt and answer is 30"):
            llm.submit(ask([1] * 30))


def test_text_before_a_stop_string_goes_out_and_nothing_behind(llm: LLM) -> None:
    answer = tiny_llm.greedy(PROMPTS[0], 30)
    text = Letters().decode_delta([], answer)
    stop = text[7:10]
    events = list(llm.submit(ask(PROMPTS[0], 30, stop=("?", stop))))
    finish = events[-1]
    assert isinstance(finish, FinishEvent) and finish.reason == "stop" and finish.context_ids == ()
    assert received(events) == text[: text.index(stop)]


def received(events: Sequence[Event]) -> str:
    parts = [event for event in events if isinstance(event, TokenEvent)]
    texts = [Letters().decode_delta(part.context_ids, part.token_ids)[: part.text_length] for part in parts]
    return "".join(texts)


def test_a_stop_string_that_never_completes_holds_nothing_back_for_good(llm: LLM) -> None:
    answer = tiny_llm.greedy(PROMPTS[0], 12)
    text = Letters().decode_delta([], answer)
    events = list(llm.submit(ask(PROMPTS[0], 12, stop=(text[-2:] + "?",))))
    assert received(events) == text


def test_events_carry_their_place_and_context(llm: LLM) -> None:
    answer = tiny_llm.greedy(PROMPTS[0], 12)
    for event in llm.submit(ask(PROMPTS[0])):
        if isinstance(event, TokenEvent):
            assert answer[event.index : event.index + len(event.token_ids)] == list(event.token_ids)
            assert answer[max(0, event.index - 3) : event.index] == list(event.context_ids)
        elif isinstance(event, FinishEvent):
            assert list(event.context_ids) == answer[-3:]


def test_sampled_tokens_depend_on_the_seed_and_not_on_neighbours(tiny_engine: Engine) -> None:
    request = ask(PROMPTS[0], 20, temperature=3.0, seed=11)
    alone = tokens(tiny_engine, request)[0]
    others = [ask(prompt, 30, temperature=2.0) for prompt in PROMPTS[1:]]
    assert tokens(tiny_engine, others[0], request, *others[1:])[1] == alone
    assert tokens(tiny_engine, ask(PROMPTS[0], 20, temperature=3.0, seed=12))[0] != alone


def test_cancelling_frees_the_slot_and_leaves_others_alone(tiny_engine: Engine) -> None:
    with LLM(tiny_engine, LLMOptions(slots=2, max_seq_len=4096)) as llm:
        endless = llm.submit(ask(PROMPTS[0], 4000))
        kept = llm.submit(ask(PROMPTS[1], 60))
        queued = llm.submit(ask(PROMPTS[2], 10))
        dropped = llm.submit(ask(PROMPTS[3], 10))
        dropped.cancel()
        next(iter(kept))
        endless.cancel()
        assert isinstance(failure(endless), CancelledError)
        assert isinstance(failure(dropped), CancelledError)
        assert queued.result()[0] == tiny_llm.greedy(PROMPTS[2], 10)
    full = tokens(tiny_engine, ask(PROMPTS[1], 60))[0]
    assert full == tiny_llm.greedy(PROMPTS[1], 60)


def test_the_board_cancels_by_flag_and_by_lease(tiny_engine: Engine, tmp_path: Path) -> None:
    board = CancelBoard(tmp_path / "board")
    with LLM(tiny_engine, LLMOptions(max_seq_len=8192), board=board) as llm:
        board.renew("leased", 0.2)
        leased = llm.submit(ask(PROMPTS[0], 8000, "leased"))
        assert isinstance(failure(leased), CancelledError)
        flagged = llm.submit(ask(PROMPTS[0], 8000, "flagged"))
        next(iter(flagged))
        CancelBoard(tmp_path / "board").cancel("flagged")
        assert isinstance(failure(flagged), CancelledError)
        assert llm.submit(ask(PROMPTS[0], 3)).result()[0] == tiny_llm.greedy(PROMPTS[0], 3)


def poisoned(count: int = 12) -> GenerationRequest:
    rows = np.full((1, tiny_llm.H), np.nan, np.float32)
    index = np.array([-1, 0, -1, -1, -1])
    return GenerationRequest(
        np.array(PROMPTS[0]), feature_index=index, features=rows, sampling=Sampling(max_tokens=count)
    )


def test_logits_that_are_not_finite_end_their_request_only(tiny_engine: Engine) -> None:
    with LLM(tiny_engine, LLMOptions(slots=2, prefill_chunk=2)) as llm:
        handles = [
            llm.submit(request) for request in (ask(PROMPTS[1], 30), poisoned(), ask(PROMPTS[3]), ask(PROMPTS[0]))
        ]
        error = failure(handles[1])
        assert isinstance(error, EngineError) and "not finite" in str(error)
        assert handles[0].result()[0] == tiny_llm.greedy(PROMPTS[1], 30)
        # the slot that held the NaN serves again
        assert handles[2].result()[0] == tiny_llm.greedy(PROMPTS[3], 12)
        assert handles[3].result()[0] == tiny_llm.greedy(PROMPTS[0], 12)


@pytest.mark.parametrize("error", [EngineError("out of memory"), ValueError("a bug")])
def test_a_failed_step_ends_those_that_took_part_and_the_thread_goes_on(tiny_engine: Engine, error: Exception) -> None:
    broken = threading.Event()

    def before(feeds: Mapping[str, Any]) -> None:
        if broken.is_set():
            broken.clear()
            raise error

    with LLM(Spy(tiny_engine, before), LLMOptions(max_seq_len=4096)) as llm:
        handle = llm.submit(ask(PROMPTS[0], 4000))
        next(iter(handle))
        broken.set()
        assert str(error) in str(failure(handle))
        assert llm.submit(ask(PROMPTS[0])).result()[0] == tiny_llm.greedy(PROMPTS[0], 12)


class BrokenBoard(CancelBoard):
    """A board whose folder cannot be read while `broken`."""

    broken = False

    def is_cancelled(self, request_id: str) -> bool:
        if self.broken:
            raise PermissionError("no")
        return super().is_cancelled(request_id)


def test_a_fault_between_the_steps_ends_what_runs_and_the_thread_goes_on(tiny_engine: Engine, tmp_path: Path) -> None:
    board = BrokenBoard(tmp_path)
    with LLM(tiny_engine, LLMOptions(slots=2, max_seq_len=4096), board=board) as llm:
        handles = [llm.submit(ask(PROMPTS[0], 4000)) for _ in range(3)]
        next(iter(handles[0]))
        board.broken = True
        assert all("PermissionError" in str(failure(handle)) for handle in handles)
        board.broken = False
        assert llm.submit(ask(PROMPTS[0])).result()[0] == tiny_llm.greedy(PROMPTS[0], 12)


def test_a_handle_may_be_left_and_taken_up_again(llm: LLM) -> None:
    handle, ids = llm.submit(ask(PROMPTS[0])), []
    for _ in range(100):
        event = next(iter(handle), None)
        if event is None:
            break
        ids += event.token_ids if isinstance(event, TokenEvent) else ()
        last = event
    assert isinstance(last, FinishEvent) and ids == tiny_llm.greedy(PROMPTS[0], 12)


def test_an_option_that_leaves_no_token_ends_its_request_only(llm: LLM) -> None:
    doomed = ask(range(tiny_llm.V), 3, no_repeat_ngram_size=1)
    handles = [llm.submit(doomed), llm.submit(ask(PROMPTS[0]))]
    assert isinstance(failure(handles[0]), InputError)
    assert handles[1].result()[0] == tiny_llm.greedy(PROMPTS[0], 12)


def test_a_slow_receiver_delays_nobody(llm: LLM) -> None:
    release, got = threading.Event(), []

    def slow(event: Event) -> None:
        release.wait(30)
        got.append(event)

    llm.submit(ask(PROMPTS[0], 30), on_event=slow)
    assert llm.submit(ask(PROMPTS[1])).result()[0] == tiny_llm.greedy(PROMPTS[1], 12)
    assert not got
    release.set()
    wait_until(lambda: bool(got) and isinstance(got[-1], FinishEvent))
    assert [token for event in got if isinstance(event, TokenEvent) for token in event.token_ids] == tiny_llm.greedy(
        PROMPTS[0], 30
    )
    assert len(got) < 30, "what waited came together"


def test_a_receiver_that_raises_cancels_its_request(tiny_engine: Engine) -> None:
    steps: list[int] = []
    with LLM(Spy(tiny_engine, lambda _: steps.append(1)), LLMOptions(max_seq_len=8192)) as llm:

        def fail(event: Event) -> None:
            raise RuntimeError("the receiver is gone")

        llm.submit(ask(PROMPTS[0], 8000), on_event=fail)
        llm.submit(ask(PROMPTS[1])).result()
        wait_until(lambda: llm._scheduler.idle)
    assert len(steps) < 8000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": np.array([], np.int64)}, "the prompt is empty"),
        ({"input_ids": np.array([1, 97])}, "'input_ids' holds 97"),
        ({"input_ids": np.array([1.0])}, "whole numbers"),
        ({"feature_index": np.array([0, -1])}, "'feature_index' holds 0"),
        ({"features": np.zeros((2, 5), np.float32)}, "the engine takes"),
        ({"modality": np.array([0])}, "'modality' is"),
        ({"modality": np.array([0, 3])}, "'modality' holds 3"),
        ({"positions": np.zeros((3, 3), np.int64)}, "'positions' has the shape"),
        ({"want_hidden": np.array([2])}, "'want_hidden' holds 2"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(llm: LLM, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        llm.submit(GenerationRequest(**{"input_ids": np.array([1, 2]), **change}))


def test_limits_of_the_service(tiny_engine: Engine) -> None:
    with pytest.raises(InputError, match="tokenizer"), LLM(tiny_engine, LLMOptions()) as llm:
        llm.submit(ask(PROMPTS[0], stop=("x",)))
    with pytest.raises(ConfigError, match="kv_budget"):
        LLM(tiny_engine, LLMOptions(kv_budget=1000))
    with LLM(tiny_engine, LLMOptions(slots=1, max_waiting=1, max_seq_len=4096)) as llm:
        handles = [llm.submit(ask(PROMPTS[0], 4000)) for _ in range(2)]
        with pytest.raises(UnavailableError, match="2 requests"):
            llm.submit(ask(PROMPTS[0]))
    assert all(isinstance(failure(handle), CancelledError) for handle in handles)
    with pytest.raises(UnavailableError, match="shutting down"):
        llm.submit(ask(PROMPTS[0]))


# float32 against float64: always the same examples, so that none is ever a near tie between two tokens
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_mix_of_requests_gets_the_tokens_of_each_alone(tiny_engine: Engine, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 6))
    sizes = [data.draw(st.integers(1, 40)) for _ in range(count)]
    lengths = [data.draw(st.integers(1, 25)) for _ in range(count)]
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    prompts = [rng.integers(0, tiny_llm.V, size).tolist() for size in sizes]
    requests = [ask(prompt, length) for prompt, length in zip(prompts, lengths, strict=True)]
    cancelled = data.draw(st.integers(-1, count - 1))
    options = LLMOptions(slots=data.draw(st.integers(1, 4)), prefill_chunk=data.draw(st.integers(1, 20)))
    with LLM(tiny_engine, options) as llm:
        handles = [llm.submit(request) for request in requests]
        if cancelled >= 0:
            handles[cancelled].cancel()
        for i, handle in enumerate(handles):
            if i != cancelled:
                assert handle.result()[0] == tiny_llm.greedy(prompts[i], lengths[i])


def test_the_engine_waits_for_a_reader_to_deal_with_the_first_token_only() -> None:
    handle = Handle("x")
    handle.put(HiddenEvent(np.zeros(0), np.zeros(0), np.zeros(0)))
    handle.put(TokenEvent((1,), 0))
    events = iter(handle)
    assert isinstance(next(events), HiddenEvent) and not handle.wait_for_reader(0.0)
    assert isinstance(next(events), TokenEvent) and not handle.wait_for_reader(0.0), "it may be sending it"
    handle.put(TokenEvent((2,), 1))
    next(events)
    assert handle.wait_for_reader(0.0)
