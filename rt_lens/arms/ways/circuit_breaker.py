"""Turning the other side's representations away from what they were (circuit breakers, Zou et al. 2024)."""

from __future__ import annotations

from rt_lens.arms.intervention import Interventions
from rt_lens.arms.knobs import Between, Blocks
from rt_lens.arms.registry import ArmInputs, register_arm
from rt_lens.arms.ways.token_tuned import KNOBS, config_of, prepared, tuned


@register_arm(
    "circuit_breaker",
    "Fine-tuned until residuals of the other side's responses are unlike what they were, those of neutral ones alike.",
    tunes=True, like="rep_tuned",
    differs={"residual_loss": "circuit_breaker", "cosine_weight": 10.0, "token_weight": 0.0},
    knobs={
        **KNOBS, "layers": Blocks(0.3, 0.95, width=5), "cosine_weight": Between(1.0, 100.0, log=True),
        "kl_weight": Between(0.03, 3.0, log=True),
    },
)  # fmt: skip
def circuit_breaker(inputs: ArmInputs) -> Interventions:
    """What is to go are the responses of the opposite personas; what is to stay, the neutral ones."""
    config = config_of("circuit_breaker", inputs)
    return tuned("circuit_breaker", inputs, prepared(inputs, config, *inputs.targets(inputs.opposite)))
