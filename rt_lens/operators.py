"""Pure edits of activations: activation in, activation out, out of place. They know no model and no hook."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Add:
    """Add a multiple of a vector at every position: h + multiplier * v (activation addition, Turner et al. 2023).

    Attributes:
        vector: Float[Tensor, "d_model"].
        multiplier: one number, or Float[Tensor, "batch"] with one for each row.
    """

    vector: Float[Tensor, "d_model"]
    multiplier: float | Float[Tensor, "batch"]

    def __call__(self, h: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if h.shape[-1] != self.vector.shape[0]:
            raise ValueError(
                f"vectors: made for d_model {self.vector.shape[0]}, these activations have {h.shape[-1]}. "
                "Extract vectors on this model first."
            )
        vector = self.vector.to(h)
        if isinstance(self.multiplier, Tensor):
            if self.multiplier.shape != h.shape[:1]:
                raise ValueError(
                    f"multiplier: {self.multiplier.numel()} numbers came for {h.shape[0]} rows. "
                    "Give one number, or one for each row of the batch."
                )
            return h + self.multiplier.to(h)[:, None, None] * vector
        return h + self.multiplier * vector
