"""What tuning aims at: directions with their weights, and steering to withstand. Checked before any work."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from jaxtyping import Float
from torch import Tensor

from rt_lens.data.contrast_pairs import ContrastPairs
from rt_lens.models.forward import check_layers
from rt_lens.models.positions import position_named, position_of
from rt_lens.models.protocol import Model
from rt_lens.steering.binding import add
from rt_lens.steering.edits import Edit, FwdHook
from rt_lens.tuning.config import TuneConfig, whole_numbers
from rt_lens.tuning.losses import Direction, check_direction
from rt_lens.vectors.extraction import extract_vectors
from rt_lens.vectors.guards import refuse_heads
from rt_lens.vectors.steering_vectors import SteeringVectors, layer_of


@dataclass(frozen=True)
class DirectionTarget:
    """One of several directions to tune at once; what is None is taken from the TuneConfig.

    Attributes:
        vectors: the direction, at each of the layers.
        weight: of its cosine loss beside the other targets'.
        direction: `toward`, `away` or `suppress`.
        layers: blocks whose activations are read.
        hook: kind of hook point.
        positions: which tokens are read.

    Example:
        >>> other = extract_vectors(model, load_pairs("formality").sample(8), layers=[21])
        >>> targets = [DirectionTarget(vectors, direction="away"), DirectionTarget(other, 0.5, "suppress")]
        >>> delta = tune(model, targets, train.sample(4), config, neutral=neutral, progress=False)
        >>> [(target["behaviour"], target["direction"]) for target in delta.config["vectors"]]
        [('mood', 'away'), ('formality', 'suppress')]
    """

    vectors: SteeringVectors
    weight: float = 1.0
    direction: Direction | None = None
    layers: Sequence[int] | None = None
    hook: str | None = None
    positions: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.vectors, SteeringVectors):
            raise ValueError(f"vectors must be SteeringVectors, got a {type(self.vectors).__name__}.")

        if self.layers is not None:
            object.__setattr__(self, "layers", whole_numbers("layers", self.layers))


@dataclass(frozen=True)
class ResolvedTarget:
    """A DirectionTarget with everything filled in from the TuneConfig: what the loop reads.

    Attributes:
        vectors: hook name -> Float[Tensor, "d_model"].
        direction: `toward`, `away` or `suppress`.
        weight: its fraction of the cosine loss; the fractions of all targets sum to 1.
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
    model: Model, targets: SteeringVectors | Sequence[DirectionTarget], config: TuneConfig
) -> list[ResolvedTarget]:
    """The targets as the loop reads them.

    Raises:
        ValueError: vectors of another model, a layer that no training can move, a direction without length.
    """
    if isinstance(targets, SteeringVectors):
        targets = [DirectionTarget(targets)]
    listed = isinstance(targets, Sequence) and all(isinstance(target, DirectionTarget) for target in targets)
    if not listed or not targets:
        raise ValueError("vectors must be SteeringVectors, or a list of at least one DirectionTarget.")
    weights = [target.weight for target in targets]
    if min(weights) <= 0:
        raise ValueError(f"weight must be above 0 for every DirectionTarget, got {weights}. Leave out those of 0.")
    return [_resolved(model, target, target.weight / sum(weights), config) for target in targets]


def _resolved(model: Model, target: DirectionTarget, share: float, config: TuneConfig) -> ResolvedTarget:
    direction, positions = target.direction or config.direction, target.positions or config.positions
    check_direction(direction)
    if positions == "vector":
        positions = position_named(target.vectors.provenance.position)
    if positions != "response":
        position_of(positions)  # refuses what it does not know
    target.vectors.check_fits(model)
    layers = config.layers if target.layers is None else target.layers
    vectors = target.vectors.at_layers(layers, target.hook or config.hook)
    refuse_heads(vectors)
    for name, vector in vectors.items():
        if vector.norm() == 0:
            raise ValueError(f"vectors must have a direction to tune, got all zeros at {name}. Extract them again.")
        if config.cosine_weight and not _can_change(name, config):
            raise ValueError(
                f"layers contains {layer_of(name)}, but {name} lies before the first weight that the cosine loss "
                f"trains, in block {min(config.blocks_of('cosine'))}, so training cannot change it. Name later layers, "
                "or earlier trained_layers."
            )
    return ResolvedTarget(vectors, direction, share, positions)


