"""Pure edits of activations: activation in, activation out, out of place. They know no model and no hook.

An operator is called with activations `Float[Tensor, "batch pos *heads d"]` and a strength: one number, or a tensor of
the activations' leading shape (`batch`, `batch pos` or `batch pos head`). Where the strength is 0 nothing changes, bit
for bit. `affine` returns an edit of strength s as h A + c for activations of a trailing shape `*heads d`, or None where
the edit is no such map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Strength = float | Float[Tensor, "..."]
Activation = Float[Tensor, "batch pos *heads d"]
Affine = tuple[Float[Tensor, "*heads d d"], Float[Tensor, "*heads d"]]


@runtime_checkable
class Operator(Protocol):
    """What every operator is: a function of activations and a strength, and where it can, an affine map.

    Example:
        >>> import torch
        >>> isinstance(Add(torch.ones(4)), Operator), isinstance(torch.nn.ReLU(), Operator)
        (True, False)
    """

    def __call__(self, h: Activation, strength: Strength = 1.0) -> Activation: ...

    def affine(self, strength: float, shape: Sequence[int]) -> Affine | None: ...


@dataclass(frozen=True)
class Add:
    """Add a vector: h + s v (activation addition, Turner et al. 2023).

    Attributes:
        vector: Float[Tensor, "*heads d"].

    Example:
        >>> import torch
        >>> h = torch.tensor([[[1.0, 2.0]]])  # one text, one token, d_model 2
        >>> Add(torch.tensor([0.0, 1.0]))(h, 3.0)
        tensor([[[1., 5.]]])
    """

    vector: Float[Tensor, "*heads d"]

    def __call__(self, h: Activation, strength: Strength = 1.0) -> Activation:
        return h + _spread(strength, h) * _like(self.vector, h)

    def affine(self, strength: float, shape: Sequence[int]) -> Affine:
        return _identity(self.vector), strength * self.vector


@dataclass(frozen=True)
class AddPreservingNorm:
    """Add a vector, then rescale each token to the norm it had: (h + s v) |h| / |h + s v|. Not an affine map.

    Attributes:
        vector: Float[Tensor, "*heads d"].

    Example:
        >>> import torch
        >>> h = torch.tensor([[[3.0, 4.0]]])
        >>> moved = AddPreservingNorm(torch.tensor([0.0, 10.0]))(h)
        >>> round(float(h.norm()), 4), round(float(moved.norm()), 4), bool(moved[0, 0, 1] > 4)
        (5.0, 5.0, True)
    """

    vector: Float[Tensor, "*heads d"]

    def __call__(self, h: Activation, strength: Strength = 1.0) -> Activation:
        moved = h + _spread(strength, h) * _like(self.vector, h)
        after = moved.norm(dim=-1, keepdim=True)
        # A vector that cancels h exactly leaves no direction to give the norm to.
        return moved * torch.where(after > 0, h.norm(dim=-1, keepdim=True) / after.clamp(min=1e-30), 1.0)

    def affine(self, strength: float, shape: Sequence[int]) -> None:
        return None


@dataclass(frozen=True)
class Ablate:
    """Remove the components in a subspace: h - s U U^T h, with U an orthonormal basis of the directions.

    Idempotent at s = 1; every orthogonal component stays (directional ablation, Arditi et al. 2024).

    Attributes:
        directions: Float[Tensor, "k *heads d"], of any norms; they may be linearly dependent. A head whose directions
            are all zero stays as it is.

    Example:
        >>> import torch
        >>> h = torch.tensor([[[3.0, 4.0]]])
        >>> Ablate(torch.tensor([[0.0, 7.0]]))(h)  # a row for each direction
        tensor([[[3., 0.]]])
        >>> Ablate(torch.tensor([[0.0, 7.0]]))(h, 0.5)
        tensor([[[3., 2.]]])
    """

    directions: Float[Tensor, "k *heads d"]

    @cached_property
    def basis(self) -> Float[Tensor, "*heads k d"]:
        """Orthonormal rows that span the directions, and zero rows in place of dependent ones."""
        stacked = _unit(self.directions.movedim(0, -2).double())
        _, sizes, rows = torch.linalg.svd(stacked, full_matrices=False)
        independent = sizes > 1e-6 * sizes.amax(-1, keepdim=True)
        return (rows * independent[..., None]).to(self.directions.dtype)

    def __call__(self, h: Activation, strength: Strength = 1.0) -> Activation:
        basis = _like(self.basis, h, skip=1)
        inside = torch.einsum("...k,...kd->...d", torch.einsum("...d,...kd->...k", h, basis), basis)
        return h - _spread(strength, h) * inside

    def affine(self, strength: float, shape: Sequence[int]) -> Affine:
        basis = self.basis
        inside = torch.einsum("...kd,...ke->...de", basis, basis)
        return _identity(self.directions[0]) - strength * inside, torch.zeros_like(self.directions[0])


@dataclass(frozen=True)
class Clamp:
    """Set the projection on a direction to a value: h + s (value - h . u) u, with u the unit direction.

    Attributes:
        direction: Float[Tensor, "*heads d"], of any norm but zero.
        value: the projection to set, in the activations' own units.

    Example:
        >>> import torch
        >>> h = torch.tensor([[[3.0, 4.0]]])
        >>> Clamp(torch.tensor([0.0, 7.0]), 10.0)(h)
        tensor([[[ 3., 10.]]])
    """

    direction: Float[Tensor, "*heads d"]
    value: float

    def __call__(self, h: Activation, strength: Strength = 1.0) -> Activation:
        unit = _like(_unit(self.direction), h)
        missing = self.value - (h * unit).sum(-1, keepdim=True)
        return h + _spread(strength, h) * missing * unit

    def affine(self, strength: float, shape: Sequence[int]) -> Affine:
        unit = _unit(self.direction)
        inside = unit[..., :, None] * unit[..., None, :]
        return _identity(unit) - strength * inside, strength * self.value * unit


@dataclass(frozen=True)
class Cap:
    """Cap the projection on a direction: h - s max(h . u - limit, 0) u, with u the unit direction. Not an affine map.

    What lies below the limit stays as it is, bit for bit (activation capping, Lu et al. 2026). With -direction and
    -limit it is a floor.

    Attributes:
        direction: Float[Tensor, "*heads d"], of any norm but zero.
        limit: the largest projection that is left, in the activations' own units.

    Example:
        >>> import torch
        >>> h = torch.tensor([[[3.0, 4.0], [3.0, 1.0]]])
        >>> Cap(torch.tensor([0.0, 7.0]), 2.0)(h)
        tensor([[[3., 2.],
                 [3., 1.]]])
    """

    direction: Float[Tensor, "*heads d"]
    limit: float

    def __call__(self, h: Activation, strength: Strength = 1.0) -> Activation:
        unit = _like(_unit(self.direction), h)
        above = ((h * unit).sum(-1, keepdim=True) - self.limit).clamp(min=0)
        return h - _spread(strength, h) * above * unit

    def affine(self, strength: float, shape: Sequence[int]) -> None:
        return None


@dataclass(frozen=True)
class Rotate:
    """Rotate by s times an angle in the plane of two directions; every norm stays (angular steering, Vu et al. 2025).

    Attributes:
        start: Float[Tensor, "*heads d"], the direction that is turned away from.
        end: Float[Tensor, "*heads d"], the one that is turned towards; not parallel to `start`.
        angle: in degrees.

    Example:
        >>> import torch
        >>> h = torch.tensor([[[3.0, 0.0, 4.0]]])
        >>> quarter = Rotate(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.0]), 90.0)
        >>> quarter(h).round(decimals=4) + 0.0
        tensor([[[0., 3., 4.]]])
    """

    start: Float[Tensor, "*heads d"]
    end: Float[Tensor, "*heads d"]
    angle: float

    @cached_property
    def basis(self) -> tuple[Float[Tensor, "*heads d"], Float[Tensor, "*heads d"]]:
        """The plane's orthonormal axes, from `start` to `end`."""
        first, other = _unit(self.start.double()), _unit(self.end.double())
        second = _unit(other - (other * first).sum(-1, keepdim=True) * first)
        return first.to(self.start.dtype), second.to(self.start.dtype)

    def __call__(self, h: Activation, strength: Strength = 1.0) -> Activation:
        first, second = (_like(axis, h) for axis in self.basis)
        x, y = ((h * axis).sum(-1, keepdim=True) for axis in (first, second))
        turn = torch.as_tensor(_spread(strength, h), device=h.device, dtype=h.dtype) * math.radians(self.angle)
        less, sine = torch.cos(turn) - 1, torch.sin(turn)
        return h + (x * less - y * sine) * first + (x * sine + y * less) * second

    def affine(self, strength: float, shape: Sequence[int]) -> Affine:
        first, second = self.basis
        turn = strength * math.radians(self.angle)

        def outer(read: Tensor, written: Tensor) -> Tensor:
            return read[..., :, None] * written[..., None, :]

        inside = (math.cos(turn) - 1) * (outer(first, first) + outer(second, second))
        across = math.sin(turn) * (outer(first, second) - outer(second, first))
        return _identity(first) + inside + across, torch.zeros_like(first)


