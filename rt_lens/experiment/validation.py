"""What a behaviour is measured on before its test: validation prompts, with the scorer that its file names."""

from __future__ import annotations

from rt_lens.evaluation.tasks import EvalTask
from rt_lens.experiment.config import Experiment
from rt_lens.experiment.protocols import family_of
from rt_lens.models.protocol import Model


def validation_task(
    experiment: Experiment, model: Model, max_new_tokens: int, n_prompts: int | None = None
) -> EvalTask:
    """The task that measures steering on validation prompts, for `sweep`.

    Args:
        experiment: of the behaviour. Honesty is measured by the likelihood of options, and no response is generated.
        model: is measured first where the protocol of honesty is `auto`.
        max_new_tokens: length of a response.
        n_prompts: number of prompts to use. Defaults to all.

    Raises:
        ValueError: as `protocol_of`.

    Example:
        >>> task = validation_task(load_experiment("mood"), model, max_new_tokens=4, n_prompts=2)
        >>> sweep(model, vectors, task, layers=[21], multipliers=[-1, 1], progress=False).metric
        'vader'
    """
    return family_of(experiment).validation_task(model, max_new_tokens, n_prompts)
