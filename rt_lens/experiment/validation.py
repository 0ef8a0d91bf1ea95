"""Validation prompts of a behaviour, and the metric that its file asks for: what is measured before the test."""

from __future__ import annotations

from rt_lens.arms.sweeping import Metric
from rt_lens.experiment.config import Experiment
from rt_lens.experiment.protocols import family_of
from rt_lens.models.protocol import Model


def validation_metric(experiment: Experiment, model: Model, max_new_tokens: int) -> tuple[list[str], Metric]:
    """Validation prompts, and how `sweep` measures steering on them.

    Args:
        experiment: of the behaviour. For honesty the metric is the likelihood of options, and no response is generated.
        model: is measured first where the protocol of honesty is `auto`.
        max_new_tokens: length of a response.

    Raises:
        ValueError: as `protocol_of`.

    Example:
        >>> from rt_lens.experiment.validation import validation_metric
        >>> prompts, metric = validation_metric(load_experiment("mood"), model, max_new_tokens=4)
        >>> result = sweep(model, vectors, prompts[:2], layers=[21], multipliers=[0, 2], metric=metric, progress=False)
        >>> result.summary()[["layer", "multiplier", "n"]].to_numpy().tolist()
        [[21.0, 0.0, 2.0], [21.0, 2.0, 2.0]]
    """
    return family_of(experiment).metric(model, max_new_tokens)
