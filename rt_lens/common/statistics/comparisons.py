"""Differences between two arms with tests and effect sizes, and the correction for many of them."""

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
    bootstrapped,
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
        low: lower bound; NaN (as is `high`) where there is no spread to judge by, as in `Interval`.
        high: upper bound.
        p: two-sided.
        test: what p comes from.
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

    One number per prompt: bootstrap interval (`mean_interval`) and sign-flip permutation test. One per tuning seed and
    prompt: `crossed_interval` of the differences and its t-test. A side without seeds, such as the untuned model, is
    set against every seed of the other. The test's size at the 5 % level is 5 % for one number per prompt, and 3.5 to
    6.5 % for three seeds (simulated); far below 5 %, as a correction for many comparisons needs it, it is too small
    for few seeds (p < 0.0005 comes ten times too often with three), and `cautious` is not.

    Args:
        first: [prompt] or [seed, prompt].
        second: as many prompts, in the same order; as many seeds, or none.
        seed: of the bootstrap and the permutations.
        cautious: take no more degrees of freedom for p than the seeds have, for `holm`.

    Raises:
        ValueError: unlike numbers of prompts or seeds, no value, or one that is NaN or infinite.

    Example:
        >>> paired_comparison([0.9, 0.8, 0.7], [0.5, 0.9, 0.1])
    """
    differences = _differences(first, second, most=2)
    if differences.ndim == 2 and len(differences) > 1:
        n_seeds, n_prompts = differences.shape
        found, interval = moments(differences), crossed_interval(differences, seed)
        if cautious:
            found = found.capped(n_seeds - 1)
        if found.variance > 0:
            return Comparison(*interval, found.p, f"crossed t, {n_seeds} seeds x {n_prompts} prompts")
        differences = differences.mean(axis=0)  # no spread over seeds and prompts, so that signs are all there is
    differences = differences.reshape(-1)
    p = _permutation_p(differences, np.zeros_like(differences), "samples", seed)
    return Comparison(*mean_interval(differences, seed), p, "paired permutation, 9999 sign flips")


def mcnemar(first: Values, second: Values) -> Comparison:
    """Difference of two shares over the same prompts: McNemar's exact test (1947) and Newcombe's interval (1998).

    The test asks whether, of the prompts on which the arms differ, each arm wins half. The interval is method 10 of
    Newcombe's paper on paired data, of Wilson's two intervals and the outcomes' correlation; unlike a bootstrap it has
    a width even if no prompt differs.

    Args:
        first: 0 or 1 for each prompt.
        second: the same prompts in the same order.

    Raises:
        ValueError: unlike lengths, no value, or other values than 0 and 1.

    Example:
        >>> mcnemar([1, 1, 1, 0, 1], [0, 1, 0, 0, 0])
    """
    a, b = (_outcomes(name, values) for name, values in (("first", first), ("second", second)))
    _differences(a, b)
    p = float(mcnemar_of_table(_table(a, b), exact=True).pvalue)
    return Comparison(*_difference_of_shares(a, b), p, "McNemar, exact")


def wilcoxon(first: Values, second: Values, seed: int = 0) -> Comparison:
    """Wilcoxon's signed-rank test (1945) over the same prompts, which an outlier cannot carry alone.

    The difference and its interval are of the mean, as in `paired_comparison`, so that rows of a table compare; p is
    the ranks'. Differences of 0 are left out of the ranks. Exact up to 50 prompts without ties or
    zeros and up to 13 with them, else a normal approximation.

    Args:
        first: one number per prompt.
        second: the same prompts in the same order.
        seed: of the bootstrap interval.

    Raises:
        ValueError: unlike lengths, no value, or one that is NaN or infinite.

    Example:
        >>> wilcoxon([0.9, 0.8, 0.7], [0.5, 0.9, 0.1])
    """
    differences = _differences(first, second)
    p = float(stats.wilcoxon(_whole(differences)).pvalue) if differences.any() else 1.0
    return Comparison(*mean_interval(differences, seed), p, "Wilcoxon signed rank")


def unpaired_comparison(
    first: Sequence[float] | Sequence[Sequence[float]] | Shaped[np.ndarray, "... first"],
    second: Sequence[float] | Sequence[Sequence[float]] | Shaped[np.ndarray, "... second"],
    seed: int = 0,
) -> Comparison:
    """Mean of first minus mean of second where the prompts differ: Welch's t-test (1947) and interval.

    Prompts in common are worth pairing: `paired_comparison` sees smaller differences. With several tuning seeds a
    side's variance and degrees of freedom are those of `crossed_interval`; the test's size at the 5 % level is then 3
    to 6 % (simulated).

    Args:
        first: [prompt] or [seed, prompt].
        second: likewise, with its own prompts and seeds.
        seed: of the permutation test that is used where neither side has a spread.

    Raises:
        ValueError: no value, or one that is NaN or infinite.

    Example:
        >>> unpaired_comparison([0.9, 0.8, 0.7], [0.5, 0.9, 0.1, 0.3])
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

    Calling those below 0.05 differences errs once or more in at most 5 % of such tables, however the tests hang
    together.

    Args:
        p_values: of all comparisons that were made, not only of those that look well.

    Raises:
        ValueError: no p-value, or one outside 0 to 1.

    Example:
        >>> holm([0.01, 0.04, 0.03])  # 0.03, 0.06, 0.06
    """
    raw = numbers("p_values", p_values)
    if raw.min() < 0 or raw.max() > 1:
        raise ValueError(f"p_values must be between 0 and 1, got {raw.min():g} to {raw.max():g}. Give p-values only.")
    return np.asarray(multipletests(raw, method="holm")[1], dtype=float)


def standardised_difference(first: Values, second: Values, seed: int = 0) -> Interval:
    """Cohen's d_z: mean of the paired differences in units of their standard deviation, with a bootstrap interval.

    It says how even the effect is over prompts, not how large it is: tell it beside the difference itself. The interval
    covers 95 to 98 % from 16 prompts on (simulated).

    Args:
        first: one number per prompt.
        second: the same prompts in the same order.
        seed: of the bootstrap.

    Returns:
        NaN, bounds included, where the differences have no spread.

    Raises:
        ValueError: unlike lengths, no value, or one that is NaN or infinite.

    Example:
        >>> standardised_difference([0.9, 0.8, 0.7], [0.5, 0.9, 0.1])
    """
    differences = _differences(first, second)
    if all_alike(differences):
        return Interval(differences.size, float("nan"), float("nan"), float("nan"))
    return bootstrapped(differences, _d_z, seed, 4000)


def cliffs_delta(first: Values, second: Values) -> Interval:
    """Share of the prompts on which first is higher minus share on which it is lower (Cliff 1993, within subjects).

    From -1 to 1, free of the scorer's unit. The interval is Newcombe's for the difference of two paired shares, so
    that even "all prompts" has a width.

    Args:
        first: one number per prompt.
        second: the same prompts in the same order.

    Raises:
        ValueError: unlike lengths, no value, or one that is NaN or infinite.

    Example:
        >>> cliffs_delta([0.9, 0.8, 0.7], [0.5, 0.9, 0.1]).mean  # 2/3 - 1/3
    """
    differences = _differences(first, second)
    return _difference_of_shares(differences > 0, differences < 0)


def _d_z(differences: np.ndarray, axis: int = -1) -> np.ndarray | np.floating:
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.mean(differences, axis=axis) / np.std(differences, axis=axis, ddof=1)
    return np.nan_to_num(found, nan=0.0, posinf=np.inf, neginf=-np.inf)  # a resample that is all zeros shows nothing


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
    """First minus second, [prompt] or, if two axes may come, [seed, prompt]."""
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
    """Of the difference of means. One observation proves nothing, and is more than scipy takes."""
    if min(len(a), len(b)) == 1 or all_alike(np.concatenate([a, b])):
        return 1.0
    whole = _whole(np.concatenate([a, b]))
    sides = np.sort(whole[: len(a)]), np.sort(whole[len(a) :])  # the order of prompts changes nothing
    result = stats.permutation_test(
        sides, _mean_difference, permutation_type=kind, vectorized=True, n_resamples=9999, rng=seed
    )
    return float(result.pvalue)


def _whole(values: Shaped[np.ndarray, " n"]) -> Shaped[np.ndarray, " n"]:
    """In whole parts of the largest, so that ties are ties: 0.3 - 0.2 is not quite 0.2 - 0.1."""
    return np.rint(values / np.abs(values).max() * 2**40)  # sums of 4,096 of them are exact


def _mean_difference(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray | np.floating:
    return np.mean(a, axis=axis) - np.mean(b, axis=axis)
