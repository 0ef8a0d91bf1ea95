"""Fine-tuning on responses that the personas gave, by their tokens alone: what everybody would try first."""

from __future__ import annotations

from dataclasses import replace

from rt_lens.arms.intervention import Interventions
from rt_lens.arms.knobs import Among, Between, Blocks, Knob
from rt_lens.arms.registry import ArmInputs, register_arm
from rt_lens.tuning.config import MATRICES
from rt_lens.tuning.loop import tune

# None of them changes how many tokens a run is trained on: a search gives every arm the same.
KNOBS: dict[str, Knob] = {
    "learning_rate": Between(3e-5, 1e-3, log=True),
    "kl_weight": Among((0.0, 0.3, 1.0, 3.0)),
    "target_modules": Among((MATRICES, MATRICES[:4], MATRICES[4:])),
}


@register_arm(
    "token_tuned", "Fine-tuned on the tokens of the personas' responses alone.", tunes=True,
    knobs={**KNOBS, "trained_layers": Blocks(0.2, 0.9, width=8)},
)  # fmt: skip
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
