"""One operator at one hook point, with where, when and how strongly it acts: what TransformerLens calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rt_lens.models.context import TokenContext, current_context, default_context
from rt_lens.vectors.guards import refuse_read_only
from rt_lens.vectors.operators import Operator

Positions = Literal["all", "prompt", "generated", "last"] | Sequence[int] | Bool[Tensor, "..."]
Schedule = Callable[[int], float]
Multiplier = float | Float[Tensor, "row"]
FwdHook = tuple[str, Callable[..., Any]]


@runtime_checkable
class Gates(Protocol):
    """A condition's decision: where an edit acts."""

    def open_at(self, batch: int, pos: int) -> Bool[Tensor, "batch pos"]: ...


@dataclass(frozen=True)
class Linear:
    """A schedule that goes from one factor to another over the first generated tokens, and stays there.

    Attributes:
        start: factor at the first generated token.
        end: factor from token `tokens` on.
        tokens: how many tokens the change takes.

    Example:
        >>> fade = Linear(start=1.0, end=0.0, tokens=4)
        >>> [fade(number) for number in (0, 1, 2, 4, 100)]
        [1.0, 0.75, 0.5, 0.0, 0.0]
        >>> with model.hooks(fwd_hooks=add(vectors, [21], 2.0, schedule=fade)):
        ...     answers = generate(model, ["How was your day?"], max_new_tokens=4)
    """

    start: float
    end: float
    tokens: int

    def __call__(self, number: int) -> float:
        return self.start + (self.end - self.start) * min(number / max(self.tokens, 1), 1.0)


@dataclass(frozen=True, repr=False)
class Edit:
    """One operator at one hook point: the function of a `(hook name, function)` pair.

    Attributes:
        operator: the edit itself.
        multiplier: its strength, or Float[Tensor, "row"] with one for each prompt.
        positions: which tokens.
        schedule: factor by generated token.
        heads: which heads.
        gate: a condition that must hold.
        on_stream: it must reach the residual stream between attention and MLP, which a TransformerBridge has no hook
            point on.

    Example:
        >>> import torch
        >>> (_, edit), = add(vectors, [21], multiplier=2.0)
        >>> edit, edit.constant  # constant: it acts on every token alike, so `bake` can fold it into the weights
        (Edit(Add), True)
        >>> h = torch.zeros(1, 3, 576)  # one text of three tokens
        >>> torch.equal(edit(h, None), (2.0 * vectors["blocks.21.hook_resid_post"]).expand(1, 3, -1))
        True
    """

    operator: Operator
    multiplier: Multiplier = 1.0
    positions: Positions = "all"
    schedule: Schedule | None = None
    heads: tuple[int, ...] | None = None
    gate: Gates | None = None
    on_stream: bool = False

    def __call__(self, activation: Float[Tensor, "batch pos *heads d"], hook: Any) -> Tensor:
        if self.on_stream:
            refuse_read_only(str(getattr(hook, "name", "")))
        return self.operator(activation, self._strength(activation))

    def __repr__(self) -> str:  # TransformerLens names hooks by it, and numbers of whole vectors take long to write
        return f"Edit({type(self.operator).__name__})"

    @property
    def constant(self) -> bool:
        """Whether it acts on every token of every row alike: then it may be folded into weights."""
        everywhere = isinstance(self.positions, str) and self.positions == "all"
        return everywhere and self.schedule is None and self.gate is None and not isinstance(self.multiplier, Tensor)

    def treats(self, row: int) -> float | None:
        """How it treats a row up to the end of its prompt: rows with the same number alike; None if tokens decide."""
        if self.gate is not None or not isinstance(self.positions, str):
            return None
        if not isinstance(self.multiplier, Tensor):
            return float(self.multiplier)
        return float(self.multiplier[row]) if row < len(self.multiplier) else None

    def _strength(self, activation: Tensor) -> float | Tensor:
        if self.constant and self.heads is None:
            return float(self.multiplier)
        batch, pos = activation.shape[:2]
        context = current_context()
        strength = self._by_row(batch, context).to(activation.device).expand(batch, pos)
        strength = strength * _chosen(self.positions, context, batch, pos, activation.device)
        if self.schedule is not None:
            strength = strength * _scheduled(self.schedule, context)
        if self.gate is not None:
            strength = strength * self.gate.open_at(batch, pos)
        if self.heads is None:
            return strength
        if activation.ndim != 4:
            raise ValueError(
                f"heads must be None where activations have no heads, got {list(self.heads)} at activations of shape "
                f"{tuple(activation.shape)}. Use hook='z'."
            )
        return strength[..., None] * _of_heads(self.heads, activation)

    def _by_row(self, batch: int, context: TokenContext | None) -> Float[Tensor, "rows 1"]:
        if not isinstance(self.multiplier, Tensor):
            return torch.full((1, 1), float(self.multiplier), device="cpu")
        rows = _row_numbers(context, batch, len(self.multiplier))
        if rows is None:
            raise ValueError(
                f"multiplier must be one number, or one for each of the {_row_count(context, batch)} rows of the "
                f"batch, got {len(self.multiplier)} numbers."
            )
        return self.multiplier[rows, None]


def _row_numbers(context: TokenContext | None, batch: int, n: int) -> list[int] | None:
    """Which of the caller's n rows are in this batch; None if the caller does not have n."""
    rows = range(batch) if context is None or context.rows is None else context.rows
    count = _row_count(context, batch)
    more_may_follow = context is not None and context.rows is not None and context.n_rows is None
    return list(rows) if n == count or (more_may_follow and n > count) else None


