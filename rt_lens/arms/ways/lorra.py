"""A target per token where rep-tuning has a cosine: h plus what the personas change there (LoRRA, Zou et al. 2023)."""

from __future__ import annotations

from rt_lens.arms.intervention import Interventions
from rt_lens.arms.knobs import Between, Blocks
from rt_lens.arms.registry import ArmInputs, ArmUnavailable, register_arm
from rt_lens.arms.ways.token_tuned import KNOBS, config_of, prepared, tuned
from rt_lens.tuning.targets import Target


@register_arm(
    "lorra", "Fine-tuned towards residuals moved by what the personas change at each token.", tunes=True,
    like="rep_tuned", differs={"residual_loss": "lorra", "cosine_weight": 1.0, "token_weight": 0.0},
    knobs={
        **KNOBS, "layers": Blocks(0.3, 0.95, width=5), "cosine_weight": Between(0.03, 3.0, log=True),
        "shift": Between(0.5, 4.0, log=True),
    },
)  # fmt: skip
def lorra(inputs: ArmInputs) -> Interventions:
    """The distance to h + shift (h_positive - h_negative) on the personas' responses, with h of the untuned model."""
    config = config_of("lorra", inputs)
    written = inputs.targets(inputs.direction)
    train, validation = ([t for t in part if isinstance(t, Target) and t.contrast] for part in written)
    if not train or not validation:
        raise ArmUnavailable("It needs targets that were written under personas, and this protocol has none.")
    return tuned("lorra", inputs, prepared(inputs, config, train, validation))
