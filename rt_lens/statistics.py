"""Intervals and paired tests, thin over scipy and statsmodels. Every function says which method it is."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.proportion import proportion_confint


class Interval(NamedTuple):
    """An estimate with its 95 % interval.

    Attributes:
        n: number of independent observations.
        mean: the estimate.
        low: lower bound.
        high: upper bound.
    """

    n: int
    mean: float
    low: float
    high: float


class Comparison(NamedTuple):
    """A paired difference, first minus second, with its 95 % interval and two-sided p-value."""

    n: int
    difference: float
    low: float
    high: float
    p: float
    test: str


def mean_interval(values: Sequence[float] | NDArray[np.floating], seed: int = 0, resamples: int = 4000) -> Interval:
    """Mean with a bias-corrected accelerated bootstrap interval (percentile where that is undefined)."""
    sample = np.asarray(values, dtype=float)
    if sample.size == 0:
        raise ValueError("values: the list is empty; at least one observation is wanted.")
    mean = float(sample.mean())
    if sample.size == 1 or np.ptp(sample) == 0:
        return Interval(sample.size, mean, mean, mean)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        for method in ("BCa", "percentile"):
            result = stats.bootstrap((sample,), np.mean, n_resamples=resamples, method=method, rng=seed, batch=500)
            low, high = (float(bound) for bound in result.confidence_interval)
            if np.isfinite([low, high]).all():
                break
    return Interval(sample.size, mean, low, high)


def share_interval(hits: int, n: int) -> Interval:
    """Share with a Wilson interval."""
    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"hits: {hits} of {n} came; a count between 0 and n, with n above 0, is wanted.")
    low, high = proportion_confint(hits, n, method="wilson")
    return Interval(n, hits / n, float(low), float(high))


def paired_comparison(
    first: Sequence[float] | NDArray[np.floating], second: Sequence[float] | NDArray[np.floating], seed: int = 0
) -> Comparison:
    """Mean of first - second over the same prompts: bootstrap interval and paired sign-flip permutation test."""
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.shape != b.shape:
        raise ValueError(f"second: {b.size} values came for {a.size} in first. The comparison is paired.")
    interval = mean_interval(a - b, seed)
    test = "paired permutation, 9999 sign flips"
    if a.size == 1 or np.array_equal(a, b):  # every flip is as extreme as what was found
        return Comparison(interval.n, interval.mean, interval.low, interval.high, 1.0, test)
    result = stats.permutation_test(
        (a, b), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", vectorized=True,
        n_resamples=9999, rng=seed,
    )  # fmt: skip
    return Comparison(interval.n, interval.mean, interval.low, interval.high, float(result.pvalue), test)
