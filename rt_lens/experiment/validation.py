"""What a behaviour is tried on before its test: validation prompts, and the metric that its file asks for."""

from __future__ import annotations

from rt_lens.arms.sweeping import Answers, Metric, Options
from rt_lens.experiment.config import Experiment
from rt_lens.experiment.protocols import parts, protocol_of
from rt_lens.models.protocol import Model


def validation_metric(experiment: Experiment, model: Model, max_new_tokens: int) -> tuple[list[str], Metric]:
    """Prompts to steer on, and how to measure what steering does there, both for `sweep`.

    Args:
        experiment: of the behaviour. Honesty's metric weighs options by likelihood, and nothing is written.
        model: is asked what it can do, where honesty's protocol is `auto`.
        max_new_tokens: length of an answer.

    Raises:
        ValueError: as `protocol_of`.

    Example:
        >>> prompts, metric = validation_metric(load_experiment("mood"), model, 24)
        >>> sweep(model, vectors, prompts[:8], layers=[18, 21], metric=metric)
    """
    if experiment.honesty is None:
        _, held_out, _ = parts(experiment)
        return held_out.topics, Answers(experiment.scorer, max_new_tokens)
    protocol = protocol_of(experiment, model)
    asked = protocol.choosing.asked
    return [each.prompt for each in asked], Options(asked, "letters" if protocol.name == "persona" else "answers")
