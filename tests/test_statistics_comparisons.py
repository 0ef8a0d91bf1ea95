"""Tests, effect sizes, power and calibration against published and hand-worked cases, and their algebra."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.power import TTestPower

from rt_lens.common.statistics.calibration import calibration_curve
from rt_lens.common.statistics.comparisons import (
    cliffs_delta,
    holm,
    mcnemar,
    paired_comparison,
    unpaired_comparison,
)
from rt_lens.common.statistics.intervals import crossed_interval, share_interval
from rt_lens.common.statistics.power import detectable, prompts_needed

algebra = settings(deadline=None, max_examples=25)
SCORES = st.lists(st.integers(-100, 100).map(lambda x: x / 100), min_size=4, max_size=12)
# Heights of crossed minus self-fertilised maize, in eighths of an inch: Darwin 1876, as in Fisher's Design of
# Experiments, 1935.
DARWIN = [49.0, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
# Extra hours of sleep under two drugs, ten patients: Student 1908.
DRUG_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
DRUG_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def no_bounds(found) -> bool:
    return math.isnan(found.low) and math.isnan(found.high)


# Paired comparisons


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
    found = paired_comparison(DARWIN, [0.0] * 15)
    assert found.p == pytest.approx(1726 / 32768, abs=0.008)
    assert found.low < 20.93 < found.high
    assert paired_comparison([0.0] * 15, DARWIN).difference == pytest.approx(-found.difference)


def test_nothing_different_gives_p_1_and_a_clear_difference_a_small_p():
    a = np.random.default_rng(3).normal(size=40)
    same = paired_comparison(a.tolist(), a.tolist())
    assert (same.difference, same.p) == (0.0, 1.0)
    assert no_bounds(same)
    clear = paired_comparison((a + 1).tolist(), (a + 0.01 * np.arange(40)).tolist())
    assert clear.p <= 0.0003
    assert clear.low > 0


def test_a_small_but_constant_difference_of_large_numbers_is_found():
    base = np.random.default_rng(4).normal(1000, 1, 20)
    found = paired_comparison((base + 0.005).tolist(), base.tolist())
    assert found.difference == pytest.approx(0.005)
    assert found.p < 0.001


@pytest.mark.parametrize("compare", [paired_comparison, unpaired_comparison])
def test_one_pair_proves_nothing(compare):
    found = compare([2.0], [1.0])
    assert (found.difference, found.p) == (1.0, 1.0)
    assert no_bounds(found)


def test_a_comparison_repeats_with_its_seed():
    draws = np.random.default_rng(6)
    a, b = draws.normal(size=30).tolist(), draws.normal(0.3, 1, size=30).tolist()
    assert paired_comparison(a, b, seed=1) == paired_comparison(a, b, seed=1)
    assert paired_comparison(a, b, seed=1) != paired_comparison(a, b, seed=2)


def test_lists_of_unlike_length_are_refused():
    for compare in (paired_comparison, mcnemar, cliffs_delta):
        with pytest.raises(ValueError, match=r"second must have a value for each prompt of first \(3\), got 2"):
            compare([1.0, 0.0, 1.0], [1.0, 0.0])


@settings(deadline=None, max_examples=10)
@given(first=SCORES.map(lambda scores: scores[:8]), seed=st.integers(0, 100))
def test_swapped_sides_negate_the_difference_and_keep_p(first, seed):
    draws = np.random.default_rng(seed)
    second = draws.permutation(first)
    order = draws.permutation(len(first))
    for compare in (paired_comparison, unpaired_comparison):
        found, swapped, shuffled = compare(first, second), compare(second, first), compare(np.array(first)[order],
                                                                                           second[order])  # fmt: skip
        assert swapped.difference == pytest.approx(-found.difference)
        assert swapped.p == pytest.approx(found.p)
        assert shuffled[1:5] == pytest.approx(found[1:5], nan_ok=True)


def test_with_seeds_p_and_interval_are_of_one_t_test():
    draws = np.random.default_rng(7)
    first, second = draws.normal(0.5, 1, (3, 30)) + draws.normal(0, 0.2, (3, 1)), draws.normal(0, 1, (3, 30))
    found = paired_comparison(first, second)
    assert found[:4] == crossed_interval(first - second)
    # The bound is where p crosses 5 %: with the bound taken away, p is 0.05.
    assert paired_comparison(first - found.low, second).p == pytest.approx(0.05)
    assert found.test == "crossed t, 3 seeds x 30 prompts"
    assert paired_comparison(second, first).p == pytest.approx(found.p)


def test_a_side_without_seeds_is_set_against_every_seed():
    draws = np.random.default_rng(8)
    tuned, untuned = draws.normal(size=(3, 20)), draws.normal(size=20)
    found = paired_comparison(tuned, untuned)
    assert found == paired_comparison(tuned, np.stack([untuned] * 3)) == paired_comparison(tuned, untuned[None])
    assert paired_comparison(untuned, tuned).difference == pytest.approx(-found.difference)


def test_one_seed_gets_the_permutation_test():
    draws = np.random.default_rng(9)
    a, b = draws.normal(size=(1, 12)), draws.normal(size=12)
    assert paired_comparison(a, b) == paired_comparison(a[0], b)
    assert "permutation" in paired_comparison(a, b).test


def test_a_difference_that_never_varies_has_a_p_but_no_bounds():
    found = paired_comparison(np.ones((3, 20)), np.zeros(20))
    assert (found.n, found.difference) == (20, 1.0)
    assert found.p < 0.001 and no_bounds(found)


def test_unlike_numbers_of_seeds_are_refused(as_a_user):
    with pytest.raises(
        ValueError, match=r"second must have as many seeds as first \(2\), got 3. Give as many, or average"
    ):
        paired_comparison(np.ones((2, 5)), np.ones((3, 5)))


def test_tests_that_know_no_seeds_say_so(as_a_user):
    with pytest.raises(
        ValueError,
        match=r"first must be one number per prompt, got an array of shape \(2, 5\). Average over seeds first",
    ):
        cliffs_delta(np.ones((2, 5)), np.ones((2, 5)))


# Shares compared


def table_as_outcomes(both, only_first, only_second, neither):
    first = [1] * (both + only_first) + [0] * (only_second + neither)
    second = [1] * both + [0] * only_first + [1] * only_second + [0] * neither
    return first, second


@pytest.mark.parametrize(
    ("table", "p", "low", "high"),
    [
        # Airway reactivity before and after transplantation (Fagerland, Lydersen and Laake 2014): of 8 pairs that
        # differ 1 does so one way, 2 (1 + 8) / 2^8; Newcombe's interval as given there.
        ((1, 1, 7, 12), 18 / 256, -0.507, -0.026),
        ((20, 12, 2, 16), 2 * (1 + 14 + 91) / 2**14, 0.056, 0.329),  # Newcombe 1998 (paired data), method 10
    ],
)
def test_mcnemar_as_published(table, p, low, high):
    found = mcnemar(*table_as_outcomes(*table))
    assert found.n == sum(table)
    assert found.difference == pytest.approx((table[1] - table[2]) / sum(table))
    assert found.p == pytest.approx(p)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-4)


@pytest.mark.parametrize("outcome", [0, 1])
def test_shares_without_any_difference_still_have_a_width(outcome):
    found = mcnemar([outcome] * 30, [outcome] * 30)
    assert (found.difference, found.p) == (0.0, 1.0)
    assert -0.2 < found.low < -0.05 and 0.05 < found.high < 0.2


@algebra
@given(table=st.tuples(*[st.integers(0, 12)] * 4).filter(any))
def test_mcnemar_mirrors_and_its_interval_lies_within_minus_1_and_1(table):
    first, second = table_as_outcomes(*table)
    found, swapped = mcnemar(first, second), mcnemar(second, first)
    assert swapped[1:5] == pytest.approx((-found.difference, -found.high, -found.low, found.p), abs=1e-9)
    assert -1 - 1e-9 <= found.low <= found.difference <= found.high <= 1 + 1e-9


def test_what_is_no_outcome_is_refused():
    with pytest.raises(ValueError, match=r"second must be 0 or 1 for each prompt, got .* use paired_comparison"):
        mcnemar([0.0, 1.0], [0.5, 1.0])


# Ranks, and other prompts


def test_welch_on_students_sleep_data():
    found = unpaired_comparison(DRUG_1, DRUG_2)  # t = -1.8608, 17.776 degrees of freedom (R's help on t.test)
    assert found.p == pytest.approx(0.07939, abs=5e-6)
    assert (found.low, found.high) == pytest.approx((-3.3654832, 0.2054832), abs=5e-7)
    assert (found.n, found.difference) == (20, pytest.approx(-1.58))
    assert paired_comparison(DRUG_1, DRUG_2).p < 0.01  # what pairing sees


def test_unpaired_seeds_widen_the_interval():
    draws = np.random.default_rng(10)
    apart = draws.normal(size=(3, 30)) + np.array([[-1.0], [0.0], [1.0]])
    other = draws.normal(size=25)
    wide, narrow = unpaired_comparison(apart, other), unpaired_comparison(apart.mean(0), other)
    assert wide.difference == pytest.approx(narrow.difference)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_unpaired_sides_without_spread_are_permuted():
    found = unpaired_comparison([1.0] * 3, [0.0] * 4)
    assert found.p == pytest.approx(2 / math.comb(7, 3))
    assert no_bounds(found)
    assert unpaired_comparison([1.0] * 3, [1.0] * 4).p == 1.0


# Many comparisons


def test_holm_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 gives 0.02, 0.03, 0.06, 0.04; the last may not be below 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@settings(deadline=None, max_examples=8)
@given(raw=st.lists(st.floats(0, 1), min_size=1, max_size=10))
def test_holm_keeps_the_order_and_lowers_no_p(raw):
    adjusted = holm(raw)
    assert (adjusted >= np.array(raw)).all() and (adjusted <= 1).all()
    for (a, x), (b, y) in itertools.combinations(zip(raw, adjusted, strict=True), 2):
        assert (a - b) * (x - y) >= 0
    assert min(adjusted) == pytest.approx(min(1.0, len(raw) * min(raw)))  # Bonferroni's for the smallest


def test_holm_refuses_what_is_no_p():
    with pytest.raises(ValueError, match=r"p_values must be between 0 and 1, got 0.2 to 1.3"):
        holm([0.2, 1.3])


# Effect sizes


def test_cliffs_delta_by_hand():
    found = cliffs_delta([3.0, 2.0, 2.0, 0.0, 5.0], [1.0, 1.0, 2.0, 1.0, 1.0])  # up, up, same, down, up
    assert (found.n, found.mean) == (5, pytest.approx(3 / 5 - 1 / 5))
    every = cliffs_delta([1.0] * 20, [0.0] * 20)
    assert every.mean == 1.0
    assert 0.5 < every.low < 1


@algebra
@given(first=SCORES, scale=st.floats(0.5, 10))
def test_cliffs_delta_knows_no_unit_and_mirrors(first, scale):
    second = first[::-1]
    found = cliffs_delta(first, second)
    scaled = cliffs_delta([scale * x**3 for x in first], [scale * x**3 for x in second])
    assert scaled == pytest.approx(found)
    assert cliffs_delta(second, first).mean == pytest.approx(-found.mean)


# Power


@pytest.mark.parametrize(("effect", "n"), [(0.2, 199), (0.5, 34), (0.8, 15)])  # as G*Power gives them
def test_prompts_needed_for_cohens_small_medium_and_large(effect, n):
    unit = np.array([-1.0, 1.0, -1.0, 1.0])
    assert prompts_needed(unit / unit.std(ddof=1) + effect) == n


@pytest.mark.parametrize("effect", [0.01, 0.3, 0.7, 0.9, 1.5, 4.0, 50.0])
def test_prompts_needed_are_enough_and_one_less_is_not(effect):
    unit = np.array([-1.0, 1.0, -1.0, 1.0])
    n = prompts_needed(unit / unit.std(ddof=1) - effect)
    assert n is not None and n >= 2
    assert effect > 10 or TTestPower().power(effect, n, 0.05) >= 0.8
    assert n == 2 or TTestPower().power(effect, n - 1, 0.05) < 0.8


def test_detectable_is_what_needs_so_many_prompts():
    found = detectable(34, 2.0)
    assert found == pytest.approx(2 * 0.4953, abs=1e-3)  # with n = 33.37 it would be 2 x 0.5
    assert TTestPower().power(found / 2.0, 34, 0.05) == pytest.approx(0.8, abs=1e-5)
    assert detectable(136, 2.0) < 0.52 * found


def test_no_difference_and_no_spread_have_no_number_of_prompts():
    assert prompts_needed([1.0, -1.0, 0.5, -0.5]) is None
    with pytest.raises(ValueError, match="differences must be at least two numbers that differ"):
        prompts_needed([0.5, 0.5, 0.5])


def test_impossible_plans_are_refused():
    with pytest.raises(ValueError, match=r"0 < alpha < power < 1, got power=0.01 and alpha=0.05"):
        prompts_needed([0.1, 0.2], power=0.01)
    with pytest.raises(ValueError, match=r"n must be at least 2 and sd at least 0, got n=1 and sd=0.5"):
        detectable(1, 0.5)


# Calibration


def test_calibration_curve_by_hand():
    table = calibration_curve([0.1, 0.2, 0.5, 0.8, 1.0], [0, 1, 1, 1, 1], bins=2)
    assert table["bin_low"].tolist() == [0.0, 0.5] and table["bin_high"].tolist() == [0.5, 1.0]
    assert table["n"].tolist() == [2, 3]
    assert table["predicted"].tolist() == pytest.approx([0.15, 2.3 / 3])
    assert table["right"].tolist() == [0.5, 1.0]
    assert (table["low"][0], table["high"][0]) == share_interval(1, 2)[2:]


def test_edges_belong_above_and_empty_bins_are_left_out():
    edges = [k / 10 for k in range(11)]
    table = calibration_curve(edges, [0] * 11)
    assert table["bin_low"].tolist() == pytest.approx([k / 10 for k in range(10)])
    assert table["n"].tolist() == [1] * 9 + [2]
    assert len(calibration_curve([0.05, 0.95], [0, 1])) == 2


@pytest.mark.parametrize(
    ("probabilities", "outcomes", "bins", "message"),
    [
        ([0.1, 1.2], [0, 1], 10, "probabilities must be between 0 and 1, got 0.1 to 1.2"),
        ([0.1, 0.2], [0, 2], 10, "outcomes must be 0 or 1, got 2"),
        ([0.1, 0.2], [0], 10, r"outcomes must be as many as the probabilities \(2\), got 1"),
        ([0.1, 0.2], [0, 1], 0, "bins must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(probabilities, outcomes, bins, message):
    with pytest.raises(ValueError, match=message):
        calibration_curve(probabilities, outcomes, bins)
