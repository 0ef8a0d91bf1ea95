"""The control: a random direction through the same machinery. An arm that does not beat it shows nothing."""

from __future__ import annotations

from dataclasses import replace

import torch

from rt_lens.arms.intervention import Interventions
from rt_lens.arms.registry import ArmInputs, register_arm
from rt_lens.arms.ways.steered import KNOBS
from rt_lens.steering.binding import add


@register_arm(
    "random", "A random direction, as long as the steering vector, is added at the chosen layer: the control.",
    knobs=KNOBS,
)  # fmt: skip
def random(inputs: ArmInputs) -> Interventions:
    """A Gaussian direction of the vector's norm; each seed has its own, the same for both directions up to its sign."""
    generator = torch.Generator().manual_seed(inputs.seed)
    drawn = {}
    for name, vector in inputs.vectors.select(inputs.layers).vectors.items():
        noise = torch.randn(vector.shape, generator=generator, device="cpu")
        drawn[name] = (noise / noise.norm() * vector.norm().cpu()).to(vector)
    provenance = replace(inputs.vectors.provenance, method="random", seed=inputs.seed)
    return add(type(inputs.vectors)(drawn, provenance), inputs.layers, inputs.sign)
