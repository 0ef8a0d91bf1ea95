"""Edits of activations: their algebra, and that there was something to edit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rt_lens.vectors.methods import fit_transport
from rt_lens.vectors.operators import (
    Ablate,
    Add,
    AddPreservingNorm,
    Cap,
    Clamp,
    Erase,
    Operator,
    Rotate,
    Scale,
    Transport,
)

BATCH, POS, HEADS, D = 3, 5, 4, 8
SEEDS = st.integers(0, 10_000)
STRENGTHS = st.floats(-5, 5)
algebra = settings(deadline=None, max_examples=25)


def noise(seed: int) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm(dim=-1, keepdim=True)


def along(h: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Projection of each token (and head) on a direction."""
    return (h * unit(vector)).sum(-1)


def beside(h: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """What is orthogonal to a direction."""
    return h - along(h, vector)[..., None] * unit(vector)


def eraser(random: Callable[..., torch.Tensor], *shape: int) -> Erase:
    """An Erase with right . left = 1."""
    left, right, centre = random(*shape), random(*shape), random(*shape)
    left = left + right * (1.0 - (left * right).sum(-1, keepdim=True)) / (right * right).sum(-1, keepdim=True)
    return Erase(left, right, centre)


MAKERS: dict[str, Callable[..., Operator]] = {
    "add": lambda random, *shape: Add(random(*shape)),
    "add_preserving_norm": lambda random, *shape: AddPreservingNorm(random(*shape)),
    "ablate": lambda random, *shape: Ablate(random(1, *shape)),
    "ablate_subspace": lambda random, *shape: Ablate(random(3, *shape)),
    "clamp": lambda random, *shape: Clamp(random(*shape), 1.75),
    "scale": lambda random, *shape: Scale(0.7),
    "scale_dimensions": lambda random, *shape: Scale(0.5 + random(D).abs()),
    "scale_heads": lambda random, *shape: Scale(0.5 + random(*shape[:-1], 1).abs()),
    "erase": eraser,
    "cap": lambda random, *shape: Cap(random(*shape), -1.5),
    "rotate": lambda random, *shape: Rotate(random(*shape), random(*shape), 40.0),
    "transport": lambda random, *shape: Transport(1 + 0.5 * random(*shape), random(*shape)),
}
NOT_AFFINE = ("add_preserving_norm", "cap")
EVERY = pytest.mark.parametrize("kind", MAKERS)
SHAPES = pytest.mark.parametrize("shape", [(D,), (HEADS, D)], ids=["residual", "per head"])
AFFINE = pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind not in NOT_AFFINE])


def made(kind: str, shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, Operator]:
    """Activations, and an operator for them, in double precision."""
    random = noise(seed)
    return random(BATCH, POS, *shape), MAKERS[kind](random, *shape)


# What holds for every operator


@EVERY
@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@algebra
@given(seed=SEEDS)
def test_strength_0_changes_nothing_bit_for_bit_and_strength_1_something(kind, shape, dtype, seed):
    h, operator = made(kind, shape, seed)
    h = h.to(dtype)
    assert torch.equal(operator(h, 0.0), h)
    assert torch.equal(operator(h, torch.tensor(0.0)), h)
    assert torch.equal(operator(h, torch.zeros(BATCH, POS)), h)
    assert (operator(h, 1.0) - h).abs().max() > 0.1


@EVERY
@SHAPES
def test_strength_is_1_unless_said(kind, shape):
    h, operator = made(kind, shape)
    assert torch.equal(operator(h), operator(h, 1.0))


