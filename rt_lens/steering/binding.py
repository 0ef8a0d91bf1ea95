"""Operators bound to the hook points of steering vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rt_lens.models.activations import check_hook_names
from rt_lens.models.protocol import Model
from rt_lens.steering.edits import (
    Edit,
    FwdHook,
    Multiplier,
    Positions,
    Schedule,
    check_multiplier,
    check_positions,
)
from rt_lens.vectors.guards import must_reach_stream
from rt_lens.vectors.operators import (
    Ablate,
    Add,
    AddPreservingNorm,
    Cap,
    Clamp,
    Erase,
    Operator,
    Rotate,
    Scale,
    Transport,
)
from rt_lens.vectors.steering_vectors import SteeringVectors


@dataclass(frozen=True)
class _Scope:
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
            raise ValueError("heads must name at least one head, got an empty list. Use None for all.")
        chosen = self.vectors.at_layers(self.layers, self.hook)
        hooks: list[FwdHook] = []
        for name, vector in chosen.items():
            bound = operator(name, vector)
            repeated_at = chosen if self.schedule is None else ()
            on_stream = must_reach_stream(name, bound, multiplier, repeated_at)
            edit = Edit(bound, multiplier, self.positions, self.schedule, heads, on_stream=on_stream)
            hooks.append((name, edit))
        return hooks


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
        layers: block indices. Defaults to all blocks that have a vector.
        multiplier: in units of the vector's own length; negative steers the other way. A tensor with one number per
            prompt gives a dose-response curve in a single batch.
        hook: kind of hook point.
        positions: which token positions (see `rt_lens.steering`).
        schedule: scaling factor per generated token.
        heads: with hook="z".

    Returns:
        `(hook name, function)` pairs for `model.hooks(fwd_hooks=...)`; lists can be concatenated with `+`.

    Raises:
        ValueError: if a layer has no vector, the multiplier is not finite, or the positions are unknown.

    Example:
        >>> hooks = add(vectors, layers=[18, 21], multiplier=2.0)
        >>> hooks
        [('blocks.18.hook_resid_post', Edit(Add)), ('blocks.21.hook_resid_post', Edit(Add))]
        >>> with model.hooks(fwd_hooks=hooks):
        ...     answers = generate(model, ["Tell me about your weekend."], max_new_tokens=4)
    """
    scope = _Scope(vectors, layers, hook, positions, schedule, heads)
    return scope.edits(lambda name, vector: Add(vector), multiplier)


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
    """Hooks that add a multiple of a vector and rescale each token to the norm it had. Arguments as for `add`.

    Example:
        >>> _, before = token_activations(model, "What a day", ["blocks.21.hook_resid_post"])
        >>> with model.hooks(fwd_hooks=add_preserving_norm(vectors, layers=[21], multiplier=4.0)):
        ...     _, after = token_activations(model, "What a day", ["blocks.21.hook_resid_post"])
        >>> lengths = [h["blocks.21.hook_resid_post"].norm(dim=-1) for h in (before, after)]
        >>> bool(lengths[0].isclose(lengths[1], rtol=1e-3).all())
        True
    """
    scope = _Scope(vectors, layers, hook, positions, schedule, heads)
    return scope.edits(lambda name, vector: AddPreservingNorm(vector), multiplier)


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
    stream. `bake` writes this into the weights (weight orthogonalization, Arditi et al. 2024).

    Args:
        vectors: one set, or several whose span is removed together.
        layers: block indices. Defaults to all that have a vector.
        multiplier: fraction of the component to remove, or one for each prompt.
        hook: kind of hook point; `any` for whatever the vectors have.
        positions: which token positions (see `rt_lens.steering`).
        schedule: scaling factor per generated token.
        heads: with hook="z".

    Raises:
        ValueError: as `add`; also if a vector is zero, or one of several sets has no vector at a hook point.

    Example:
        >>> with model.hooks(fwd_hooks=ablate(vectors, layers=[21])):
        ...     _, projections = token_projections(model, vectors.select([21]), "What a lovely day")
        >>> bool(projections.abs().max() < 1e-2)  # nothing is left along the direction
        True
        >>> everywhere = ablate(vectors.everywhere(model, 21), hook="any")  # this one can be baked into the weights
        >>> len(everywhere) > model.cfg.n_layers
        True
    """
    sets = [vectors] if isinstance(vectors, SteeringVectors) else list(vectors)
    if not sets:
        raise ValueError("vectors must be at least one set of steering vectors, got an empty list.")

    def operator(name: str, vector: Tensor) -> Operator:
        return Ablate(torch.stack([_nonzero(name, directions[name]) for directions in sets]))

    return _Scope(sets[0], layers, hook, positions, schedule, heads).edits(operator, multiplier)


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
        layers: block indices. Defaults to all that have a vector.
        value: the projection to set; 0 is an ablation.
        multiplier: fraction of the way to the value, or one for each prompt.
        hook: kind of hook point.
        positions: which token positions (see `rt_lens.steering`).
        schedule: fraction of the way to the value, per generated token.
        heads: with hook="z".

    Example:
        >>> with model.hooks(fwd_hooks=clamp(vectors, layers=[21], value=5.0)):
        ...     _, projections = token_projections(model, vectors.select([21]), "What a lovely day")
        >>> projections.round(decimals=1).tolist()
        [[5.0, 5.0, 5.0, 5.0]]
    """
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"value must be a finite number, got {value}.")
    scope = _Scope(vectors, layers, hook, positions, schedule, heads)
    return scope.edits(lambda name, vector: Clamp(_nonzero(name, vector), value), multiplier)


