"""Operators bound to the hook points of steering vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rt_lens.models.protocol import Model
from rt_lens.steering.edits import (
    Edit,
    FwdHook,
    Multiplier,
    Positions,
    Schedule,
    check_multiplier,
    check_positions,
    must_reach_stream,
)
from rt_lens.vectors.operators import Ablate, Add, AddPreservingNorm, Clamp, Erase, Operator, Scale
from rt_lens.vectors.steering_vectors import SteeringVectors


@dataclass(frozen=True)
class _Place:
    """What the functions below have in common: which hook points, tokens and times."""

    vectors: SteeringVectors
    layers: Iterable[int] | None
    hook: str
    positions: Positions
    schedule: Schedule | None
    heads: Sequence[int] | None

    def edits(self, operator: Callable[[str, Tensor], Operator], multiplier: Multiplier = 1.0) -> list[FwdHook]:
        check_positions(self.positions)
        check_multiplier(multiplier)
        heads = None if self.heads is None else tuple(self.heads)
        if heads == ():
            raise ValueError("heads: the list is empty. Name at least one, or None for all.")
        chosen = self.vectors.at_layers(self.layers, self.hook)
        found: list[FwdHook] = []
        for name, vector in chosen.items():
            made = operator(name, vector)
            once_more = chosen if self.schedule is None else ()
            on_stream = must_reach_stream(name, made, multiplier, once_more)
            edit = Edit(made, multiplier, self.positions, self.schedule, heads, on_stream=on_stream)
            found.append((name, edit))
        return found


def add(
    vectors: SteeringVectors,
    layers: Iterable[int] | None = None,
    multiplier: Multiplier = 1.0,
    *,
    hook: str = "resid_post",
    positions: Positions = "all",
    schedule: Schedule | None = None,
    heads: Sequence[int] | None = None,
) -> list[FwdHook]:
    """Hooks that add `multiplier` times a block's vector to its activations (Turner et al. 2023).

    Args:
        vectors: the directions.
        layers: block indices; all blocks that have a vector for None.
        multiplier: in units of the vector's own length; negative steers the other way. A tensor with one number per
            prompt makes one batch a dose-response.
        hook: kind of hook point.
        positions: which tokens; as in `rt_lens.steering`.
        schedule: factor by generated token.
        heads: with hook="z".

    Returns:
        `(hook name, function)` pairs for `model.hooks(fwd_hooks=...)`; lists add up.

    Raises:
        ValueError: if a layer has no vector, the multiplier is not finite, or the positions are unknown.

    Example:
        >>> with model.hooks(fwd_hooks=add(vectors, layers=[18], multiplier=2.0)):
        ...     print(generate(model, ["Tell me about your weekend."]))
    """
    place = _Place(vectors, layers, hook, positions, schedule, heads)
    return place.edits(lambda name, vector: Add(vector), multiplier)


def add_preserving_norm(
    vectors: SteeringVectors,
    layers: Iterable[int] | None = None,
    multiplier: Multiplier = 1.0,
    *,
    hook: str = "resid_post",
    positions: Positions = "all",
    schedule: Schedule | None = None,
    heads: Sequence[int] | None = None,
) -> list[FwdHook]:
    """Hooks that add a multiple of a vector and give each token its own norm back. Arguments as for `add`."""
    place = _Place(vectors, layers, hook, positions, schedule, heads)
    return place.edits(lambda name, vector: AddPreservingNorm(vector), multiplier)


def ablate(
    vectors: SteeringVectors | Sequence[SteeringVectors],
    layers: Iterable[int] | None = None,
    *,
    multiplier: Multiplier = 1.0,
    hook: str = "resid_post",
    positions: Positions = "all",
    schedule: Schedule | None = None,
    heads: Sequence[int] | None = None,
) -> list[FwdHook]:
    """Hooks that remove a direction, or the subspace of several (directional ablation, Arditi et al. 2024).

    With `vectors.everywhere(model, layer=18)` and hook="any" one direction is removed at every point of the residual
    stream, which can be baked into the weights.

    Args:
        vectors: one set, or several whose span is removed together.
        layers: block indices; all that have a vector for None.
        multiplier: share of the component that is removed, or one for each prompt.
        hook: kind of hook point; `any` for whatever the vectors have.
        positions: which tokens.
        schedule: factor by generated token.
        heads: with hook="z".

    Raises:
        ValueError: as `add`; also if a vector is zero, or one of several sets has no vector at a hook point.
    """
    sets = [vectors] if isinstance(vectors, SteeringVectors) else list(vectors)
    if not sets:
        raise ValueError("vectors: the list is empty. Give at least one set of steering vectors.")

    def operator(name: str, vector: Tensor) -> Operator:
        return Ablate(torch.stack([_nonzero(name, each[name]) for each in sets]))

    return _Place(sets[0], layers, hook, positions, schedule, heads).edits(operator, multiplier)


def clamp(
    vectors: SteeringVectors,
    layers: Iterable[int] | None = None,
    value: float = 0.0,
    *,
    multiplier: Multiplier = 1.0,
    hook: str = "resid_post",
    positions: Positions = "all",
    schedule: Schedule | None = None,
    heads: Sequence[int] | None = None,
) -> list[FwdHook]:
    """Hooks that set the projection on a direction to a value, in the activations' own units.

    Args:
        vectors: the directions; their lengths do not matter.
        layers: block indices; all that have a vector for None.
        value: the projection wanted; 0 is an ablation.
        multiplier: share of the way to the value, or one for each prompt.
        hook: kind of hook point.
        positions: which tokens.
        schedule: share of the way to the value, by generated token.
        heads: with hook="z".
    """
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"value: {value} came; a finite number is wanted.")
    place = _Place(vectors, layers, hook, positions, schedule, heads)
    return place.edits(lambda name, vector: Clamp(_nonzero(name, vector), value), multiplier)


def scale(
    alphas: Mapping[str, float | Float[Tensor, "..."]],
    multiplier: Multiplier = 1.0,
    *,
    positions: Positions = "all",
    schedule: Schedule | None = None,
) -> list[FwdHook]:
    """Hooks that multiply activations by 1 + multiplier * alpha (activation scaling, Stoehr et al. 2024).

    Args:
        alphas: hook name -> alpha: one number, one for each dimension, or (at `attn.hook_z`) Float[Tensor, "head 1"].
        multiplier: beta of the paper; 1 and -1 act oppositely.
        positions: which tokens.
        schedule: factor by generated token.

    Example:
        >>> hooks = scale({"blocks.12.hook_mlp_out": -0.5, "blocks.14.hook_attn_out": 0.3}, multiplier=1.0)
    """
    if not alphas:
        raise ValueError("alphas: there is none. Give at least one hook name with its number.")
    check_positions(positions)
    check_multiplier(multiplier)
    for name, alpha in alphas.items():
        if not torch.isfinite(torch.as_tensor(alpha)).all():
            raise ValueError(f"alphas: {name} has {alpha}; finite numbers are wanted.")
    return [
        (name, Edit(made, multiplier, positions, schedule, on_stream=must_reach_stream(name, made, multiplier, ())))
        for name, made in ((name, Scale(alpha)) for name, alpha in alphas.items())
    ]


def erase(
    vectors: SteeringVectors,
    layers: Iterable[int] | None = None,
    *,
    multiplier: Multiplier = 1.0,
    hook: str = "resid_post",
    positions: Positions = "all",
    schedule: Schedule | None = None,
    heads: Sequence[int] | None = None,
) -> list[FwdHook]:
    """Hooks that take out what a linear probe could read (least-squares concept erasure, Belrose et al. 2023).

    Args:
        vectors: extracted with method="leace", which fits the erasers.
        layers: block indices; all that have an eraser for None.
        multiplier: share of what is taken out, or one for each prompt.
        hook: kind of hook point.
        positions: which tokens.
        schedule: factor by generated token.
        heads: with hook="z".

    Raises:
        ValueError: if the vectors carry no erasers.
    """
    if not vectors.erasers:
        raise ValueError(
            f"vectors: made by {vectors.provenance.method}, they carry no erasers. Extract them with method='leace'."
        )
    place = _Place(vectors, layers, hook, positions, schedule, heads)

    def operator(name: str, vector: Tensor) -> Operator:
        eraser = vectors.erasers[name]
        return Erase(eraser.left, eraser.right, eraser.centre)

    return place.edits(operator, multiplier)


def _nonzero(name: str, vector: Tensor) -> Tensor:
    if not (vector.norm() > 0):
        raise ValueError(f"vectors: {name} is all zeros, which has no direction to remove or set.")
    return vector


@contextmanager
def steered(model: Model, *hooks: Sequence[FwdHook]) -> Iterator[Any]:
    """`model.hooks(fwd_hooks=...)` for several lists, refusing hook points that the model has not.

    HookedTransformer names an unknown hook point without a hint, TransformerBridge ignores it. On leaving, and on any
    exception, these hooks come off and nobody else's.

    Raises:
        ValueError: names the nearest hook points.

    Example:
        >>> with steered(model, add(mood, [18], 2.0), ablate(formality, [20])):
        ...     print(generate(model, ["Tell me about your weekend."]))
    """
    together = [hook for some in hooks for hook in some]
    for name, _ in together:
        if name not in model.hook_dict:
            near = get_close_matches(name, model.hook_dict, n=3)
            raise ValueError(
                f"hooks: {name!r} is not in this model ({model.cfg.n_layers} blocks). Near: {', '.join(near)}."
            )
    with model.hooks(fwd_hooks=together):
        yield model
