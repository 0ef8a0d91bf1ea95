"""Losses of representation tuning, as pure functions of tensors. They know no model and no loop.

Each returns one value per position, so that a loop can average over whatever batches its memory allows.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Direction = Literal["toward", "away", "suppress"]


def check_direction(direction: str) -> None:
    """Refuses what is no direction of tuning.

    Raises:
        ValueError: names the three that are.
    """
    if direction not in ("toward", "away", "suppress"):
        hint = ", the old name of 'suppress'" if direction == "out" else ""
        raise ValueError(f"direction must be 'toward', 'away' or 'suppress', got {direction!r}{hint}.")


def cosine_loss(
    h: Float[Tensor, "n d_model"],
    vector: Float[Tensor, "d_model"],
    direction: Direction,
    centre: Float[Tensor, "d_model"] | None = None,
) -> Float[Tensor, "n"]:
    """Cosine loss of activations against a direction (Ackerman 2024), each between 0 and 1.

    With c = cos(h, v): toward is (1 - c) / 2, away the same with -v, suppress is |c|. Given a centre, c is
    cos(h - centre, v): raw residual streams share a few huge dimensions, which hide v from the plain cosine.

    Args:
        h: activations at the chosen positions.
        vector: the direction.
        direction: `toward`, `away` or `suppress`.
        centre: what is subtracted from h first, usually the untuned model's mean.

    Example:
        >>> import torch
        >>> h = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> vector = torch.tensor([5.0, 0.0])
        >>> {direction: cosine_loss(h, vector, direction).tolist() for direction in ("toward", "away", "suppress")}
        {'toward': [0.0, 0.5, 1.0], 'away': [1.0, 0.5, 0.0], 'suppress': [1.0, 0.0, 1.0]}
    """
    check_direction(direction)
    cosine = F.cosine_similarity(h if centre is None else h - centre, vector[None], dim=-1)
    if direction == "toward":
        return (1 - cosine) / 2
    if direction == "away":
        return (1 + cosine) / 2
    return cosine.abs()


def token_loss(
    logits: Float[Tensor, "n d_vocab"],
    choices: Int[Tensor, "n k"],
    shares: Float[Tensor, "n k"],
    rest: float = 0.0,
) -> Float[Tensor, "n"]:
    """Cross-entropy of target distributions over a few tokens, in nats.

    One token with share 1 is the usual language-model loss; two with share 0.5 the soft choice of Ackerman (2024),
    whose floor is ln 2. Within `rest` of its floor a position's loss is constant and gives no gradient, since it is
    only there to keep the output's form.

    Args:
        logits: at the positions before the target tokens.
        choices: the tokens that have a share.
        shares: of each, with sum 1; 0 for a token that only fills its row up.
        rest: distance to the floor, in nats; 0 always gives a gradient.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[4.0, 4.0, -50.0]])  # two tokens of a vocabulary of three are likely
        >>> soft = token_loss(logits, torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]))
        >>> torch.allclose(soft, torch.tensor(2.0).log())
        True
    """
    # An unlikely token with share 0 has log-probability -inf under some masks, and 0 * -inf is no number.
    likely = logits.log_softmax(-1).gather(1, choices).masked_fill(shares == 0, 0.0)
    loss = -(shares * likely).sum(-1)
    if rest == 0:
        return loss
    return loss.clamp(min=-torch.xlogy(shares, shares).sum(-1) + rest)


def shift_loss(h: Float[Tensor, "n d_model"], aim: Float[Tensor, "n d_model"]) -> Float[Tensor, "n"]:
    """Distance of activations to where they are to go, |h - aim| (LoRRA, Zou et al. 2023, arXiv 2310.01405).

    With the untuned activations as aim it is what circuit breakers hold other text by (Zou et al. 2024).

    Args:
        h: activations at the chosen positions.
        aim: a target for each position.

    Example:
        >>> import torch
        >>> shift_loss(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0]])).tolist()
        [5.0]
    """
    return (h - aim).norm(dim=-1)


def break_loss(h: Float[Tensor, "n d_model"], untuned: Float[Tensor, "n d_model"]) -> Float[Tensor, "n"]:
    """Cosine to the untuned activations where it is positive: relu(cos(h, untuned)).

    At 0 the representation is orthogonal to what it was (circuit breakers, Zou et al. 2024, arXiv 2406.04313).

    Example:
        >>> import torch
        >>> h = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> break_loss(h, torch.tensor([[2.0, 0.0]]).expand(3, 2)).tolist()
        [1.0, 0.0, 0.0]
    """
    return F.cosine_similarity(h, untuned, dim=-1).relu()


def preference_loss(
    given: Float[Tensor, "n"],
    rejected: Float[Tensor, "n"],
    untuned_given: Float[Tensor, "n"],
    untuned_rejected: Float[Tensor, "n"],
    beta: float = 0.1,
) -> Float[Tensor, "n"]:
    """DPO loss of pairs of answers, in nats (Rafailov et al. 2023, arXiv 2305.18290).

    -log sigmoid(beta [(given - untuned_given) - (rejected - untuned_rejected)]). BiPO is the same, of a vector.

    Args:
        given: log-likelihood of the answer to give, over all of its tokens.
        rejected: of the answer not to give.
        untuned_given: of the first under the untuned model.
        untuned_rejected: of the second.
        beta: scale of the log-ratios.

    Example:
        >>> import torch
        >>> zero = torch.zeros(1)
        >>> torch.allclose(preference_loss(zero, zero, zero, zero), torch.tensor(2.0).log())
        True
    """
    return -F.logsigmoid(beta * ((given - untuned_given) - (rejected - untuned_rejected)))


def effectiveness_loss(differences: Float[Tensor, "n"], margin: float) -> Float[Tensor, "n"]:
    """Hinge on the logit difference of two answers: max(0, margin - difference) (Stoehr et al. 2024, 2410.04962).

    Args:
        differences: logit of the answer that is to be favoured minus that of the other.
        margin: by how much it is to be favoured; further gives nothing more.

    Example:
        >>> import torch
        >>> effectiveness_loss(torch.tensor([-1.0, 0.5, 3.0]), margin=2.0).tolist()
        [3.0, 1.5, 0.0]
    """
    return (margin - differences).clamp(min=0)


def faithfulness_loss(
    logits: Float[Tensor, "n d_vocab"], untuned: Float[Tensor, "n d_vocab"], answers: Int[Tensor, "n k"]
) -> Float[Tensor, "n"]:
    """KL from the untuned model over all tokens but the answers, in nats (Stoehr et al. 2024, 2410.04962).

    Both distributions are renormalised without the answers, so that moving probability between these costs nothing.

    Args:
        logits: of the edited model.
        untuned: of the untuned one.
        answers: tokens that are left out.

    Example:
        >>> import torch
        >>> untuned = torch.tensor([[2.0, 1.0, 0.0, 0.0]])
        >>> answers = torch.tensor([[0, 1]])
        >>> flipped, other = torch.tensor([[1.0, 2.0, 0.0, 0.0]]), torch.tensor([[2.0, 1.0, 1.0, 0.0]])
        >>> [round(float(faithfulness_loss(logits, untuned, answers)), 3) for logits in (flipped, other)]
        [0.0, 0.12]
    """
    left_out = torch.zeros_like(logits, dtype=torch.bool).scatter(1, answers, True)
    edited, before = (part.masked_fill(left_out, float("-inf")).log_softmax(-1) for part in (logits, untuned))
    return (before.exp() * (before - edited).masked_fill(left_out, 0.0)).sum(-1).clamp(min=0)
