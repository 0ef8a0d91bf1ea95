"""Intervals and tests against published and hand-worked cases, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from rt_lens.statistics import mean_interval, paired_comparison, share_interval


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_as_published(hits, n, low, high):
    interval = share_interval(hits, n)
    assert (interval.n, interval.mean) == (n, hits / n)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


def test_wilson_interval_mirrors():
    some, rest = share_interval(3, 20), share_interval(17, 20)
    assert (some.low, some.high) == pytest.approx((1 - rest.high, 1 - rest.low))


@pytest.mark.parametrize(("hits", "n"), [(5, 4), (-1, 4), (0, 0)])
def test_impossible_counts_are_refused(hits, n):
    with pytest.raises(ValueError, match=rf"hits: {hits} of {n} came; a count between 0 and n"):
        share_interval(hits, n)


@pytest.mark.parametrize("skewed", [False, True])
def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says(skewed):
    draws = np.random.default_rng(0)
    covered = []
    for seed in range(200):
        sample = draws.exponential(2.0, 40) if skewed else draws.normal(2.0, 1.0, 40)
        interval = mean_interval(sample.tolist(), seed=seed, resamples=600)
        covered.append(interval.low <= 2.0 <= interval.high)
    assert 0.88 <= np.mean(covered) <= 0.985


def test_mean_interval_narrows_with_more_observations_like_the_root():
    draws = np.random.default_rng(1)
    few, many = (mean_interval(draws.normal(0, 1, n).tolist()) for n in (50, 800))
    assert 3 < (few.high - few.low) / (many.high - many.low) < 5.5
    assert many.high - many.low == pytest.approx(2 * 1.96 / np.sqrt(800), rel=0.15)


def test_mean_interval_holds_its_mean_and_repeats_with_its_seed():
    values = np.random.default_rng(2).normal(size=30).tolist()
    first = mean_interval(values, seed=3)
    assert first.low < first.mean < first.high
    assert first.mean == pytest.approx(np.mean(values))
    assert mean_interval(values, seed=3) == first
    assert mean_interval(values, seed=4) != first


@pytest.mark.parametrize("values", [[0.3], [0.3, 0.3, 0.3]])
def test_no_spread_gives_an_interval_of_no_width(values):
    interval = mean_interval(values)
    assert (interval.n, interval.low, interval.high) == (len(values), interval.mean, interval.mean)
    assert interval.mean == pytest.approx(0.3)


def test_two_values_give_a_finite_interval():
    interval = mean_interval([0.0, 1.0])
    assert 0 <= interval.low <= 0.5 <= interval.high <= 1


def test_no_observation_is_refused():
    with pytest.raises(ValueError, match=r"values: the list is empty; at least one observation"):
        mean_interval([])


def test_a_value_that_is_no_number_is_not_hidden():
    assert np.isnan(mean_interval([0.1, float("nan"), 0.3])[1:]).all()


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1.0, 2.0, 3.0, 4.0], 2 / 16),  # the most extreme of 16 sign patterns, on either side
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 2 / 64),
        ([1.0, -1.0], 1.0),
        ([3.0, 2.0, -1.0], 4 / 8),  # sums 6 4 2 0 and their mirrors; 4 or more is reached by 2 of 8 on each side
    ],
)
def test_permutation_p_by_hand(differences, p):
    base = [0.5 * i for i in range(len(differences))]
    found = paired_comparison([b + d for b, d in zip(base, differences, strict=True)], base)
    assert found.p == pytest.approx(p)
    assert found.difference == pytest.approx(np.mean(differences))


def test_permutation_p_of_darwins_maize_as_fisher_gave_it():
    differences = [
        float(x) for x in (49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48)
    ]  # The Design of Experiments, 1935
    found = paired_comparison(differences, [0.0] * 15)
    assert found.p == pytest.approx(1726 / 32768, abs=0.008)
    assert found.low < 20.93 < found.high
    assert paired_comparison([0.0] * 15, differences).difference == pytest.approx(-found.difference)


def test_nothing_different_gives_p_1_and_a_clear_difference_a_small_p():
    a = np.random.default_rng(3).normal(size=40)
    assert paired_comparison(a.tolist(), a.tolist()).p == 1.0
    clear = paired_comparison((a + 1).tolist(), (a + 0.01 * np.arange(40)).tolist())
    assert clear.p <= 0.0003
    assert clear.low > 0


def test_a_small_but_constant_difference_of_large_numbers_is_found():
    base = np.random.default_rng(4).normal(1000, 1, 20)
    found = paired_comparison((base + 0.005).tolist(), base.tolist())
    assert found.low > 0
    assert found.p < 0.001


def test_one_pair_proves_nothing():
    found = paired_comparison([2.0], [1.0])
    assert (found.n, found.difference, found.p) == (1, 1.0, 1.0)


def test_p_is_right_about_as_often_as_it_says_when_there_is_nothing():
    draws = np.random.default_rng(5)
    ps = [paired_comparison(draws.normal(size=8).tolist(), draws.normal(size=8).tolist()).p for _ in range(150)]
    assert np.mean(np.array(ps) <= 0.2) == pytest.approx(0.2, abs=0.1)


def test_a_comparison_repeats_with_its_seed():
    draws = np.random.default_rng(6)
    a, b = draws.normal(size=30).tolist(), draws.normal(0.3, 1, size=30).tolist()
    assert paired_comparison(a, b, seed=1) == paired_comparison(a, b, seed=1)
    assert paired_comparison(a, b, seed=1) != paired_comparison(a, b, seed=2)


def test_lists_of_unlike_length_are_refused():
    with pytest.raises(ValueError, match=r"second: 2 values came for 3 in first. The comparison is paired"):
        paired_comparison([1.0, 2.0, 3.0], [1.0, 2.0])
