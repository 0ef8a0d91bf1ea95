"""Adding the steering vector at generated tokens only: what the user wrote is read as it is."""

from __future__ import annotations

from rt_lens.arms.intervention import Interventions
from rt_lens.arms.registry import ArmInputs, register_arm
from rt_lens.arms.ways.steered import KNOBS
from rt_lens.steering.binding import add


@register_arm(
    "steered_generated", "The steering vector is added at the chosen layer, at generated tokens only.", knobs=KNOBS
)
def steered_generated(inputs: ArmInputs) -> Interventions:
    """As `steered`, at generated tokens."""
    return add(inputs.vectors, inputs.layers, inputs.sign, positions="generated")
