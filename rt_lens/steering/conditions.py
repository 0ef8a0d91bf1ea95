"""Acting only where an example's, or a token's, own projection passes a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rt_lens.models.context import TokenContext, current_context, default_context
from rt_lens.steering.edits import Edit, FwdHook
from rt_lens.vectors.steering_vectors import forward_order


@dataclass(frozen=True)
class Condition:
    """When to act: where a projection on a direction passes a threshold (compare CAST, Lee et al. 2024).

    Attributes:
        hook_name: where the projection is read.
        direction: Float[Tensor, "d_model"], of any norm.
        threshold: projection on the unit direction from which on the condition holds.
        by: `example` decides once for each prompt, before its answer; `token` for each token.
        position: what of a prompt `example` reads: its `last` token or the `mean` of its tokens.

    Example:
        >>> condition = Condition("blocks.10.hook_resid_post", vectors["blocks.10.hook_resid_post"], threshold=0.0)
        >>> hooks = conditional(add(vectors, [21], 2.0), condition)
        >>> [name for name, _ in hooks]  # the condition is read first, and guards the edit after it
        ['blocks.10.hook_resid_post', 'blocks.21.hook_resid_post']
    """

    hook_name: str
    direction: Float[Tensor, "d_model"]
    threshold: float
    by: Literal["example", "token"] = "example"
    position: Literal["last", "mean"] = "last"

    def __post_init__(self) -> None:
        check_condition(self.by, self.position)
        if not (self.direction.norm() > 0 and torch.isfinite(torch.tensor(self.threshold, device="cpu"))):
            raise ValueError(
                "condition must have a direction other than zero and a finite threshold, got a direction of length "
                f"{float(self.direction.norm()):g} and threshold {self.threshold}."
            )


def check_condition(by: str, position: str) -> None:
    if by not in ("example", "token") or position not in ("last", "mean"):
        raise ValueError(
            f"by must be 'example' or 'token' and position 'last' or 'mean', got by={by!r} and position={position!r}."
        )


class Gate:
    """Reads a condition's projection in each forward pass, and decides where the edits that it guards act."""

    def __init__(self, condition: Condition, n_edits: int) -> None:
        self.condition = condition
        self.n_edits = n_edits
        self._open: Tensor | None = None
        self._waiting = 0  # edits that have yet to ask in this forward pass

    def described(self) -> dict[str, Any]:
        """What it decides by, without its last decision."""
        return {"condition": self.condition, "n_edits": self.n_edits}

    def __call__(self, activation: Float[Tensor, "batch pos d"], hook: Any) -> None:
        condition = self.condition
        unit = (condition.direction / condition.direction.norm()).to(activation)
        scores = (activation @ unit).float()
        self._waiting = self.n_edits
        context = current_context()
        if condition.by == "token":
            self._open = scores >= condition.threshold
        elif context is not None and self in context.memory:
            self._open = context.memory[self][:, None].expand(*scores.shape)
        else:
            if context is None and scores.shape[1] == 1:
                raise ValueError(
                    "condition must be read on whole prompts, but this forward pass has one token and rt_lens does "
                    "not know where the prompt ends. Use rt_lens's generate, or `with token_context(mask, lengths=..., "
                    "memory=...)`."
                )
            context = context or default_context(scores.shape[0], scores.shape[1], scores.device)
            verdict = self._of_prompts(scores, context)
            context.memory[self] = verdict
            self._open = verdict[:, None].expand(*scores.shape)

    def _of_prompts(self, scores: Float[Tensor, "batch pos"], context: TokenContext) -> Bool[Tensor, "batch"]:
        lengths, numbers = context.lengths[:, None], context.positions
        last = numbers == lengths - 1
        read = last if self.condition.position == "last" else (numbers >= 0) & (numbers < lengths)
        if not read.any(1).all():
            raise ValueError(
                "condition must be read on whole prompts, but a row's prompt is not in this forward pass. Run prompts "
                "whole."
            )
        return torch.where(read, scores, 0.0).sum(1) / read.sum(1) >= self.condition.threshold

    def treats(self, row: int) -> None:
        """A row's tokens decide, so nothing is known of it before."""
        return None

    def open_at(self, batch: int, pos: int) -> Bool[Tensor, "batch pos"]:
        if self._open is None or tuple(self._open.shape) != (batch, pos):
            raise ValueError(
                f"condition must be read before its edits act, but {self.condition.hook_name} was not read in this "
                "forward pass. Attach the whole list that `conditional` returns, and start the pass before that hook "
                "point."
            )
        verdict = self._open
        self._waiting -= 1
        if self._waiting == 0:  # so that a later pass which does not read it finds nothing
            self._open = None
        return verdict


def conditional(hooks: Sequence[FwdHook], condition: Condition) -> list[FwdHook]:
    """Hooks that act only on the examples, or tokens, whose own projection passes a threshold.

    Args:
        hooks: from `add`, `ablate` and so on.
        condition: from `fit_condition`, or written by hand.

    Returns:
        The condition's reader, then the guarded edits: attach the whole list. The reader sees the edits of earlier
        lists at its hook point.

    Raises:
        ValueError: if an edit acts before the condition is read, is guarded already, or is no rt_lens edit.

    Example:
        >>> chats = ["How was your day?", "Did you sleep well?", "Any plans tonight?", "Do you like tea?"]
        >>> sums = ["What is 2 + 2?", "What is 3 * 4?", "What is 9 - 5?", "What is 8 / 2?"]
        >>> small_talk = fit_condition(model, positive=chats, negative=sums, layer=10)
        >>> with model.hooks(fwd_hooks=conditional(add(vectors, [18], 2.0), small_talk)):
        ...     answers = generate(model, ["How was your day?", "What is 2 + 2?"], max_new_tokens=4)
    """
    gate = Gate(condition, len(hooks))
    guarded: list[FwdHook] = [(condition.hook_name, gate)]
    for name, edit in hooks:
        if not isinstance(edit, Edit) or edit.gate is not None:
            raise ValueError(
                f"hooks must be edits of rt_lens without a condition, got another function or a second condition at "
                f"{name}."
            )
        if forward_order(name) < forward_order(condition.hook_name):
            raise ValueError(
                f"condition must be read before its edits, got {condition.hook_name}, which is after the edit at "
                f"{name}. Read it at an earlier block, or edit later."
            )
        guarded.append((name, replace(edit, gate=gate)))
    return guarded