@EVERY
@SHAPES
@algebra
@given(seed=SEEDS, doses=st.lists(st.sampled_from([0.0, 1.0]) | st.floats(-3, 3, width=32), min_size=5, max_size=5))
def test_a_strength_for_each_row_token_or_head_equals_separate_calls(kind, shape, seed, doses):
    h, operator = made(kind, shape, seed)
    rows, tokens = torch.tensor(doses[:BATCH]), torch.tensor([doses, doses[::-1], [0.5, *doses[1:]]])
    by_row, by_token = operator(h, rows), operator(h, tokens)
    for row in range(BATCH):
        alone = operator(h[row : row + 1], rows[row].item())
        torch.testing.assert_close(by_row[row : row + 1], alone, atol=1e-12, rtol=1e-12)
        for token in range(POS):
            alone = operator(h[row : row + 1, token : token + 1], tokens[row, token].item())[0, 0]
            torch.testing.assert_close(by_token[row, token], alone, atol=1e-12, rtol=1e-12)
    assert torch.equal(by_row[rows == 0], h[rows == 0])
    assert torch.equal(by_token[tokens == 0], h[tokens == 0])
    assert not torch.equal(operator(h, torch.tensor([0.0, 1.0, 0.0]))[1], h[1])
    if len(shape) == 2:
        heads = torch.tensor(doses[:HEADS]).expand(BATCH, POS, HEADS)
        by_head = operator(h, heads)
        for head in range(HEADS):
            alone = operator(h, doses[head])[:, :, head]
            torch.testing.assert_close(by_head[:, :, head], alone, atol=1e-12, rtol=1e-12)
        assert torch.equal(by_head[heads == 0], h[heads == 0])


@EVERY
@SHAPES
def test_the_input_is_not_written_to(kind, shape):
    h, operator = made(kind, shape)
    parts = [value for value in vars(operator).values() if isinstance(value, torch.Tensor)]
    before = [part.clone() for part in (h, *parts)]
    assert not torch.equal(operator(h, 2.0), h)
    assert all(torch.equal(now, was) for now, was in zip((h, *parts), before, strict=True))


@EVERY
@SHAPES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_activations_keep_their_dtype_and_the_edit_is_the_same_up_to_rounding(kind, shape, dtype):
    h, operator = made(kind, shape)
    exact = operator(h, 0.5)
    for strength in (0.5, torch.full((BATCH,), 0.5), torch.full((BATCH, POS), 0.5, dtype=torch.float64)):
        found = operator(h.to(dtype), strength)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, atol=40 * torch.finfo(dtype).eps, rtol=0)


@EVERY
@SHAPES
@algebra
@given(seed=SEEDS, strength=st.floats(0.1, 2))
def test_gradients_of_activations_and_strength_are_those_of_finite_differences(kind, shape, seed, strength):
    h, operator = made(kind, shape, seed)
    h = h[:1, :2].requires_grad_()
    doses = torch.full((1, 2), strength, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(operator, (h, doses))


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if not kind.startswith("scale")])
@pytest.mark.parametrize(("shape", "made_for"), [((D,), "8"), ((HEADS, D), "4 x 8")], ids=["residual", "per head"])
@pytest.mark.parametrize("width", [(12,), (HEADS, 6), (3, D)])
def test_another_width_is_refused_with_both_widths_and_a_fix(kind, shape, made_for, width):
    _, operator = made(kind, shape)
    has = " x ".join(map(str, width))
    message = (
        rf"extracted from a model with d_model {made_for}; these activations have {has}\. Extract vectors from this"
    )
    with pytest.raises(ValueError, match=message):
        operator(torch.ones(2, POS, *width))


@EVERY
@SHAPES
@pytest.mark.parametrize("strength", [torch.ones(BATCH + 1), torch.ones(BATCH, POS + 1), torch.ones(POS, BATCH)])
def test_strengths_of_another_shape_than_the_rows_and_tokens_are_refused(kind, shape, strength):
    h, operator = made(kind, shape)
    with pytest.raises(
        ValueError, match=r"strength must fit activations of shape \(3, 5, .*, got shape \(.*\)\. Give one number, or"
    ):
        operator(h, strength)