@dataclass(frozen=True)
class Transport:
    """Move each coordinate by a line: h + s ((omega - 1) h + beta) (Linear-AcT, Rodriguez et al. 2024).

    Attributes:
        omega: Float[Tensor, "*heads d"], the slopes.
        beta: Float[Tensor, "*heads d"], the offsets.

    Example:
        >>> import torch
        >>> source, target = torch.randn(50, 2), 3.0 + 0.5 * torch.randn(50, 2)
        >>> moved = Transport(*fit_transport(source, target))(source[None])
        >>> torch.allclose(moved[0].mean(0), target.mean(0), atol=1e-5)
        True
    """

    omega: Float[Tensor, "*heads d"]
    beta: Float[Tensor, "*heads d"]

    def __call__(self, h: Activation, strength: Strength = 1.0) -> Activation:
        omega, beta = _like(self.omega, h), _like(self.beta, h)
        return h + _spread(strength, h) * ((omega - 1) * h + beta)

    def affine(self, strength: float, shape: Sequence[int]) -> Affine:
        return torch.diag_embed(1 + strength * (self.omega - 1)), strength * self.beta


@dataclass(frozen=True)
class LowRankShift:
    """Move activations within a subspace to a linear map of them: h + s R^T (W h + b - R h) (LoReFT, Wu et al. 2024).

    Attributes:
        rotation: Float[Tensor, "k d"], R, with orthonormal rows.
        weight: Float[Tensor, "k d"], W.
        bias: Float[Tensor, "k"], b.

    Example:
        >>> import torch
        >>> h = torch.tensor([[[3.0, 4.0]]])
        >>> edit = LowRankShift(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([0.5]))
        >>> edit(h)  # the second coordinate becomes the first plus 0.5
        tensor([[[3.0000, 3.5000]]])
    """

    rotation: Float[Tensor, "k d"]
    weight: Float[Tensor, "k d"]
    bias: Float[Tensor, "k"]

    def __call__(self, h: Activation, strength: Strength = 1.0) -> Activation:
        rotation, weight = _like(self.rotation, h, 1), _like(self.weight, h, 1)
        moved = (h @ (weight - rotation).T + self.bias.to(h)) @ rotation
        return h + _spread(strength, h) * moved

    def affine(self, strength: float, shape: Sequence[int]) -> Affine:
        inside = (self.weight - self.rotation).T @ self.rotation
        return _identity(self.rotation[0]) + strength * inside, strength * self.bias @ self.rotation


