"""Steering adds what it says where it says and comes off again; a batch of answers is what singles would have been."""

from __future__ import annotations

import pytest
import torch

from rt_lens.data.contrast_pairs import load_pairs
from rt_lens.models.context import token_context
from rt_lens.models.positions import position_of
from rt_lens.models.tokens.batches import encode, pad
from rt_lens.steering.binding import (
    ablate,
    add,
    add_preserving_norm,
    cap,
    clamp,
    erase,
    rotate,
    scale,
    steered,
    transport,
)
from rt_lens.steering.edits import Linear
from rt_lens.vectors.extraction import extract_transport, read_sides
from rt_lens.vectors.reading import projection_quantiles
from rt_lens.vectors.steering_vectors import SteeringVectors

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
        with pytest.raises(
            ValueError, match=rf"multiplier must be one number, or one for each of the {rows} rows of the batch, got 3"
        ):
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
    assert calls in ([POST[0]], ["blocks.0.hook_out"])  # a bridge's own name for it


@pytest.mark.parametrize("multiplier", [float("nan"), float("inf"), torch.tensor([1.0, float("nan")])])
def test_a_multiplier_that_is_no_number_is_refused(tiny_vectors, multiplier):
    with pytest.raises(ValueError, match=r"multiplier must be a finite number, .*got .*(nan|inf)"):
        add(tiny_vectors, [0], multiplier)


def test_a_layer_without_a_vector_is_refused_with_the_mend(tiny_vectors):
    with pytest.raises(
        ValueError, match=r"layers contains 18, but these vectors are of blocks 0\.\.1 .*Try layers=\[1\]"
    ):
        add(tiny_vectors, [18])
    with pytest.raises(ValueError, match=r"hook must be .*, got hook_mlp_out"):
        add(tiny_vectors, [0], hook="mlp_out")


def test_vectors_of_another_width_are_refused_where_they_are_added(tiny, provenance, hooks_on):
    vectors = SteeringVectors({POST[0]: torch.ones(48)}, provenance)
    with pytest.raises(ValueError, match=r"d_model 48; these activations have 32\. Extract vectors"):
        logits(tiny, add(vectors))
    assert not hooks_on(tiny)


@pytest.mark.parametrize("bound", [add, add_preserving_norm, ablate, clamp])
def test_every_function_takes_the_same_places(tiny_vectors, bound):
    hooks = bound(tiny_vectors, [1], positions="last", schedule=Linear(1.0, 0.0, 4), heads=[2])
    assert [name for name, _ in hooks] == [POST[1]]
    (edit,) = [edit for _, edit in hooks]
    assert (edit.positions, edit.schedule, edit.heads) == ("last", Linear(1.0, 0.0, 4), (2,))


# Order


@torch.no_grad()
def test_edits_at_one_hook_point_act_in_the_order_of_the_list(tiny, tiny_vectors, provenance):
    tokens = torch.tensor([encode(tiny, TEXT)])
    other = SteeringVectors({POST[1]: torch.randn(32, generator=torch.Generator().manual_seed(4))}, provenance)
    adding, removing = add(tiny_vectors, [1], 3.0), ablate(other)
    _, cache = tiny.run_with_cache(tokens)
    h, v, unit = cache[POST[1]], 3.0 * tiny_vectors[POST[1]], other[POST[1]] / other[POST[1]].norm()

    def without(h):
        return h - (h @ unit)[..., None] * unit

    by_hand = {"add, ablate": without(h + v), "ablate, add": without(h) + v}
    assert (by_hand["add, ablate"] - by_hand["ablate, add"]).abs().max() > 0.1
    for order, hooks in (("add, ablate", adding + removing), ("ablate, add", removing + adding)):
        with tiny.hooks(fwd_hooks=hooks):
            _, found = tiny.run_with_cache(tokens)
        torch.testing.assert_close(found[POST[1]], by_hand[order], atol=1e-4, rtol=1e-4)
    first, second = adding, removing
    with steered(tiny, first, second):
        _, found = tiny.run_with_cache(tokens)
    torch.testing.assert_close(found[POST[1]], by_hand["add, ablate"], atol=1e-4, rtol=1e-4)


def test_three_lists_at_one_hook_point_add_up_whatever_their_order(tiny, tiny_vectors):
    lists = [add(tiny_vectors, [0], dose) for dose in (0.5, -2.0, 4.0)]
    with steered(tiny, *lists):
        found = logits(tiny)
    with steered(tiny, *lists[::-1]):
        torch.testing.assert_close(logits(tiny), found, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found, logits(tiny, add(tiny_vectors, [0], 2.5)), atol=1e-4, rtol=1e-4)
    assert (found - logits(tiny)).abs().max() > 0.1


