"""Percentiles, intervals and tests against NumPy, known tables and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ming_trt.bench.stats import PERCENTILES, holm, mann_whitney, ratio_of_medians, summarize

numbers = st.lists(st.floats(0, 1e6), min_size=1, max_size=30)


@given(numbers)
def test_percentiles_are_numpys(values: list[float]) -> None:
    summary = summarize([[value] for value in values])
    assert summary is not None
    for number in PERCENTILES:
        estimate = summary.percentiles[number]
        assert estimate.value == pytest.approx(np.percentile(values, number))
        assert estimate.low <= estimate.high
        assert min(values) <= estimate.low and estimate.high <= max(values)
    assert summary.count == summary.values == len(values)


def test_nothing_is_no_summary() -> None:
    assert summarize([]) is None
    assert summarize([[], []]) is None


def test_interval_of_the_median_covers_it() -> None:
    """Of 60 samples with a known median at least 50 intervals must hold it: 95 % of 60 is 57, and 50 is below that by
    four standard deviations."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        summary = summarize([[value] for value in rng.exponential(1.0, 40)])
        assert summary is not None
        median = summary.percentiles[50]
        covered += median.low <= np.log(2) <= median.high
    assert covered >= 50


def test_requests_are_drawn_whole() -> None:
    """Ten requests of many equal numbers each say no more than ten numbers."""
    rng = np.random.default_rng(2)
    values = rng.normal(100, 10, 10)
    single = summarize([[value] for value in values])
    many = summarize([[value] * 50 for value in values])
    assert single is not None and many is not None
    assert (many.count, many.values) == (10, 500)
    assert many.mean.high - many.mean.low == pytest.approx(single.mean.high - single.mean.low, rel=0.2)


def test_tails_need_requests() -> None:
    few, many = summarize([[float(i)] for i in range(20)]), summarize([[float(i)] for i in range(100)])
    assert few is not None and many is not None
    assert {number: e.enough for number, e in few.percentiles.items()} == {50: True, 90: True, 95: True, 99: False}
    assert many.percentiles[99].enough


def test_mann_whitney_known_value() -> None:
    # U = 0 for two groups of 8 that do not overlap: z = (32 - 0.5) / sqrt(8 * 8 * 17 / 12)
    assert mann_whitney(list(range(8)), list(range(10, 18))) == pytest.approx(0.000939, rel=1e-2)


def test_mann_whitney_ties() -> None:
    assert mann_whitney([1.0] * 10, [1.0] * 10) == 1.0
    assert mann_whitney([1, 1, 2, 2], [1, 2, 1, 2]) == pytest.approx(1.0)


@given(numbers, numbers)
def test_mann_whitney_is_symmetric(one: list[float], two: list[float]) -> None:
    p = mann_whitney(one, two)
    assert 0 <= p <= 1
    assert mann_whitney(two, one) == pytest.approx(p)


def test_mann_whitney_of_equal_distributions_is_rarely_small() -> None:
    rng = np.random.default_rng(3)
    small = sum(mann_whitney(rng.normal(size=20), rng.normal(size=20)) < 0.05 for _ in range(400))
    # 20 expected; 38 is four standard deviations above
    assert 4 <= small <= 38


def test_mann_whitney_needs_numbers() -> None:
    with pytest.raises(ValueError):
        mann_whitney([], [1.0])


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_ratio_of_medians() -> None:
    rng = np.random.default_rng(4)
    ratio = ratio_of_medians(rng.normal(100, 5, 50), rng.normal(80, 5, 50))
    assert ratio.low < 0.8 < ratio.high
    assert ratio.high < 1