@EVERY
@SHAPES
def test_a_strength_for_each_dimension_is_refused(kind, shape):
    h, operator = made(kind, shape)
    for strength in (torch.ones_like(h), torch.ones(1, *h.shape)):
        with pytest.raises(
            ValueError, match=r"strength must fit .*Give one number, or one for each row, token or head"
        ):
            operator(h, strength)


@EVERY
def test_an_operator_is_frozen_and_known_as_one(kind):
    _, operator = made(kind, (D,))
    assert isinstance(operator, Operator)
    name = dataclasses.fields(operator)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(operator, name, torch.ones(D))


# As an affine map


@AFFINE
@SHAPES
@algebra
@given(seed=SEEDS, strength=STRENGTHS)
def test_the_affine_map_is_the_call_and_its_transpose_the_gradient(kind, shape, seed, strength):
    h, operator = made(kind, shape, seed)
    h.requires_grad_()
    matrix, offset = operator.affine(strength, shape)
    assert matrix.shape == (*shape, D) and offset.shape == shape
    matrix, offset = matrix.double(), offset.double()
    found = operator(h, strength)
    torch.testing.assert_close(
        torch.einsum("...d,...de->...e", h, matrix) + offset, found, atol=1e-5 if kind == "scale" else 1e-10, rtol=0
    )  # one number for alpha is a float32 in the map
    upstream = noise(seed + 1)(*h.shape)
    (gradient,) = torch.autograd.grad(found, h, upstream)
    wanted = torch.einsum("...e,...de->...d", upstream, matrix)
    torch.testing.assert_close(gradient, wanted, atol=1e-5 if kind == "scale" else 1e-10, rtol=0)


@AFFINE
@SHAPES
def test_the_affine_map_of_strength_0_is_the_identity_and_of_1_is_not(kind, shape):
    _, operator = made(kind, shape)
    identity = torch.eye(D).expand(*shape, D)
    matrix, offset = (part.float() for part in operator.affine(0.0, shape))
    assert torch.equal(matrix, identity) and not offset.any()
    matrix, offset = operator.affine(1.0, shape)
    assert not torch.equal(matrix.float(), identity) or offset.abs().max() > 0.1


@SHAPES
@pytest.mark.parametrize("kind", NOT_AFFINE)
def test_adding_with_the_norm_kept_and_capping_are_no_affine_maps(shape, kind):
    h, operator = made(kind, shape)
    operator = dataclasses.replace(operator, limit=0.0) if isinstance(operator, Cap) else operator  # amid the tokens
    assert operator.affine(1.0, shape) is None
    halfway = operator((h[:1] + h[1:2]) / 2)
    assert (halfway - (operator(h[:1]) + operator(h[1:2])) / 2).abs().max() > 0.01  # an affine map keeps midpoints


# Add


@algebra
@given(SEEDS, st.floats(-20, 20))
def test_adding_and_taking_away_cancel_and_there_was_an_effect(seed, strength):
    h, operator = made("add", (D,), seed)
    there = operator(h, strength)
    torch.testing.assert_close(operator(there, -strength), h, atol=1e-10, rtol=0)
    torch.testing.assert_close(Add(-operator.vector)(there, strength), h, atol=1e-10, rtol=0)
    if abs(strength) > 0.1:
        assert (there - h).norm(dim=-1).min() > 0.05 * operator.vector.norm()


@algebra
@given(SEEDS, STRENGTHS, STRENGTHS)
def test_strengths_of_adding_add_up(seed, first, second):
    h, operator = made("add", (HEADS, D), seed)
    twice = operator(operator(h, first), second)
    torch.testing.assert_close(twice, operator(h, first + second), atol=1e-10, rtol=0)


@SHAPES
def test_the_projection_grows_by_the_multiple_at_every_token_and_nothing_else_moves(shape):
    h, operator = made("add", shape)
    after, vector = operator(h, 1.5), operator.vector
    torch.testing.assert_close(along(after, vector) - along(h, vector), 1.5 * vector.norm(dim=-1).expand(h.shape[:-1]))
    torch.testing.assert_close(beside(after, vector), beside(h, vector), atol=1e-12, rtol=0)