# What comes off again


def test_nested_blocks_take_off_their_own_hooks_only(tiny, tiny_vectors, hooks_on):
    baseline, outer, inner = logits(tiny), add(tiny_vectors, [0], 2.0), add(tiny_vectors, [0, 1], 1.0)
    with steered(tiny, outer) as given:
        assert given is tiny
        only_outer, on = logits(tiny), hooks_on(tiny)
        with pytest.raises(RuntimeError, match="mine"), steered(tiny, inner):  # noqa: PT012
            assert not torch.equal(logits(tiny), only_outer)
            raise RuntimeError("mine")
        assert hooks_on(tiny) == on
        assert torch.equal(logits(tiny), only_outer)
    assert not torch.equal(only_outer, baseline)
    assert not hooks_on(tiny)
    assert torch.equal(logits(tiny), baseline)


def test_an_edit_that_fails_leaves_no_hook(tiny, tiny_vectors, hooks_on):
    with (
        pytest.raises(ValueError, match=r"positions='generated' needs the end of the prompt"),
        steered(tiny, add(tiny_vectors, positions="generated")),
    ):
        logits(tiny)
    assert not hooks_on(tiny)


# What is refused


@pytest.mark.parametrize(("word", "near"), [("promt", "prompt"), ("generate", "generated"), ("lst", "last")])
def test_an_unknown_word_for_positions_is_refused_with_the_nearest(tiny_vectors, word, near, as_a_user):
    for bound in (add, add_preserving_norm, ablate, clamp):
        with pytest.raises(
            ValueError, match=rf"positions must be one of 'all', .*got '{word}'\. Did you mean '{near}'\?"
        ):
            bound(tiny_vectors, [0], positions=word)
    with pytest.raises(ValueError, match=rf"positions must be one of .*got '{word}'"):
        scale({POST[0]: 0.5}, positions=word)


@pytest.mark.parametrize("mask", [torch.tensor([1.0, 0.0]), torch.tensor([0, 1])])
def test_a_mask_that_is_not_boolean_is_refused(tiny_vectors, mask, as_a_user):
    with pytest.raises(
        ValueError, match=r"positions must be a boolean mask .*got a tensor of torch\.\w+ and shape \(2,\)"
    ):
        add(tiny_vectors, [0], positions=mask)


def test_what_is_no_place_and_no_strength_is_refused_with_the_mend(tiny_vectors, as_a_user):
    with pytest.raises(ValueError, match=r"positions must be token indices in a list, .*got 3"):
        add(tiny_vectors, [0], positions=3)
    for multiplier in ([1.0, 2.0], torch.tensor(2.0), torch.ones(2, 3)):
        with pytest.raises(ValueError, match=r"(?s)multiplier must be a finite number, or a tensor"):
            add(tiny_vectors, [0], multiplier)


