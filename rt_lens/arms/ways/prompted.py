"""Asking for it: a persona as the system prompt. AxBench (Wu et al. 2025) finds it ahead of representation methods."""

from __future__ import annotations

from rt_lens.arms.intervention import Interventions, SystemPrompt, applied
from rt_lens.arms.knobs import Personas
from rt_lens.arms.registry import ArmInputs, ArmUnavailable, register_arm
from rt_lens.evaluation.tasks import evaluate


@register_arm(
    "prompted", "The training persona that moves the score of validation prompts most, as the system prompt.",
    seeded=False, knobs={"persona": Personas()},
)  # fmt: skip
def prompted(inputs: ArmInputs) -> Interventions:
    """The best persona; of equals the first. It has no strength, so it is measured as it is."""
    if not inputs.personas:
        raise ArmUnavailable("The pairs have no personas to use as a system prompt.")
    if len(inputs.personas) == 1:  # of the settings
        return SystemPrompt(inputs.personas[0])

    def moved(persona: str) -> float:
        with applied(inputs.model, SystemPrompt(persona)):
            return inputs.sign * evaluate(inputs.model, inputs.validation).interval.mean

    return SystemPrompt(max(inputs.personas, key=moved))
