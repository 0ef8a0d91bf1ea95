"""What losses compare a tuned model with, row by row: residuals and likelihoods of the untuned one, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from rt_lens.models.protocol import Model
from rt_lens.steering.edits import FwdHook
from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.losses import token_loss
from rt_lens.tuning.tuning_data import Batch, Row, TuningData, in_batches_of, logits_of, read, unmixed


@torch.no_grad()
def with_references(model: Model, data: TuningData, config: TuneConfig, names: Sequence[str]) -> TuningData:
    """The data with what the losses of a configuration compare with. The model must be untuned.

    Args:
        model: the untuned model.
        data: prepared for it.
        config: its losses.
        names: hook points that are read.
    """
    if config.cosine_weight and config.residual_loss == "lorra":
        sign = {"toward": 1.0, "away": -1.0}.get(config.direction)
        if sign is None:
            raise ValueError(f"direction must be 'toward' or 'away' for the loss 'lorra', got {config.direction!r}.")
        train, held_out = (
            _shifted(model, rows, data, names, sign * config.shift) for rows in (data.train, data.held_out)
        )
        data = replace(data, train=train, held_out=held_out)
    if config.cosine_weight and config.residual_loss == "circuit_breaker":
        parts = (_untuned(model, rows, data, names) for rows in (data.train, data.held_out, data.neutral))
        train, held_out, neutral = parts
        data = replace(data, train=train, held_out=held_out, neutral=neutral)
    if config.token_weight and config.token_loss == "preference":
        data = replace(data, train=_likely(model, data.train, data), held_out=_likely(model, data.held_out, data))
    return data


def likelihoods(model: Model, batch: Batch, first_block: int, hooks: Sequence[FwdHook] = ()) -> Float[Tensor, "row"]:
    """Log-likelihood of each answer of a batch under hooks, summed over its tokens."""
    _, final = read(model, batch, [], first_block, final=True, hooks=hooks)
    assert final is not None
    likely = -token_loss(logits_of(model, final).float(), batch.choices, batch.shares)
    rows = batch.predicts.nonzero()[:, 0]
    return torch.zeros(len(batch.tokens), device=likely.device).index_add(0, rows, likely)


def _untuned(model: Model, rows: Sequence[Row], data: TuningData, names: Sequence[str]) -> list[Row]:
    """The rows that aim at the activations which they have."""
    return [
        replace(row, aims=aims)
        for row, aims in zip(rows, _activations(model, rows, names, data.first_block), strict=True)
    ]


def _shifted(model: Model, rows: Sequence[Row], data: TuningData, names: Sequence[str], shift: float) -> list[Row]:
    """The rows that aim at their activations plus `shift` times the difference between the personas."""
    if any(row.contrast is None for row in rows):
        raise ValueError(
            "train must be data prepared for residual_loss='lorra', got some without the personas' contrast. Prepare "
            "it with this TuneConfig."
        )
    contrasts = [row.contrast for row in rows if row.contrast is not None]
    own = _activations(model, rows, names, data.first_block)
    positive, negative = (_activations(model, [pair[side] for pair in contrasts], names, 0) for side in (0, 1))
    return [
        replace(row, aims={name: h[name] + shift * (up[name] - down[name]) for name in names})
        for row, h, up, down in zip(rows, own, positive, negative, strict=True)
    ]


def _activations(model: Model, rows: Sequence[Row], names: Sequence[str], first: int) -> list[dict[str, Tensor]]:
    """Hook name -> Float[Tensor, "read d_model"] where answers are predicted, for each row."""
    found: list[dict[str, Tensor]] = []
    for some, batch in in_batches_of(model, rows):
        activations, _ = read(model, batch, names, first, final=False)
        lengths = [int(row.predicts.sum()) for row in some]
        parts = {name: activations[name][batch.predicts].float().split(lengths) for name in names}
        found += [{name: parts[name][number].clone() for name in names} for number in range(len(some))]
    return found


def _likely(model: Model, rows: Sequence[Row], data: TuningData) -> list[Row]:
    if any(row.rejected is None for row in rows):
        raise ValueError(
            "train must be data prepared for token_loss='preference', got some without rejected answers. Prepare it "
            "with this TuneConfig."
        )
    given = _scored(model, rows, data)
    rejected = _scored(model, [row.rejected for row in rows if row.rejected is not None], data)
    return [replace(row, rejected=other) for row, other in zip(given, rejected, strict=True)]


def _scored(model: Model, rows: Sequence[Row], data: TuningData) -> list[Row]:
    found: list[Row] = []
    for some, batch in in_batches_of(model, rows):
        with unmixed(model):
            values = likelihoods(model, batch, data.first_block).tolist()
        found += [replace(row, likelihood=value) for row, value in zip(some, values, strict=True)]
    return found
