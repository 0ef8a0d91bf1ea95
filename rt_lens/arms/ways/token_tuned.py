"""Fine-tuning on responses that the personas gave, by their tokens alone: what everybody would try first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rt_lens.arms.intervention import Interventions
from rt_lens.arms.knobs import Among, Between, Blocks, Knob
from rt_lens.arms.registry import ArmInputs, ArmUnavailable, register_arm
from rt_lens.tuning.config import MATRICES, TuneConfig
from rt_lens.tuning.delta import WeightDelta
from rt_lens.tuning.direction_targets import SteerWhileTuning
from rt_lens.tuning.loop import tune
from rt_lens.tuning.losses import Direction
from rt_lens.tuning.targets import TokenTarget
from rt_lens.tuning.tuning_data import TuningData, prepare_data, trained_tokens

# None of them changes how many tokens a run is trained on: a search gives every arm the same.
KNOBS: dict[str, Knob] = {
    "learning_rate": Between(3e-5, 1e-3, log=True),
    "kl_weight": Among((0.0, 0.3, 1.0, 3.0)),
    "target_modules": Among((MATRICES, MATRICES[:4], MATRICES[4:])),
}


@register_arm(
    "token_tuned", "Fine-tuned on the tokens of the personas' responses alone.", tunes=True, like="token_tuned",
    knobs={**KNOBS, "trained_layers": Blocks(0.2, 0.9, width=8)},
)  # fmt: skip
def token_tuned(inputs: ArmInputs) -> Interventions:
    """The delta of a tuning run with the settings of `token_tuned`."""
    return tuned("token_tuned", inputs)


def tuned(
    arm: str,
    inputs: ArmInputs,
    data: TuningData | None = None,
    *,
    steer: SteerWhileTuning | None = None,
    direction: Direction | None = None,
) -> WeightDelta:
    """The delta of a tuning run with an arm's settings.

    Args:
        arm: its name.
        inputs: of the arm.
        data: what it reads. Defaults to that of the direction, which all arms share.
        steer: edits under which the losses are computed.
        direction: of the loss at the hook points. Defaults to the arm's.
    """
    config = config_of(arm, inputs, direction=direction or inputs.direction)
    data = inputs.data(inputs.direction) if data is None else data
    delta = tune(inputs.model, inputs.vectors, data, config, steer=steer, progress=inputs.progress)
    inputs.tuned(inputs.direction, delta.history, trained_tokens(data, config, delta.history))
    return delta


def config_of(arm: str, inputs: ArmInputs, **changes: Any) -> TuneConfig:
    """The arm's tuning settings, for its direction and seed."""
    return replace(inputs.configs[arm], **({"direction": inputs.direction, "seed": inputs.seed} | changes))


def prepared(
    inputs: ArmInputs,
    config: TuneConfig,
    train: Sequence[TokenTarget],
    validation: Sequence[TokenTarget],
    *,
    steer: SteerWhileTuning | None = None,
) -> TuningData:
    """Data of an arm's own: other targets than the personas' responses, or edits while it tunes.

    Raises:
        ArmUnavailable: without a target to learn from or to validate on.
    """
    if not train or not validation:
        raise ArmUnavailable(
            f"It needs responses to learn from and to validate on, and has {len(train)} and {len(validation)}."
        )
    neutral = inputs.neutral() if config.kl_weight else []
    return prepare_data(
        inputs.model, inputs.vectors, train, config, validation=validation, neutral=neutral, steer=steer
    )
