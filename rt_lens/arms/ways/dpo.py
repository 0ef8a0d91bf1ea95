"""Preference tuning: the direction's response over the opposite one (DPO, Rafailov et al. 2023)."""

from __future__ import annotations

from dataclasses import replace

from rt_lens.arms.intervention import Interventions
from rt_lens.arms.knobs import Between, Blocks
from rt_lens.arms.registry import ArmInputs, register_arm
from rt_lens.arms.ways.token_tuned import KNOBS, config_of, prepared, tuned
from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.targets import preferences
from rt_lens.tuning.tuning_data import TuningData


@register_arm(
    "dpo", "Fine-tuned to prefer the personas' responses to those of the opposite personas.", tunes=True,
    like="token_tuned", differs={"token_loss": "preference"},
    knobs={**KNOBS, "trained_layers": Blocks(0.2, 0.9, width=8), "beta": Between(0.03, 1.0, log=True)},
)  # fmt: skip
def dpo(inputs: ArmInputs) -> Interventions:
    """Pairs of responses to one prompt, half as many in a step, so that it reads as many tokens as other arms."""
    config = of_pairs(config_of("dpo", inputs))
    return tuned("dpo", replace(inputs, configs={**inputs.configs, "dpo": config}), pairs_of(inputs, config))


def of_pairs(config: TuneConfig) -> TuneConfig:
    """The settings for pairs: half as many in a step."""
    return replace(config, batch_size=max(1, config.batch_size // 2))


def pairs_of(inputs: ArmInputs, config: TuneConfig) -> TuningData:
    """The direction's responses with the opposite ones to reject."""
    given, rejected = inputs.targets(inputs.direction), inputs.targets(inputs.opposite)
    train, validation = (preferences(*parts) for parts in zip(given, rejected, strict=True))
    return prepared(inputs, config, train, validation)
