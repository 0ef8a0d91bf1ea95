"""Intervals against published and hand-worked cases, and their algebra."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.regression.mixed_linear_model import MixedLM

from rt_lens.common.statistics.intervals import crossed_interval, mean_interval, ratio_interval, share_interval

algebra = settings(deadline=None, max_examples=25)
SCORES = st.lists(st.integers(-100, 100).map(lambda x: x / 100), min_size=4, max_size=12)


def no_bounds(found) -> bool:
    return math.isnan(found.low) and math.isnan(found.high)


# Shares


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (10, 100, 0.0552, 0.1744),  # (p + z2/2n +- z sqrt(p q/n + z2/4n2)) / (1 + z2/n) with z2 = 3.8415
    ],
)
def test_wilson_interval_as_published(hits, n, low, high):
    interval = share_interval(hits, n)
    assert (interval.n, interval.mean) == (n, hits / n)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (81, 263, 0.2527, 0.3676),  # Newcombe 1998, table I, method 5
        (15, 148, 0.0578, 0.1617),
        (0, 20, 0.0, 0.1684),  # 1 - 0.025 ** (1 / 20)
        (1, 29, 0.0009, 0.1776),
        (10, 100, 0.0490, 0.1762),
    ],
)
def test_exact_interval_as_published(hits, n, low, high):
    interval = share_interval(hits, n, method="exact")
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


@pytest.mark.parametrize(("hits", "n"), [(3, 20), (10, 100)])
def test_exact_bounds_leave_a_tail_of_one_fortieth_each(hits, n):
    interval = share_interval(hits, n, method="exact")
    assert stats.binom.sf(hits - 1, n, interval.low) == pytest.approx(0.025)
    assert stats.binom.cdf(hits, n, interval.high) == pytest.approx(0.025)


@pytest.mark.parametrize("method", ["wilson", "exact"])
@algebra
@given(n=st.integers(1, 60), share=st.floats(0, 1))
def test_share_interval_mirrors_and_lies_within_0_and_1(method, n, share):
    hits = round(share * n)
    some, rest = share_interval(hits, n, method), share_interval(n - hits, n, method)
    assert (some.low, some.high) == pytest.approx((1 - rest.high, 1 - rest.low), abs=1e-9)
    assert 0 <= some.low <= some.mean <= some.high <= 1
    assert some.high - some.low > 0.01  # even none or all of n is not certain


@pytest.mark.parametrize(("hits", "n"), [(5, 4), (-1, 4), (0, 0)])
def test_impossible_counts_are_refused(hits, n):
    with pytest.raises(ValueError, match=rf"hits must be between 0 and n, .*got hits={hits} and n={n}"):
        share_interval(hits, n)


def test_an_unknown_method_is_refused(as_a_user):
    with pytest.raises(ValueError, match="method must be 'wilson' or 'exact', got 'wald'"):
        share_interval(1, 4, method="wald")


# Means


def test_mean_interval_narrows_with_more_observations_like_the_root():
    draws = np.random.default_rng(1)
    few, many = (mean_interval(draws.normal(0, 1, n).tolist()) for n in (50, 800))
    assert 3 < (few.high - few.low) / (many.high - many.low) < 5.5
    assert many.high - many.low == pytest.approx(2 * 1.96 / np.sqrt(800), rel=0.15)


def test_mean_interval_of_few_symmetric_values_is_as_wide_as_students():
    quantiles = stats.norm.ppf((np.arange(20) + 0.5) / 20)
    found, half = mean_interval(quantiles), stats.t.ppf(0.975, 19) * quantiles.std(ddof=1) / np.sqrt(20)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.04)
    plain = stats.bootstrap((quantiles,), np.mean, n_resamples=4000, rng=0).confidence_interval
    assert plain.high - plain.low < 0.93 * 2 * half  # what the widening makes up for


def test_mean_interval_holds_its_mean_and_repeats_with_its_seed():
    values = np.random.default_rng(2).normal(size=30).tolist()
    first = mean_interval(values, seed=3)
    assert first.low < first.mean < first.high
    assert first.mean == pytest.approx(np.mean(values))
    assert mean_interval(values, seed=3) == first
    assert mean_interval(values, seed=4) != first


@pytest.mark.parametrize("values", [[0.3], [0.3, 0.3, 0.3], [0.3, 0.1 + 0.2, 0.3]])
def test_no_spread_gives_no_bounds_rather_than_certainty(values):
    interval = mean_interval(values)
    assert interval.n == len(values)
    assert interval.mean == pytest.approx(0.3)
    assert no_bounds(interval)


@pytest.mark.parametrize("values", [[0.0, 1.0], [0.0, 0.0, 1.0]])
def test_very_few_values_give_their_own_range(values):
    interval = mean_interval(values)
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_no_observation_is_refused():
    with pytest.raises(ValueError, match=r"values must have at least one observation, got an empty list"):
        mean_interval([])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused_and_counted(bad):
    with pytest.raises(ValueError, match=r"values must be finite numbers, got 2 of 4 .* Leave those prompts out"):
        mean_interval([0.1, bad, 0.3, bad])


@algebra
@given(values=SCORES, seed=st.integers(0, 100))
def test_the_order_of_prompts_changes_no_interval(values, seed):
    shuffled = np.random.default_rng(seed).permutation(values)
    assert mean_interval(shuffled, resamples=200) == pytest.approx(mean_interval(values, resamples=200), nan_ok=True)
    sizes = np.arange(1, len(values) + 1)
    order = np.random.default_rng(seed).permutation(len(values))
    found = ratio_interval(np.asarray(values)[order], sizes[order], resamples=200)
    assert found == pytest.approx(ratio_interval(values, sizes, resamples=200), nan_ok=True)


# Ratios


def test_ratio_is_of_the_sums_and_not_the_mean_of_the_ratios():
    found = ratio_interval([10.0, 30.0], [5, 10])
    assert found.mean == pytest.approx(40 / 15)
    assert (found.low, found.high) == pytest.approx((2.0, 3.0))  # one text alone, or the other


def test_ratio_of_texts_of_one_size_is_their_mean():
    totals = np.random.default_rng(0).normal(3, 1, 40)
    ratio, mean = ratio_interval(totals * 7, np.full(40, 7)), mean_interval(totals)
    assert ratio.mean == pytest.approx(mean.mean)
    assert (ratio.low, ratio.high) == pytest.approx((mean.low, mean.high), abs=0.05)


def test_a_text_without_tokens_counts_for_nothing():
    assert ratio_interval([10.0, 0.0, 30.0, 7.0], [5, 0, 10, 4]) == ratio_interval([10.0, 30.0, 7.0], [5, 10, 4])


@pytest.mark.parametrize(("totals", "sizes"), [([3.0], [2]), ([0.0, 0.0, 0.0], [2, 3, 4])])
def test_ratio_without_spread_has_no_bounds(totals, sizes):
    assert no_bounds(ratio_interval(totals, sizes))


def test_ratio_over_seeds_is_the_crossed_interval_of_its_seeds():
    sizes = np.full(30, 10)
    rates = np.random.default_rng(0).normal(3, 0.5, (3, 30)) + np.array([[-0.3], [0.0], [0.3]])
    assert ratio_interval(rates * 10, sizes) == pytest.approx(crossed_interval(rates))
    uneven = np.arange(5, 35)
    found = ratio_interval(rates * uneven, uneven)
    assert found.mean == pytest.approx((rates * uneven).sum() / (3 * uneven.sum()))
    assert found.high - found.low > 2 * np.ptp(ratio_interval((rates * uneven).mean(0), uneven)[2:])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([1.0], r"for each text \(2\), got 1"),
        ([1.0, -1.0], "sizes must be 0 or more.*got -1"),
        ([0.0, 0.0], "got 0 to 0"),
    ],
)
def test_sizes_that_fit_no_texts_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        ratio_interval([1.0, 2.0], sizes)


# Seeds x prompts


def test_crossed_interval_by_hand():
    # Mean 3; seeds 1.5 and 4.5, so MS_seed = 2 (1.5^2 + 1.5^2) / 1 = 9; prompts 2 and 4, so MS_prompt = 2 (1 + 1) / 1
    # = 4; residuals +-0.5, so MS_rest = 1. Variance (9 + 4 - 1) / 4 = 3; 1/d = (9/12) / 1 + (3/12) / 1, so d = 1.
    found = crossed_interval([[1.0, 2.0], [3.0, 6.0]])
    assert (found.n, found.mean) == (2, 3.0)
    assert found.high - 3 == pytest.approx(12.7062 * math.sqrt(3), rel=1e-5)
    assert found.high + found.low == pytest.approx(6)


def test_its_variance_is_that_of_a_mixed_model():
    draws = np.random.default_rng(2)
    grid = draws.normal(size=(5, 1)) * 0.5 + draws.normal(size=(1, 14)) + 0.6 * draws.normal(size=(5, 14))
    seeds, prompts = np.indices(grid.shape)
    frame = pd.DataFrame({"y": grid.ravel(), "tuned": seeds.ravel(), "prompt": prompts.ravel()})
    fit = MixedLM.from_formula(
        "y ~ 1", frame, groups=np.ones(len(frame)), re_formula="0",
        vc_formula={"tuned": "0 + C(tuned)", "prompt": "0 + C(prompt)"},
    ).fit(reml=True)  # fmt: skip
    ms_seed, ms_prompt = 14 * grid.mean(1).var(ddof=1), 5 * grid.mean(0).var(ddof=1)
    rest = grid - grid.mean(1, keepdims=True) - grid.mean(0) + grid.mean()
    ms_rest = (rest**2).sum() / 52
    assert min(ms_seed, ms_prompt) > ms_rest  # where REML and moments agree
    parts, found = (ms_seed, ms_prompt - ms_rest), crossed_interval(grid)
    d = sum(parts) / (parts[0] / 4 + parts[1] / 13)
    assert found.mean == pytest.approx(fit.params["Intercept"])
    assert found.high - found.mean == pytest.approx(stats.t.ppf(0.975, d) * fit.bse["Intercept"], rel=2e-3)


def test_seeds_that_agree_add_nothing_and_seeds_that_do_not_widen():
    row = np.random.default_rng(3).normal(size=40)
    same = crossed_interval(np.stack([row, row, row]))
    assert same.high - same.mean == pytest.approx(stats.t.ppf(0.975, 39) * row.std(ddof=1) / math.sqrt(40))
    apart = crossed_interval(np.stack([row - 1, row, row + 1]))
    assert apart.high - apart.low > 5 * (same.high - same.low)


def test_one_seed_is_an_interval_over_prompts():
    row = np.random.default_rng(4).normal(size=(1, 20))
    assert crossed_interval(row, seed=5) == mean_interval(row[0], seed=5)


@pytest.mark.parametrize("grid", [[[1.0], [2.0]], [[1.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
def test_one_prompt_or_no_spread_gives_no_bounds(grid):
    assert no_bounds(crossed_interval(grid))


@algebra
@given(seed=st.integers(0, 1000))
def test_the_order_of_seeds_and_prompts_changes_nothing(seed):
    draws = np.random.default_rng(seed)
    grid = draws.normal(size=(3, 10)) + draws.normal(size=(3, 1))
    assert crossed_interval(grid[draws.permutation(3)][:, draws.permutation(10)]) == pytest.approx(
        crossed_interval(grid)
    )


def test_a_grid_that_is_none_is_refused(as_a_user):
    with pytest.raises(
        ValueError, match=r"values must be one number per seed and prompt, got an array of shape \(2,\)"
    ):
        crossed_interval([1.0, 2.0])
    with pytest.raises(ValueError, match=r"values must be numbers in a regular array, .* every seed the same prompts"):
        crossed_interval([[1.0, 2.0], [1.0]])
