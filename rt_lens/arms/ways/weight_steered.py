"""Contrastive weight steering: the difference of the weights tuned toward and away (arXiv 2511.05408)."""

from __future__ import annotations

from rt_lens.arms.intervention import Interventions
from rt_lens.arms.registry import ArmInputs, register_arm, registered_arm
from rt_lens.tuning.delta import WeightDelta


@register_arm(
    "weight_steered", "The difference of the two token-tuned weight changes, toward minus away.",
    uses=("token_tuned",), tunes=True, knobs=registered_arm("token_tuned").knobs,
)  # fmt: skip
def weight_steered(inputs: ArmInputs) -> Interventions:
    """The delta of this direction minus the other's: what both learn, such as the form of responses, cancels out."""
    here, there = (inputs.make("token_tuned", way) for way in (inputs.direction, inputs.opposite))
    assert isinstance(here, WeightDelta)
    assert isinstance(there, WeightDelta)
    return here - there