# Add, norm kept


@SHAPES
@algebra
@given(seed=SEEDS, strength=st.floats(0.1, 5))
def test_every_token_keeps_its_norm_and_turns_towards_the_vector(shape, seed, strength):
    h, operator = made("add_preserving_norm", shape, seed)
    after, vector = operator(h, strength), operator.vector
    torch.testing.assert_close(after.norm(dim=-1), h.norm(dim=-1), atol=1e-12, rtol=1e-12)
    assert (along(after, vector) > along(h, vector)).all()
    assert (along(operator(h, -strength), vector) < along(h, vector)).all()
    assert ((Add(vector)(h, strength).norm(dim=-1) / h.norm(dim=-1) - 1).abs() > 1e-6).any()  # there was a norm to mend
    torch.testing.assert_close(unit(after), unit(Add(vector)(h, strength)), atol=1e-12, rtol=0)


def test_a_vector_that_cancels_a_token_gives_zero_and_no_nan():
    h = torch.randn(1, 2, D, dtype=torch.float64)
    h[0, 1] = 3.0
    h.requires_grad_()
    after = AddPreservingNorm(torch.full((D,), -3.0))(h)
    assert not after[0, 1].any() and after[0, 0].any()
    after.sum().backward()
    assert torch.isfinite(after).all() and torch.isfinite(h.grad).all()
    half = AddPreservingNorm(torch.full((D,), -3.0))(h.detach().half())  # whose smallest number is far above 1e-30
    assert not half[0, 1].any() and torch.isfinite(half).all()


# Ablate


@SHAPES
@pytest.mark.parametrize("k", [1, 3])
@algebra
@given(seed=SEEDS)
def test_ablating_leaves_no_projection_where_there_was_some_and_the_rest_as_it_was(shape, k, seed):
    random = noise(seed)
    h, directions, orthogonal = random(BATCH, POS, *shape), random(k, *shape), random(*shape)
    operator = Ablate(directions)
    after = operator(h)
    for direction in directions:
        assert along(h, direction).abs().max() > 0.1
        assert along(after, direction).abs().max() < 1e-10
    for direction in directions.movedim(0, -2).reshape(-1, k, D):
        assert torch.linalg.matrix_rank(direction) == k
    basis, _ = torch.linalg.qr(directions.movedim(0, -2).mT)  # an independent way to the span
    orthogonal = orthogonal - torch.einsum("...dk,...ek,...e->...d", basis, basis, orthogonal)
    torch.testing.assert_close(along(after, orthogonal), along(h, orthogonal), atol=1e-10, rtol=0)
    if k == 1:
        torch.testing.assert_close(beside(after, directions[0]), beside(h, directions[0]), atol=1e-10, rtol=0)


@SHAPES
@pytest.mark.parametrize("kind", ["ablate", "ablate_subspace", "clamp", "erase", "cap"])
@algebra
@given(seed=SEEDS)
def test_ablating_clamping_erasing_and_capping_twice_is_once(shape, kind, seed):
    h, operator = made(kind, shape, seed)
    once = operator(h)
    assert (once - h).abs().max() > 0.05
    torch.testing.assert_close(operator(once), once, atol=1e-9, rtol=0)


@SHAPES
@algebra
@given(seed=SEEDS, first=STRENGTHS, second=STRENGTHS)
def test_directions_that_depend_on_others_change_nothing(shape, seed, first, second):
    random = noise(seed)
    h, pair = random(BATCH, POS, *shape), random(2, *shape)
    dependent = torch.stack([pair[0], pair[1], first * pair[0] + second * pair[1], torch.zeros(shape)])
    torch.testing.assert_close(Ablate(dependent)(h), Ablate(pair)(h), atol=1e-9, rtol=0)
    torch.testing.assert_close(Ablate(dependent.float())(h), Ablate(pair.float())(h), atol=1e-4, rtol=0)
    assert (Ablate(pair)(h) - Ablate(pair[:1])(h)).abs().max() > 1e-3


