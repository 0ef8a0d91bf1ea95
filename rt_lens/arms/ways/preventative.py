"""Fine-tuning while steered to the other side, used without (preventative steering, Chen et al. 2025)."""

from __future__ import annotations

from rt_lens.arms.intervention import Interventions
from rt_lens.arms.registry import ArmInputs, register_arm
from rt_lens.arms.ways.steer_distilled import STEERED
from rt_lens.arms.ways.token_tuned import config_of, prepared, tuned
from rt_lens.steering.binding import add
from rt_lens.tuning.direction_targets import Preventative


@register_arm(
    "preventative", "Fine-tuned on the personas' responses while steered to the other side; used without steering.",
    tunes=True, like="token_tuned", knobs=STEERED,
)  # fmt: skip
def preventative(inputs: ArmInputs) -> Interventions:
    """As `token_tuned`, but the weights have to make up for an edit that pulls the other way."""
    steer = Preventative(add(inputs.vectors, inputs.layers, -inputs.sign * inputs.multiplier))
    config = config_of("preventative", inputs)
    data = prepared(inputs, config, *inputs.targets(inputs.direction), steer=steer)
    return tuned("preventative", inputs, data, steer=steer)