@dataclass(frozen=True)
class Scale:
    """Scale activations: h (1 + s alpha) (activation scaling, Stoehr et al. 2024).

    Attributes:
        alpha: one number, Float[Tensor, "d"], or Float[Tensor, "head 1"] with one for each head.

    Example:
        >>> import torch
        >>> h = torch.tensor([[[3.0, 4.0]]])
        >>> Scale(0.5)(h), Scale(0.5)(h, -1.0)
        (tensor([[[4.5000, 6.0000]]]), tensor([[[1.5000, 2.0000]]]))
    """

    alpha: float | Float[Tensor, "..."]

    def __call__(self, h: Activation, strength: Strength = 1.0) -> Activation:
        alpha = _of_shape(self.alpha, h.shape[2:]).to(h) if isinstance(self.alpha, Tensor) else self.alpha
        return h * (1 + _spread(strength, h) * alpha)

    def affine(self, strength: float, shape: Sequence[int]) -> Affine:
        alpha = self.alpha if isinstance(self.alpha, Tensor) else torch.tensor(self.alpha, device="cpu")
        factors = 1 + strength * _of_shape(alpha, shape)
        return torch.diag_embed(factors), torch.zeros_like(factors)


@dataclass(frozen=True)
class Erase:
    """Remove what a linear probe can read: h - s left (right . (h - centre)) (LEACE, Belrose et al. 2023).

    Attributes:
        left: Float[Tensor, "*heads d"], the direction that is removed.
        right: Float[Tensor, "*heads d"], the direction that reads; right . left is 1.
        centre: Float[Tensor, "*heads d"], what the erased concept is moved to.

    Example:
        >>> import torch
        >>> positive, negative = torch.randn(40, 4) + torch.tensor([2.0, 0, 0, 0]), torch.randn(40, 4)
        >>> erase = Erase(*fit_eraser(positive, negative))
        >>> before = (positive - negative).mean(0).norm()
        >>> after = (erase(positive[None]) - erase(negative[None]))[0].mean(0).norm()
        >>> float(before) > 1, float(after) < 1e-4
        (True, True)
    """

    left: Float[Tensor, "*heads d"]
    right: Float[Tensor, "*heads d"]
    centre: Float[Tensor, "*heads d"]

    def __call__(self, h: Activation, strength: Strength = 1.0) -> Activation:
        left, right, centre = (_like(part, h) for part in (self.left, self.right, self.centre))
        reading = ((h - centre) * right).sum(-1, keepdim=True)
        return h - _spread(strength, h) * reading * left

    def affine(self, strength: float, shape: Sequence[int]) -> Affine:
        removed = self.right[..., :, None] * self.left[..., None, :]
        offset = (self.right * self.centre).sum(-1, keepdim=True) * self.left
        return _identity(self.left) - strength * removed, strength * offset