@algebra
@given(seed=SEEDS, first=st.floats(-12, 12), second=st.floats(-12, 12))
def test_the_lengths_and_signs_of_the_directions_do_not_matter(seed, first, second):
    h, operator = made("ablate_subspace", (D,), seed)
    longer = operator.directions * torch.tensor([10.0**first, -(10.0**second), 1.0])[:, None]
    torch.testing.assert_close(Ablate(longer)(h), operator(h), atol=1e-9, rtol=0)


def test_a_head_whose_direction_is_zero_stays_as_it_is():
    h, operator = made("ablate", (HEADS, D))
    directions = operator.directions.clone()
    directions[:, 1] = 0
    after = Ablate(directions)(h)
    assert torch.equal(after[:, :, 1], h[:, :, 1])
    torch.testing.assert_close(after[:, :, [0, 2, 3]], operator(h)[:, :, [0, 2, 3]])


def test_heads_know_nothing_of_each_other():
    h, operator = made("ablate_subspace", (HEADS, D))
    after = operator(h)
    for head in range(HEADS):
        alone = Ablate(operator.directions[:, head])(h[:, :, head])
        torch.testing.assert_close(after[:, :, head], alone, atol=1e-12, rtol=0)


def test_half_an_ablation_leaves_half_the_projection():
    h, operator = made("ablate", (D,))
    (direction,) = operator.directions
    torch.testing.assert_close(along(operator(h, 0.5), direction), along(h, direction) / 2)


# Clamp


@SHAPES
@algebra
@given(seed=SEEDS, value=st.floats(-20, 20), length=st.floats(0.01, 100))
def test_clamping_reaches_the_value_and_leaves_what_is_orthogonal(shape, seed, value, length):
    random = noise(seed)
    h, direction = random(BATCH, POS, *shape), random(*shape)
    assert along(h, direction).std() > 0.1
    after = Clamp(length * direction, value)(h)
    torch.testing.assert_close(
        along(after, direction), torch.full(h.shape[:-1], value, dtype=h.dtype), atol=1e-10, rtol=0
    )
    torch.testing.assert_close(beside(after, direction), beside(h, direction), atol=1e-10, rtol=0)


def test_clamping_at_0_is_ablating():
    h, operator = made("clamp", (HEADS, D))
    clamped = Clamp(operator.direction, 0.0)(h)
    torch.testing.assert_close(clamped, Ablate(operator.direction[None])(h))
    assert not torch.allclose(clamped, operator(h))


# Scale


@SHAPES
@pytest.mark.parametrize("kind", ["scale", "scale_dimensions", "scale_heads"])
@algebra
@given(seed=SEEDS, strength=STRENGTHS)
def test_scaling_with_opposite_strengths_is_opposite(shape, kind, seed, strength):
    h, operator = made(kind, shape, seed)
    more, less = operator(h, strength) - h, operator(h, -strength) - h
    torch.testing.assert_close(more, -less, atol=1e-12, rtol=0)
    torch.testing.assert_close(more, strength * operator.alpha * h, atol=1e-12, rtol=0)
    if abs(strength) > 0.1:
        assert more.abs().max() > 1e-3


def test_scaling_by_head_scales_each_head_by_its_own():
    h, _ = made("scale_heads", (HEADS, D))
    after = Scale(torch.tensor([[0.0], [1.0], [-1.0], [0.5]]))(h)
    torch.testing.assert_close(after, torch.stack([h[:, :, 0], 2 * h[:, :, 1], 0 * h[:, :, 2], 1.5 * h[:, :, 3]], 2))


