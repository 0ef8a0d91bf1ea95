"""Differences between two arms, with tests and effect sizes, and a correction for many comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as mcnemar_of_table
from statsmodels.stats.multitest import multipletests

from rt_lens.common.statistics.intervals import (
    Interval,
    Moments,
    Values,
    all_alike,
    crossed_interval,
    mean_interval,
    moments,
    numbers,
    share_interval,
)


class Comparison(NamedTuple):
    """A difference, first minus second, with its 95 % interval and two-sided p-value.

    Attributes:
        n: number of prompts; of an unpaired comparison, of both sides together.
        difference: mean of first minus mean of second.
        low: lower bound; NaN (as is `high`) if the observations have no spread, as in `Interval`.
        high: upper bound.
        p: two-sided.
        test: the test that gives p.
    """

    n: int
    difference: float
    low: float
    high: float
    p: float
    test: str


def paired_comparison(
    first: Sequence[float] | Sequence[Sequence[float]] | Shaped[np.ndarray, "... prompt"],
    second: Sequence[float] | Sequence[Sequence[float]] | Shaped[np.ndarray, "... prompt"],
    seed: int = 0,
    *,
    cautious: bool = False,
) -> Comparison:
    """Mean of first - second over the same prompts.

    With one number per prompt: a bootstrap interval (`mean_interval`) and a sign-flip permutation test. With one number
    per tuning seed and prompt: `crossed_interval` of the differences and its t-test. A side without seeds, such as the
    untuned model, is compared with every seed of the other. The test's size at the 5 % level is 5 % for one number per
    prompt, and 3.5 to 6.5 % for three seeds (simulated). At levels far below 5 %, which a correction for many
    comparisons needs, p is too small for few seeds (p < 0.0005 occurs ten times too often with three seeds); with
    `cautious` it is not.

    Args:
        first: [prompt] or [seed, prompt].
        second: as many prompts, in the same order; as many seeds, or none.
        seed: seed for the bootstrap and the permutations.
        cautious: limit p's degrees of freedom to those of the seeds, for `holm`.

    Raises:
        ValueError: different numbers of prompts or seeds, no value, or a value that is NaN or infinite.

    Example:
        >>> comparison = paired_comparison([0.9, 0.8, 0.7], [0.5, 0.9, 0.1])
        >>> round(comparison.difference, 3), comparison.p, comparison.test
        (0.3, 0.5, 'paired permutation, 9999 sign flips')
    """
    differences = _differences(first, second, most=2)
    if differences.ndim == 2 and len(differences) > 1:
        n_seeds, n_prompts = differences.shape
        mean, interval = moments(differences), crossed_interval(differences, seed)
        if cautious:
            mean = mean.capped(n_seeds - 1)
        if mean.variance > 0:
            return Comparison(*interval, mean.p, f"crossed t, {n_seeds} seeds x {n_prompts} prompts")
        differences = differences.mean(axis=0)  # without spread over seeds and prompts, only the signs are left
    differences = differences.reshape(-1)
    p = _permutation_p(differences, np.zeros_like(differences), "samples", seed)
    return Comparison(*mean_interval(differences, seed), p, "paired permutation, 9999 sign flips")


def mcnemar(first: Values, second: Values) -> Comparison:
    """Difference of two shares over the same prompts: McNemar's exact test (1947) and Newcombe's interval (1998).

    The test asks whether each arm wins half of the prompts on which the arms differ. The interval is method 10 of
    Newcombe's paper on paired data, from Wilson's two intervals and the correlation of the outcomes; unlike a bootstrap
    interval it has a width even if no prompt differs.

    Args:
        first: 0 or 1 for each prompt.
        second: the same prompts in the same order.

    Raises:
        ValueError: different lengths, no value, or values other than 0 and 1.

    Example:
        >>> comparison = mcnemar([1, 1, 1, 0, 1], [0, 1, 0, 0, 0])
        >>> comparison.difference, comparison.p
        (0.6, 0.25)
    """
    a, b = (_outcomes(name, values) for name, values in (("first", first), ("second", second)))
    _differences(a, b)
    p = float(mcnemar_of_table(_table(a, b), exact=True).pvalue)
    return Comparison(*_difference_of_shares(a, b), p, "McNemar, exact")


def unpaired_comparison(
    first: Sequence[float] | Sequence[Sequence[float]] | Shaped[np.ndarray, "... first"],
    second: Sequence[float] | Sequence[Sequence[float]] | Shaped[np.ndarray, "... second"],
    seed: int = 0,
) -> Comparison:
    """Mean of first minus mean of second where the prompts differ: Welch's t-test (1947) and interval.

    If the prompts are the same, pair them: `paired_comparison` detects smaller differences. With several tuning seeds,
    a side's variance and degrees of freedom are those of `crossed_interval`; the test's size at the 5 % level is then 3
    to 6 % (simulated).

    Args:
        first: [prompt] or [seed, prompt].
        second: likewise, with its own prompts and seeds.
        seed: seed for the permutation test that replaces Welch's if neither side has a spread.

    Raises:
        ValueError: no value, or a value that is NaN or infinite.

    Example:
        >>> comparison = unpaired_comparison([0.9, 0.8, 0.7], [0.5, 0.9, 0.1, 0.3])
        >>> comparison.n, round(comparison.difference, 3), comparison.test
        (7, 0.35, 'Welch t, 3 and 4 prompts')
    """
    a, b = numbers("first", first, most=2), numbers("second", second, most=2)
    n = a.shape[-1] + b.shape[-1]
    sides = moments(a), moments(b)
    difference = sides[0].mean - sides[1].mean
    variance = sides[0].variance + sides[1].variance
    alone = min(a.shape[-1], b.shape[-1]) == 1
    if variance == 0 or alone:
        a, b = (side.reshape(-1, side.shape[-1]).mean(0) for side in (a, b))
        p = _permutation_p(a, b, "independent", seed)
        return Comparison(n, difference, float("nan"), float("nan"), p, "permutation, 9999 shuffles")
    df = variance**2 / sum(side.variance**2 / side.df for side in sides)
    both = Moments(difference, variance, df)
    _, low, high = both.interval()
    return Comparison(n, difference, low, high, both.p, f"Welch t, {a.shape[-1]} and {b.shape[-1]} prompts")


def holm(p_values: Values) -> Float[np.ndarray, " test"]:
    """Holm's correction over many comparisons (1979): adjusted p-values in the given order.

    If those below 0.05 count as differences, at most 5 % of such tables contain a false one, however the tests depend
    on each other.

    Args:
        p_values: of all comparisons made, not only of those that look good.

    Raises:
        ValueError: no p-value, or one outside 0 to 1.

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(3).tolist()
        [0.03, 0.06, 0.06]
    """
    raw = numbers("p_values", p_values)
    if raw.min() < 0 or raw.max() > 1:
        raise ValueError(f"p_values must be between 0 and 1, got {raw.min():g} to {raw.max():g}. Give p-values only.")
    return np.asarray(multipletests(raw, method="holm")[1], dtype=float)


def cliffs_delta(first: Values, second: Values) -> Interval:
    """Fraction of prompts on which first is higher minus fraction on which it is lower (Cliff 1993, within subjects).

    From -1 to 1, independent of the scorer's unit. The interval is Newcombe's for the difference of two paired shares,
    so it has a width even if first is higher on all prompts.

    Args:
        first: one number per prompt.
        second: the same prompts in the same order.

    Raises:
        ValueError: different lengths, no value, or a value that is NaN or infinite.

    Example:
        >>> round(cliffs_delta([0.9, 0.8, 0.7], [0.5, 0.9, 0.1]).mean, 3)  # 2/3 - 1/3
        0.333
    """
    differences = _differences(first, second)
    return _difference_of_shares(differences > 0, differences < 0)


def _difference_of_shares(a: Shaped[np.ndarray, " prompt"], b: Shaped[np.ndarray, " prompt"]) -> Interval:
    """Newcombe 1998 (paired data), method 10."""
    n = len(a)
    (both, only_a), (only_b, neither) = _table(a, b)
    p, q = share_interval(both + only_a, n), share_interval(both + only_b, n)
    product = float(both * neither - only_a * only_b)
    if product > 0:
        product = max(product - n / 2, 0.0)  # the method's continuity correction
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    correlation = product / np.sqrt(margins) if margins else 0.0

    def distance(x: float, y: float) -> float:
        return float(np.sqrt(max(x * x - 2 * correlation * x * y + y * y, 0.0)))

    difference = (only_a - only_b) / n
    low = difference - distance(p.mean - p.low, q.high - q.mean)
    high = difference + distance(p.high - p.mean, q.mean - q.low)
    return Interval(n, difference, low, high)


def _table(a: Shaped[np.ndarray, " prompt"], b: Shaped[np.ndarray, " prompt"]) -> list[list[int]]:
    x, y = a.astype(bool), b.astype(bool)
    return [[int((x & y).sum()), int((x & ~y).sum())], [int((~x & y).sum()), int((~x & ~y).sum())]]


def _outcomes(argument: str, values: Values) -> Shaped[np.ndarray, " prompt"]:
    outcomes = numbers(argument, values)
    if not np.isin(outcomes, (0, 1)).all():
        raise ValueError(
            f"{argument} must be 0 or 1 for each prompt, got {outcomes[~np.isin(outcomes, (0, 1))][0]:g}. "
            "For other numbers use paired_comparison."
        )
    return outcomes.astype(bool)


def _differences(first: Any, second: Any, most: int = 1) -> Shaped[np.ndarray, "..."]:
    """First minus second: [prompt], or with `most=2` also [seed, prompt]."""
    a, b = numbers("first", first, most=most), numbers("second", second, most=most)
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"second must have a value for each prompt of first ({a.shape[-1]}), got {b.shape[-1]}. "
            "If the prompts differ, use unpaired_comparison."
        )
    seeds = [len(side) for side in (a, b) if side.ndim == 2]
    if len(set(seeds) - {1}) > 1:
        raise ValueError(
            f"second must have as many seeds as first ({seeds[0]}), got {seeds[1]}. Give as many, or average one side "
            "over its seeds."
        )
    return a - b


def _permutation_p(
    a: Shaped[np.ndarray, " first"],
    b: Shaped[np.ndarray, " second"],
    kind: Literal["samples", "independent"],
    seed: int,
) -> float:
    """p of the difference of means. A single observation shows nothing, and scipy's test needs more."""
    if min(len(a), len(b)) == 1 or all_alike(np.concatenate([a, b])):
        return 1.0
    whole = _whole(np.concatenate([a, b]))
    sides = np.sort(whole[: len(a)]), np.sort(whole[len(a) :])  # so the order of prompts does not matter
    result = stats.permutation_test(
        sides, _mean_difference, permutation_type=kind, vectorized=True, n_resamples=9999, rng=seed
    )
    return float(result.pvalue)


def _whole(values: Shaped[np.ndarray, " n"]) -> Shaped[np.ndarray, " n"]:
    """Values as whole multiples of a tiny unit, so that ties are ties: 0.3 - 0.2 is not quite 0.2 - 0.1."""
    return np.rint(values / np.abs(values).max() * 2**40)  # sums of 4,096 of them are exact


def _mean_difference(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray | np.floating:
    return np.mean(a, axis=axis) - np.mean(b, axis=axis)
