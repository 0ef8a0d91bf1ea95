"""From two sides to a direction: each method beside the theory, on a planted direction in anisotropic noise."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import pytest
import torch
from concept_erasure import LeaceEraser
from sklearn.decomposition import PCA as SklearnPCA
from sklearn.linear_model import LogisticRegression

from rt_lens.vectors.methods import (
    METHODS,
    PCA,
    Logistic,
    Random,
    covariate_direction,
    fit_eraser,
    mass_mean,
    mean_diff,
    winsorise,
)

D = 24
FITTED = [name for name in METHODS if name != "random"]


class Planted(NamedTuple):
    """Two sides at +-truth/2 about what the pair shares, and the covariances of the noise."""

    positive: torch.Tensor
    negative: torch.Tensor
    truth: torch.Tensor
    of_a_side: torch.Tensor
    of_differences: torch.Tensor


def planted(n: int, seed: int = 0, d: int = D, own: float = 1.0) -> Planted:
    """Standard deviations from 0.3 to 3 in rotated axes, half of the variance shared by a pair; a truth of norm 2."""
    fixed, noise = torch.Generator().manual_seed(1000), torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(d, d, generator=fixed, dtype=torch.float64))[0]
    root = torch.logspace(math.log10(0.3), math.log10(3), d, dtype=torch.float64)[:, None] * axes.T / math.sqrt(2)
    truth = torch.randn(d, generator=fixed, dtype=torch.float64)
    truth *= 2 / truth.norm()
    shared, first, second = (torch.randn(n, d, generator=noise, dtype=torch.float64) @ root for _ in range(3))
    half = root.T @ root
    return Planted(
        (shared + own * first + truth / 2).float(),
        (shared + own * second - truth / 2).float(),
        truth,
        half * (1 + own**2),
        2 * half * own**2,
    )


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.cosine_similarity(a.double(), b.double(), dim=0).item()


# --- each method beside the theory ---


@pytest.mark.parametrize("n", [20, 80, 320])
def test_mean_diff_is_as_near_the_truth_as_its_noise_allows(n):
    sides = [planted(n, seed) for seed in range(200)]
    found = sum(cosine(mean_diff(s.positive, s.negative), s.truth) for s in sides) / 200
    theory = 2 / math.sqrt(4 + sides[0].of_differences.trace().item() / n)
    assert found == pytest.approx(theory, abs=0.015)
    assert theory < 0.99


def test_uncentred_pca_finds_the_first_axis_of_the_second_moment():
    sides = planted(20_000, own=0.6)
    moment = torch.outer(sides.truth, sides.truth) + sides.of_differences
    axis = torch.linalg.eigh(moment)[1][:, -1]
    found = PCA()(sides.positive, sides.negative)
    assert abs(cosine(found, axis)) > 0.999
    assert cosine(found, sides.truth) == pytest.approx(abs(cosine(axis, sides.truth)), abs=0.02)
    assert cosine(found, sides.truth) < 0.98  # the noise bends it, however many pairs


@pytest.mark.parametrize("name", ["mass_mean", "logistic"])
def test_probes_find_the_whitened_truth_and_not_the_truth(name):
    sides = planted(20_000)
    whitened = torch.linalg.solve(sides.of_a_side, sides.truth)
    found = METHODS[name](0)(sides.positive, sides.negative)
    theory = sides.truth @ whitened / (sides.truth.norm() * whitened.norm())
    assert cosine(found, whitened) > 0.99
    assert cosine(found, sides.truth) == pytest.approx(theory.item(), abs=0.02)
    assert theory < 0.6


def test_leace_takes_the_mean_difference_out():
    sides = planted(300)
    assert cosine(fit_eraser(sides.positive, sides.negative)[0], mean_diff(sides.positive, sides.negative)) > 1 - 1e-9
    assert cosine(fit_eraser(sides.positive, sides.negative)[0], mass_mean(sides.positive, sides.negative)) < 0.9


def test_random_directions_have_the_cosines_of_chance():
    sides = planted(10, d=64)
    cosines = torch.tensor([cosine(Random(seed)(sides.positive, sides.negative), sides.truth) for seed in range(1000)])
    assert abs(cosines.mean()) < 4 / math.sqrt(64 * 1000)
    assert cosines.std().item() == pytest.approx(1 / math.sqrt(64), rel=0.1)


@pytest.mark.parametrize("n", [12, 200])
def test_centring_takes_the_signal_away_and_leaves_what_pairs_differ_in(n):
    noise = torch.Generator().manual_seed(3)
    truth, nuisance = 2 * torch.eye(D)[0], torch.eye(D)[1]
    deviations = torch.randn(n, generator=noise)
    deviations = 1.5 * (deviations - deviations.mean()) / deviations.std()
    differences = truth + deviations[:, None] * nuisance + 0.1 * torch.randn(n, D, generator=noise)
    negative = torch.randn(n, D, generator=noise)
    assert cosine(PCA()(negative + differences, negative), truth) > 0.99
    centred = PCA(centred=True)(negative + differences, negative)
    assert abs(cosine(centred, truth)) < 0.1
    assert abs(cosine(centred, nuisance)) > 0.99
    louder = differences + deviations[:, None] * nuisance  # a nuisance of variance 9 above the squared signal 4
    assert abs(cosine(PCA()(negative + louder, negative), truth)) < 0.1


def test_pca_equals_scikit_learns_about_midpoints_and_the_centred_one_scikit_learns_on_differences():
    sides = planted(15, seed=4)
    halves = (sides.positive - sides.negative) / 2
    about_midpoints = SklearnPCA(1).fit(torch.cat([halves, -halves]).numpy()).components_[0]
    on_differences = SklearnPCA(1).fit((2 * halves).numpy()).components_[0]
    assert abs(cosine(PCA()(sides.positive, sides.negative), torch.tensor(about_midpoints))) > 1 - 1e-6
    assert abs(cosine(PCA(centred=True)(sides.positive, sides.negative), torch.tensor(on_differences))) > 1 - 1e-6
    assert abs(about_midpoints @ on_differences) < 0.999


def test_the_majority_of_pairs_fixes_the_sign_of_pca_and_the_mean_a_tie():
    axis = torch.eye(4)[0]
    zeros = torch.zeros(3, 4)
    two_up_one_far_down = torch.tensor([1.0, 1.0, -5.0])[:, None] * axis
    assert PCA()(two_up_one_far_down, zeros)[0] > 0 > mean_diff(two_up_one_far_down, zeros)[0]
    one_each = torch.tensor([3.0, -1.0])[:, None] * axis
    assert PCA()(one_each, zeros[:2])[0] > 0 > PCA()(-one_each, zeros[:2])[0]


@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
def test_the_logistic_fit_in_the_rows_span_is_the_full_one_and_converges(C):
    sides = planted(8, seed=5)
    rows = torch.cat([sides.positive, sides.negative]).double()
    rows = (rows - rows.mean(0)) / (rows - rows.mean(0)).square().mean().sqrt()
    full = LogisticRegression(C=C, tol=1e-10, max_iter=100_000).fit(rows.numpy(), [1] * 8 + [0] * 8).coef_[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Logistic(C)(sides.positive, sides.negative)
    assert cosine(found, torch.tensor(full)) > 1 - 1e-7


def test_a_weak_logistic_probe_is_the_mean_difference_and_a_strong_one_is_not():
    sides = planted(8, seed=6)
    mean = mean_diff(sides.positive, sides.negative)
    assert cosine(Logistic(C=1e-6)(sides.positive, sides.negative), mean) > 1 - 1e-5
    assert cosine(Logistic(C=100.0)(sides.positive, sides.negative), mean) < 0.95


@pytest.mark.parametrize("n", [8, 100])
def test_logistic_converges_on_dimensions_of_unlike_size(n):
    sides = planted(n, seed=7)
    size, offset = torch.ones(D), torch.zeros(D)
    size[:2], offset[:2] = 300.0, 2000.0
    positive, negative = sides.positive * size + offset, sides.negative * size + offset
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Logistic(C=1e4)(positive, negative)
    correct = ((positive - negative) @ found > 0).float().mean()
    assert correct > ((positive - negative) @ mean_diff(positive, negative) > 0).float().mean() + 0.1
    assert correct > 0.8


# --- what all methods share ---


@pytest.mark.parametrize("n", [7, 61])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_the_mean_differences_norm_in_the_inputs_dtype(name, n):
    sides = planted(n)
    found = METHODS[name](0)(sides.positive, sides.negative)
    assert found.dtype == torch.float32
    assert found.norm().item() == pytest.approx(mean_diff(sides.positive, sides.negative).norm().item(), rel=1e-5)
    torch.testing.assert_close(
        mean_diff(sides.positive, sides.negative), sides.positive.mean(0) - sides.negative.mean(0)
    )
    assert METHODS[name](0)(sides.positive.bfloat16(), sides.negative.bfloat16()).dtype == torch.bfloat16


def test_the_methods_differ_so_that_what_they_share_means_something():
    sides = planted(61)
    found = {name: make(0)(sides.positive, sides.negative) for name, make in METHODS.items() if name != "leace"}
    for first in found:
        assert all(cosine(found[first], found[other]) < 0.999 for other in found if other != first), first


@pytest.mark.parametrize("n", [7, 61])
@pytest.mark.parametrize("name", FITTED)
def test_swapping_the_sides_turns_the_direction_round(name, n):
    sides, method = planted(n), METHODS[name](0)
    there, back = method(sides.positive, sides.negative), method(sides.negative, sides.positive)
    assert there.norm() > 1
    torch.testing.assert_close(back, -there, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n", [7, 61])
@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_the_pairs_does_not_matter_but_that_they_are_pairs_matters_to_pca(name, n):
    sides, method = planted(n, own=0.1), METHODS[name](0)
    found = method(sides.positive, sides.negative)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(method(sides.positive[order], sides.negative[order]), found, atol=1e-5, rtol=0)
    unpaired = cosine(method(sides.positive[order], sides.negative), found)
    assert (unpaired < 0.99) == name.startswith("pca")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("factor", [1e-3, 50.0])
def test_directions_grow_with_the_activations_and_a_common_offset_changes_nothing(name, factor):
    sides, method = planted(20), METHODS[name](0)
    found = method(sides.positive, sides.negative)
    scaled = method(factor * sides.positive, factor * sides.negative)
    torch.testing.assert_close(scaled / factor, found, atol=1e-4, rtol=0)
    offset = 8 * torch.randn(D, generator=torch.Generator().manual_seed(2))
    moved = method(sides.positive + offset, sides.negative + offset)
    torch.testing.assert_close(moved, found, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_the_seed_decides_random_and_nothing_else(name):
    sides = planted(20)
    found = METHODS[name](0)(sides.positive, sides.negative)
    assert torch.equal(METHODS[name](0)(sides.positive, sides.negative), found)
    assert torch.equal(METHODS[name](1)(sides.positive, sides.negative), found) == (name != "random")


@pytest.mark.parametrize("name", ["mean_diff", "pca", "random"])
def test_one_pair_is_enough_where_no_spread_is_needed(name):
    sides = planted(1)
    found = METHODS[name](0)(sides.positive, sides.negative)
    if name != "random":
        torch.testing.assert_close(found, (sides.positive - sides.negative)[0])


def test_mass_mean_stands_two_pairs_with_equal_deviations():
    deviation = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])  # scikit-learn shrinks their covariance by 0
    found = mass_mean(deviation + torch.tensor([1.0, 1.0, 0.0]), deviation)
    assert cosine(found, torch.tensor([0.0, 1.0, 0.0])) > 1 - 1e-6  # the noisy axis counts for nothing


# --- the eraser ---


def erased(h: torch.Tensor, left: torch.Tensor, right: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    return h - ((h - centre) @ right)[:, None] * left


@pytest.mark.parametrize("n", [6, 15, 400])
def test_after_erasing_no_linear_probe_finds_anything_and_before_it_did(n):
    sides = planted(n, seed=8)
    size, offset = torch.ones(D), torch.zeros(D)
    size[:2], offset[:2] = 30.0, 500.0  # as residual streams have them
    positive, negative = sides.positive * size + offset, sides.negative * size + offset
    eraser = fit_eraser(positive, negative)
    rows, labels = torch.cat([positive, negative]), [1] * n + [0] * n
    cleaned = erased(rows, *eraser)
    scale = rows.std(0)

    def probe_margins(h: torch.Tensor) -> torch.Tensor:
        x = ((h - h.mean(0)) / scale).double().numpy()
        return torch.tensor(LogisticRegression(tol=1e-8, max_iter=10_000).fit(x, labels).decision_function(x))

    assert probe_margins(rows).abs().mean() > 0.5
    assert probe_margins(cleaned).abs().max() < 1e-3
    before, after = mean_diff(positive, negative), cleaned[:n].double().mean(0) - cleaned[n:].double().mean(0)
    assert before.norm() > 1
    assert (after / scale).norm() < 1e-4 * (before / scale).norm()


def test_the_erasers_three_vectors_are_what_they_say():
    sides = planted(400, seed=9)
    left, right, centre = fit_eraser(sides.positive, sides.negative)
    rows = torch.cat([sides.positive, sides.negative])
    torch.testing.assert_close(left, mean_diff(sides.positive, sides.negative))
    torch.testing.assert_close(centre, rows.mean(0), atol=1e-5, rtol=0)
    assert (right @ left).item() == pytest.approx(1, abs=1e-5)
    coordinate = (rows - centre) @ right
    assert (coordinate[:400].mean() - coordinate[400:].mean()).item() == pytest.approx(1, abs=1e-5)
    assert cosine(right, mass_mean(sides.positive, sides.negative)) > 0.99
    assert cosine(right, left) < 0.6
    assert all(part.dtype == torch.float32 for part in (left, right, centre))


def test_the_eraser_moves_activations_less_than_plain_ablation_which_erases_as_much():
    sides = planted(400, seed=10)
    left, right, centre = fit_eraser(sides.positive, sides.negative)
    rows = torch.cat([sides.positive, sides.negative])
    ablated = erased(rows, left, left / left.square().sum(), centre)
    assert (ablated[:400].mean(0) - ablated[400:].mean(0)).norm() < 1e-5
    moved = (erased(rows, left, right, centre) - rows).square().sum()
    assert 0 < moved < 0.5 * (ablated - rows).square().sum()


def test_a_weak_concept_is_erased_too_though_the_packages_default_leaves_it():
    negative = planted(500, seed=11).negative.double()
    positive = negative + 0.01 * torch.eye(D)[0]
    rows, labels = torch.cat([positive, negative]), torch.cat([torch.ones(500), torch.zeros(500)])

    def left_over(h: torch.Tensor) -> float:
        return (h[:500].mean(0) - h[500:].mean(0)).norm().item() / 0.01

    assert left_over(LeaceEraser.fit(rows, labels)(rows)) == pytest.approx(1)
    assert left_over(erased(rows, *fit_eraser(positive, negative))) < 1e-6


def test_with_few_texts_shrinkage_makes_the_eraser_move_unseen_activations_less():
    seen, unseen = planted(30, seed=20, d=64), planted(200, seed=21, d=64)
    rows = torch.cat([seen.positive, seen.negative]).double()
    labels = torch.cat([torch.ones(30), torch.zeros(30)])
    plain = LeaceEraser.fit(rows, labels, shrinkage=False, svd_tol=1e-12)
    h = unseen.positive.double()
    moved = (erased(h, *fit_eraser(rows[:30], rows[30:])) - h).square().sum()
    assert 0 < moved < 0.5 * (plain(h) - h).square().sum()


# --- cleaning ---


def test_winsorise_clips_the_far_ones_of_each_dimension_and_only_those():
    rows = torch.arange(101.0)[:, None] * torch.tensor([1.0, -10.0])
    rows[0, 0], rows[100, 1] = -1e6, -1e6
    clipped = winsorise(rows, 0.05)
    assert clipped.min(0).values.tolist() == [5.0, -950.0]
    assert clipped.max(0).values.tolist() == [95.0, -50.0]
    assert torch.equal(clipped[6:95], rows[6:95])
    assert torch.equal(winsorise(rows, 0.0), rows)


def test_winsorise_saves_a_mean_from_one_far_pair():
    sides = planted(200, seed=12)
    differences = sides.positive - sides.negative
    differences[0] += 5000 * torch.eye(D)[0]
    assert cosine(differences.mean(0), sides.truth) < 0.5
    assert cosine(winsorise(differences, 0.02).mean(0), sides.truth) > 0.9


@pytest.mark.parametrize("share", [-0.01, 0.5, 1.0, math.nan])
def test_a_share_that_leaves_nothing_is_refused(share):
    with pytest.raises(ValueError, match=r"share must be at least 0 and below 0\.5, got "):
        winsorise(torch.ones(3, 2), share)


def test_the_direction_of_a_zero_or_one_is_the_difference_of_the_means():
    h = planted(9, seed=17).positive
    values = torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 1, 1])
    expected = h[values == 1].mean(0) - h[values == 0].mean(0)
    assert expected.norm() > 0.5
    torch.testing.assert_close(covariate_direction(h, values), expected)


def test_the_direction_of_a_number_is_the_planted_slope_whatever_its_offset():
    sides = planted(4000, seed=18)
    values = 20 + 5 * torch.randn(4000, generator=torch.Generator().manual_seed(19))
    h = sides.positive + values[:, None] * sides.truth.float()
    found = covariate_direction(h, values)
    assert (found - sides.truth).norm() < 0.1
    torch.testing.assert_close(covariate_direction(h, 2 * values - 7), found / 2, atol=1e-4, rtol=0)
    cleaned = h - (values - values.mean())[:, None] * found
    assert covariate_direction(cleaned, values).norm() < 1e-4


# --- the front door ---


@pytest.mark.parametrize("name", ["pca_centred", "logistic", "mass_mean", "leace"])
def test_one_pair_is_refused_where_spread_is_needed(name):
    sides = planted(1)
    with pytest.raises(ValueError, match=rf"must be at least 2 pairs for {name}, got 1\. Give more pairs"):
        METHODS[name](0)(sides.positive, sides.negative)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(4, 8), (5, 7), (5,)])
def test_sides_of_unlike_shape_are_refused_with_both_shapes(name, shape):
    with pytest.raises(ValueError, match=r"negative must have the shape of positive, \(5, 8\), got .* Give both sides"):
        METHODS[name](0)(torch.ones(5, 8), torch.ones(shape))


@pytest.mark.parametrize("name", METHODS)
def test_no_pairs_numbers_that_are_none_and_equal_sides_are_refused(name):
    method, sides = METHODS[name](0), planted(5)
    with pytest.raises(ValueError, match=r"must be at least \d pairs for \w+, got 0"):
        method(torch.zeros(0, 8), torch.zeros(0, 8))
    for side, bad in (("positive", math.nan), ("negative", math.inf)):
        broken = {"positive": sides.positive.clone(), "negative": sides.negative.clone()}
        broken[side][0, :3] = bad
        with pytest.raises(ValueError, match=rf"{side} must be finite, but 3 of {5 * D} numbers are NaN or infinite"):
            method(**broken)
    thirds = sides.positive.double() / 3
    for other in (thirds, thirds.flip(0)):
        with pytest.raises(ValueError, match="the two sides have identical means"):
            method(thirds, other)


def test_sides_without_the_spread_that_a_method_needs_are_refused():
    negative = planted(4).negative
    thirds = torch.linspace(-2, 3, 4).double() / 3  # rounding keeps their differences and means from being equal
    with pytest.raises(ValueError, match=r"centring leaves nothing\. Use PCA\(centred=False\)"):
        PCA(centred=True)(negative.double() / 3 + 1, negative.double() / 3)
    with pytest.raises(ValueError, match=r"must vary from text to text.*Use mean_diff"):
        mass_mean(thirds.expand(7, 4), 1 - thirds.expand(7, 4))
    with pytest.raises(ValueError, match=r"C must be above 0, got 0\.0"):
        Logistic(C=0.0)(negative + 1, negative)


def test_covariates_that_fit_no_slope_are_refused():
    h = planted(4).positive
    with pytest.raises(ValueError, match="values must differ between texts, got \d+ equal values \(2\)"):
        covariate_direction(h, torch.full((4,), 2.0))
    with pytest.raises(ValueError, match="values must be finite, but 1 of 4 numbers are NaN"):
        covariate_direction(h, torch.tensor([1.0, 2, math.nan, 3]))
    with pytest.raises(ValueError, match=r"values must be one number for each of at least 2 texts, got 1 for 1"):
        covariate_direction(h[:1], torch.ones(1))


@pytest.mark.usefixtures("as_a_user")
def test_covariates_of_another_number_are_refused():
    with pytest.raises(ValueError, match="got 3 for 4 texts"):
        covariate_direction(planted(4).positive, torch.arange(3.0))
