"""Fine-tuning on responses that the personas gave, by their tokens alone: what everybody would try first."""

from __future__ import annotations

from dataclasses import replace

from rt_lens.arms.intervention import Interventions
from rt_lens.arms.registry import ArmInputs, register_arm
from rt_lens.tuning.loop import tune


@register_arm("token_tuned", "Fine-tuned on the tokens of the personas' responses alone.", tunes=True)
def token_tuned(inputs: ArmInputs) -> Interventions:
    """The delta of a tuning run with the settings of `token_tuned`."""
    return tuned("token_tuned", inputs)


def tuned(arm: str, inputs: ArmInputs) -> Interventions:
    """The delta of a tuning run with an arm's settings."""
    config = replace(inputs.configs[arm], direction=inputs.direction, seed=inputs.seed)
    data = inputs.data(inputs.direction)
    delta = tune(inputs.model, inputs.vectors, data, config, progress=inputs.progress)
    inputs.tuned(arm, inputs.direction, delta)
    return delta
