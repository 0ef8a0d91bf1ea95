"""Losses against values worked out by hand, their gradients, and their ranges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rt_lens.models.divergence import kl_divergence
from rt_lens.tuning.losses import cosine_loss, token_loss

SEEDS = st.integers(0, 10_000)
DIRECTIONS = ("toward", "away", "suppress")


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    ("h", "direction", "value"),
    [
        ([3.0, 0.0], "toward", 0.0),
        ([-2.0, 0.0], "toward", 1.0),
        ([0.0, 5.0], "toward", 0.5),
        ([1.0, 1.0], "toward", (1 - math.sqrt(0.5)) / 2),
        ([3.0, 0.0], "away", 1.0),
        ([-2.0, 0.0], "away", 0.0),
        ([0.0, 5.0], "away", 0.5),
        ([3.0, 0.0], "suppress", 1.0),
        ([-2.0, 0.0], "suppress", 1.0),
        ([0.0, 5.0], "suppress", 0.0),
        ([3.0, 4.0], "suppress", 0.6),
        ([-3.0, 4.0], "suppress", 0.6),
    ],
)
def test_cosine_loss_by_hand(h, direction, value):
    loss = cosine_loss(torch.tensor([h]), torch.tensor([7.0, 0.0]), direction)
    assert loss.item() == pytest.approx(value, abs=1e-6)


def test_cosine_loss_is_one_value_for_each_position():
    h = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(cosine_loss(h, torch.tensor([1.0, 0.0]), "toward"), torch.tensor([0.0, 1.0, 0.5, 0.0]))


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.floats(0.01, 100))
def test_cosine_loss_stays_between_0_and_1_and_ignores_lengths(seed, scale):
    h, vector = random(seed, 6, 5), random(seed + 1, 5)
    for direction in DIRECTIONS:
        loss = cosine_loss(h, vector, direction)
        assert loss.shape == (6,)
        assert -1e-6 <= loss.min() <= loss.max() <= 1 + 1e-6
        torch.testing.assert_close(cosine_loss(scale * h, vector / scale, direction), loss, atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=40)
@given(SEEDS)
def test_toward_and_away_sum_to_1_and_mirror_each_other(seed):
    h, vector = random(seed, 6, 5), random(seed + 1, 5)
    toward, away = cosine_loss(h, vector, "toward"), cosine_loss(h, vector, "away")
    torch.testing.assert_close(toward + away, torch.ones(6))
    torch.testing.assert_close(cosine_loss(h, -vector, "toward"), away)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("centred", [False, True])
def test_cosine_loss_gradient(direction, centred):
    h, vector, centre = (random(seed, *shape, dtype=torch.float64) for seed, shape in enumerate([(4, 5), (5,), (5,)]))
    centre = centre if centred else None
    assert torch.autograd.gradcheck(lambda x: cosine_loss(x, vector, direction, centre), h.requires_grad_())


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_step_down_the_gradient_moves_the_cosine_the_way_the_direction_says(direction):
    h, vector = random(0, 4, 5).requires_grad_(), random(1, 5)
    cosine_loss(h, vector, direction).sum().backward()
    before = torch.cosine_similarity(h.detach(), vector[None])
    change = torch.cosine_similarity((h - 0.1 * h.grad).detach(), vector[None]) - before
    wanted = {"toward": torch.ones(4), "away": -torch.ones(4), "suppress": -before.sign()}[direction]
    assert (change * wanted > 0).all()


def test_a_centre_removes_a_common_offset_and_without_it_the_offset_hides_the_direction():
    h, vector, offset = random(0, 64, 16), random(1, 16), 1000 * torch.eye(16)[3]
    clean = cosine_loss(h + vector, vector, "toward")
    centred = cosine_loss(h + vector + offset, vector, "toward", offset)
    raw = cosine_loss(h + vector + offset, vector, "toward")
    raw_against = cosine_loss(h - vector + offset, vector, "toward")
    torch.testing.assert_close(centred, clean, atol=1e-4, rtol=0)
    assert (raw - clean).mean().abs() > 0.05
    assert (raw - raw_against).abs().max() < 0.01
    assert (clean - cosine_loss(h - vector, vector, "toward")).abs().mean() > 0.1


def test_an_unknown_direction_is_refused_by_name():
    unchecked = cosine_loss
    while hasattr(unchecked, "__wrapped__"):  # without the tests' type checker, as a user runs it
        unchecked = unchecked.__wrapped__
    with pytest.raises(ValueError, match=r"direction must be 'toward', 'away' or 'suppress', got 'up'"):
        unchecked(random(0, 2, 3), random(1, 3), "up")


def hard(*tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One target token at each position."""
    return torch.tensor(tokens)[:, None], torch.ones(len(tokens), 1)


# Four positions: the usual target, a soft choice of two, three shares, and a hard one filled up with a share of 0.
CHOICES = torch.tensor([[4, 0, 0], [1, 2, 0], [0, 3, 5], [5, 4, 0]])
SHARES = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
FLOORS = torch.tensor([0.0, math.log(2), -sum(share * math.log(share) for share in (0.2, 0.3, 0.5)), 0.0])


