"""Edits of activations: their algebra, and that there was something to edit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rt_lens.operators import Add

SEEDS = st.integers(0, 10_000)


def residual_and_vector(seed: int, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 5, 8, generator=noise), torch.randn(8, generator=noise)


@settings(deadline=None, max_examples=25)
@given(SEEDS)
def test_zero_times_a_vector_gives_the_baseline_bit_for_bit(seed):
    residual, vector = residual_and_vector(seed)
    assert torch.equal(Add(vector, 0.0)(residual), residual)
    assert not torch.equal(Add(vector, 1.0)(residual), residual)


@settings(deadline=None, max_examples=25)
@given(SEEDS, st.floats(-20, 20))
def test_adding_and_taking_away_cancel_and_there_was_an_effect(seed, multiplier):
    residual, vector = residual_and_vector(seed)
    there = Add(vector, multiplier)(residual)
    torch.testing.assert_close(Add(vector, -multiplier)(there), residual, atol=1e-4, rtol=0)
    if abs(multiplier) > 0.1:
        assert (there - residual).norm(dim=-1).min() > 0.05 * vector.norm()


@settings(deadline=None, max_examples=25)
@given(SEEDS, st.floats(-5, 5), st.floats(-5, 5))
def test_multipliers_add_up(seed, first, second):
    residual, vector = residual_and_vector(seed)
    twice = Add(vector, second)(Add(vector, first)(residual))
    torch.testing.assert_close(twice, Add(vector, first + second)(residual), atol=1e-4, rtol=0)


def test_the_projection_grows_by_the_multiple_at_every_position_and_nothing_else_moves():
    residual, vector = residual_and_vector(0)
    unit, change = vector / vector.norm(), Add(vector, 1.5)(residual) - residual
    torch.testing.assert_close(change @ unit, (1.5 * vector.norm()).expand(3, 5))
    assert (change - (change @ unit)[..., None] * unit).abs().max() < 1e-5


def test_one_multiplier_for_each_row_equals_separate_calls_bit_for_bit():
    residual, vector = residual_and_vector(1)
    doses = torch.tensor([0.0, 1.5, -2.0])
    together = Add(vector, doses)(residual)
    for row, dose in enumerate(doses.tolist()):
        assert torch.equal(together[row : row + 1], Add(vector, dose)(residual[row : row + 1]))
    assert torch.equal(together[0], residual[0])
    assert not torch.equal(together[1], residual[1])


def test_the_input_is_not_written_to():
    residual, vector = residual_and_vector(2)
    before = residual.clone()
    Add(vector, 3.0)(residual)
    assert torch.equal(residual, before)


def test_the_activations_keep_their_dtype():
    residual, vector = residual_and_vector(3)
    assert Add(vector, 2.0)(residual.bfloat16()).dtype == torch.bfloat16
    assert Add(vector, torch.ones(3))(residual.bfloat16()).dtype == torch.bfloat16


def test_gradients_reach_the_activations():
    residual, vector = residual_and_vector(4)
    residual.requires_grad_()
    Add(vector, 2.0)(residual).sum().backward()
    assert torch.equal(residual.grad, torch.ones_like(residual))


def test_another_width_is_refused_with_both_widths_and_the_mend():
    with pytest.raises(ValueError, match=r"vectors: made for d_model 8, .* have 12\. Extract vectors"):
        Add(torch.ones(8), 1.0)(torch.ones(2, 3, 12))


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_multipliers_of_another_number_than_the_rows_are_refused(rows):
    residual, vector = residual_and_vector(5, rows=rows)
    with pytest.raises(ValueError, match=rf"multiplier: 3 numbers came for {rows} rows.*Give one number"):
        Add(vector, torch.ones(3))(residual)


def test_an_operator_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Add(torch.ones(8), 1.0).multiplier = 2.0
