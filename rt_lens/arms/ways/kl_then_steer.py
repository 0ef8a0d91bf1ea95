"""Tuning a model to keep its answers while steered, then steering it (KL-then-steer, Stickland et al. 2024)."""

from __future__ import annotations

from rt_lens.arms.intervention import Interventions
from rt_lens.arms.registry import ArmInputs, register_arm
from rt_lens.arms.ways.steer_distilled import STEERED
from rt_lens.arms.ways.token_tuned import config_of, prepared, tuned
from rt_lens.steering.binding import add
from rt_lens.tuning.direction_targets import KLThenSteer


@register_arm(
    "kl_then_steer", "Fine-tuned to keep its neutral responses while steered at random, and then steered.", tunes=True,
    like="token_tuned", differs={"token_weight": 0.0, "kl_weight": 1.0},
    knobs={name: knob for name, knob in STEERED.items() if name != "kl_weight"},
)  # fmt: skip
def kl_then_steer(inputs: ArmInputs) -> Interventions:
    """The delta together with the vector; a strength scales both."""
    steer = KLThenSteer([inputs.vectors], inputs.layers, strength=2 * inputs.multiplier, share=1.0)
    config = config_of("kl_then_steer", inputs)
    data = prepared(inputs, config, *inputs.targets(inputs.direction), steer=steer)
    delta = tuned("kl_then_steer", inputs, data, steer=steer)
    return delta, add(inputs.vectors, inputs.layers, inputs.sign)
