"""The ways to install a behaviour, by name: each is a function that makes an intervention from the same inputs.

The built-in ones are in `rt_lens.arms.ways`, one file each. One of your own is a function and a decorator:

    @register_arm("steered_everywhere", "The vector is added at every layer from the chosen one on.")
    def steered_everywhere(inputs: ArmInputs) -> Interventions:
        return add(inputs.vectors, range(inputs.layer, inputs.model.cfg.n_layers), inputs.sign)

An arm is made at any strength: a comparison at equal damage scales it (`rt_lens.arms.scaled`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from typing import Any, Literal, TypeAlias

from rt_lens.arms.intervention import Interventions
from rt_lens.arms.knobs import Knob
from rt_lens.evaluation.tasks import EvalTask
from rt_lens.models.protocol import Model
from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.losses import Direction
from rt_lens.tuning.targets import Target, TokenTarget
from rt_lens.tuning.tuning_data import TuningData
from rt_lens.vectors.steering_vectors import SteeringVectors

BUILT_IN = (
    "prompted", "steered", "steered_generated", "token_tuned", "rep_tuned", "weight_steered", "steer_distilled",
    "preventative", "preventative_ablated", "lorra", "circuit_breaker", "dpo", "bipo", "reft_r1", "kl_then_steer",
    "suppress_tuned", "random",
)  # fmt: skip


class ArmUnavailable(Exception):
    """Raised by an arm that cannot be made of its inputs; the message says why, and the comparison reports it.

    Example:
        >>> str(ArmUnavailable("The pairs have no personas."))
        'The pairs have no personas.'
    """


@dataclass(frozen=True)
class ArmInputs:
    """What an arm is made from. Every arm of a run gets the same.

    Attributes:
        model: the untuned model.
        direction: `toward` or `away`.
        seed: for everything that is random.
        vectors: of the behaviour, from this seed's pairs.
        layer: chosen on validation prompts.
        personas: of the direction's side, from the training part; may be empty.
        validation: validation prompts, and the scorer, of which more is further toward.
        configs: arm -> settings of its tuning.
        data: direction -> targets and neutral responses, prepared once for all arms of this seed.
        make: (arm, direction) -> another arm of this seed, made once; with this arm's settings where it has any.
        settings: values of the arm's knobs, from the file's `[settings.ARM]` or a search; those not named are left to
            the arm.
        targets: direction -> training and validation targets, written once for all arms of this seed; for an arm that
            prepares data of its own.
        neutral: neutral responses for such data.
        tuned: is called with the direction, the history and the number of trained tokens of each tuning run.
        progress: show bars.

    Example:
        >>> inputs = ArmInputs(
        ...     model=model, direction="away", seed=0, vectors=vectors, layer=21, personas=["You are a sad assistant."],
        ...     validation=EvalTask(prompts, max_new_tokens=4), configs={}, data=lambda direction: data,
        ...     make=lambda arm, direction: None,
        ... )
        >>> ((name, edit),) = rtl.arms.registered_arm("steered").way(inputs)
        >>> name, edit.multiplier, inputs.opposite
        ('blocks.21.hook_resid_post', -1.0, 'toward')
    """

    model: Model
    direction: Direction
    seed: int
    vectors: SteeringVectors
    layer: int
    personas: Sequence[str]
    validation: EvalTask
    configs: Mapping[str, TuneConfig]
    data: Callable[[Direction], TuningData]
    make: Callable[[str, Direction], Interventions]
    settings: Mapping[str, Any] = field(default_factory=dict)
    targets: Callable[[Direction], tuple[list[TokenTarget], list[TokenTarget]]] = lambda direction: ([], [])
    neutral: Callable[[], list[Target]] = list
    tuned: Callable[[Direction, History, int], None] = lambda direction, history, tokens: None
    progress: bool = False

    @property
    def sign(self) -> float:
        """1 toward the behaviour, -1 away from it."""
        return 1.0 if self.direction == "toward" else -1.0

    @property
    def layers(self) -> list[int]:
        """Blocks at which an arm steers: from `layer` of the settings, or the one chosen, `n_layers` of them (1)."""
        first = self.settings.get("layer", self.layer)
        return list(range(first, min(first + self.settings.get("n_layers", 1), self.model.cfg.n_layers)))

    @property
    def multiplier(self) -> float:
        """How strongly an arm steers while it writes or tunes: `multiplier` of the settings (2), of the vector."""
        return float(self.settings.get("multiplier", 2.0))

    @property
    def opposite(self) -> Direction:
        """The other direction."""
        return "away" if self.direction == "toward" else "toward"


History: TypeAlias = Sequence[Mapping[str, Any]]
Way: TypeAlias = Callable[[ArmInputs], Interventions]


@dataclass(frozen=True)
class RegisteredArm:
    """A way to install a behaviour.

    Attributes:
        name: of the arm.
        description: in a sentence, for reports.
        way: the function.
        uses: names of other arms that it asks `ArmInputs.make` for.
        tunes: whether it trains weights, or an edit's tensors.
        seeded: whether it depends on the seed; if not, it is made once for each direction.
        knobs: name of a setting -> the values that a search tries.
        like: the arm whose tuning settings it has, `rep_tuned` or `token_tuned`; None if it has none.
        differs: tuning settings in which it differs from that one.
    """

    name: str
    description: str
    way: Way = field(repr=False)
    uses: tuple[str, ...] = ()
    tunes: bool = False
    seeded: bool = True
    knobs: Mapping[str, Knob] = field(default_factory=dict)
    like: Literal["rep_tuned", "token_tuned"] | None = None
    differs: Mapping[str, Any] = field(default_factory=dict)


_ARMS: dict[str, RegisteredArm] = {}


def register_arm(
    name: str,
    description: str,
    *,
    uses: Sequence[str] = (),
    tunes: bool = False,
    seeded: bool = True,
    knobs: Mapping[str, Knob] | None = None,
    like: Literal["rep_tuned", "token_tuned"] | None = None,
    differs: Mapping[str, Any] | None = None,
) -> Callable[[Way], Way]:
    """Decorator: makes a function available as an arm of this name, in a TOML file's `arms` too.

    Args:
        name: of the arm; letters, digits and underscores.
        description: in a sentence, for reports.
        uses: other arms that the function asks `ArmInputs.make` for.
        tunes: whether it trains weights, or an edit's tensors.
        seeded: whether it depends on the seed: on its vectors, its data, or a random draw.
        knobs: name of a setting -> the values that a search tries; the function reads it from `ArmInputs.settings`, and
            those that are settings of a TuneConfig from `ArmInputs.configs` too.
        like: for an arm that tunes, the one from whose settings in the file its own in `ArmInputs.configs` are made.
        differs: settings of the TuneConfig in which it differs from that one.

    Raises:
        ValueError: for a name that is taken, or not a name.

    Example:
        >>> @register_arm("twice_steered", "The vector is added at the chosen layer and at the last.")
        ... def twice_steered(inputs):
        ...     return add(inputs.vectors, [inputs.layer, inputs.model.cfg.n_layers - 1], inputs.sign)
        >>> registered_arm("twice_steered").description
        'The vector is added at the chosen layer and at the last.'
        >>> unregister_arm("twice_steered")
    """
    if not name.isidentifier() or name in ("untuned", "none"):
        raise ValueError(
            f"name must be letters, digits and underscores, and not 'untuned', got {name!r}. Choose another."
        )
    if name in _ARMS:
        raise ValueError(f"name must be one that no arm has, got {name!r}, which is taken. Choose another.")

    def registered(way: Way) -> Way:
        _ARMS[name] = RegisteredArm(
            name, description, way, tuple(uses), tunes, seeded, dict(knobs or {}), like, dict(differs or {})
        )
        return way

    return registered


def unregister_arm(name: str) -> None:
    """Forgets an arm that `register_arm` has registered.

    Example:
        >>> unregister_arm("never registered")  # does nothing
    """
    _ARMS.pop(name, None)


def registered_arm(name: str) -> RegisteredArm:
    """The arm of a name.

    Raises:
        ValueError: for an unknown one.

    Example:
        >>> registered_arm("steered").tunes, registered_arm("rep_tuned").tunes
        (False, True)
    """
    if name in BUILT_IN and name not in _ARMS:
        import_module(f"rt_lens.arms.ways.{name}")
    if name not in _ARMS:
        raise ValueError(unknown_arm(name))
    return _ARMS[name]


def unknown_arm(name: Any) -> str:
    """The message for a name that no arm has."""
    known = [*BUILT_IN, *(other for other in _ARMS if other not in BUILT_IN)]
    near = get_close_matches(str(name), known, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else "Register one of your own with rtl.arms.register_arm."
    return f"arms must be of {', '.join(known)}, got {name!r}. {hint}"


def check_arms(names: Sequence[str]) -> None:
    """Refuses names that no arm has, without importing the built-in ones.

    Raises:
        ValueError: for an unknown or repeated name, or none.
    """
    if not names:
        raise ValueError(f"arms must name at least one of {', '.join(BUILT_IN)}, got none.")
    for name in names:
        if name not in (*BUILT_IN, *_ARMS):
            raise ValueError(unknown_arm(name))
    if len(set(names)) < len(names):
        raise ValueError(f"arms must be named once each, got {', '.join(names)}. Remove the repeated one.")