def cap(
    vectors: SteeringVectors,
    limits: Mapping[str, float],
    *,
    multiplier: Multiplier = 1.0,
    positions: Positions = "all",
    schedule: Schedule | None = None,
) -> list[FwdHook]:
    """Hooks that cap the projection on a direction, and leave alone what lies below (activation capping).

    Lu et al. 2026 (arXiv 2601.10387) cap at a quantile of ordinary text, so that only what is out of the ordinary
    changes. For a floor, negate both: `cap(-vectors, {name: -limit})`.

    Args:
        vectors: the directions; their lengths do not matter.
        limits: hook name -> the largest projection left, such as `rtl.vectors.projection_quantiles` gives.
        multiplier: fraction of what is above to remove, or one for each prompt.
        positions: which token positions (see `rt_lens.steering`).
        schedule: scaling factor per generated token.

    Raises:
        ValueError: for no limit, one that is not finite, or one without a vector.

    Example:
        >>> limits = rtl.vectors.projection_quantiles(model, vectors.select([21]), neutral, quantile=0.5)
        >>> with model.hooks(fwd_hooks=cap(vectors, limits)):
        ...     _, projections = token_projections(model, vectors.select([21]), "What a lovely day")
        >>> bool(projections.max() < limits["blocks.21.hook_resid_post"] + 0.1)
        True
    """
    if wrong := [(name, limit) for name, limit in limits.items() if not math.isfinite(limit)]:
        raise ValueError(f"limits must be finite, got {wrong[0][1]} for {wrong[0][0]}.")
    if missing := [name for name in limits if name not in vectors.vectors]:
        raise ValueError(f"limits must be for hook points that have a vector, got {missing[0]}. Leave it out.")
    operators = {name: Cap(_nonzero(name, vectors[name]), float(limit)) for name, limit in limits.items()}
    return _bound("limits", operators, multiplier, positions, schedule)


def rotate(
    vectors: SteeringVectors,
    others: SteeringVectors,
    layers: Iterable[int] | None = None,
    angle: float = 30.0,
    *,
    multiplier: Multiplier = 1.0,
    hook: str = "resid_post",
    positions: Positions = "all",
    schedule: Schedule | None = None,
    heads: Sequence[int] | None = None,
) -> list[FwdHook]:
    """Hooks that turn activations in the plane of two directions, and keep every norm (angular steering).

    Vu et al. 2025 (arXiv 2510.26243).

    Args:
        vectors: the directions to turn towards.
        others: those to turn away from, such as another behaviour's, or the mean activation.
        layers: block indices. Defaults to all that have a vector.
        angle: in degrees, from `others` to `vectors`; negative turns the other way.
        multiplier: of the angle, or one for each prompt.
        hook: kind of hook point.
        positions: which token positions (see `rt_lens.steering`).
        schedule: scaling factor per generated token.
        heads: with hook="z".

    Raises:
        ValueError: as `add`; also if `others` has no vector at a hook point, or a parallel one, which spans no plane.

    Example:
        >>> formal = extract_vectors(model, load_pairs("formality").sample(8), layers=[21])
        >>> _, before = token_activations(model, "What a day", ["blocks.21.hook_resid_post"])
        >>> with model.hooks(fwd_hooks=rotate(vectors, formal, [21], angle=40.0)):
        ...     _, after = token_activations(model, "What a day", ["blocks.21.hook_resid_post"])
        >>> lengths = [h["blocks.21.hook_resid_post"].norm(dim=-1) for h in (before, after)]
        >>> bool(lengths[0].isclose(lengths[1], rtol=1e-3).all())
        True
    """
    if not isinstance(angle, int | float) or not math.isfinite(angle):
        raise ValueError(f"angle must be a finite number of degrees, got {angle}.")

    def operator(name: str, vector: Tensor) -> Operator:
        if name not in others.vectors:
            raise ValueError(f"others must have a vector at {name}, got {', '.join(others.hook_names)}.")
        start = _nonzero(name, others[name])
        if bool((torch.cosine_similarity(start, _nonzero(name, vector), dim=-1).abs() > 1 - 1e-6).any()):
            raise ValueError(f"others must not be parallel to vectors, got the same direction at {name}.")
        return Rotate(start, vector, float(angle))

    return _Scope(vectors, layers, hook, positions, schedule, heads).edits(operator, multiplier)


