"""How far apart two models' next-token distributions are. Tuning trains with it, and evaluation measures with it."""

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
        reference: the reference's log-probabilities, normalised. Both sides take gradients.
    """
    return F.kl_div(log_probabilities, reference, log_target=True, reduction="none").sum(-1).clamp(min=0)