def test_token_loss_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    torch.testing.assert_close(token_loss(logits, *hard(0, 2)), -torch.log(torch.tensor([0.5, 0.8])))
    torch.testing.assert_close(token_loss(torch.zeros(3, 7), *hard(0, 3, 6)), torch.full((3,), math.log(7)))
    soft = token_loss(logits[:1], torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]))
    assert soft.item() == pytest.approx(-(math.log(0.5) + math.log(0.25)) / 2)


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.integers(1, 4))
def test_token_loss_with_all_of_the_share_on_one_token_is_torchs_cross_entropy(seed, k):
    logits, column = random(seed, 5, 9), seed % k
    choices = torch.randint(9, (5, k), generator=torch.Generator().manual_seed(seed))
    shares = torch.zeros(5, k).index_fill(1, torch.tensor(column), 1.0)
    expected = torch.nn.functional.cross_entropy(logits, choices[:, column], reduction="none")
    torch.testing.assert_close(token_loss(logits, choices, shares), expected)


def test_token_loss_with_shares_is_torchs_cross_entropy_of_a_distribution():
    logits = random(0, 4, 6)
    wanted = torch.zeros(4, 6).scatter_add(1, CHOICES, SHARES)
    expected = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    torch.testing.assert_close(token_loss(logits, CHOICES, SHARES), expected)


def test_a_token_without_share_may_be_impossible():
    logits = random(0, 1, 4).index_fill(1, torch.tensor(3), -math.inf)
    loss = token_loss(logits, torch.tensor([[0, 3]]), torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(loss, token_loss(logits, *hard(0)))


@pytest.mark.parametrize("rest", [0.0, 0.5])
def test_token_loss_gradient(rest):
    """Hard, soft, three shares, filled up; with and without a rest, which no position is within here."""
    logits = random(0, 4, 6, dtype=torch.float64).requires_grad_()
    assert (token_loss(logits, CHOICES, SHARES.double()) - FLOORS).min() > 0.5
    assert torch.autograd.gradcheck(lambda x: token_loss(x, CHOICES, SHARES.double(), rest), logits)


def test_the_floor_is_the_entropy_of_the_shares_and_that_of_a_soft_choice_ln_2():
    """Nothing is below the floor, and the logits that give the shares themselves are at it."""
    at_floor = torch.log(torch.zeros(4, 6).scatter_add(1, CHOICES, SHARES) + 1e-12)
    torch.testing.assert_close(token_loss(at_floor, CHOICES, SHARES), FLOORS, atol=1e-5, rtol=0)
    assert token_loss(at_floor, CHOICES, SHARES)[1].item() == pytest.approx(math.log(2), abs=1e-6)
    for seed in range(20):
        assert (token_loss(3 * random(seed, 4, 6), CHOICES, SHARES) > FLOORS).all()


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.floats(0.05, 2.0))
def test_within_the_rest_a_position_has_exactly_no_gradient_and_outside_it_its_own(seed, rest):
    logits = (2 * random(seed, 4, 6)).requires_grad_()
    free = token_loss(logits, CHOICES, SHARES)
    (expected,) = torch.autograd.grad(free.sum(), logits)
    resting = token_loss(logits, CHOICES, SHARES, rest)
    (found,) = torch.autograd.grad(resting.sum(), logits)
    within = free.detach() < FLOORS + rest
    assert torch.equal(found[within], torch.zeros_like(found[within]))
    assert torch.equal(found[~within], expected[~within])
    assert (expected.abs().amax(1) > 0).all()
    torch.testing.assert_close(resting, torch.where(within, FLOORS + rest, free))


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.floats(0.1, 10))
def test_kl_equals_the_sum_written_out_in_float64(seed, scale):
    logits, reference = scale * random(seed, 4, 9), scale * random(seed + 1, 4, 9)
    q, p = (torch.softmax(x.double(), -1) for x in (logits, reference))
    expected = (p * (p / q).log()).sum(-1)
    found = kl_divergence(logits.log_softmax(-1), reference.log_softmax(-1))
    assert found.shape == (4,)
    assert (found >= 0).all()
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)


def test_kl_of_a_distribution_with_itself_is_0_and_with_another_is_not():
    own, other = (random(seed, 4, 9).log_softmax(-1) for seed in (0, 1))
    assert torch.equal(kl_divergence(own, own), torch.zeros(4))
    assert kl_divergence(other, own).min() > 1e-3


def test_kl_by_hand_and_its_direction():
    reference, ours = torch.log(torch.tensor([[0.5, 0.5]])), torch.log(torch.tensor([[0.9, 0.1]]))
    assert kl_divergence(ours, reference).item() == pytest.approx(
        0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5), abs=1e-6
    )
    assert kl_divergence(reference, ours).item() == pytest.approx(
        0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5), abs=1e-6
    )


def test_kl_gradient_of_both_sides():
    logits, reference = (random(seed, 3, 6, dtype=torch.float64).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(
        lambda x, y: kl_divergence(x.log_softmax(-1), y.log_softmax(-1)), (logits, reference)
    )
    grads = torch.autograd.grad(
        kl_divergence(logits.log_softmax(-1), reference.log_softmax(-1)).sum(), (logits, reference)
    )
    assert all(grad.abs().max() > 0.01 for grad in grads)
