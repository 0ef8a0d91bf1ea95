"""One operator at one hook point, with where, when and how strongly it acts: what TransformerLens calls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rt_lens.models.context import TokenContext, current_context, default_context
from rt_lens.vectors.operators import Ablate, Clamp, Erase, Operator

Positions = Literal["all", "prompt", "generated", "last"] | Sequence[int] | Bool[Tensor, "..."]
Schedule = Callable[[int], float]
Multiplier = float | Float[Tensor, "row"]
FwdHook = tuple[str, Callable[..., Any]]

_MID = "hook_resid_mid"
_READ = ".hook_in"  # of a bridge's norm or MLP


@runtime_checkable
class Gates(Protocol):
    """Says where an edit is let through."""

    def open_at(self, batch: int, pos: int) -> Bool[Tensor, "batch pos"]: ...


@dataclass(frozen=True)
class Linear:
    """A schedule that goes from one factor to another over the first generated tokens, and stays there.

    Attributes:
        start: factor at the first generated token.
        end: factor from token `tokens` on.
        tokens: how many tokens the change takes.
    """

    start: float
    end: float
    tokens: int

    def __call__(self, place: int) -> float:
        return self.start + (self.end - self.start) * min(place / max(self.tokens, 1), 1.0)


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
    """

    operator: Operator
    multiplier: Multiplier = 1.0
    positions: Positions = "all"
    schedule: Schedule | None = None
    heads: tuple[int, ...] | None = None
    gate: Gates | None = None
    on_stream: bool = False

    def __call__(self, activation: Float[Tensor, "batch pos *heads d"], hook: Any) -> Tensor:
        # A bridge calls by that name what the next norm or the MLP reads (`ln2.hook_in`, `mlp.hook_in`), past which the
        # residual goes on.
        if self.on_stream and str(getattr(hook, "name", "")).endswith(_READ):
            raise ValueError(
                "hook: a TransformerBridge's resid_mid is only what the MLP reads, so this edit would not reach the "
                "residual stream. Edit at attn_out or resid_post, or load the model with backend='hooked'."
            )
        return self.operator(activation, self._strength(activation))

    def __repr__(self) -> str:  # TransformerLens names hooks by it, and numbers of whole vectors take long to write
        return f"Edit({type(self.operator).__name__})"

    @property
    def constant(self) -> bool:
        """Whether it acts on every token of every row alike: then it may be folded into weights."""
        everywhere = isinstance(self.positions, str) and self.positions == "all"
        return everywhere and self.schedule is None and self.gate is None and not isinstance(self.multiplier, Tensor)

    def _strength(self, activation: Tensor) -> float | Tensor:
        if self.constant and self.heads is None:
            return float(self.multiplier)
        batch, pos = activation.shape[:2]
        here = current_context()
        strength = self._by_row(batch, here).to(activation.device).expand(batch, pos)
        strength = strength * _chosen(self.positions, here, batch, pos, activation.device)
        if self.schedule is not None:
            strength = strength * _scheduled(self.schedule, here)
        if self.gate is not None:
            strength = strength * self.gate.open_at(batch, pos)
        if self.heads is None:
            return strength
        if activation.ndim != 4:
            raise ValueError(f"heads: activations of shape {tuple(activation.shape)} have no heads. Use hook='z'.")
        return strength[..., None] * _of_heads(self.heads, activation)

    def _by_row(self, batch: int, here: TokenContext | None) -> Float[Tensor, "rows 1"]:
        if not isinstance(self.multiplier, Tensor):
            return torch.full((1, 1), float(self.multiplier))
        rows = _row_numbers(here, batch, len(self.multiplier))
        if rows is None:
            raise ValueError(
                f"multiplier: {len(self.multiplier)} numbers came for {_row_count(here, batch)} rows. "
                "Give one number, or one for each row of the batch."
            )
        return self.multiplier[rows, None]


def must_reach_stream(name: str, operator: Operator, multiplier: Multiplier, names: Collection[str]) -> bool:
    """Whether an edit is wrong where it changes only what the MLP reads instead of the residual stream.

    A whole projection that is done again at the block's end comes to the same either way.

    Args:
        name: hook point of the edit.
        operator: what it does there.
        multiplier: how strongly.
        names: hook points at which the same is done.
    """
    projects = isinstance(operator, Ablate | Clamp | Erase) and not isinstance(multiplier, Tensor) and multiplier == 1
    return name.endswith(_MID) and not (projects and name.replace("resid_mid", "resid_post") in names)


def _row_numbers(here: TokenContext | None, batch: int, n: int) -> list[int] | None:
    """Which of n rows of the caller's are in this batch; None if the caller's are not n."""
    rows = range(batch) if here is None or here.rows is None else here.rows
    count = _row_count(here, batch)
    more_may_follow = here is not None and here.rows is not None and here.n_rows is None
    return list(rows) if n == count or (more_may_follow and n > count) else None


