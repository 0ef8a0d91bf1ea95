"""Fine-tuning on what the steered model writes: the edit's effect, moved into the weights (arXiv 2606.00995)."""

from __future__ import annotations

from rt_lens.arms.intervention import Interventions, applied
from rt_lens.arms.knobs import Among
from rt_lens.arms.registry import ArmInputs, register_arm
from rt_lens.arms.ways.token_tuned import KNOBS, config_of, prepared, tuned
from rt_lens.steering.binding import add
from rt_lens.tuning.targets import rewrite_targets

STEERED = {**KNOBS, "multiplier": Among((1.0, 1.5, 2.0, 3.0))}


@register_arm(
    "steer_distilled", "Fine-tuned on the tokens of responses that the steered model wrote.", tunes=True,
    like="token_tuned", knobs=STEERED,
)  # fmt: skip
def steer_distilled(inputs: ArmInputs) -> Interventions:
    """As `token_tuned`, but the targets' answers are written under the steering vector and not under personas."""
    config = config_of("steer_distilled", inputs)
    with applied(inputs.model, add(inputs.vectors, inputs.layers, inputs.sign * inputs.multiplier)):
        train, validation = (rewrite_targets(inputs.model, part, config) for part in inputs.targets(inputs.direction))
    return tuned("steer_distilled", inputs, prepared(inputs, config, train, validation))
