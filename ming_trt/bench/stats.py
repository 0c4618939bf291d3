"""Statistics of latencies: percentiles with bootstrap intervals, and tests of two samples. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

PERCENTILES = (50, 90, 95, 99)
CONFIDENCE = 0.95
RESAMPLES = 1000
_SEED = 20240607


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its confidence interval. `enough`: whether the sample can tell it at all (a p99 of 20 requests is
    their maximum)."""

    value: float
    low: float
    high: float
    enough: bool = True

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Summary:
    """Of `count` requests (`values` numbers): mean, percentiles by their number, minimum and maximum."""

    count: int
    values: int
    mean: Estimate
    percentiles: dict[int, Estimate]
    minimum: float
    maximum: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: p50, p90, ... beside the rest."""
        return {
            "requests": self.count,
            "values": self.values,
            "mean": self.mean.as_dict(),
            **{f"p{number}": estimate.as_dict() for number, estimate in self.percentiles.items()},
            "min": self.minimum,
            "max": self.maximum,
        }


def summarize(groups: Sequence[Sequence[float]]) -> Summary | None:
    """Statistics of all numbers of all requests; None without any.

    `groups`: the numbers of each request, one or many. The bootstrap draws whole requests, since the numbers of one
    request are not independent.
    """
    kept = [np.asarray(group, np.float64) for group in groups if len(group)]
    if not kept:
        return None
    pooled = np.concatenate(kept)
    statistics: list[Callable[[Floats], Any]] = [np.mean, lambda x: np.percentile(x, PERCENTILES)]
    draws = [np.hstack([np.atleast_1d(f(drawn)) for f in statistics]) for drawn in _resampled(kept)]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.array(draws), (tail, 100 - tail), axis=0)
    values = np.hstack([np.atleast_1d(f(pooled)) for f in statistics])
    estimates = [
        Estimate(float(v), float(a), float(b), number is None or len(kept) * (100 - number) >= 100)
        for v, a, b, number in zip(values, low, high, (None, *PERCENTILES), strict=True)
    ]
    return Summary(
        len(kept),
        pooled.size,
        estimates[0],
        dict(zip(PERCENTILES, estimates[1:], strict=True)),
        float(pooled.min()),
        float(pooled.max()),
    )


def _resampled(groups: Sequence[Floats]) -> list[Floats]:
    rng = np.random.default_rng(_SEED)
    picks = rng.integers(0, len(groups), (RESAMPLES, len(groups)))
    if all(group.size == 1 for group in groups):
        flat = np.concatenate(groups)
        return list(flat[picks])
    return [np.concatenate([groups[i] for i in pick]) for pick in picks]


def ratio_of_medians(base: Sequence[float], other: Sequence[float]) -> Estimate:
    """median(other) / median(base) with its bootstrap interval; both not empty, medians not 0."""
    rng = np.random.default_rng(_SEED)
    one, two = np.asarray(base, np.float64), np.asarray(other, np.float64)
    medians = [
        np.median(values[rng.integers(0, len(values), (RESAMPLES, len(values)))], axis=1) for values in (one, two)
    ]
    tail = 100 * (1 - CONFIDENCE) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.nanpercentile(medians[1] / medians[0], (tail, 100 - tail))
        value = np.median(two) / np.median(one)
    return Estimate(float(value), float(low), float(high))


def mann_whitney(one: Sequence[float], two: Sequence[float]) -> float:
    """Two-sided p-value of the Mann-Whitney U test that neither sample tends to larger values.

    The normal approximation with corrections for ties and continuity (good from about eight numbers each). 1.0 where
    all numbers are equal. Raises ValueError for an empty sample.
    """
    a, b = np.asarray(one, np.float64), np.asarray(two, np.float64)
    if not (a.size and b.size):
        raise ValueError("the test needs two samples that are not empty")
    both = np.concatenate([a, b])
    _, places, counts = np.unique(both, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - (counts - 1) / 2)[places]
    u = float(ranks[: a.size].sum()) - a.size * (a.size + 1) / 2
    total = both.size
    ties = float((counts.astype(np.float64) ** 3 - counts).sum()) / (total * (total - 1))
    variance = a.size * b.size / 12 * (total + 1 - ties)
    if variance <= 0:
        return 1.0
    distance = max(0.0, abs(u - a.size * b.size / 2) - 0.5)
    return math.erfc(distance / math.sqrt(2 * variance))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm's step-down): as many comparisons as one likes, 5 % wrong in all."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, p_values[index] * (len(order) - rank)))
        corrected[index] = worst
    return corrected
