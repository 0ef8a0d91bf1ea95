"""What tuning is to reach: directions with their weights, and steering to be withstood. Checked before any work."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from rt_lens.data.contrast_pairs import ContrastPairs
from rt_lens.models.forward import check_layers
from rt_lens.models.positions import position_named, position_of
from rt_lens.models.protocol import Model
from rt_lens.steering.binding import add
from rt_lens.steering.edits import FwdHook
from rt_lens.tuning.config import TuneConfig, whole_numbers
from rt_lens.tuning.losses import Direction
from rt_lens.vectors.extraction import extract_vectors
from rt_lens.vectors.steering_vectors import SteeringVectors, layer_of


@dataclass(frozen=True)
class DirectionTarget:
    """One of several directions to tune at once; what is None is taken from the TuneConfig.

    Attributes:
        vectors: the direction, at each of the layers.
        weight: of its cosine loss beside the other aims'.
        direction: `toward`, `away` or `suppress`.
        layers: blocks whose activations are read.
        hook: kind of hook point.
        positions: which tokens are read.

    Example:
        >>> targets = [DirectionTarget(mood, direction="away"), DirectionTarget(formality, 0.5, "toward")]
        >>> delta = tune(model, targets, train, config)
    """

    vectors: SteeringVectors
    weight: float = 1.0
    direction: Direction | None = None
    layers: Sequence[int] | None = None
    hook: str | None = None
    positions: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.vectors, SteeringVectors):
            raise ValueError(f"vectors: a {type(self.vectors).__name__} came, SteeringVectors are wanted.")
        if self.layers is not None:
            object.__setattr__(self, "layers", whole_numbers("layers", self.layers))


@dataclass(frozen=True)
class ResolvedTarget:
    """An aim with everything filled in: what the loop reads.

    Attributes:
        vectors: hook name -> Float[Tensor, "d_model"].
        direction: `toward`, `away` or `suppress`.
        weight: its share of the cosine loss; the shares of all readings add up to 1.
        positions: `response`, or a name that `position_of` knows.
    """

    vectors: dict[str, Float[Tensor, "d_model"]]
    direction: Direction
    weight: float
    positions: str

    @property
    def names(self) -> list[str]:
        return list(self.vectors)


def resolve_targets(
    model: Model, aims: SteeringVectors | Sequence[DirectionTarget], config: TuneConfig
) -> list[ResolvedTarget]:
    """The aims as the loop reads them.

    Raises:
        ValueError: vectors of another model, a layer that no training can move, a direction without length.
    """
    if isinstance(aims, SteeringVectors):
        aims = [DirectionTarget(aims)]
    if not isinstance(aims, Sequence) or not aims or not all(isinstance(aim, DirectionTarget) for aim in aims):
        raise ValueError("vectors: SteeringVectors, or a list of at least one Aim, is wanted.")
    if any(aim.weight <= 0 for aim in aims):
        raise ValueError(f"weight: {[aim.weight for aim in aims]} came; each aim wants more than 0. Leave others out.")
    total = sum(aim.weight for aim in aims)
    return [_reading(model, aim, aim.weight / total, config) for aim in aims]


def _reading(model: Model, aim: DirectionTarget, share: float, config: TuneConfig) -> ResolvedTarget:
    direction, positions = aim.direction or config.direction, aim.positions or config.positions
    if direction not in ("toward", "away", "suppress"):
        raise ValueError(f"direction: {direction!r} came; 'toward', 'away' or 'suppress' is wanted.")
    if positions == "vector":
        positions = position_named(aim.vectors.provenance.position)
    if positions != "response":
        position_of(positions)  # refuses what it does not know
    aim.vectors.check_fits(model)
    found = aim.vectors.at_layers(config.layers if aim.layers is None else aim.layers, aim.hook or config.hook)
    for name, vector in found.items():
        if vector.norm() == 0:
            raise ValueError(f"vectors: {name} is all zeros, which has no direction to tune. Extract it again.")
        if vector.ndim != 1:
            raise ValueError(
                f"vectors: {name} has a vector for each head; tuning wants one of d_model. Use resid_post."
            )
        if config.cosine_weight and not _moved(name, config):
            raise ValueError(
                f"layers: {layer_of(name)} ({name}) lies before the first weight that the cosine loss trains, in block "
                f"{min(config.blocks_of('cosine'))}, so nothing can move it. Name later layers, or earlier "
                "trained_layers."
            )
    return ResolvedTarget(found, direction, share, positions)


def _moved(name: str, config: TuneConfig) -> bool:
    """Whether a weight that the cosine loss trains comes before this hook point."""
    first = min(config.blocks_of("cosine"))
    if layer_of(name) != first:
        return layer_of(name) > first
    only_mlp = set(config.target_modules_of("cosine")) <= {"gate", "up", "down"}
    return not name.endswith(("hook_resid_pre", "hook_attn_out", "hook_resid_mid") if only_mlp else "hook_resid_pre")


@dataclass(frozen=True)
class KLThenSteer:
    """Tunes a model while it is steered at random (Stickland et al. 2024, KL-then-steer).

    In each step, with probability `share`, one of the directions is added to every token with a multiplier drawn from
    `strength` * U(-1, 1), and all losses are computed under it. With the KL alone the model learns to keep its own
    answers while steered: KL(tuned and steered || untuned and unsteered). With the cosine of direction `suppress` it learns
    to take the direction out again. With a small share, the first steps of such a run have nothing to learn from.

    Attributes:
        directions: SteeringVectors, which stay as they are; or ContrastPairs, whose mean difference at the last token
            is taken from the current model each time, as in the paper.
        layers: blocks to whose output a direction is added.
        strength: largest multiplier, of the directions' own lengths.
        share: probability of steering in a step.
        n_pairs: pairs that a direction is taken from each time, where ContrastPairs came.

    Example:
        >>> config = TuneConfig(cosine_weight=0, token_weight=0, max_steps=100)
        >>> steer = KLThenSteer([vectors], layers=[21], strength=3.0)
        >>> delta = tune(model, vectors, train, config, neutral=neutral_prompts, steer=steer)
    """

    directions: Sequence[SteeringVectors | ContrastPairs]
    layers: Sequence[int]
    strength: float = 1.5
    share: float = 0.125
    n_pairs: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", whole_numbers("layers", self.layers))
        kinds = (SteeringVectors, ContrastPairs)
        if (
            not isinstance(self.directions, Sequence)
            or not self.directions
            or not all(isinstance(each, kinds) for each in self.directions)
        ):
            raise ValueError("directions: a list of at least one SteeringVectors or ContrastPairs is wanted.")
        if not self.strength > 0 or not 0 < self.share <= 1 or self.n_pairs < 1:
            raise ValueError(
                f"strength, share, n_pairs: {self.strength}, {self.share}, {self.n_pairs} came; a strength above 0, a "
                "share above 0 and up to 1, and at least one pair are wanted."
            )

    def check_fits(self, model: Model) -> None:
        """Refuses directions of another model and layers outside it.

        Raises:
            ValueError: names the argument.
        """
        check_layers(model, self.layers)
        for each in self.directions:
            if isinstance(each, SteeringVectors):
                each.check_fits(model)
                each.at_layers(self.layers)

    def drawn(self, model: Model, seed: str) -> list[FwdHook]:
        """The hooks of one step: none, or a direction with a multiplier."""
        chance = random.Random(seed)
        steered, which = chance.random() < self.share, chance.randrange(len(self.directions))
        multiplier = self.strength * chance.uniform(-1, 1)
        return self.hooks(model, which, multiplier, chance.randrange(2**31)) if steered else []

    def held_out(self, model: Model) -> list[list[FwdHook]]:
        """The hooks of every validation: each direction at half its strength, both ways."""
        return [
            self.hooks(model, which, sign * self.strength / 2, 0)
            for which in range(len(self.directions))
            for sign in (1, -1)
        ]

    def hooks(self, model: Model, which: int, multiplier: float, seed: int) -> list[FwdHook]:
        """One of the directions, added."""
        chosen = self.directions[which]
        if isinstance(chosen, ContrastPairs):
            chosen = extract_vectors(model, chosen.sample(self.n_pairs, seed=seed), layers=self.layers)
        return add(chosen, self.layers, multiplier)

    def described(self) -> dict[str, Any]:
        """What of it a delta's configuration keeps."""
        kept: list[Mapping[str, Any]] = [
            each.described() if isinstance(each, SteeringVectors) else {"pairs": each.name, "sha256": each.sha256}
            for each in self.directions
        ]
        return {
            "layers": list(self.layers), "strength": self.strength, "share": self.share, "n_pairs": self.n_pairs,
            "directions": kept,
        }  # fmt: skip


def described(aims: SteeringVectors | Sequence[DirectionTarget]) -> list[dict[str, Any]]:
    """The aims as a delta's configuration keeps them."""
    if isinstance(aims, SteeringVectors):
        return [aims.described()]
    own = ("weight", "direction", "layers", "hook", "positions")
    return [{**{name: getattr(aim, name) for name in own}, **aim.vectors.described()} for aim in aims]
