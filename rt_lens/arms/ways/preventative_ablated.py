"""Fine-tuning with the direction ablated, used without: concept ablation fine-tuning (CAFT, Casademunt et al. 2025)."""

from __future__ import annotations

from rt_lens.arms.intervention import Interventions
from rt_lens.arms.registry import ArmInputs, register_arm
from rt_lens.arms.ways.token_tuned import KNOBS, config_of, prepared, tuned
from rt_lens.steering.binding import ablate
from rt_lens.tuning.direction_targets import Preventative


@register_arm(
    "preventative_ablated", "Fine-tuned on the personas' responses while the direction is ablated; used without.",
    tunes=True, like="token_tuned", knobs=KNOBS,
)  # fmt: skip
def preventative_ablated(inputs: ArmInputs) -> Interventions:
    """As `token_tuned`, but what is learned cannot run along the vector at the layer that is ablated."""
    steer = Preventative(ablate(inputs.vectors, inputs.layers))
    config = config_of("preventative_ablated", inputs)
    data = prepared(inputs, config, *inputs.targets(inputs.direction), steer=steer)
    return tuned("preventative_ablated", inputs, data, steer=steer)
