"""What people type where layers and numbers are wanted."""

from __future__ import annotations

import pytest

from rt_lens.common.parsing import layers_of, multipliers_of, whole_number


@pytest.mark.parametrize(
    ("text", "layers"), [("14-16,20", [14, 15, 16, 20]), (" 3 ", [3]), ("5 - 6, 1", [5, 6, 1]), ("7-7", [7])]
)
def test_layers_come_in_the_order_in_which_they_were_typed(text, layers):
    assert layers_of(text) == layers


@pytest.mark.parametrize("text", ["", "a", "3,", "-2", "9-4", "1-2-3", "²", "1.5", "0-999999999"])
def test_what_is_no_span_of_layers_is_refused_with_what_came(text):
    with pytest.raises(ValueError, match="layers must be blocks such as 14-22 or 14,18, got ") as refusal:
        layers_of(text)
    assert repr(text) in str(refusal.value)


def test_multipliers_are_numbers_with_a_minus_of_either_kind():
    assert multipliers_of("-1.5, 0,3,−2") == [-1.5, 0.0, 3.0, -2.0]


@pytest.mark.parametrize("text", ["1,x", "", "nan,0,inf", "1,-inf", "1e999"])
def test_what_is_no_finite_number_is_refused_with_what_came(text):
    with pytest.raises(ValueError, match="multipliers must be numbers such as -2,0,2, got ") as refusal:
        multipliers_of(text)
    assert repr(text) in str(refusal.value)


def test_more_layers_than_any_model_has_are_refused_unlisted():
    assert len(layers_of("0-499,0-499")) == 1000
    for text in ("0-99999", "0-499,0-500", "0-999,7"):
        with pytest.raises(ValueError, match="layers must be at most 1,000 blocks, got "):
            layers_of(text)


@pytest.mark.parametrize("came", [None, 1, 61, 2.5, float("nan"), float("inf")])
def test_a_number_that_will_not_do_is_refused_with_the_range(came):
    assert whole_number("prompts", 6.0, 2, 60) == 6
    with pytest.raises(ValueError, match="prompts must be a whole number from 2 to 60, got "):
        whole_number("prompts", came, 2, 60)
