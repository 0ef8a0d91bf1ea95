"""Representation tuning: a cosine loss moves the residual stream along the vector (Ackerman 2024)."""

from __future__ import annotations

from rt_lens.arms.intervention import Interventions
from rt_lens.arms.knobs import Between, Blocks
from rt_lens.arms.registry import ArmInputs, register_arm
from rt_lens.arms.ways.token_tuned import KNOBS, tuned


@register_arm(
    "rep_tuned", "Fine-tuned with a loss on the residual stream's cosine to the steering vector.", tunes=True,
    like="rep_tuned",
    knobs={**KNOBS, "layers": Blocks(0.3, 0.95, width=5), "cosine_weight": Between(2.0, 50.0, log=True)},
)  # fmt: skip
def rep_tuned(inputs: ArmInputs) -> Interventions:
    """The delta of a tuning run with the settings of `rep_tuned`."""
    return tuned("rep_tuned", inputs)
