"""Adding the steering vector at one layer, at every token (Turner et al. 2023; Rimsky et al. 2024)."""

from __future__ import annotations

from rt_lens.arms.intervention import Interventions
from rt_lens.arms.knobs import Among, Blocks, Knob
from rt_lens.arms.registry import ArmInputs, register_arm
from rt_lens.steering.binding import add

KNOBS: dict[str, Knob] = {"layer": Blocks(0.3, 0.95), "n_layers": Among((1, 2, 4))}


@register_arm("steered", "The steering vector is added at the chosen layer, at every token.", knobs=KNOBS)
def steered(inputs: ArmInputs) -> Interventions:
    """The vector at the chosen layer, or at some from there on, with multiplier 1 or -1."""
    return add(inputs.vectors, inputs.layers, inputs.sign)
