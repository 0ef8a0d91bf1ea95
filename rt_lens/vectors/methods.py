"""From the activations of two aligned sides to one direction. Pure functions; they know no model, no text and no file.

Every method gives its direction the norm of the mean difference, so that a multiplier is the same dose whatever the
method. All compute in float64 on the CPU and return the input's dtype and device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Method = Callable[[Float[Tensor, "pair d"], Float[Tensor, "pair d"]], Float[Tensor, "d"]]


def mean_diff(positive: Float[Tensor, "pair d"], negative: Float[Tensor, "pair d"]) -> Float[Tensor, "d"]:
    """Mean of the pairwise differences (Ackerman 2024; Panickssery et al. 2024).

    Example:
        >>> import torch
        >>> mean_diff(torch.tensor([[2.0, 1.0], [4.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
        tensor([3., 0.])
    """
    _, _, difference = _sides("mean_diff", positive, negative)
    return _norm_matched(difference, difference, positive)


@dataclass(frozen=True)
class PCA:
    """First principal direction of the pairwise differences; the majority of pairs projects higher on its positive end.

    Uncentred, it is the direction of the largest mean square difference. That equals PCA of both sides about the pairs'
    midpoints, which are half a difference with either sign (repeng's `pca_center`; Zou et al. 2023 get near it by
    shuffling the sides). Centring the differences removes their mean, which is the signal: scikit-learn's PCA on plain
    differences does so (repeng's `pca_diff`), and then finds how the pairs differ from each other.

    Attributes:
        centred: subtract the mean difference first; it exists to show why not.

    Example:
        >>> import torch
        >>> shift = torch.tensor([3.0, 0.0, 0.0])
        >>> negative = torch.randn(50, 3)
        >>> direction = PCA()(negative + shift + 0.1 * torch.randn(50, 3), negative)
        >>> float(torch.cosine_similarity(direction, shift, dim=0)) > 0.99
        True
    """

    centred: bool = False

    def __call__(self, positive: Float[Tensor, "pair d"], negative: Float[Tensor, "pair d"]) -> Float[Tensor, "d"]:
        name, least = ("pca_centred", 2) if self.centred else ("pca", 1)
        positive64, negative64, difference = _sides(name, positive, negative, least)
        differences = positive64 - negative64
        rows = differences - difference if self.centred else differences
        if rows.norm() <= 1e-12 * differences.norm():
            raise ValueError(
                "positive and negative must differ from pair to pair, but all pairs have the same difference, so "
                "centring leaves nothing. Use PCA(centred=False)."
            )
        direction = _first_right_singular(rows)
        projections = differences @ direction
        majority = projections.sign().sum() or projections.sum()  # the mean's sign where the pairs tie
        return _norm_matched(-direction if majority < 0 else direction, difference, positive)


@dataclass(frozen=True)
class Logistic:
    """Weights of an L2-regularised logistic probe between the two sides (scikit-learn's LogisticRegression).

    All features are divided by one number, their overall standard deviation: the result does not depend on the
    activations' scale, and its direction stays as it is, which standardising each feature would change. The fit runs in
    the span of the centred rows, where the optimum lies; Newton's method finds it and it is unique, so there is no
    seed.

    Attributes:
        C: inverse strength of the regularisation. Small values tend to the mean difference, large ones to the widest
            margin, or with many more pairs than dimensions to Sigma^-1 times the mean difference. On the bundled
            model 0.01 to 10 separated held-out texts equally well, and 0.1 about best, from 16 pairs as from 80.

    Example:
        >>> import torch
        >>> positive, negative = torch.randn(40, 8) + 2.0, torch.randn(40, 8)
        >>> direction = Logistic(C=0.1)(positive, negative)
        >>> float(((positive - negative) @ direction > 0).float().mean()) > 0.9
        True
    """

    C: float = 0.1

    def __call__(self, positive: Float[Tensor, "pair d"], negative: Float[Tensor, "pair d"]) -> Float[Tensor, "d"]:
        from sklearn.linear_model import LogisticRegression

        if not self.C > 0:
            raise ValueError(f"C must be above 0, got {self.C}. The default is 0.1.")
        positive64, negative64, difference = _sides("logistic", positive, negative, 2)
        rows = torch.cat([positive64, negative64])
        rows = rows - rows.mean(0)
        left, singular, basis = torch.linalg.svd(rows / rows.square().mean().sqrt(), full_matrices=False)
        probe = LogisticRegression(C=self.C, solver="newton-cholesky", tol=1e-8, max_iter=1000)
        probe.fit((left * singular).numpy(), [1] * len(positive64) + [0] * len(negative64))
        return _norm_matched(torch.from_numpy(probe.coef_[0]) @ basis, difference, positive)


def mass_mean(positive: Float[Tensor, "pair d"], negative: Float[Tensor, "pair d"]) -> Float[Tensor, "d"]:
    """Whitened mean difference, Sigma^-1 (mu+ - mu-), with the within-side covariance (Marks and Tegmark 2023).

    The covariance is shrunk towards a multiple of the identity (Ledoit and Wolf 2004, scikit-learn), since there are
    seldom more pairs than dimensions. This is the probe's reading direction; the mean difference is the writing one.

    Example:
        >>> import torch
        >>> noise = torch.randn(200, 2) @ torch.tensor([[1.0, 0.0], [2.0, 0.5]])  # the two dimensions correlate
        >>> positive, negative = noise + torch.tensor([1.0, 0.0]), noise.flip(0)
        >>> read, write = mass_mean(positive, negative), mean_diff(positive, negative)
        >>> bool(read.norm().isclose(write.norm())), float(torch.cosine_similarity(read, write, dim=0)) < 0.95
        (True, True)
    """
    from sklearn.covariance import ledoit_wolf

    positive64, negative64, difference = _sides("mass_mean", positive, negative, 2)
    within = torch.cat([positive64 - positive64.mean(0), negative64 - negative64.mean(0)])
    if within.norm() <= 1e-12 * (positive64.norm() + negative64.norm()):
        raise ValueError(
            "positive and negative must vary from text to text, but neither side does, so there is no covariance. Use "
            "mean_diff."
        )
    covariance = torch.from_numpy(
        ledoit_wolf((within / within.square().mean().sqrt()).numpy(), assume_centered=True)[0]
    )
    covariance += 1e-9 * torch.eye(len(covariance), device="cpu")  # two pairs with equal deviations get no shrinkage
    return _norm_matched(torch.linalg.solve(covariance, difference), difference, positive)


@dataclass(frozen=True)
class Random:
    """Gaussian direction, the control: it sees no activation, only the norm of their mean difference.

    Attributes:
        seed: seed for the direction; give each layer its own, since the same seed gives the same direction at each.

    Example:
        >>> import torch
        >>> positive, negative = torch.randn(20, 64) + 1.0, torch.randn(20, 64)
        >>> control, direction = Random(0)(positive, negative), mean_diff(positive, negative)
        >>> cosine = torch.cosine_similarity(control, direction, dim=0)
        >>> bool(control.norm().isclose(direction.norm())), bool(cosine < 0.5)
        (True, True)
    """

    seed: int

    def __call__(self, positive: Float[Tensor, "pair d"], negative: Float[Tensor, "pair d"]) -> Float[Tensor, "d"]:
        _, _, difference = _sides("random", positive, negative)
        noise = torch.Generator().manual_seed(self.seed)
        direction = torch.randn(len(difference), generator=noise, dtype=torch.float64, device="cpu")
        return _norm_matched(direction, difference, positive)


def leace(positive: Float[Tensor, "pair d"], negative: Float[Tensor, "pair d"]) -> Float[Tensor, "d"]:
    """Direction that least-squares concept erasure removes (Belrose et al. 2023).

    For a concept of two values that is the mean difference, by theorem, so it is computed as such: as a steering vector
    it is nothing new. What is new is how much of it is removed from each activation, see `fit_eraser`.

    Example:
        >>> import torch
        >>> positive, negative = torch.randn(20, 8) + 1.0, torch.randn(20, 8)
        >>> torch.allclose(leace(positive, negative), mean_diff(positive, negative))
        True
    """
    _, _, difference = _sides("leace", positive, negative, 2)
    return difference.to(positive)


def fit_eraser(
    positive: Float[Tensor, "pair d"], negative: Float[Tensor, "pair d"]
) -> tuple[Float[Tensor, "d"], Float[Tensor, "d"], Float[Tensor, "d"]]:
    """Least-squares concept eraser h - left (right . (h - centre)) (LEACE, Belrose et al. 2023, `concept-erasure`).

    Of all affine maps after which no linear probe can tell the sides apart, this one moves activations least. Plain
    ablation, h - (h . u) u, has the same u but reads along it and about zero; this one reads along Sigma^-1 u, where
    the sides differ most for their noise, and about the mean, so that a common offset stays.

    Returns:
        left: the mean difference, which is removed.
        right: reads how many mean differences an activation lies from the centre; right . left = 1.
        centre: mean of all activations of both sides.

    Example:
        >>> import torch
        >>> positive, negative = torch.randn(40, 4) + 1.0, torch.randn(40, 4)
        >>> left, right, centre = fit_eraser(positive, negative)
        >>> round(float(left @ right), 4)
        1.0
    """
    from concept_erasure import LeaceFitter

    positive64, negative64, difference = _sides("leace", positive, negative, 2)
    labels = torch.cat([torch.ones(len(positive64), device="cpu"), torch.zeros(len(negative64), device="cpu")]).double()
    # The package's svd_tol of 0.01 would leave a weak concept in. Its constraint on the trace never binds for two
    # values, and may cost the rank of one. Shrinkage makes the covariance invertible with fewer texts than dimensions.
    eraser = LeaceFitter.fit(
        torch.cat([positive64, negative64]), labels, method="leace", shrinkage=True, constrain_cov_trace=False,
        svd_tol=1e-12,
    ).eraser  # fmt: skip
    left, right = eraser.proj_left[:, 0], eraser.proj_right[0]
    unit = (left @ difference) / difference.square().sum()  # left is this many mean differences long
    return _norm_matched(left / unit, difference, positive), (right * unit).to(positive), eraser.bias.to(positive)


def fit_transport(
    source: Float[Tensor, "source d"], target: Float[Tensor, "target d"]
) -> tuple[Float[Tensor, "d"], Float[Tensor, "d"]]:
    """Slope and offset of each coordinate's line from one cloud of activations to another (Linear-AcT).

    Rodriguez et al. 2024 (arXiv 2410.23054): in one dimension the best transport pairs sorted values, and the line is
    their least-squares fit. Clouds of different sizes are paired by their quantiles.

    Returns:
        omega: slopes, never negative; 1 for a coordinate that does not vary in the source.
        beta: offsets; the line moves the source's mean to the target's.

    Example:
        >>> import torch
        >>> source = torch.tensor([[0.0], [1.0], [2.0]])
        >>> omega, beta = fit_transport(source, torch.tensor([[5.0], [1.0], [3.0]]))  # sorted: 1, 3, 5
        >>> omega.tolist(), beta.tolist()
        ([2.0], [1.0])
    """
    for name, cloud in (("source", source), ("target", target)):
        if len(cloud) < 2:
            raise ValueError(f"{name} must have at least 2 rows, got {len(cloud)}. Give more texts.")
        _check_finite(name, cloud)
    n = min(len(source), len(target))
    a, b = (_quantiles(cloud.double(), n) for cloud in (source, target))
    spread = a - a.mean(0)
    variance = spread.square().mean(0)
    omega = torch.where(variance > 0, (spread * (b - b.mean(0))).mean(0) / variance.clamp(min=1e-300), 1.0)
    beta = target.double().mean(0) - omega * source.double().mean(0)
    return omega.to(source), beta.to(source)


def _quantiles(cloud: Float[Tensor, "row d"], n: int) -> Float[Tensor, "n d"]:
    """The sorted rows of each coordinate; n of them, interpolated, where there are more."""
    ordered = cloud.sort(0).values
    if len(ordered) == n:
        return ordered
    places = torch.linspace(0, len(ordered) - 1, n, dtype=cloud.dtype, device=cloud.device)
    below = places.floor().long().clamp(max=len(ordered) - 2)
    share = (places - below)[:, None]
    return ordered[below] * (1 - share) + ordered[below + 1] * share


METHODS: dict[str, Callable[[int], Method]] = {
    "mean_diff": lambda seed: mean_diff,
    "pca": lambda seed: PCA(),
    "pca_centred": lambda seed: PCA(centred=True),
    "logistic": lambda seed: Logistic(),
    "mass_mean": lambda seed: mass_mean,
    "random": Random,
    "leace": lambda seed: leace,
}
"""Every method by name, as a function of the seed; only `random` draws anything."""


def winsorise(rows: Float[Tensor, "pair d"], share: float) -> Float[Tensor, "pair d"]:
    """Clip each dimension at its `share` and 1 - `share` quantiles over the rows (interpolated linearly).

    For differences, or one side, in which a few texts are outliers. A `share` of 0 changes nothing.
    """
    if not 0 <= share < 0.5:
        raise ValueError(f"share must be at least 0 and below 0.5, got {share}. Try 0.02.")
    low, high = np.quantile(rows.detach().cpu().double().numpy(), [share, 1 - share], axis=0)
    return rows.clamp(torch.from_numpy(low).to(rows), torch.from_numpy(high).to(rows))


def covariate_direction(h: Float[Tensor, "text d"], values: Float[Tensor, "text"]) -> Float[Tensor, "d"]:
    """Cov(h, y) / Var(y): how activations move for each unit of a number, such as a text's length or answer letter.

    The slope of least squares in every dimension; for values of 0 and 1 it is the difference of the two means.
    """
    if len(h) != len(values) or len(h) < 2:
        raise ValueError(
            f"values must be one number for each of at least 2 texts, got {len(values)} for {len(h)} texts."
        )
    _check_finite("h", h)
    _check_finite("values", values)
    values64 = values.detach().cpu().double()
    centred = values64 - values64.mean()
    if values64.min() == values64.max():
        raise ValueError(f"values must differ between texts, got {len(values64)} equal values ({values64[0]:g}).")
    return (centred @ h.detach().cpu().double() / centred.square().sum()).to(h)


def _sides(
    method: str, positive: Float[Tensor, "..."], negative: Float[Tensor, "..."], at_least: int = 1
) -> tuple[Float[Tensor, "pair d"], Float[Tensor, "pair d"], Float[Tensor, "d"]]:
    """What every method begins with: both sides, checked, in float64 on the CPU, and their mean difference."""
    if positive.ndim != 2 or positive.shape != negative.shape:
        raise ValueError(
            f"negative must have the shape of positive, {tuple(positive.shape)}, got {tuple(negative.shape)}. "
            "Give both sides of the same pairs at one layer, [pair, d] each."
        )
    if len(positive) < at_least:
        raise ValueError(
            f"positive and negative must be at least {at_least} pairs for {method}, got {len(positive)}. Give more "
            "pairs."
        )
    _check_finite("positive", positive)
    _check_finite("negative", negative)
    positive64, negative64 = positive.detach().cpu().double(), negative.detach().cpu().double()
    difference = (positive64 - negative64).mean(0)
    if difference.norm() <= 1e-12 * (positive64.norm() + negative64.norm()):
        raise ValueError(
            "positive and negative must have different means, but the two sides have identical means, so there is "
            "no direction. Give pairs whose sides differ."
        )
    return positive64, negative64, difference


def _check_finite(name: str, activations: Float[Tensor, "..."]) -> None:
    if bad := int((~activations.isfinite()).sum()):
        raise ValueError(
            f"{name} must be finite, but {bad} of {activations.numel()} numbers are NaN or infinite. Try running the "
            "model in float32."
        )


def _first_right_singular(rows: Float[Tensor, "pair d"]) -> Float[Tensor, "d"]:
    """Direction of the largest mean square, from the smaller Gram matrix; of any sign and norm."""
    n, d = rows.shape
    if n < d:
        return rows.T @ torch.linalg.eigh(rows @ rows.T)[1][:, -1]
    return torch.linalg.eigh(rows.T @ rows)[1][:, -1]


def _norm_matched(
    direction: Float[Tensor, "d"], difference: Float[Tensor, "d"], like: Float[Tensor, "pair d"]
) -> Float[Tensor, "d"]:
    """The direction at the mean difference's norm, in the dtype and on the device of the activations."""
    return (direction * (difference.norm() / direction.norm())).to(like)