def test_a_mask_of_three_axes_and_a_list_of_truths_are_refused_with_the_mend(tiny_vectors):
    with pytest.raises(
        ValueError, match=r"positions must be a boolean mask .*got a tensor of torch.bool and shape \(1, 1, 2\)"
    ):
        add(tiny_vectors, [0], positions=torch.ones(1, 1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"positions must be .*boolean tensor, got \[True, False\]\. .*torch\.tensor"):
        add(tiny_vectors, [0], positions=[True, False])


@pytest.mark.parametrize(("number", "row"), [(2, 5), (-3, 5), (4, 5)])
def test_a_number_past_the_end_names_the_row(tiny, tiny_vectors, number, row, hooks_on):
    batch = pad([[5] * 9, [5] * 2], 0)
    with (
        pytest.raises(
            ValueError,
            match=rf"positions contains {number}, but the prompt of row {row} has 2 tokens\. .* between -2 and 1",
        ),
        steered(tiny, add(tiny_vectors, positions=[0, number])),
        token_context(batch.mask, rows=[3, row]),
    ):
        tiny(batch.tokens, attention_mask=batch.mask)
    assert not hooks_on(tiny)


def test_a_mask_of_another_number_of_rows_is_refused(tiny, tiny_vectors):
    hooks = add(tiny_vectors, positions=torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"positions must be a mask .*the 2 rows of the batch, got 3 rows"):
        logits(tiny, hooks, rows=2)
    with (
        pytest.raises(ValueError, match=r"positions must be a mask .*the 5 rows of the batch, got 3 rows"),
        token_context(torch.ones(2, 6, dtype=torch.long), rows=[4, 1]),
    ):
        logits(tiny, hooks, rows=2)


@torch.no_grad()
def test_what_cannot_be_told_apart_is_refused_outside_rt_lenss_own_loops(tiny, tiny_vectors):
    whole, one = torch.tensor([encode(tiny, TEXT)]), torch.tensor([[5]])
    for positions, tokens in (("generated", whole), ("generated", one), ("last", one), ("prompt", one), ([0], one)):
        with (
            pytest.raises(ValueError, match=r"positions=.* rt_lens does not know where the prompt ends.*Use rt_lens's"),
            tiny.hooks(fwd_hooks=add(tiny_vectors, positions=positions)),
        ):
            tiny(tokens)
    with (
        pytest.raises(ValueError, match=r"schedule needs the end of the prompt"),
        tiny.hooks(fwd_hooks=add(tiny_vectors, schedule=Linear(1.0, 0.0, 3))),
    ):
        tiny(whole)
    with tiny.hooks(fwd_hooks=add(tiny_vectors, positions="last")), token_context(torch.ones_like(one)):
        said = tiny(one)
    assert (said - tiny(one)).abs().max() > 0.1


def test_zero_vectors_have_no_direction_to_remove_or_set(provenance, tiny_vectors):
    zero = SteeringVectors({POST[0]: torch.zeros(32)}, provenance)
    for bind in (lambda: ablate(zero), lambda: ablate([tiny_vectors, zero], [0]), lambda: clamp(zero, value=1.0)):
        with pytest.raises(
            ValueError, match=rf"vectors must have a direction to remove or set, got all zeros at {POST[0]}"
        ):
            bind()
    assert len(add(zero)) == 1  # adding nothing is no mistake


def test_erasing_needs_erasers(tiny_vectors):
    with pytest.raises(ValueError, match=r"vectors must carry erasers, got vectors by mean_diff, .*method='leace'"):
        erase(tiny_vectors)


def test_no_vectors_and_no_alphas_are_refused():
    with pytest.raises(ValueError, match=r"vectors must be at least one set of steering vectors, got an empty list"):
        ablate([])
    with pytest.raises(ValueError, match=r"alphas must be at least one hook name"):
        scale({})


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused_by_name(tiny_vectors, wrong):
    with pytest.raises(ValueError, match=rf"value must be a finite number, got {wrong}"):
        clamp(tiny_vectors, [0], wrong)
    with pytest.raises(ValueError, match=rf"alphas must be finite, got {wrong} for {POST[0]}"):
        scale({POST[0]: wrong})
    with pytest.raises(ValueError, match=rf"multiplier must be a finite number, .*got {wrong}"):
        scale({POST[0]: 1.0}, wrong)


def test_heads_of_a_residual_stream_and_heads_that_are_not_are_refused(tiny, tiny_vectors, provenance):
    with pytest.raises(ValueError, match=r"heads must be None .*activations of shape \(1, \d+, 32\)\. Use hook='z'"):
        logits(tiny, add(tiny_vectors, heads=[0]))
    z = SteeringVectors({"blocks.1.attn.hook_z": torch.ones(4, 8)}, provenance)
    for heads in ([4], [-1], [0, 9]):
        with pytest.raises(ValueError, match=r"heads must be in 0\.\.3, got "):
            logits(tiny, add(z, hook="z", heads=heads))
    assert not torch.equal(logits(tiny, add(z, hook="z", heads=[3])), logits(tiny))


def test_empty_lists_of_positions_and_heads_are_refused(tiny_vectors):
    with pytest.raises(ValueError, match=r"positions must be token indices in a list, .*got \[\]"):
        add(tiny_vectors, [0], positions=[])
    with pytest.raises(ValueError, match=r"heads must name at least one head"):
        add(tiny_vectors, [0], heads=[])


def test_part_of_a_component_is_removed_or_set_by_row(tiny, tiny_vectors):
    tokens, name = torch.tensor([encode(tiny, TEXT)] * 2), POST[1]
    unit = tiny_vectors[name] / tiny_vectors[name].norm()
    before = tiny.run_with_cache(tokens)[1][name] @ unit
    shares = torch.tensor([0.25, 1.0])
    for hooks, goal in (
        (ablate(tiny_vectors, [1], multiplier=shares), 0.0),
        (clamp(tiny_vectors, [1], 3.0, multiplier=shares), 3.0),
    ):
        with tiny.hooks(fwd_hooks=hooks):
            after = tiny.run_with_cache(tokens)[1][name] @ unit
        torch.testing.assert_close(after, before + shares[:, None] * (goal - before), atol=1e-4, rtol=1e-4)
        assert (after - before).abs().min() > 1e-3


def test_floats_as_positions_are_refused(tiny_vectors, as_a_user):
    with pytest.raises(ValueError, match=r"positions must be token indices in a list, .*got \[1\.5\]"):
        add(tiny_vectors, [0], positions=[1.5])


# Capping, turning and moving


def test_a_cap_at_a_quantile_of_texts_bites_on_the_rest_of_their_tokens_and_on_no_other(tiny, tiny_vectors):
    texts = [TEXT, "Two herons stood in the shallow water near the bank."]
    limits = projection_quantiles(tiny, tiny_vectors, texts, quantile=0.75)
    tokens = torch.tensor([encode(tiny, texts[1])])
    name = POST[1]
    unit = tiny_vectors[name] / tiny_vectors[name].norm()
    before = tiny.run_with_cache(tokens)[1][name] @ unit
    with tiny.hooks(fwd_hooks=cap(tiny_vectors, {name: limits[name]})):
        after = tiny.run_with_cache(tokens)[1][name] @ unit
    above = before > limits[name]
    assert above.any() and not above.all()
    torch.testing.assert_close(after, before.clamp(max=limits[name]), atol=1e-5, rtol=1e-5)
    read = [tiny.run_with_cache(torch.tensor([encode(tiny, text)]))[1][name][0, 1:] @ unit for text in texts]
    assert limits[name] == pytest.approx(float(torch.cat(read).quantile(0.75)), abs=1e-5)


def test_turning_keeps_the_norm_of_every_token_and_turns_towards_the_vector(tiny, tiny_vectors, provenance):
    others = SteeringVectors({POST[1]: torch.randn(32, generator=torch.Generator().manual_seed(5))}, provenance)
    tokens, name = torch.tensor([encode(tiny, TEXT)]), POST[1]
    before = tiny.run_with_cache(tokens)[1][name]
    with tiny.hooks(fwd_hooks=rotate(tiny_vectors, others, [1], angle=35.0)):
        after = tiny.run_with_cache(tokens)[1][name]
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1), atol=1e-4, rtol=1e-5)
    assert (after - before).norm(dim=-1).min() > 1e-2
    for layers, wrong, message in (
        ([1], tiny_vectors, "others must not be parallel to vectors, got the same direction at"),
        ([0], others, "others must have a vector at"),
    ):
        with pytest.raises(ValueError, match=message):
            rotate(tiny_vectors, wrong, layers)
    with pytest.raises(ValueError, match="angle must be a finite number of degrees, got nan"):
        rotate(tiny_vectors, others, [1], angle=float("nan"))


