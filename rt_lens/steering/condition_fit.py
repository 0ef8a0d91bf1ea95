"""Fitting a condition's threshold on prompts where it should hold and prompts where it should not."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rt_lens.common.inputs import text_list
from rt_lens.common.statistics.intervals import Interval, mean_interval, share_interval
from rt_lens.models.activations import read_activations, token_activations
from rt_lens.models.forward import check_layers
from rt_lens.models.generation import as_chat
from rt_lens.models.positions import numbers_in, position_of, rows_of
from rt_lens.models.protocol import Model
from rt_lens.steering.conditions import Condition, check_condition
from rt_lens.vectors.guards import refuse_head_hook
from rt_lens.vectors.steering_vectors import SteeringVectors, hook_names


@dataclass(frozen=True, kw_only=True)
class FittedCondition(Condition):
    """A condition with how often it errs on prompts that it was not fitted on.

    Attributes:
        misses: fraction of the positive prompts where it does not hold, with its Wilson 95 % interval; by token, the
            mean fraction of such tokens, with a bootstrap interval over prompts.
        false_alarms: fraction of the negative prompts, or their tokens, where it holds.
        seed: seed for the split into fitted and held-out prompts.

    Example:
        >>> chats = ["How was your day?", "Did you sleep well?", "Any plans tonight?", "Do you like tea?"]
        >>> sums = ["What is 2 + 2?", "What is 3 * 4?", "What is 9 - 5?", "What is 8 / 2?"]
        >>> fitted = fit_condition(model, positive=chats, negative=sums, layer=10)
        >>> fitted.misses.n, fitted.false_alarms.n, fitted.seed  # half of each kind is held out
        (2, 2, 0)
    """

    misses: Interval
    false_alarms: Interval
    seed: int


def fit_condition(
    model: Model,
    positive: Iterable[str],
    negative: Iterable[str],
    *,
    layer: int,
    hook: str = "resid_post",
    by: Literal["example", "token"] = "example",
    position: Literal["last", "mean"] = "last",
    vectors: SteeringVectors | None = None,
    seed: int = 0,
) -> FittedCondition:
    """A condition whose threshold best tells two kinds of prompt apart (compare CAST, Lee et al. 2024).

    Half of the prompts give the direction and the threshold (the one of the best balanced accuracy, in the middle
    between two prompts), the other half the error rates.

    Args:
        model: HookedTransformer or TransformerBridge.
        positive: prompts where the condition should hold; put through the chat template as `generate` does.
        negative: prompts where it should not.
        layer: block at which it is read.
        hook: kind of hook point.
        by: `example` decides once for each prompt, `token` for each token.
        position: what of a prompt `example` reads: its `last` token or the `mean` of its tokens.
        vectors: directions to use. Defaults to the mean difference of the two kinds of prompt.
        seed: seed for the split.

    Raises:
        ValueError: if a kind has fewer than four different prompts, or the two are the same.

    Example:
        >>> chats = ["How was your day?", "Did you sleep well?", "Any plans tonight?", "Do you like tea?"]
        >>> sums = ["What is 2 + 2?", "What is 3 * 4?", "What is 9 - 5?", "What is 8 / 2?"]
        >>> small_talk = fit_condition(model, positive=chats, negative=sums, layer=10)
        >>> small_talk.hook_name, 0 <= small_talk.misses.mean <= 1
        ('blocks.10.hook_resid_post', True)
    """
    positive, negative = _distinct("positive", positive), _distinct("negative", negative)
    check_condition(by, position)
    (name,) = hook_names(check_layers(model, [layer]), hook)
    refuse_head_hook(name)
    if vectors is not None:
        vectors = vectors.select([layer], hook)
        vectors.check_fits(model)
    read = _all_tokens if by == "token" else partial(_read, position=position)
    positive_fit, positive_held = _halves(read(model, positive, name), seed)
    negative_fit, negative_held = _halves(read(model, negative, name), seed)
    if vectors is not None:
        direction = vectors[name]
    else:
        positive_mean, negative_mean = (
            torch.stack([h.mean(0) for h in fit]).mean(0) for fit in (positive_fit, negative_fit)
        )
        direction = positive_mean - negative_mean
        if direction.norm() <= 1e-5 * positive_mean.norm():
            raise ValueError(
                f"positive must differ from negative, but their activations are the same at {name}. Give prompts that "
                "differ."
            )
    unit = direction / direction.norm()
    threshold = _threshold(torch.cat(positive_fit) @ unit, torch.cat(negative_fit) @ unit)
    missed = [float((h @ unit < threshold).float().mean()) for h in positive_held]
    alarmed = [float((h @ unit >= threshold).float().mean()) for h in negative_held]
    return FittedCondition(
        name, direction, threshold, by, position, misses=_rate(missed, by, seed),
        false_alarms=_rate(alarmed, by, seed), seed=seed,
    )  # fmt: skip


def _distinct(argument: str, prompts: Iterable[str]) -> list[str]:
    """Every prompt once: a held-out prompt that was fitted on would prove nothing."""
    distinct = list(dict.fromkeys(text_list(prompts, argument, chats=True)))
    if len(distinct) < 4:
        raise ValueError(
            f"{argument} must be at least 4 different prompts, half to fit on and half to test on, got {len(distinct)}."
        )
    return distinct


def _rate(wrong: Sequence[float], by: str, seed: int) -> Interval:
    """Over prompts: fraction of wrong verdicts, or mean fraction of wrong tokens."""
    return mean_interval(wrong, seed) if by == "token" else share_interval(int(sum(wrong)), len(wrong))


def _read(model: Model, prompts: Sequence[str], name: str, position: str) -> list[Float[Tensor, "1 d_model"]]:
    texts = as_chat(model, prompts)
    read_at = position_of(position)
    reads = [[numbers_in(row, read_at, f"prompt {i}")] for i, row in enumerate(rows_of(model, texts))]
    return list(read_activations(model, texts, [name], reads)[name])


def _all_tokens(model: Model, prompts: Sequence[str], name: str) -> list[Float[Tensor, "pos d_model"]]:
    return [token_activations(model, text, [name])[1][name] for text in as_chat(model, prompts)]


def _halves(items: Sequence[Tensor], seed: int) -> tuple[list[Tensor], list[Tensor]]:
    shuffled = random.Random(seed).sample(list(items), len(items))
    cut = (len(items) + 1) // 2
    return shuffled[:cut], shuffled[cut:]


def _threshold(positive: Float[Tensor, "positive"], negative: Float[Tensor, "negative"]) -> float:
    """Middle between the two neighbouring scores at which the balanced accuracy is best."""
    scores = torch.cat([positive, negative]).sort().values
    middles = (scores[1:] + scores[:-1]) / 2
    hits, rejections = positive[None] >= middles[:, None], negative[None] < middles[:, None]
    balanced = hits.float().mean(1) + rejections.float().mean(1)
    best = (balanced == balanced.max()).nonzero()[:, 0]
    return float(middles[best[len(best) // 2]])