def _unit(direction: Float[Tensor, "*heads d"]) -> Float[Tensor, "*heads d"]:
    return direction / direction.norm(dim=-1, keepdim=True).clamp(min=1e-30)


def _identity(vector: Float[Tensor, "*heads d"]) -> Float[Tensor, "*heads d d"]:
    return torch.eye(vector.shape[-1], dtype=vector.dtype, device=vector.device).expand(*vector.shape, -1).clone()


def _like(part: Tensor, h: Tensor, skip: int = 0) -> Tensor:
    """A vector as the activations are: same dtype and device; `skip` axes before the last are not the activations'."""
    heads = part.shape[: part.ndim - 1 - skip]
    if part.shape[-1] != h.shape[-1] or heads != h.shape[2:-1]:
        raise ValueError(
            f"vectors were extracted from a model with d_model {_width(heads, part.shape[-1])}; these activations have "
            f"{_width(h.shape[2:-1], h.shape[-1])}. Extract vectors from this model first."
        )
    return part.to(h)


def _of_shape(alpha: Tensor, shape: Sequence[int]) -> Tensor:
    """Scaling factors for each head and dimension. Refuses what would broadcast over the axis of tokens."""
    sizes = (*[1] * (len(shape) - alpha.ndim), *alpha.shape)
    if len(sizes) != len(shape) or any(given not in (1, size) for given, size in zip(sizes, shape, strict=True)):
        raise ValueError(
            f"alpha must fit activations of {_width(shape[:-1], shape[-1])}, got shape {tuple(alpha.shape)}. "
            "Give one number, one for each dimension, or at z one for each head: shape (head, 1)."
        )
    return alpha.expand(*shape)


def _width(heads: Any, d: int) -> str:
    return " x ".join(str(size) for size in (*heads, d))


def _spread(strength: Strength, h: Tensor) -> Any:
    """The strength with trailing axes of size 1, so that it meets the activations from the front."""
    if not isinstance(strength, Tensor):
        return strength
    leading = h.shape[:-1]
    if strength.ndim > len(leading) or any(
        given not in (1, size) for given, size in zip(strength.shape, leading, strict=False)
    ):
        raise ValueError(
            f"strength must fit activations of shape {tuple(h.shape)}, got shape {tuple(strength.shape)}. "
            "Give one number, or one for each row, token or head."
        )
    return strength.to(h).reshape(*strength.shape, *[1] * (h.ndim - strength.ndim))