def test_transport_of_the_negative_side_reaches_the_positive_sides_means(tiny):
    pairs = load_pairs("mood").sample(6, seed=0)
    for toward, source, target in (("positive", 1, 0), ("negative", 0, 1)):
        maps = extract_transport(tiny, pairs, toward=toward, layers=[1])
        (sides,) = read_sides(tiny, pairs, [POST[1]], [position_of("last")])
        clouds = (sides.positive[POST[1]], sides.negative[POST[1]])
        ((_, edit),) = transport(maps)
        moved = edit(clouds[source][None], None)[0]
        assert (clouds[source].mean(0) - clouds[target].mean(0)).abs().max() > 1e-3
        torch.testing.assert_close(moved.mean(0), clouds[target].mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("as_a_user")
def test_a_side_that_there_is_not_is_refused(tiny):
    with pytest.raises(ValueError, match="toward must be 'positive' or 'negative', got 'up'"):
        extract_transport(tiny, load_pairs("mood").sample(2), toward="up")


def test_limits_and_quantiles_out_of_range_are_refused(tiny, tiny_vectors):
    for limits, message in (
        ({}, "limits must be at least one hook name"),
        ({POST[0]: float("inf")}, f"limits must be finite, got inf for {POST[0]}"),
        ({"blocks.7.hook_resid_post": 1.0}, "limits must be for hook points that have a vector, got blocks.7"),
    ):
        with pytest.raises(ValueError, match=message):
            cap(tiny_vectors, limits)
    with pytest.raises(ValueError, match="quantile must be from 0 to 1, got 99"):
        projection_quantiles(tiny, tiny_vectors, [TEXT], quantile=99)
    with pytest.raises(ValueError, match="maps must be at least one hook name"):
        transport({})
