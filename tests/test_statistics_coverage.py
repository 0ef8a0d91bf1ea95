"""Intervals and tests against their own promise, by simulation: 95 % intervals cover 93 to 97 %, 5 % tests err in 5 %.

Draws are seeded, and so many that a right method lies within the limits by three standard errors or more.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from rt_lens.common.statistics.comparisons import (
    cliffs_delta,
    mcnemar,
    paired_comparison,
    unpaired_comparison,
)
from rt_lens.common.statistics.intervals import crossed_interval, mean_interval, ratio_interval, share_interval


def share_of(draw: Callable[[np.random.Generator, int], bool], times: int) -> float:
    draws = np.random.default_rng(0)
    return float(np.mean([draw(draws, number) for number in range(times)]))


# Shares: exactly, from the binomial distribution


def coverage_of_shares(n: int, method: str) -> np.ndarray:
    bounds = np.array([share_interval(hits, n, method)[2:] for hits in range(n + 1)])
    shares = np.linspace(0.001, 0.999, 999)
    covers = (bounds[:, :1] <= shares) & (shares <= bounds[:, 1:])
    return (stats.binom.pmf(np.arange(n + 1)[:, None], n, shares) * covers).sum(0)


@pytest.mark.parametrize("n", [16, 40, 60])
def test_wilson_covers_95_percent_on_average_and_exact_never_less(n):
    wilson, exact = coverage_of_shares(n, "wilson"), coverage_of_shares(n, "exact")
    assert 0.93 < wilson.mean() < 0.97
    assert exact.min() >= 0.95
    assert exact.mean() > wilson.mean()  # what the guarantee costs


# Means


def normal(draws: np.random.Generator, n: int) -> tuple[np.ndarray, float]:
    return draws.normal(size=n), 0.0


def mood(draws: np.random.Generator, n: int) -> tuple[np.ndarray, float]:
    """Like VADER's compound: bounded, most answers glad, some of 0."""
    return np.where(draws.random(n) < 0.15, 0.0, 1 - 2 * draws.beta(1.2, 4, n)), 0.85 * (1 - 2.4 / 5.2)


def two_heaps(draws: np.random.Generator, n: int) -> tuple[np.ndarray, float]:
    glad = draws.random(n) < 0.85
    return np.where(glad, draws.beta(6, 1.2, n), -draws.beta(3, 1.5, n)), 0.85 * 6 / 7.2 - 0.15 * 3 / 4.5


@pytest.mark.parametrize(("kind", "n"), [(normal, 60), (mood, 60), (two_heaps, 60), (normal, 16), (mood, 16)])
def test_mean_interval_covers(kind, n):
    def covers(draws, number):
        sample, mean = kind(draws, n)
        found = mean_interval(sample, number, resamples=500)
        return found.low <= mean <= found.high

    assert 0.93 < share_of(covers, 2000) < 0.97


@pytest.mark.parametrize("n", [24, 40])
def test_ratio_interval_covers_texts_of_unequal_length(n):
    def covers(draws, number):
        sizes = np.round(np.exp(draws.normal(4.8, 0.45, n)))
        found = ratio_interval((3 + 0.5 * draws.normal(size=n)) * sizes, sizes, number, resamples=500)
        return found.low <= 3 <= found.high

    assert 0.93 < share_of(covers, 2000) < 0.97


# Seeds x prompts. Prompts have a variance of 1.


@pytest.mark.parametrize("rest", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("of_seeds", [0.0, 0.03, 0.1, 0.3, 1.0, 10.0])
def test_crossed_interval_covers_whatever_the_seeds_do(of_seeds, rest):
    def covers(draws, number):
        grid = (
            np.sqrt(of_seeds) * draws.normal(size=(3, 1))
            + draws.normal(size=(1, 60))
            + np.sqrt(rest) * draws.normal(size=(3, 60))
        )
        found = crossed_interval(grid)
        return found.low <= 0 <= found.high

    assert 0.93 < share_of(covers, 3000) < 0.97


def test_an_interval_over_prompts_alone_does_not_where_seeds_differ():
    def covers(draws, number):
        grid = np.sqrt(0.1) * draws.normal(size=(3, 1)) + draws.normal(size=(1, 60)) + draws.normal(size=(3, 60))
        found = mean_interval(grid.mean(0), number, resamples=400)
        return found.low <= 0 <= found.high

    assert share_of(covers, 500) < 0.85


def test_crossed_interval_covers_bounded_skewed_scores_and_ratios():
    def covers(draws, number):
        prompts, sizes = 2 * draws.beta(3, 1.2, 24) - 1, np.round(np.exp(draws.normal(4.8, 0.45, 24)))
        grid = prompts + 0.1 * draws.normal(size=(3, 1)) + 0.25 * draws.normal(size=(3, 24))
        found = crossed_interval(grid), ratio_interval(grid * sizes, sizes)
        return [one.low <= 2 * 3 / 4.2 - 1 <= one.high for one in found]

    draws = np.random.default_rng(0)
    mean, ratio = np.mean([covers(draws, number) for number in range(2000)], axis=0)
    assert 0.93 < mean < 0.97
    assert 0.93 < ratio < 0.97


# Tests where there is nothing to find, and differences of shares


def test_permutation_test_errs_in_5_percent():
    def errs(draws, number):
        return paired_comparison(draws.exponential(size=8), draws.exponential(size=8), number).p <= 0.05

    assert 0.03 < share_of(errs, 1500) < 0.065  # of 256 sign patterns 12 lie within 5 %, that is 4.7 %


@pytest.mark.parametrize("of_seeds", [0.0, 0.1, 0.3])
def test_crossed_t_tests_err_in_about_5_percent(of_seeds):
    def errs(draws, number):
        a, b, c = (of_seeds * draws.normal(size=(3, 1)) + draws.normal(size=(3, 40)) for _ in range(3))
        # Paired prompts share what is hard about them.
        hard = draws.normal(size=(1, 40))
        return [paired_comparison(a + hard, b + hard).p <= 0.05, unpaired_comparison(a, c[:, :30]).p <= 0.05]

    draws = np.random.default_rng(0)
    paired, unpaired = np.mean([errs(draws, number) for number in range(2000)], axis=0)
    assert 0.03 < paired < 0.07
    assert 0.02 < unpaired < 0.06  # on the safe side: two variances of three seeds each


def test_welch_errs_in_5_percent_and_mcnemar_in_no_more():
    def errs(draws, number):
        a, b = draws.normal(size=(2, 15))
        shares = draws.random((2, 25)) < 0.4
        return [
            unpaired_comparison(3 * a, b[:12]).p <= 0.05,
            mcnemar(*shares.astype(int)).p <= 0.05,
        ]

    draws = np.random.default_rng(0)
    welch, exact = np.mean([errs(draws, number) for number in range(1000)], axis=0)
    assert 0.03 < welch < 0.07
    assert 0.005 < exact < 0.05


@pytest.mark.parametrize(("up", "down"), [(0.5, 0.5), (0.9, 0.05)])
def test_newcombes_interval_covers(up, down):
    def covers(draws, number):
        signs = draws.choice([1.0, -1.0, 0.0], size=60, p=[up, down, 1 - up - down])
        found = cliffs_delta(signs, np.zeros(60))
        return found.low <= up - down <= found.high

    assert 0.93 < share_of(covers, 2000) < 0.97
