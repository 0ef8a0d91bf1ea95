"""The token context: which tokens of which rows the current forward pass covers.

Hooks see activations only; here they learn which tokens these belong to. Everything in rt_lens that runs a model
declares its tokens with `token_context(...)`, and your own loop can too. A pass without a declared context counts as
whole prompts without padding (`default_context`).
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
        positions: Int[Tensor, "batch pos"], index of each token in its row, not counting padding; -1 for padding.
        lengths: Int[Tensor, "batch"], tokens of each row's prompt; the tokens after these are generated.
        rows: indices of these rows in the caller's list; None if unknown.
        n_rows: length of that list; None if unknown.
        memory: values that hooks keep from one pass of a run to the next.
    """

    positions: Int[Tensor, "batch pos"]
    lengths: Int[Tensor, "batch"]
    rows: tuple[int, ...] | None
    n_rows: int | None = None
    memory: dict[Any, Any] = field(default_factory=dict, repr=False)


_CURRENT: ContextVar[TokenContext | None] = ContextVar("token_context", default=None)


def current_context() -> TokenContext | None:
    """The declared context of the current forward pass; None if nobody declared one."""
    return _CURRENT.get()


def default_context(batch: int, pos: int, device: Any) -> TokenContext:
    """The context that a pass without a declared one counts as: whole prompts, no padding."""
    positions = torch.arange(pos, device=device).expand(batch, pos)
    return TokenContext(positions, torch.full((batch,), pos, device=device), None)


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
    """Context manager that declares which tokens the current forward pass covers.

    Args:
        mask: 1 for real tokens, 0 for padding, of all tokens so far; padding may be on either side.
        new: how many of the last columns this pass covers (1 for a step with a key-value cache). Defaults to all.
        lengths: tokens of each row's prompt; None if all real tokens are the prompt's.
        rows: indices of these rows in the caller's list, for multipliers by row.
        n_rows: length of that list.
        memory: one dictionary for all passes of a run.

    Example:
        Two prompts of unlike length, padded on the left. The hook edits the last token of each prompt only.

        >>> batch = model.tokenizer(texts, return_tensors="pt", padding=True)
        >>> tokens, mask = batch["input_ids"], batch["attention_mask"]
        >>> hooks = add(vectors, layers=[21], multiplier=2.0, positions="last")
        >>> with model.hooks(fwd_hooks=hooks), token_context(mask) as context:
        ...     logits = model(tokens, attention_mask=mask)
        >>> context.positions[:, -1].tolist() == (mask.sum(1) - 1).tolist()
        True
    """
    positions = torch.where(mask.bool(), mask.cumsum(1) - 1, -1)
    context = TokenContext(
        positions if new is None else positions[:, -new:],
        mask.sum(1) if lengths is None else lengths,
        None if rows is None else tuple(rows),
        n_rows,
        {} if memory is None else memory,
    )
    token = _CURRENT.set(context)
    try:
        yield context
    finally:
        _CURRENT.reset(token)