def _row_count(here: TokenContext | None, batch: int) -> int:
    """How many rows the caller has, as far as is known."""
    if here is None or here.rows is None:
        return batch
    return here.n_rows if here.n_rows is not None else max(here.rows) + 1


def _chosen(positions: Positions, here: TokenContext | None, batch: int, pos: int, device: Any) -> float | Tensor:
    """Float[Tensor, "batch pos"], 1 where the edit acts."""
    if isinstance(positions, str) and positions == "all":
        return 1.0
    if here is None:
        # A single token may be a prompt's, or come after one.
        if pos == 1 or (isinstance(positions, str) and positions == "generated"):
            raise ValueError(
                f"positions: {positions!r} cannot be told apart in this forward pass. Use rt_lens's generate, or say "
                "where the prompt ends: `with token_context(mask, lengths=...)`."
            )
        here = default_context(batch, pos, device)
    places, lengths = here.places, here.lengths[:, None]
    if isinstance(positions, str):
        prompt = (places >= 0) & (places < lengths)
        which = {"prompt": prompt, "generated": places >= lengths, "last": places == lengths - 1}[positions]
    elif isinstance(positions, Tensor):
        mask = positions.to(device)
        mask = mask.expand(batch, -1) if mask.ndim == 1 else _of_rows(mask, here, batch)
        inside = (places >= 0) & (places < mask.shape[1])
        which = inside & mask.gather(1, places.clamp(0, mask.shape[1] - 1))
    else:
        which = torch.zeros_like(places, dtype=torch.bool)
        for number in positions:
            _check_number(number, lengths[:, 0].tolist(), here.rows)
            which |= places == (number if number >= 0 else lengths + number)
    return which.float()


def _of_rows(mask: Bool[Tensor, "rows pos"], here: TokenContext, batch: int) -> Bool[Tensor, "batch pos"]:
    rows = _row_numbers(here, batch, len(mask))
    if rows is None:
        raise ValueError(
            f"positions: a mask of {len(mask)} rows came for {_row_count(here, batch)} rows. Give a mask of shape "
            "(pos,), or one row for each row of the batch."
        )
    return mask[rows]


def _check_number(number: int, lengths: list[int], rows: Sequence[int] | None) -> None:
    for row, length in zip(rows or range(len(lengths)), lengths, strict=True):
        if not -length <= number < length:
            raise ValueError(
                f"positions: {number} is outside the prompt of row {row}, which has {length} tokens. Give a number "
                f"between {-length} and {length - 1}, or positions='generated' for what comes after."
            )


def _scheduled(schedule: Schedule, here: TokenContext | None) -> Float[Tensor, "batch pos"]:
    if here is None:
        raise ValueError(
            "schedule: this forward pass does not say which tokens were generated. Use rt_lens's generate, or "
            "`with token_context(mask, lengths=...)`."
        )
    generated = here.places - here.lengths[:, None]
    factors = {place: float(schedule(place)) for place in generated.unique().tolist() if place >= 0}
    found = torch.ones_like(generated, dtype=torch.float32)
    for place, factor in factors.items():
        found[generated == place] = factor
    return found


def _of_heads(heads: Sequence[int], activation: Tensor) -> Float[Tensor, "head"]:
    n = activation.shape[2]
    if not all(0 <= head < n for head in heads):
        raise ValueError(f"heads: {list(heads)} came, this model has heads 0..{n - 1}.")
    chosen = torch.zeros(n, device=activation.device)
    chosen[list(heads)] = 1.0
    return chosen


def check_positions(positions: Positions) -> None:
    """Refuses what names no tokens.

    Raises:
        ValueError: says what is wanted.
    """
    if isinstance(positions, str):
        names = ("all", "prompt", "generated", "last")
        if positions not in names:
            near = get_close_matches(positions, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"positions: {positions!r} came; one of {', '.join(names)}, a list of numbers or a boolean mask is "
                f"wanted.{hint}"
            )
    elif isinstance(positions, Tensor):
        if positions.dtype != torch.bool or positions.ndim not in (1, 2):
            raise ValueError(
                f"positions: a tensor of {positions.dtype} and shape {tuple(positions.shape)} came; a boolean mask of "
                "shape (pos,) or (rows, pos) is wanted."
            )
    elif not isinstance(positions, Sequence) or not positions or any(type(number) is not int for number in positions):
        raise ValueError(
            f"positions: {positions!r} came; token numbers are wanted as a list, a mask as a boolean tensor: "
            "torch.tensor([True, False])."
        )


def check_multiplier(multiplier: Multiplier) -> None:
    """Refuses what is neither a finite number nor one for each prompt.

    Raises:
        ValueError: says what is wanted.
    """
    finite = bool(torch.isfinite(torch.as_tensor(multiplier)).all())
    if not finite or (isinstance(multiplier, Tensor) and multiplier.ndim != 1) or isinstance(multiplier, Sequence):
        raise ValueError(
            f"multiplier: {multiplier} came; finite numbers are wanted: a float, or a tensor with one for each prompt."
        )
