"""Which tokens of which rows a forward pass is running. Hooks see activations only, and ask here for the rest.

Everything in rt_lens that runs a model says so with `token_context(...)`; a loop of your own can too. Where nobody has
said, a pass counts as whole prompts without padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class TokenContext:
    """The tokens of one forward pass.

    Attributes:
        places: Int[Tensor, "batch pos"], number of each token in its row, padding not counted; -1 for padding.
        lengths: Int[Tensor, "batch"], tokens of each row's prompt; tokens from there on were generated.
        rows: numbers of these rows in the caller's list; None if unknown.
        n_rows: length of that list; None if unknown.
        memory: what hooks keep from one pass of a run to the next.
    """

    places: Int[Tensor, "batch pos"]
    lengths: Int[Tensor, "batch"]
    rows: tuple[int, ...] | None
    n_rows: int | None = None
    memory: dict[Any, Any] = field(default_factory=dict, repr=False)


_NOW: ContextVar[TokenContext | None] = ContextVar("token_context", default=None)


def current_context() -> TokenContext | None:
    """What was said of the pass that is running, if anything."""
    return _NOW.get()


def default_context(batch: int, pos: int, device: Any) -> TokenContext:
    """A pass of which nothing is known: whole prompts, no padding."""
    places = torch.arange(pos, device=device).expand(batch, pos)
    return TokenContext(places, torch.full((batch,), pos, device=device), None)


@contextmanager
def token_context(
    mask: Int[Tensor, "batch all_pos"],
    *,
    new: int | None = None,
    lengths: Int[Tensor, "batch"] | None = None,
    rows: Sequence[int] | None = None,
    n_rows: int | None = None,
    memory: dict[Any, Any] | None = None,
) -> Iterator[TokenContext]:
    """Says, for the time of a block, which tokens a forward pass runs.

    Args:
        mask: 1 for real tokens of the rows so far, on either side of any padding.
        new: how many of its last columns this pass runs (1 for a step with a key-value cache); all for None.
        lengths: tokens of each row's prompt; all real ones for None.
        rows: numbers of these rows in the caller's list, for multipliers by row.
        n_rows: length of that list.
        memory: the same dictionary in each pass of one run.

    Example:
        >>> tokens, mask = batch.tokens, batch.mask
        >>> with model.hooks(fwd_hooks=add(vectors, positions="last")), token_context(mask):
        ...     logits = model(tokens, attention_mask=mask)
    """
    places = torch.where(mask.bool(), mask.cumsum(1) - 1, -1)
    here = TokenContext(
        places if new is None else places[:, -new:],
        mask.sum(1) if lengths is None else lengths,
        None if rows is None else tuple(rows),
        n_rows,
        {} if memory is None else memory,
    )
    token = _NOW.set(here)
    try:
        yield here
    finally:
        _NOW.reset(token)
