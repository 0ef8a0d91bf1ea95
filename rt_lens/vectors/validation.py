"""Validation of steering vectors: what held-out pairs, halves of the data and random directions say of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rt_lens.common.progress import Bar
from rt_lens.common.statistics.intervals import share_interval
from rt_lens.data.contrast_pairs import ContrastPairs
from rt_lens.models.forward import check_layers
from rt_lens.models.positions import Position, position_of
from rt_lens.models.protocol import Model
from rt_lens.vectors.extraction import Sides, method_of, provenance_of, read_sides, vectors_of
from rt_lens.vectors.guards import refuse_head_hook
from rt_lens.vectors.methods import Method, winsorise
from rt_lens.vectors.steering_vectors import SteeringVectors, hook_names, layer_of

_OLD_NAMES = {"signal": "d_prime", "control_signal": "control_d_prime"}
"""Columns of `VectorValidation.layers` in tables that were written before they were renamed."""

_RANDOM_DIRECTIONS = 200
_RESAMPLES = 2000


@dataclass(frozen=True)
class VectorValidation:
    """One extraction's evidence. Every interval is of 95 %.

    Attributes:
        vectors: made from all training pairs.
        layers: columns layer, n (held-out pairs), accuracy, accuracy_low, accuracy_high (pairs whose positive side
            projects higher; Wilson), auc, auc_low, auc_high (bootstrap over pairs), stability, stability_low,
            stability_high (cosine between vectors of two random halves of the topics; range over splits; NaN for
            `random`, which looks at no pair), control_low, control_high (range of the accuracy of random directions),
            d_prime (mean held-out margin over its standard deviation), control_d_prime (95 % of random directions stay
            below it, whatever their sign), seed.
        learning: columns layer, n_pairs, accuracy, accuracy_low, accuracy_high, cosine, cosine_low, cosine_high (to
            the vector of all pairs), n (held-out pairs), seed: mean and range over random subsets, at one layer.
        cosines: columns layer, other, cosine, between layers.
        behaviours: columns layer, behaviour, cosine, with other vectors that were given.
        recommended: layers to use.
        best: of these, the first; None if there are none.
        reason: in a sentence.
        seed: seed for every random choice.

    Example:
        >>> validated = validate_vectors(model, train.sample(8), held_out, layers=[18, 21], splits=2)
        >>> validated.vectors.hook_names
        ['blocks.18.hook_resid_post', 'blocks.21.hook_resid_post']
        >>> sorted(set(validated.learning["n_pairs"]))
        [2, 4, 8]
    """

    vectors: SteeringVectors
    layers: pd.DataFrame = field(repr=False)
    learning: pd.DataFrame = field(repr=False)
    cosines: pd.DataFrame = field(repr=False)
    behaviours: pd.DataFrame = field(repr=False)
    recommended: tuple[int, ...]
    best: int | None
    reason: str
    seed: int


def validate_vectors(
    model: Model,
    train: ContrastPairs,
    held_out: ContrastPairs,
    *,
    method: str | Method = "mean_diff",
    position: str | int | Position = "last",
    layers: Iterable[int] | None = None,
    hook: str = "resid_post",
    winsorised: float = 0.0,
    others: Sequence[SteeringVectors] = (),
    splits: int = 20,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> VectorValidation:
    """Extracts vectors and evaluates them.

    Only one held-out pair per topic is used, since pairs of one topic are not independent of each other.

    Args:
        model: HookedTransformer or TransformerBridge.
        train: pairs that the vectors are made from.
        held_out: pairs that share nothing with them: `train, held_out = pairs.split(0.7)`. Not the test prompts that
            you will report on, since layers are chosen here.
        method: as for `extract_vectors`.
        position: as for `extract_vectors`.
        layers: block indices. Defaults to all.
        hook: kind of hook point of the residual stream, or of what is written into it.
        winsorised: as for `extract_vectors`.
        others: vectors of other behaviours, to compare with.
        splits: random halves, and random subsets at each size of the learning curve.
        batch_size: texts per forward pass.
        seed: seed for every random choice.
        progress: show bars.

    Raises:
        ValueError: as `extract_vectors`; also if there are fewer than 4 training pairs.

    Example:
        >>> validated = validate_vectors(model, train, held_out, layers=[18, 21], splits=2)
        >>> print(validated.reason)
        Layer... to separate held-out texts nearly as well as the best layer (...
        >>> table = validated.layers.set_index("layer")
        >>> bool((table["d_prime"] > table["control_d_prime"]).all())  # better than random directions
        True
        >>> figure = plots.validation(
        ...     validated.layers, validated.learning, validated.cosines, recommended=validated.recommended
        ... )
    """
    if len(train) < 4:
        raise ValueError(f"train must be at least 4 pairs, so that two halves can be compared, got {len(train)}.")
    if splits < 2:
        raise ValueError(f"splits must be at least 2, got {splits}.")
    find, label = method_of(method, seed)
    names, read_at = hook_names(check_layers(model, layers), hook), position_of(position)
    for name in names:
        refuse_head_hook(name)
    one_per_topic = _one_each(held_out, seed)
    (sides,) = read_sides(model, train, names, [read_at], batch_size=batch_size, progress=progress)
    (unseen,) = read_sides(model, one_per_topic, names, [read_at], batch_size=batch_size, progress=progress)
    provenance = provenance_of(model, train, sides, label, seed)
    vectors = vectors_of(sides, find, provenance, winsorised)
    refit = _Refit(sides, find, winsorised, names[0], _by_topic(train), label == "random")
    rows = []
    for name in Bar(names, desc="validation", unit="layer", disable=not progress):
        at_layer = replace(refit, name=name)
        evidence = {**_evidence(vectors[name], unseen, name, seed), **_stability(at_layer, splits, seed)}
        rows.append({"layer": layer_of(name), **evidence})
    table = pd.DataFrame(rows).assign(seed=seed)
    recommended, best, reason = recommend(table)
    clearest = best if best is not None else int(table["layer"].iloc[int(table["d_prime"].argmax())])
    (at_best,) = hook_names([clearest], hook)
    learning = _learning(replace(refit, name=at_best), vectors[at_best], unseen, splits, seed)
    return VectorValidation(
        vectors, table, learning, _between_layers(vectors), _between_behaviours(vectors, others), recommended, best,
        reason, seed,
    )  # fmt: skip


def recommend(table: pd.DataFrame) -> tuple[tuple[int, ...], int | None, str]:
    """The layers to use, the best of them, and why: a rule on the columns of `VectorValidation.layers`.

    A layer is eligible if it beats random directions, its halves agree (stability at least 0.9 of the best), and one
    threshold tells all held-out texts apart nearly as well as anywhere (AUC above chance at least 0.75 of the best;
    the accuracy within pairs is at its ceiling too early to choose by). The range is the earliest run of eligible
    neighbours (of at least two, if there is one), the best its first layer: later layers often separate as well, but
    leave fewer blocks to act on what is added. A table from before the columns were renamed is read too.
    """
    old = {column: new for column, new in _OLD_NAMES.items() if new not in table}
    table = table.rename(columns=old).sort_values("layer")
    # Not `>`: where the sides lie very far apart, random directions tell all pairs apart as well.
    beats_random = (table["accuracy"] >= table["control_high"]) & (table["d_prime"] > table["control_d_prime"])
    steady = table["stability"] >= 0.9 * table["stability"].max()
    clear = table["auc"] - 0.5 >= 0.75 * (table["auc"].max() - 0.5)
    eligible = beats_random & steady & clear
    n = int(table["n"].iloc[0])
    if not eligible.any():
        return (), None, (
            "None: no layer beats random directions, agrees between halves of the data and separates held-out texts "
            f"(n = {n} pairs)."
        )  # fmt: skip
    groups = [
        list(group) for good, group in itertools.groupby(range(len(table)), eligible.to_numpy().__getitem__) if good
    ]
    chosen = table.iloc[next((group for group in groups if len(group) > 1), groups[0])]
    run = tuple(int(layer) for layer in chosen["layer"])
    best = chosen.iloc[0]
    gapless = run == tuple(range(run[0], run[-1] + 1))
    listed = f"{run[0]} to {run[-1]}" if gapless else ", ".join(map(str, run))
    subject = f"Layers {listed} are the earliest layers" if len(run) > 1 else f"Layer {run[0]} is the earliest layer"
    reason = (
        f"{subject} to separate held-out texts nearly as well as the best layer (at layer {run[0]} AUC "
        f"{best['auc']:.2f} [{best['auc_low']:.2f}, {best['auc_high']:.2f}], pair accuracy {best['accuracy']:.2f} "
        f"[{best['accuracy_low']:.2f}, {best['accuracy_high']:.2f}], n = {n} pairs; random directions reach "
        f"{best['control_high']:.2f}) with halves of the data that agree (cosine {best['stability']:.2f}). "
        "These layers were selected on the same pairs, so their numbers are optimistically biased."
    )
    return run, run[0], reason


def _one_each(pairs: ContrastPairs, seed: int) -> ContrastPairs:
    """One pair of each topic; of a group, such as both orders of a question's options, one in all."""
    drawn = pairs.sample(len(pairs), seed).pairs
    firsts = {pair.group or pair.topic: pair for pair in reversed(drawn)}
    return ContrastPairs(pairs.name, tuple(pair for pair in drawn if firsts[pair.group or pair.topic] is pair))


def _by_topic(pairs: ContrastPairs) -> list[list[int]]:
    """Numbers of the pairs of each topic; each pair by itself where there are too few topics to halve."""
    numbers: dict[str, list[int]] = {}
    for number, pair in enumerate(pairs.pairs):
        numbers.setdefault(pair.topic, []).append(number)
    return list(numbers.values()) if len(numbers) >= 4 else [[number] for number in range(len(pairs))]


@dataclass(frozen=True)
class _Refit:
    """One layer's vector from some of the training pairs."""

    sides: Sides
    find: Callable[[str, int], Method]
    winsorised: float
    name: str
    topics: list[list[int]]
    reads_no_pair: bool

    @property
    def n(self) -> int:
        return len(self.sides.positive[self.name])

    def shuffled(self, key: str) -> tuple[list[int], int]:
        """The pairs, topic after topic in random order, and where a half of the topics ends."""
        order = random.Random(key).sample(self.topics, len(self.topics))
        half = sum(len(numbers) for numbers in order[: len(order) // 2])
        return [number for numbers in order for number in numbers], half

    def __call__(self, chosen: Sequence[int]) -> Float[Tensor, "d_model"]:
        positive, negative = (side[self.name][list(chosen)] for side in (self.sides.positive, self.sides.negative))
        if self.winsorised:
            positive = negative + winsorise(positive - negative, self.winsorised)
        return self.find(self.name, 0)(positive, negative)


def _evidence(vector: Float[Tensor, "d_model"], unseen: Sides, name: str, seed: int) -> dict[str, float]:
    """What held-out pairs say of one layer's vector."""
    positive, negative = unseen.positive[name], unseen.negative[name]
    n = len(positive)
    margins = (positive - negative) @ vector
    accuracy = share_interval(int((margins > 0).sum()), n)
    auc, auc_low, auc_high = _auc(positive @ vector, negative @ vector, seed)
    noise = torch.Generator().manual_seed(1_000_003 * seed + layer_of(name))
    random_margins = (positive - negative) @ torch.randn(len(vector), _RANDOM_DIRECTIONS, generator=noise, device="cpu")
    control = np.quantile((random_margins > 0).float().mean(0).numpy(), [0.025, 0.975])
    return {
        "n": n,
        "accuracy": accuracy.mean,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "auc": auc,
        "auc_low": auc_low,
        "auc_high": auc_high,
        "control_low": float(control[0]),
        "control_high": float(control[1]),
        "d_prime": float(_d_prime(margins[:, None])[0]),
        "control_d_prime": float(np.quantile(_d_prime(random_margins).abs().numpy(), 0.95)),
    }


def _d_prime(margins: Float[Tensor, "pair direction"]) -> Float[Tensor, "direction"]:
    """Mean over standard deviation: d' of the paired differences."""
    return margins.mean(0) / margins.std(0).clamp(min=1e-30) if len(margins) > 1 else margins.mean(0) * 0


def _auc(positive: Float[Tensor, "pair"], negative: Float[Tensor, "pair"], seed: int) -> tuple[float, float, float]:
    """Chance that a positive text projects higher than any negative one, with a bootstrap interval over pairs."""
    n = len(positive)
    wins = (positive[:, None] > negative[None]).double() + 0.5 * (positive[:, None] == negative[None]).double()
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), _RESAMPLES)
    weights = torch.from_numpy(counts).double()
    resampled = ((weights @ wins) * weights).sum(1) / n**2
    low, high = np.quantile(resampled.numpy(), [0.025, 0.975])
    return float(wins.mean()), float(low), float(high)


def _stability(refit: _Refit, splits: int, seed: int) -> dict[str, float]:
    """Cosine between the vectors of two halves of the topics, over random splits."""
    if refit.reads_no_pair:
        return dict.fromkeys(("stability", "stability_low", "stability_high"), float("nan"))
    cosines = []
    for split in range(splits):
        order, half = refit.shuffled(f"{seed}-{split}")
        first, second = refit(order[:half]), refit(order[half:])
        cosines.append(float(torch.cosine_similarity(first, second, dim=0)))
    low, high = np.quantile(cosines, [0.025, 0.975])
    return {"stability": float(np.mean(cosines)), "stability_low": float(low), "stability_high": float(high)}


def _learning(refit: _Refit, whole: Float[Tensor, "d_model"], unseen: Sides, splits: int, seed: int) -> pd.DataFrame:
    """Accuracy, and cosine to the vector of all pairs, against the number of pairs: 2, 4, 8 ... and all."""
    differences = unseen.positive[refit.name] - unseen.negative[refit.name]
    sizes = sorted({*(2**power for power in range(1, 20) if 2**power < refit.n), refit.n})
    rows = []
    for size in sizes:
        accuracies, cosines = [], []
        for draw in range(splits if size < refit.n else 1):
            vector = refit(refit.shuffled(f"{seed}-{size}-{draw}")[0][:size])
            accuracies.append(float((differences @ vector > 0).float().mean()))
            cosines.append(float(torch.cosine_similarity(vector, whole, dim=0)))
        row: dict[str, float] = {"layer": layer_of(refit.name), "n_pairs": size, "n": len(differences), "seed": seed}
        for name, values in (("accuracy", accuracies), ("cosine", cosines)):
            low, high = np.quantile(values, [0.025, 0.975])
            row |= {name: float(np.mean(values)), f"{name}_low": float(low), f"{name}_high": float(high)}
        rows.append(row)
    return pd.DataFrame(rows)


def _between_layers(vectors: SteeringVectors) -> pd.DataFrame:
    units = torch.stack([vector / vector.norm() for vector in vectors.vectors.values()])
    cosines = (units @ units.T).tolist()
    layers = [layer_of(name) for name in vectors.hook_names]
    return pd.DataFrame(
        [
            {"layer": layer, "other": other, "cosine": cosines[i][j]}
            for i, layer in enumerate(layers)
            for j, other in enumerate(layers)
        ]
    )


def _between_behaviours(vectors: SteeringVectors, others: Sequence[SteeringVectors]) -> pd.DataFrame:
    rows = [
        {"layer": layer_of(name), "behaviour": other.provenance.behaviour, "cosine": cosine}
        for other in others
        for name, cosine in vectors.cosine(other).items()
    ]
    return pd.DataFrame(rows, columns=["layer", "behaviour", "cosine"])
