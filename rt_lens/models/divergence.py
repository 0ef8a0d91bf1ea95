"""Divergence of two models' next-token distributions. Tuning trains with it; evaluation measures with it."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def kl_divergence(
    log_probabilities: Float[Tensor, "n d_vocab"], reference: Float[Tensor, "n d_vocab"]
) -> Float[Tensor, "n"]:
    """KL(reference || model) of the next-token distributions at each position, in nats.

    Args:
        log_probabilities: the model's, normalised.
        reference: the reference's log-probabilities, normalised. Gradients flow to both.

    Example:
        >>> import torch
        >>> model_log_probs = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        >>> reference = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
        >>> [round(nats, 3) for nats in kl_divergence(model_log_probs, reference).tolist()]
        [0.0, 0.511]
    """
    return F.kl_div(log_probabilities, reference, log_target=True, reduction="none").sum(-1).clamp(min=0)