def _row_count(context: TokenContext | None, batch: int) -> int:
    """How many rows the caller has, as far as is known."""
    if context is None or context.rows is None:
        return batch
    return context.n_rows if context.n_rows is not None else max(context.rows) + 1


def _chosen(positions: Positions, context: TokenContext | None, batch: int, pos: int, device: Any) -> float | Tensor:
    """Float[Tensor, "batch pos"], 1 where the edit acts."""
    if isinstance(positions, str) and positions == "all":
        return 1.0
    if context is None:
        # A single token may be a prompt's, or come after one.
        if pos == 1 or (isinstance(positions, str) and positions == "generated"):
            raise ValueError(
                f"positions={positions!r} needs the end of the prompt, but rt_lens does not know where the prompt ends "
                "in this forward pass. Use rt_lens's generate, or `with token_context(mask, lengths=...)`."
            )
        context = default_context(batch, pos, device)
    numbers, lengths = context.positions, context.lengths[:, None]
    if isinstance(positions, str):
        prompt = (numbers >= 0) & (numbers < lengths)
        acts = {"prompt": prompt, "generated": numbers >= lengths, "last": numbers == lengths - 1}[positions]
    elif isinstance(positions, Tensor):
        mask = positions.to(device)
        mask = mask.expand(batch, -1) if mask.ndim == 1 else _of_rows(mask, context, batch)
        inside = (numbers >= 0) & (numbers < mask.shape[1])
        acts = inside & mask.gather(1, numbers.clamp(0, mask.shape[1] - 1))
    else:
        acts = torch.zeros_like(numbers, dtype=torch.bool)
        for number in positions:
            _check_number(number, lengths[:, 0].tolist(), context.rows)
            acts |= numbers == (number if number >= 0 else lengths + number)
    return acts.float()


def _of_rows(mask: Bool[Tensor, "rows pos"], context: TokenContext, batch: int) -> Bool[Tensor, "batch pos"]:
    rows = _row_numbers(context, batch, len(mask))
    if rows is None:
        raise ValueError(
            f"positions must be a mask of shape (pos,), or one with a row for each of the "
            f"{_row_count(context, batch)} rows of the batch, got {len(mask)} rows."
        )
    return mask[rows]


def _check_number(number: int, lengths: list[int], rows: Sequence[int] | None) -> None:
    for row, length in zip(rows or range(len(lengths)), lengths, strict=True):
        if not -length <= number < length:
            raise ValueError(
                f"positions contains {number}, but the prompt of row {row} has {length} tokens. Give a number between "
                f"{-length} and {length - 1}, or positions='generated' for the tokens after it."
            )


def _scheduled(schedule: Schedule, context: TokenContext | None) -> Float[Tensor, "batch pos"]:
    if context is None:
        raise ValueError(
            "schedule needs the end of the prompt, but rt_lens does not know where the prompt ends in this forward "
            "pass. Use rt_lens's generate, or `with token_context(mask, lengths=...)`."
        )
    numbers = context.positions - context.lengths[:, None]  # of generated tokens; negative in the prompt
    factor_by_number = {number: float(schedule(number)) for number in numbers.unique().tolist() if number >= 0}
    factors = torch.ones_like(numbers, dtype=torch.float32)
    for number, factor in factor_by_number.items():
        factors[numbers == number] = factor
    return factors


def _of_heads(heads: Sequence[int], activation: Tensor) -> Float[Tensor, "head"]:
    n = activation.shape[2]
    if not all(0 <= head < n for head in heads):
        raise ValueError(f"heads must be in 0..{n - 1}, got {list(heads)}.")
    chosen = torch.zeros(n, device=activation.device)
    chosen[list(heads)] = 1.0
    return chosen


def check_positions(positions: Positions) -> None:
    """Refuses what names no tokens.

    Raises:
        ValueError: says what is allowed.
    """
    if isinstance(positions, str):
        names = ("all", "prompt", "generated", "last")
        if positions not in names:
            near = get_close_matches(positions, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"positions must be one of {', '.join(map(repr, names))}, a list of token indices or a boolean mask, "
                f"got {positions!r}.{hint}"
            )
    elif isinstance(positions, Tensor):
        if positions.dtype != torch.bool or positions.ndim not in (1, 2):
            raise ValueError(
                f"positions must be a boolean mask of shape (pos,) or (rows, pos), got a tensor of {positions.dtype} "
                f"and shape {tuple(positions.shape)}."
            )
    elif not isinstance(positions, Sequence) or not positions or any(type(number) is not int for number in positions):
        raise ValueError(
            f"positions must be token indices in a list, or a mask as a boolean tensor, got {positions!r}. "
            "Try [0, -1] or torch.tensor([True, False])."
        )


def check_multiplier(multiplier: Multiplier) -> None:
    """Refuses what is neither a finite number nor one for each prompt.

    Raises:
        ValueError: says what is allowed.
    """
    finite = bool(torch.isfinite(torch.as_tensor(multiplier, device="cpu")).all())
    if not finite or (isinstance(multiplier, Tensor) and multiplier.ndim != 1) or isinstance(multiplier, Sequence):
        raise ValueError(f"multiplier must be a finite number, or a tensor with one for each prompt, got {multiplier}.")
