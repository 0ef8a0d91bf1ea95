"""How to tune: the settings, checked when they are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rt_lens.losses import Direction


@dataclass(frozen=True)
class TuneConfig:
    """How to tune; see Ackerman 2024 for the dual loss.

    Attributes:
        direction: `toward` the vector, `away` from it, or `out` (no component left, either way).
        layers: blocks whose activations the cosine loss reads.
        trained_layers: blocks whose attention and MLP matrices may change; by default from three below the first of
            `layers` up to the last of them.
        hook: kind of hook point of the cosine loss.
        cosine_weight: of the cosine loss; 0 leaves it out.
        token_weight: of the cross-entropy on the targets; 0 leaves it out.
        kl_weight: of KL(untuned || tuned) on neutral prompts; 0 leaves it out.
        centred: subtract the untuned model's mean activation before the cosine.
        learning_rate: peak of AdamW's, after a linear warm-up and before a linear decay to zero.
        weight_decay: of AdamW.
        epochs: passes over the targets.
        max_steps: stop after so many steps, whatever the epochs.
        batch_size: targets per step.
        neutral_batch_size: neutral prompts per step, for the KL term.
        n_targets: how many targets to have the model write.
        target_tokens: length of a target.
        target_temperature: at which targets and neutral answers are sampled; learning one's own greedy answers
            sharpens a model until it repeats itself.
        validation_share: share of topics held out for early stopping, where no validation pairs are given.
        validate_every: steps between validations.
        patience: validations without improvement before stopping.
        max_grad_norm: gradient clipping.
        seed: of target selection and batch order.
    """

    direction: Direction = "away"
    layers: Sequence[int] = (20, 21, 22, 23, 24)
    trained_layers: Sequence[int] | None = None
    hook: str = "resid_post"
    cosine_weight: float = 14.0
    token_weight: float = 1.0
    kl_weight: float = 1.0
    centred: bool = True
    learning_rate: float = 1e-4
    weight_decay: float = 0.1
    epochs: int = 1
    max_steps: int = 10
    batch_size: int = 4
    neutral_batch_size: int = 2
    n_targets: int = 40
    target_tokens: int = 24
    target_temperature: float = 0.7
    validation_share: float = 0.2
    validate_every: int = 5
    patience: int = 3
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.trained_layers is not None:
            object.__setattr__(self, "trained_layers", tuple(self.trained_layers))
        if self.direction not in ("toward", "away", "out"):
            raise ValueError(f"direction: {self.direction!r} came; 'toward', 'away' or 'out' is wanted.")
        if self.cosine_weight == 0 and self.token_weight == 0:
            raise ValueError("cosine_weight, token_weight: both are 0, so there is nothing to tune. Raise one.")
        if self.direction == "out" and self.token_weight > 0:
            raise ValueError("token_weight: direction 'out' has no target texts. Set token_weight=0.")
        for name in ("cosine_weight", "token_weight", "kl_weight", "weight_decay", "target_temperature"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} came; 0 or more is wanted.")
        counts = ("epochs", "max_steps", "batch_size", "neutral_batch_size", "n_targets", "target_tokens",
                  "validate_every", "patience")  # fmt: skip
        for name in (*counts, "learning_rate", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)} came; more than 0 is wanted.")

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that are trained."""
        if self.trained_layers is not None:
            return tuple(self.trained_layers)
        return tuple(range(max(0, min(self.layers) - 3), max(self.layers) + 1))
