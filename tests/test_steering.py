"""Steering adds what it says where it says and comes off again; a batch of answers is what singles would have been."""

from __future__ import annotations

import pytest
import torch

from rt_lens.steering import add
from rt_lens.tokens import encode
from rt_lens.vectors import SteeringVectors

TEXT = "The weather in the hills was"
PROMPTS = [
    "Rain?",
    "Tell me, at some length and with all the detail that you like, about your last weekend.",
    "Name a tree.",
]
POST = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


@torch.no_grad()
def logits(model, hooks=(), rows: int = 1) -> torch.Tensor:
    with model.hooks(fwd_hooks=list(hooks)):
        return model(torch.tensor([encode(model, TEXT)] * rows))


# Adding


def test_multiplier_0_gives_the_baseline_bit_for_bit(tiny, tiny_vectors):
    baseline = logits(tiny)
    assert torch.equal(logits(tiny, add(tiny_vectors, multiplier=0.0)), baseline)
    assert not torch.equal(logits(tiny, add(tiny_vectors, multiplier=1.0)), baseline)


@pytest.mark.parametrize("layers", [None, [0], [1], range(2)])
def test_adding_and_taking_away_cancel_and_there_was_an_effect(tiny, tiny_vectors, layers):
    baseline = logits(tiny)
    there = add(tiny_vectors, layers, 2.0)
    assert (logits(tiny, there) - baseline).abs().max() > 0.1
    torch.testing.assert_close(logits(tiny, there + add(tiny_vectors, layers, -2.0)), baseline, atol=1e-5, rtol=0)


def test_lists_of_hooks_add_up(tiny, tiny_vectors):
    together = logits(tiny, add(tiny_vectors, [0], 0.5) + add(tiny_vectors, [0], 1.5))
    torch.testing.assert_close(together, logits(tiny, add(tiny_vectors, [0], 2.0)), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_vector_lands_at_its_hook_point_at_every_position(tiny, tiny_vectors):
    tokens = torch.tensor([encode(tiny, TEXT)])
    hooks = add(tiny_vectors, [1], 3.0)
    assert [name for name, _ in hooks] == [POST[1]]
    _, before = tiny.run_with_cache(tokens)
    with tiny.hooks(fwd_hooks=hooks):
        _, after = tiny.run_with_cache(tokens)
    change = after[POST[1]] - before[POST[1]]
    torch.testing.assert_close(change, (3.0 * tiny_vectors[POST[1]]).expand_as(change), atol=1e-4, rtol=1e-4)
    assert torch.equal(after[POST[0]], before[POST[0]])


def test_another_kind_of_hook_point(tiny, tiny_vectors):
    name = "blocks.1.hook_mlp_out"
    vectors = SteeringVectors({name: tiny_vectors[POST[1]]}, tiny_vectors.provenance)
    hooks = add(vectors, hook="mlp_out")
    assert [hooked for hooked, _ in hooks] == [name]
    # What an MLP writes goes into the residual stream as it is.
    torch.testing.assert_close(logits(tiny, hooks), logits(tiny, add(tiny_vectors, [1])), atol=1e-4, rtol=1e-4)


def test_one_multiplier_for_each_row_equals_separate_runs(tiny, tiny_vectors):
    doses = [0.0, 1.0, -2.5]
    together = logits(tiny, add(tiny_vectors, [0], torch.tensor(doses)), rows=3)
    for row, dose in enumerate(doses):
        torch.testing.assert_close(together[row], logits(tiny, add(tiny_vectors, [0], dose))[0], atol=1e-5, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_multipliers_of_another_number_than_the_rows_are_refused(tiny, tiny_vectors, hooks_on):
    for rows in (1, 2):
        with pytest.raises(ValueError, match=rf"multiplier: 3 numbers came for {rows} rows"):
            logits(tiny, add(tiny_vectors, [0], torch.ones(3)), rows=rows)
    assert not hooks_on(tiny)


def test_an_exception_in_the_block_leaves_no_hook_and_keeps_the_users(tiny, tiny_vectors, hooks_on):
    def steer_and_fail():
        with tiny.hooks(fwd_hooks=add(tiny_vectors)):
            assert set(hooks_on(tiny)) == set(POST)
            raise RuntimeError("mine")

    baseline = logits(tiny)
    with pytest.raises(RuntimeError, match="mine"):
        steer_and_fail()
    assert not hooks_on(tiny)
    assert torch.equal(logits(tiny), baseline)

    calls = []
    tiny.add_perma_hook(POST[0], lambda x, hook: calls.append(hook.name))
    before = hooks_on(tiny)
    with pytest.raises(RuntimeError, match="mine"):
        steer_and_fail()
    assert hooks_on(tiny) == before
    logits(tiny)
    assert calls == [POST[0]]


@pytest.mark.parametrize("multiplier", [float("nan"), float("inf"), torch.tensor([1.0, float("nan")])])
def test_a_multiplier_that_is_no_number_is_refused(tiny_vectors, multiplier):
    with pytest.raises(ValueError, match=r"multiplier: .*(nan|inf).* came; finite numbers are wanted"):
        add(tiny_vectors, [0], multiplier)


def test_a_layer_without_a_vector_is_refused_with_the_mend(tiny_vectors):
    with pytest.raises(ValueError, match=r"layers: 18 is outside these vectors' blocks 0\.\.1 .*Use layers=\[1\], say"):
        add(tiny_vectors, [18])
    with pytest.raises(ValueError, match=r"hook: no vector at hook_mlp_out"):
        add(tiny_vectors, [0], hook="mlp_out")


def test_vectors_of_another_width_are_refused_where_they_are_added(tiny, provenance, hooks_on):
    vectors = SteeringVectors({POST[0]: torch.ones(48)}, provenance)
    with pytest.raises(ValueError, match=r"vectors: made for d_model 48, these activations have 32\. Extract vectors"):
        logits(tiny, add(vectors))
    assert not hooks_on(tiny)
