"""Representation tuning that learns to remove what steering to the other side adds, used without steering."""

from __future__ import annotations

from rt_lens.arms.intervention import Interventions
from rt_lens.arms.knobs import Among, Between, Blocks
from rt_lens.arms.registry import ArmInputs, register_arm
from rt_lens.arms.ways.token_tuned import KNOBS, config_of, prepared, tuned
from rt_lens.steering.binding import add
from rt_lens.tuning.direction_targets import Preventative


@register_arm(
    "suppress_tuned", "Tuned to keep the vector out of the stream while steered to the other side; used without.",
    tunes=True, like="rep_tuned", differs={"token_weight": 0.0},
    knobs={
        **KNOBS, "layers": Blocks(0.3, 0.95, width=5), "cosine_weight": Between(2.0, 50.0, log=True),
        "multiplier": Among((1.0, 1.5, 2.0, 3.0)),
    },
)  # fmt: skip
def suppress_tuned(inputs: ArmInputs) -> Interventions:
    """The cosine's `suppress` (Ackerman 2024) under an edit at the first of its layers that pulls the other way."""
    config = config_of("suppress_tuned", inputs, direction="suppress")
    steer = Preventative(add(inputs.vectors, [min(config.blocks)], -inputs.sign * inputs.multiplier))
    data = prepared(inputs, config, *inputs.targets(inputs.direction), steer=steer)
    return tuned("suppress_tuned", inputs, data, steer=steer, direction="suppress")