def transport(
    maps: Mapping[str, Transport],
    multiplier: Multiplier = 1.0,
    *,
    positions: Positions = "all",
    schedule: Schedule | None = None,
) -> list[FwdHook]:
    """Hooks that move every coordinate by a line, from one kind of text to another (Linear-AcT).

    Rodriguez et al. 2024 (arXiv 2410.23054).

    Args:
        maps: hook name -> Transport, as `rtl.vectors.extract_transport` gives.
        multiplier: fraction of the way; 1 is the whole.
        positions: which token positions (see `rt_lens.steering`).
        schedule: scaling factor per generated token.

    Example:
        >>> maps = rtl.vectors.extract_transport(model, train.sample(8), layers=[21])
        >>> transport(maps, 0.5)
        [('blocks.21.hook_resid_post', Edit(Transport))]
    """
    return _bound("maps", dict(maps), multiplier, positions, schedule)


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
        multiplier: beta of the paper; 1 and -1 act in opposite directions.
        positions: which token positions (see `rt_lens.steering`).
        schedule: scaling factor per generated token.

    Example:
        >>> scale({"blocks.12.hook_mlp_out": -0.5, "blocks.14.hook_attn_out": 0.3}, multiplier=1.0)
        [('blocks.12.hook_mlp_out', Edit(Scale)), ('blocks.14.hook_attn_out', Edit(Scale))]
    """
    for name, alpha in alphas.items():
        if not torch.isfinite(torch.as_tensor(alpha, device="cpu")).all():
            raise ValueError(f"alphas must be finite, got {alpha} for {name}.")
    operators = {name: Scale(alpha) for name, alpha in alphas.items()}
    return _bound("alphas", operators, multiplier, positions, schedule)


def _bound(
    argument: str, operators: Mapping[str, Operator], multiplier: Multiplier, positions: Positions,
    schedule: Schedule | None,
) -> list[FwdHook]:  # fmt: skip
    """Hooks of operators that are given by hook name."""
    if not operators:
        raise ValueError(f"{argument} must be at least one hook name with what acts there, got none. Name one.")
    check_positions(positions)
    check_multiplier(multiplier)
    on_stream = {name: must_reach_stream(name, operator, multiplier, ()) for name, operator in operators.items()}
    return [
        (name, Edit(operator, multiplier, positions, schedule, on_stream=on_stream[name]))
        for name, operator in operators.items()
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
    """Hooks that remove what a linear probe can read (least-squares concept erasure, Belrose et al. 2023).

    Args:
        vectors: extracted with method="leace", which fits the erasers.
        layers: block indices. Defaults to all that have an eraser.
        multiplier: fraction to remove, or one for each prompt.
        hook: kind of hook point.
        positions: which token positions (see `rt_lens.steering`).
        schedule: scaling factor per generated token.
        heads: with hook="z".

    Raises:
        ValueError: if the vectors carry no erasers.

    Example:
        >>> leace_vectors = extract_vectors(model, train, method="leace", layers=[21])
        >>> erase(leace_vectors)
        [('blocks.21.hook_resid_post', Edit(Erase))]
    """
    if not vectors.erasers:
        raise ValueError(
            f"vectors must carry erasers, got vectors by {vectors.provenance.method}, which have none. Extract them "
            "with method='leace'."
        )
    scope = _Scope(vectors, layers, hook, positions, schedule, heads)

    def operator(name: str, vector: Tensor) -> Operator:
        eraser = vectors.erasers[name]
        return Erase(eraser.left, eraser.right, eraser.centre)

    return scope.edits(operator, multiplier)


def _nonzero(name: str, vector: Tensor) -> Tensor:
    if not (vector.norm() > 0):
        raise ValueError(f"vectors must have a direction to remove or set, got all zeros at {name}.")
    return vector


@contextmanager
def steered(model: Model, *hooks: Sequence[FwdHook]) -> Iterator[Any]:
    """`model.hooks(fwd_hooks=...)` for several lists, refusing hook points that the model does not have.

    HookedTransformer names an unknown hook point without a hint, and TransformerBridge ignores it. At the end of the
    block, and on any exception, these hooks are removed and no others.

    Raises:
        ValueError: names the nearest hook points.

    Example:
        >>> from rt_lens.steering.binding import steered
        >>> with steered(model, add(vectors, [18], 2.0), ablate(vectors, [21])):
        ...     answers = generate(model, ["Tell me about your weekend."], max_new_tokens=4)
    """
    all_hooks = [hook for hook_list in hooks for hook in hook_list]
    if all_hooks:
        check_hook_names(model, [name for name, _ in all_hooks])
    with model.hooks(fwd_hooks=all_hooks):
        yield model
