"""The sampler against the plainest implementation of each rule, and its draws against the probabilities they claim."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ming_trt.errors import InputError
from ming_trt.processing.request import Sampling
from ming_trt.runtime.sampler import Sampler, banned_tokens, distribution, penalise

V = 24
# Few distinct values, so that ties are common.
values = st.one_of(st.sampled_from([-3.0, 0.0, 0.5, 2.0, 2.5]), st.floats(-20, 20, width=32))
logits = arrays.arrays(np.float32, V, elements=values)
history = st.lists(st.integers(0, V - 1), max_size=40).map(lambda ids: np.array(ids, np.int64))


def choose(scores: np.ndarray, past: Any = (), **options: Any) -> int:
    return Sampler(Sampling(**options)).next(np.asarray(scores, np.float32), np.array(past, np.int64))


@given(logits, history)
def test_greedy_is_the_first_of_the_largest(scores: np.ndarray, past: np.ndarray) -> None:
    chosen = choose(scores, past, seed=3, top_k=2, top_p=0.1)
    assert scores[chosen] == scores.max() and not (scores[:chosen] == scores.max()).any()


@given(logits, history, st.floats(0.1, 10))
def test_penalty(scores: np.ndarray, past: np.ndarray, penalty: float) -> None:
    expected = [
        float(np.float32(x) / np.float32(penalty) if x > 0 else np.float32(x) * np.float32(penalty))
        if token in past
        else float(x)
        for token, x in enumerate(scores)
    ]
    before = scores.copy()
    np.testing.assert_array_equal(penalise(scores, past, penalty), np.array(expected, np.float32))
    np.testing.assert_array_equal(scores, before)


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 5))
def test_banned_tokens_would_repeat_an_ngram(past: list[int], size: int) -> None:
    seen = {tuple(past[i : i + size]) for i in range(len(past) - size + 1)}
    tail = tuple(past[len(past) - size + 1 :]) if len(past) >= size - 1 else None
    expected = [token for token in range(4) if tail is not None and (*tail, token) in seen]
    assert banned_tokens(np.array(past, np.int64), size).tolist() == expected


@given(logits, history, st.integers(1, 3))
def test_a_banned_token_is_never_chosen(scores: np.ndarray, past: np.ndarray, size: int) -> None:
    banned = set(banned_tokens(past, size).tolist())
    if len(banned) == V:
        with pytest.raises(InputError, match="leaves no token"):
            choose(scores, past, no_repeat_ngram_size=size)
        return
    assert choose(scores, past, no_repeat_ngram_size=size) not in banned
    assert choose(scores, past, no_repeat_ngram_size=size, temperature=2.0, seed=1) not in banned


def brute_distribution(scores: np.ndarray, temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    ids = list(range(len(scores)))
    if top_k:
        worst = sorted(scores, reverse=True)[min(top_k, len(scores)) - 1]
        ids = [i for i in ids if scores[i] >= worst]
    best = float(max(scores))
    weight = {i: math.exp((float(scores[i]) - best) / temperature) for i in ids}
    total = sum(weight.values())
    chances = {i: w / total for i, w in weight.items()}
    kept, reached = [], 0.0
    for i in sorted(ids, key=lambda i: (-chances[i], i)):
        kept.append(i)
        reached += chances[i]
        if reached >= top_p:
            break
    total = sum(chances[i] for i in kept)
    return {i: chances[i] / total for i in sorted(kept)}


@given(logits, st.floats(0.05, 5), st.integers(0, V + 3), st.one_of(st.just(1.0), st.floats(0.01, 0.99)))
def test_distribution(scores: np.ndarray, temperature: float, top_k: int, top_p: float) -> None:
    ids, chances = distribution(scores, temperature, top_k, top_p)
    expected = brute_distribution(scores, temperature, top_k, top_p)
    if top_p == 1.0:
        # The brute sum may reach 1 one tiny token early, by rounding.
        expected = brute_distribution(scores, temperature, top_k, 2.0)
    elif ids.tolist() != list(expected):
        # Where the sum meets top_p but for rounding, one token more or less is as right.
        assert abs(len(ids) - len(expected)) == 1
        smaller = min((chances, ids.tolist()), (list(expected.values()), list(expected)), key=lambda pair: len(pair[1]))
        whole = brute_distribution(scores, temperature, top_k, 2.0)
        assert sum(whole[i] for i in smaller[1]) == pytest.approx(top_p, abs=1e-12)
        return
    assert ids.tolist() == list(expected)
    np.testing.assert_allclose(chances, list(expected.values()), rtol=1e-9)


def test_draws_follow_the_distribution() -> None:
    scores = np.array([0.0, 1.0, 2.0, -1.0, 2.0], np.float32)
    sampler = Sampler(Sampling(temperature=0.8, top_k=4, seed=5))
    count = 20000
    drawn = np.bincount([sampler.next(scores, np.empty(0, np.int64)) for _ in range(count)], minlength=5)
    expected = brute_distribution(scores, 0.8, 4, 1.0)
    assert drawn[3] == 0
    for token, chance in expected.items():
        # five standard deviations of a binomial; the seed is fixed anyway
        assert abs(drawn[token] - count * chance) < 5 * math.sqrt(count * chance * (1 - chance))


@given(logits, st.integers(0, 1 << 62))
def test_a_seed_gives_the_same_draws_again(scores: np.ndarray, seed: int) -> None:
    def draws() -> list[int]:
        sampler = Sampler(Sampling(temperature=1.5, top_p=0.9, seed=seed))
        return [sampler.next(scores, np.empty(0, np.int64)) for _ in range(8)]

    assert draws() == draws()


def test_without_a_seed_requests_differ() -> None:
    flat = np.zeros(1000, np.float32)
    samplers = [Sampler(Sampling(temperature=1.0)) for _ in range(2)]
    first, second = ([each.next(flat, np.empty(0, np.int64)) for _ in range(10)] for each in samplers)
    assert first != second


@given(logits)
def test_extreme_temperatures_stay_finite(scores: np.ndarray) -> None:
    assert scores[choose(scores, temperature=1e-30, seed=0)] == scores.max()
    assert 0 <= choose(scores, temperature=100.0, seed=0) < V
