"""A learned edit of rank one, by the tokens of the personas' responses (LoReFT, Wu et al. 2024; AxBench)."""

from __future__ import annotations

from rt_lens.arms.intervention import Interventions
from rt_lens.arms.knobs import Among, Between, Blocks
from rt_lens.arms.registry import ArmInputs, register_arm
from rt_lens.arms.ways.token_tuned import config_of, prepared
from rt_lens.tuning.learned_edits import tune_shift
from rt_lens.tuning.tuning_data import trained_tokens


@register_arm(
    "reft_r1", "A rank-one edit of the residual stream at one layer, learned from the personas' responses.",
    tunes=True, like="token_tuned", differs={"learning_rate": 0.002},
    knobs={
        "layer": Blocks(0.3, 0.95), "learning_rate": Between(2e-4, 2e-2, log=True),
        "kl_weight": Among((0.0, 0.3, 1.0, 3.0)),
    },
)  # fmt: skip
def reft_r1(inputs: ArmInputs) -> Interventions:
    """h + R^T (W h + b - R h) of rank one; its strength is the factor of what is added to h."""
    (layer,) = inputs.layers
    config = config_of("reft_r1", inputs, trained_layers=(layer,))
    data = prepared(inputs, config, *inputs.targets(inputs.direction))
    hooks, history = tune_shift(inputs.model, layer, data, config, progress=inputs.progress)
    inputs.tuned(inputs.direction, history, trained_tokens(data, config, history))
    return hooks
