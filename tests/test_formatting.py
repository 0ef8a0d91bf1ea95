"""Numbers, estimates and p-values as text."""

from __future__ import annotations

import math

import pytest

from rt_lens.common.formatting import estimate, number, p_value
from rt_lens.plots.style import row_estimate, with_minus_sign


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(0.5124, 3, "0.512"), (-0.0001, 3, "0.000"), (-1.25, 1, "-1.2"), (7, 0, "7"), (None, 3, "–"), (math.nan, 2, "–")],
)
def test_a_number_has_its_digits_and_no_minus_zero(value, digits, text):
    assert number(value, digits) == text


@pytest.mark.parametrize("low", [None, math.nan])
def test_an_estimate_without_an_interval_is_its_mean(low):
    assert estimate(0.5124, 0.43, 0.594) == "0.512 [0.430, 0.594]"
    assert estimate(0.5124, low, 0.594) == "0.512"
    assert estimate(None, 0.43, 0.594) == estimate(math.nan, 0.43, 0.594) == "–"


def test_a_small_p_is_bounded_and_an_unknown_one_a_dash():
    texts = [p_value(p) for p in (0.0342, 0.001, 0.00099, None, math.nan)]
    assert texts == ["= 0.034", "= 0.001", "< 0.001", "–", "–"]


def test_a_measure_of_a_row_never_gets_the_interval_of_another():
    row = {"mean": -0.5, "low": -0.6, "high": -0.4, "kl": 0.1, "difference": 0.2, "perplexity": 20.0}
    row |= {"perplexity_low": 19.0, "perplexity_high": 21.0}
    assert with_minus_sign(row_estimate(row)) == "−0.500 [−0.600, −0.400]"
    assert row_estimate(row, "difference", 1) == "0.2 [-0.6, -0.4]"
    assert row_estimate(row, "perplexity", 1) == "20.0 [19.0, 21.0]"
    assert row_estimate(row, "kl") == "0.100"
