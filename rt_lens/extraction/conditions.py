"""Fitting the threshold of a condition on prompts where it holds and prompts where it does not."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rt_lens.activations import read_activations
from rt_lens.forward import check_layers
from rt_lens.generation import as_chat
from rt_lens.methods import mean_diff
from rt_lens.positions import numbers_in, position_of, rows_of
from rt_lens.statistics import Interval, share_interval
from rt_lens.steering import Condition
from rt_lens.steering.conditions import check_condition
from rt_lens.vectors import SteeringVectors, hook_names


@dataclass(frozen=True, kw_only=True)
class FittedCondition(Condition):
    """A condition with how often it errs on prompts that it was not fitted on.

    Attributes:
        misses: share of the prompts where it should hold and does not, with its Wilson 95 % interval.
        false_alarms: share of the prompts where it holds and should not.
        seed: of the split into fitted and held-out prompts.
    """

    misses: Interval
    false_alarms: Interval
    seed: int


def fit_condition(
    model: Any,
    holds: Sequence[str],
    fails: Sequence[str],
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
        holds: prompts where the condition should hold; put through the chat template as `generate` does.
        fails: prompts where it should not.
        layer: block at which it is read.
        hook: kind of hook point.
        by: `example` decides once for each prompt, `token` for each token, with the same threshold.
        position: what of a prompt is read: its `last` token or the `mean` of its tokens.
        vectors: directions to use; the mean difference of the two kinds of prompt for None.
        seed: of the split.

    Raises:
        ValueError: if a kind has fewer than four prompts, or the direction is zero.

    Example:
        >>> small_talk = fit_condition(model, holds=chats, fails=sums, layer=10)
        >>> print(small_talk.misses, small_talk.false_alarms)
    """
    for argument, prompts in (("holds", holds), ("fails", fails)):
        if isinstance(prompts, str) or len(prompts) < 4:
            came = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
            raise ValueError(f"{argument}: {came} came; at least 4 are wanted, to fit on a half and test on the other.")
    check_condition(by, position)
    (name,) = hook_names(check_layers(model, [layer]), hook)
    if name.endswith(".hook_z"):
        raise ValueError("hook: 'z' is each head's own; a condition reads one direction. Use hook='attn_out', say.")
    if vectors is not None:
        vectors = vectors.select([layer], hook)
        vectors.check_fits(model)
    yes, no = (_read(model, prompts, name, position) for prompts in (holds, fails))
    (yes_fit, yes_held), (no_fit, no_held) = (_halves(h, seed) for h in (yes, no))
    if vectors is not None:
        direction = vectors[name]
    else:
        n = min(len(yes_fit), len(no_fit))
        direction = mean_diff(yes_fit[:n], no_fit[:n])
    unit = direction / direction.norm()
    threshold = _threshold(yes_fit @ unit, no_fit @ unit)
    missed, alarmed = int((yes_held @ unit < threshold).sum()), int((no_held @ unit >= threshold).sum())
    return FittedCondition(
        name, direction, threshold, by, position, misses=share_interval(missed, len(yes_held)),
        false_alarms=share_interval(alarmed, len(no_held)), seed=seed,
    )  # fmt: skip


def _read(model: Any, prompts: Sequence[str], name: str, position: str) -> Float[Tensor, "prompt d_model"]:
    texts = as_chat(model, prompts)
    place = position_of(position)
    reads = [[numbers_in(row, place, f"prompt {i}")] for i, row in enumerate(rows_of(model, texts))]
    return read_activations(model, texts, [name], reads)[name][:, 0]


def _halves(h: Float[Tensor, "prompt d"], seed: int) -> tuple[Tensor, Tensor]:
    order = list(range(len(h)))
    random.Random(seed).shuffle(order)
    cut = (len(h) + 1) // 2
    return h[order[:cut]], h[order[cut:]]


def _threshold(yes: Float[Tensor, "holding"], no: Float[Tensor, "failing"]) -> float:
    """Middle between the two neighbouring scores at which the balanced accuracy is best."""
    scores = torch.cat([yes, no]).sort().values
    middles = (scores[1:] + scores[:-1]) / 2
    balanced = (yes[None] >= middles[:, None]).float().mean(1) + (no[None] < middles[:, None]).float().mean(1)
    best = (balanced == balanced.max()).nonzero()[:, 0]
    return float(middles[best[len(best) // 2]])
