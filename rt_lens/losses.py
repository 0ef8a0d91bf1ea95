"""Losses of representation tuning, as pure functions of tensors. They know no model and no loop."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Direction = Literal["toward", "away", "out"]


def cosine_loss(
    h: Float[Tensor, "n d_model"],
    vector: Float[Tensor, "d_model"],
    direction: Direction,
    centre: Float[Tensor, "d_model"] | None = None,
) -> Float[Tensor, ""]:
    """Cosine loss of activations against a direction (Ackerman 2024), between 0 and 1.

    With c = cos(h, v): toward is mean((1 - c) / 2), away the same with -v, out is mean(|c|). Given a centre, c is
    cos(h - centre, v): raw residual streams share a few huge dimensions, which hide v from the plain cosine.

    Args:
        h: activations at the chosen positions.
        vector: the direction.
        direction: `toward`, `away` or `out`.
        centre: what is subtracted from h first, usually the untuned model's mean.
    """
    cosine = F.cosine_similarity(h if centre is None else h - centre, vector[None], dim=-1)
    if direction == "toward":
        return ((1 - cosine) / 2).mean()
    if direction == "away":
        return ((1 + cosine) / 2).mean()
    if direction == "out":
        return cosine.abs().mean()
    raise ValueError(f"direction: {direction!r} came; 'toward', 'away' or 'out' is wanted.")


def token_loss(logits: Float[Tensor, "n d_vocab"], targets: Int[Tensor, "n"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of target tokens, in nats."""
    return F.cross_entropy(logits, targets)


def kl_divergence(
    log_probabilities: Float[Tensor, "n d_vocab"], reference: Float[Tensor, "n d_vocab"]
) -> Float[Tensor, "n"]:
    """KL(reference || model) of the next-token distributions at each position, in nats.

    Args:
        log_probabilities: the model's, normalised.
        reference: the reference's log-probabilities, normalised.
    """
    return F.kl_div(log_probabilities, reference, log_target=True, reduction="none").sum(-1).clamp(min=0)
