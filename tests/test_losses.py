"""Losses against values worked out by hand, their gradients, and their ranges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rt_lens.losses import cosine_loss, kl_divergence, token_loss

SEEDS = st.integers(0, 10_000)
DIRECTIONS = ("toward", "away", "out")


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
        ([3.0, 0.0], "out", 1.0),
        ([-2.0, 0.0], "out", 1.0),
        ([0.0, 5.0], "out", 0.0),
        ([3.0, 4.0], "out", 0.6),
        ([-3.0, 4.0], "out", 0.6),
    ],
)
def test_cosine_loss_by_hand(h, direction, value):
    loss = cosine_loss(torch.tensor([h]), torch.tensor([7.0, 0.0]), direction)
    assert loss.item() == pytest.approx(value, abs=1e-6)


def test_cosine_loss_is_the_mean_over_rows():
    h = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert cosine_loss(h, torch.tensor([1.0, 0.0]), "toward").item() == pytest.approx((0 + 1 + 0.5 + 0) / 4)


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.floats(0.01, 100))
def test_cosine_loss_stays_between_0_and_1_and_ignores_lengths(seed, scale):
    h, vector = random(seed, 6, 5), random(seed + 1, 5)
    for direction in DIRECTIONS:
        loss = cosine_loss(h, vector, direction)
        assert -1e-6 <= loss.item() <= 1 + 1e-6
        torch.testing.assert_close(cosine_loss(scale * h, vector / scale, direction), loss, atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=40)
@given(SEEDS)
def test_toward_and_away_sum_to_1_and_mirror_each_other(seed):
    h, vector = random(seed, 6, 5), random(seed + 1, 5)
    toward, away = cosine_loss(h, vector, "toward"), cosine_loss(h, vector, "away")
    assert (toward + away).item() == pytest.approx(1, abs=1e-6)
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
    cosine_loss(h, vector, direction).backward()
    before = torch.cosine_similarity(h.detach(), vector[None])
    change = torch.cosine_similarity((h - 0.5 * h.grad).detach(), vector[None]) - before
    wanted = {"toward": torch.ones(4), "away": -torch.ones(4), "out": -before.sign()}[direction]
    assert (change * wanted > 0).all()


def test_a_centre_removes_a_common_offset_and_without_it_the_offset_hides_the_direction():
    h, vector, offset = random(0, 64, 16), random(1, 16), 1000 * torch.eye(16)[3]
    clean = cosine_loss(h + vector, vector, "toward")
    centred = cosine_loss(h + vector + offset, vector, "toward", offset)
    raw = cosine_loss(h + vector + offset, vector, "toward")
    raw_against = cosine_loss(h - vector + offset, vector, "toward")
    torch.testing.assert_close(centred, clean, atol=1e-4, rtol=0)
    assert abs(raw - clean) > 0.05
    assert abs(raw - raw_against) < 0.01 < abs(clean - cosine_loss(h - vector, vector, "toward"))


def test_an_unknown_direction_is_refused_by_name():
    unchecked = cosine_loss
    while hasattr(unchecked, "__wrapped__"):  # without the tests' type checker, as a user runs it
        unchecked = unchecked.__wrapped__
    with pytest.raises(ValueError, match=r"direction: 'up' came; 'toward', 'away' or 'out' is wanted"):
        unchecked(random(0, 2, 3), random(1, 3), "up")


def test_token_loss_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    loss = token_loss(logits, torch.tensor([0, 2]))
    assert loss.item() == pytest.approx(-(math.log(0.5) + math.log(0.8)) / 2, abs=1e-6)
    assert token_loss(torch.zeros(3, 7), torch.tensor([0, 3, 6])).item() == pytest.approx(math.log(7), abs=1e-6)


def test_token_loss_gradient():
    logits = random(0, 3, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_loss(x, torch.tensor([0, 5, 2])), logits)


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


def test_kl_gradient():
    logits, reference = (random(seed, 3, 6, dtype=torch.float64) for seed in (0, 1))
    reference = reference.log_softmax(-1)
    assert torch.autograd.gradcheck(lambda x: kl_divergence(x.log_softmax(-1), reference), logits.requires_grad_())