def _can_change(name: str, config: TuneConfig) -> bool:
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
    answers while steered: KL(tuned and steered || untuned and unsteered). With the cosine of direction `suppress` it
    learns to remove the direction again. With a small share, the first steps of such a run have nothing to learn from.

    Attributes:
        directions: SteeringVectors, which stay as they are; or ContrastPairs, whose mean difference at the last token
            is taken from the current model each time, as in the paper.
        layers: blocks to whose output a direction is added.
        strength: largest multiplier, of the directions' own lengths.
        share: probability of steering in a step.
        n_pairs: pairs that a direction is extracted from each time, where ContrastPairs are given.
        ramp: fraction of the steps over which the largest multiplier grows from 0 to `strength`; 0 has it at once.

    Example:
        >>> steer = KLThenSteer([vectors], layers=[21], strength=3.0, share=1.0)
        >>> (name, edit), = steer.drawn(model, "a step's seed")  # one random dose of the direction
        >>> name, -3.0 < edit.multiplier < 3.0
        ('blocks.21.hook_resid_post', True)
        >>> len(steer.held_out(model))  # both ways, at half the strength
        2
    """

    directions: Sequence[SteeringVectors | ContrastPairs]
    layers: Sequence[int]
    strength: float = 1.5
    share: float = 0.125
    n_pairs: int = 16
    ramp: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", whole_numbers("layers", self.layers))
        kinds = (SteeringVectors, ContrastPairs)
        if (
            not isinstance(self.directions, Sequence)
            or not self.directions
            or not all(isinstance(direction, kinds) for direction in self.directions)
        ):
            raise ValueError("directions must be a list of at least one SteeringVectors or ContrastPairs.")
        if not self.strength > 0 or not 0 < self.share <= 1 or self.n_pairs < 1 or not 0 <= self.ramp <= 1:
            raise ValueError(
                "strength must be above 0, share above 0 and up to 1, n_pairs at least 1, and ramp from 0 to 1, got "
                f"strength={self.strength}, share={self.share}, n_pairs={self.n_pairs}, ramp={self.ramp}."
            )

    def check_fits(self, model: Model) -> None:
        """Refuses directions of another model and layers outside it.

        Raises:
            ValueError: names the argument.
        """
        check_layers(model, self.layers)
        for direction in self.directions:
            if isinstance(direction, SteeringVectors):
                direction.check_fits(model)
                direction.at_layers(self.layers)

    def drawn(self, model: Model, seed: str, progress: float = 1.0) -> list[FwdHook]:
        """The hooks of one step, after a fraction `progress` of all: none, or a direction with a multiplier."""
        chance = random.Random(seed)
        steered, which = chance.random() < self.share, chance.randrange(len(self.directions))
        multiplier = self.strength * chance.uniform(-1, 1)
        multiplier *= min(1.0, progress / self.ramp) if self.ramp else 1.0
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
        """What a delta's configuration keeps of it."""
        directions: list[Mapping[str, Any]] = [
            direction.described()
            if isinstance(direction, SteeringVectors)
            else {"pairs": direction.name, "sha256": direction.sha256}
            for direction in self.directions
        ]
        about = {
            "layers": list(self.layers), "strength": self.strength, "share": self.share, "n_pairs": self.n_pairs,
            "directions": directions,
        }  # fmt: skip
        return {**about, "ramp": self.ramp} if self.ramp else about  # checkpoints of before have no ramp


@dataclass(frozen=True)
class Preventative:
    """Tunes a model under edits that are always there, to be used without them.

    Steered to the other side, the weights learn to make up for it (preventative steering, Chen et al. 2025, arXiv
    2507.21509). With the direction ablated, they have to learn the targets by other directions (CAFT, Casademunt et al.
    2025, arXiv 2507.16795). The losses at hook points and tokens are computed under the edits, the KL on neutral
    prompts without.

    Attributes:
        hooks: edits, as `add` and `ablate` give them.

    Example:
        >>> steer = Preventative(add(vectors, [21], 2.0))
        >>> steer.layers, steer.described()["hooks"]
        ((21,), [{'hook': 'blocks.21.hook_resid_post', 'edit': 'Add', 'multiplier': 2.0}])
    """

    hooks: Sequence[FwdHook]

    def __post_init__(self) -> None:
        if not self.hooks or not all(isinstance(edit, Edit) for _, edit in self.hooks):
            raise ValueError("hooks must be edits, as `add` and `ablate` give them, got others or none.")

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks that are edited."""
        return tuple(sorted({layer_of(name) for name, _ in self.hooks}))

    def check_fits(self, model: Model) -> None:
        """Refuses blocks outside the model.

        Raises:
            ValueError: names the argument.
        """
        check_layers(model, self.layers)

    def drawn(self, model: Model, seed: str, progress: float = 1.0) -> list[FwdHook]:
        """The hooks of a step: always all."""
        return list(self.hooks)

    def held_out(self, model: Model) -> list[list[FwdHook]]:
        """The hooks of every validation."""
        return [list(self.hooks)]

    def described(self) -> dict[str, Any]:
        """What a delta's configuration keeps of it."""
        edits = [(name, edit) for name, edit in self.hooks if isinstance(edit, Edit)]
        return {
            "hooks": [
                {"hook": name, "edit": type(edit.operator).__name__, "multiplier": float(edit.multiplier)}
                for name, edit in edits
            ]
        }


SteerWhileTuning: TypeAlias = KLThenSteer | Preventative
"""Edits under which a tuning run computes its losses."""


def described(targets: SteeringVectors | Sequence[DirectionTarget]) -> list[dict[str, Any]]:
    """The targets as a delta's configuration keeps them."""
    if isinstance(targets, SteeringVectors):
        return [targets.described()]
    names = ("weight", "direction", "layers", "hook", "positions")
    return [
        {**{name: getattr(target, name) for name in names}, **target.vectors.described()} for target in targets
    ]  # fmt: skip