@pytest.mark.parametrize(
    ("alpha", "width"),
    [((POS, 1), (D,)), ((BATCH, 1, 1), (D,)), ((D - 1,), (D,)), ((POS, 1), (HEADS, D)), ((HEADS,), (HEADS, D))],
)
def test_factors_that_fit_no_head_or_dimension_are_refused_even_where_they_fit_the_tokens(alpha, width):
    h, operator = torch.ones(BATCH, POS, *width), Scale(torch.ones(alpha))
    has = " x ".join(map(str, width))
    for refused in (lambda: operator(h), lambda: operator.affine(1.0, width)):
        with pytest.raises(
            ValueError, match=rf"alpha must fit activations of {has}, got shape \(.*\)\. Give one number"
        ):
            refused()


# Erase


@SHAPES
@algebra
@given(seed=SEEDS)
def test_erasing_leaves_a_probe_nothing_to_read_where_it_read_some(shape, seed):
    h, operator = made("erase", shape, seed)

    def read(activations: torch.Tensor) -> torch.Tensor:
        return ((activations - operator.centre) * operator.right).sum(-1)

    torch.testing.assert_close((operator.right * operator.left).sum(-1), torch.ones(shape[:-1]).double())
    assert read(h).abs().max() > 0.1
    assert read(operator(h)).abs().max() < 1e-9
    torch.testing.assert_close(beside(operator(h), operator.left), beside(h, operator.left), atol=1e-9, rtol=0)


# Order


@algebra
@given(SEEDS, st.floats(0.5, 5))
def test_adding_then_ablating_is_not_ablating_then_adding(seed, strength):
    h, adding = made("add", (D,), seed)
    ablating = Ablate(adding.vector[None])
    torch.testing.assert_close(ablating(adding(h, strength)), ablating(h), atol=1e-9, rtol=0)
    apart = ablating(adding(h, strength)) - adding(ablating(h), strength)
    torch.testing.assert_close(apart, (-strength * adding.vector).expand_as(apart), atol=1e-9, rtol=0)
    assert apart.norm(dim=-1).min() > 0.1


@algebra
@given(SEEDS, STRENGTHS, STRENGTHS)
def test_edits_in_orthogonal_directions_come_in_any_order(seed, strength, value):
    random = noise(seed)
    h, direction = random(BATCH, POS, D), random(D)
    other = beside(random(D), direction)
    adding, edits = Add(other), [Ablate(direction[None]), Clamp(direction, value)]
    for edit in edits:
        there, back = edit(adding(h, strength)), adding(edit(h), strength)
        torch.testing.assert_close(there, back, atol=1e-9, rtol=0)
    first, second = Ablate(direction[None]), Ablate(other[None])
    torch.testing.assert_close(first(second(h)), second(first(h)), atol=1e-9, rtol=0)
    torch.testing.assert_close(first(second(h)), Ablate(torch.stack([direction, other]))(h), atol=1e-9, rtol=0)
    assert not torch.allclose(first(second(h)), first(h))


def test_ablating_slanted_directions_one_after_the_other_depends_on_the_order():
    random: Any = noise(5)
    h, pair = random(BATCH, POS, D), random(2, D)
    assert abs(torch.cosine_similarity(*pair, dim=0)) > 0.1
    first, second, both = Ablate(pair[:1]), Ablate(pair[1:]), Ablate(pair)
    assert not torch.allclose(first(second(h)), second(first(h)))
    assert along(second(first(h)), pair[0]).abs().max() > 0.01  # the second brings the first one back
    assert along(both(h), pair[0]).abs().max() < 1e-10


# Cap


