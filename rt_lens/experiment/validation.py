"""What a behaviour is measured on before its test: validation prompts, with the scorer that its file names."""

from __future__ import annotations

from rt_lens.evaluation.scorers import Likelihood
from rt_lens.evaluation.tasks import EvalTask
from rt_lens.experiment.config import Experiment
from rt_lens.experiment.protocols import parts, protocol_of
from rt_lens.models.protocol import Model


def validation_task(
    experiment: Experiment, model: Model, max_new_tokens: int, n_prompts: int | None = None
) -> EvalTask:
    """The task that measures steering on validation prompts, for `sweep`.

    Args:
        experiment: of the behaviour. Honesty is measured by the likelihood of options, and nothing is generated.
        model: is asked what it can do, where honesty's protocol is `auto`.
        max_new_tokens: length of a response.
        n_prompts: only so many prompts; all for None.

    Raises:
        ValueError: as `protocol_of`.

    Example:
        >>> task = validation_task(load_experiment("mood"), model, max_new_tokens=4, n_prompts=2)
        >>> sweep(model, vectors, task, layers=[21], multipliers=[-1, 1], progress=False).metric
        'vader'
    """
    if experiment.honesty is None:
        _, held_out, _ = parts(experiment)
        return EvalTask(held_out.topics[:n_prompts], [experiment.scorer], max_new_tokens)
    protocol = protocol_of(experiment, model)
    form = "letters" if protocol.name == "persona" else "answers"
    return EvalTask(protocol.choosing.asked[:n_prompts], [Likelihood("share", form)], max_new_tokens)