@SHAPES
@algebra
@given(seed=SEEDS)
def test_capping_leaves_no_projection_above_the_limit_where_there_was_some_and_the_rest_bit_for_bit(shape, seed):
    h, operator = made("cap", shape, seed)
    operator = dataclasses.replace(operator, limit=0.1)
    after, before = operator(h), along(h, operator.direction)
    above = before > operator.limit
    assert above.any() and not above.all()
    torch.testing.assert_close(along(after, operator.direction), before.clamp(max=operator.limit), atol=1e-12, rtol=0)
    torch.testing.assert_close(beside(after, operator.direction), beside(h, operator.direction), atol=1e-12, rtol=0)
    assert torch.equal(after[~above], h[~above])
    floor = Cap(-operator.direction, -operator.limit)(h)
    torch.testing.assert_close(along(floor, operator.direction), before.clamp(min=operator.limit), atol=1e-12, rtol=0)


# Rotate


@SHAPES
@algebra
@given(seed=SEEDS, first=STRENGTHS, second=STRENGTHS)
def test_rotating_keeps_every_norm_adds_up_and_turns_back(shape, seed, first, second):
    h, operator = made("rotate", shape, seed)
    there = operator(h, first)
    torch.testing.assert_close(there.norm(dim=-1), h.norm(dim=-1), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(operator(there, second), operator(h, first + second), atol=1e-10, rtol=0)
    torch.testing.assert_close(operator(there, -first), h, atol=1e-10, rtol=0)
    off_plane = beside(beside(h, operator.basis[0]), operator.basis[1])
    after = beside(beside(there, operator.basis[0]), operator.basis[1])
    torch.testing.assert_close(after, off_plane, atol=1e-12, rtol=0)


@SHAPES
def test_the_start_turned_by_the_angle_between_the_two_is_the_end(shape):
    random = noise(3)
    start, end = unit(random(*shape)), unit(random(*shape))
    angles = torch.rad2deg(torch.arccos((start * end).sum(-1)))
    for angle in angles.reshape(-1):
        turned = Rotate(start, end, float(angle))(start.expand(1, 1, *shape))[0, 0]
        fits = (angles - angle).abs() < 1e-9
        torch.testing.assert_close(turned[fits], end[fits], atol=1e-10, rtol=0)
        assert ((turned - start).norm(dim=-1) > 0.1).all()


# Transport


@algebra
@given(SEEDS, st.integers(5, 40), st.integers(5, 40))
def test_a_fitted_line_moves_the_mean_exactly_and_is_the_least_squares_fit_of_sorted_values(seed, n, m):
    random = noise(seed)
    source, target = random(n, D), 2.0 + 0.3 * random(m, D)
    omega, beta = fit_transport(source, target)
    moved = Transport(omega, beta)(source[None])[0]
    assert (source.mean(0) - target.mean(0)).abs().max() > 0.5
    torch.testing.assert_close(moved.mean(0), target.mean(0), atol=1e-10, rtol=0)
    assert (omega >= 0).all()
    if n == m:
        for d in range(D):
            a, b = np.sort(source[:, d].numpy()), np.sort(target[:, d].numpy())
            slope, offset = np.polyfit(a, b, 1)
            assert float(omega[d]) == pytest.approx(slope, abs=1e-9) and float(beta[d]) == pytest.approx(
                offset, abs=1e-9
            )


@algebra
@given(SEEDS)
def test_a_line_between_two_clouds_is_found_whatever_the_order_of_the_rows(seed):
    random = noise(seed)
    source, slope, offset = random(30, D), 0.5 + random(D).abs(), random(D)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    omega, beta = fit_transport(source, (slope * source + offset)[order])
    torch.testing.assert_close(omega, slope, atol=1e-9, rtol=0)
    torch.testing.assert_close(beta, offset, atol=1e-9, rtol=0)


def test_a_coordinate_that_does_not_vary_is_moved_and_not_stretched():
    source, target = torch.tensor([[1.0, 2.0], [1.0, 4.0]]), torch.tensor([[5.0, 0.0], [7.0, 1.0]])
    omega, beta = fit_transport(source, target)
    assert omega.tolist() == [1.0, 0.5] and beta.tolist() == [5.0, -1.0]
    with pytest.raises(ValueError, match="source must have at least 2 rows, got 1"):
        fit_transport(source[:1], target)
