"""Folding steering into weights: edits that are an affine map of what a block writes into the residual stream.

It takes `fwd_hooks` and returns a WeightDelta: the baked model computes the same without a hook.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rt_lens.models.activations import check_hook_names
from rt_lens.models.backends import backend_of
from rt_lens.models.context import token_context
from rt_lens.models.forward import dtype_name, finest_dtype, model_name
from rt_lens.models.parameter_names import as_matrix, from_matrix
from rt_lens.models.protocol import Model
from rt_lens.steering.edits import Edit, FwdHook
from rt_lens.tuning.delta import WeightDelta
from rt_lens.vectors.operators import Affine
from rt_lens.vectors.steering_vectors import forward_order, hook_names, layer_of

_RESIDUAL = ("resid_pre", "resid_mid", "resid_post")
_FOLDABLE = (*_RESIDUAL, "attn_out", "mlp_out", "z")


@torch.no_grad()
def bake(model: Model, hooks: Sequence[FwdHook]) -> WeightDelta:
    """The change of weights that does what constant edits do, exactly.

    An edit has an exact fold if it acts on every token alike (positions `all`, one multiplier, no schedule, no
    condition) and is

    - `add` anywhere in the residual stream, at `attn_out`, `mlp_out` or `z`: it goes into a bias (at the first block's
      `resid_pre` into the embedding); a bias that was there stays;
    - any affine edit (`ablate`, `clamp`, `rotate`, `transport`, `scale`, `erase` too) at `attn_out`, `mlp_out` or `z`;
    - the same `ablate`, `clamp` or `erase` at every point of the residual stream from the first block to some last one
      (`ablate(vectors.everywhere(model, 18), hook="any")`): what writes into the stream is orthogonalised (Arditi et
      al. 2024).

    `add_preserving_norm`, `cap`, `conditional` and edits limited to some tokens have none, and neither have edits of
    the stream where a family norms or scales what a block writes (Gemma, Granite), or writes both parts of a block at
    once (GPT-NeoX, Cohere). Whatever the family, the result is compared with the hooks on a few tokens before it is
    given.

    Args:
        model: HookedTransformer or TransformerBridge; it stays as it is.
        hooks: from `add`, `ablate` and so on; lists can be concatenated with `+`.

    Returns:
        A WeightDelta: `with delta.applied(model)` computes without hooks what the hooks did.

    Raises:
        ValueError: names the edit that has no exact fold, and why.

    Example:
        >>> hooks = add(vectors, layers=[18], multiplier=2.0)
        >>> baked = bake(model, hooks)
        >>> [change.shape for change in baked.changes.values()]  # one bias
        [torch.Size([576])]
        >>> with model.hooks(fwd_hooks=hooks):
        ...     steered_logits = model("How was your day?")
        >>> with baked.applied(model):
        ...     bool(model("How was your day?").isclose(steered_logits, atol=1e-3).all())
        True
    """
    if not hooks:
        raise ValueError("hooks must be at least one edit, from `add` or `ablate` for example, got an empty list.")
    check_hook_names(model, [name for name, _ in hooks])
    edits = [(name, _constant(model, name, edit)) for name, edit in hooks]
    points: dict[str, list[Edit]] = {}
    for name, edit in sorted(edits, key=lambda named: forward_order(named[0])):  # stable: lists keep their order
        points.setdefault(name, []).append(edit)
    weights = _Weights(model)
    stream = [name for name in points if _kind(name) in _RESIDUAL and not _only_adds(model, name, points[name])]
    if stream:
        _fold_stream(model, weights, points, stream)
    else:
        for name, edits_at_name in points.items():
            _fold_one(model, weights, name, edits_at_name)
    config = {
        "baked": [f"{name}: {type(edit.operator).__name__}, multiplier {edit.multiplier:g}" for name, edit in edits]
    }
    baked = WeightDelta(weights.changes(), model_name(model), config, [], dtype_name(model))
    _check_exact(model, hooks, baked)
    return baked


class _Weights:
    """The parameters that are changed, as copies: read in the precision to fold in, stored in their own.

    A matrix is read as [what it reads, d_model], the layout in which a row is what one input writes into the stream.
    """

    def __init__(self, model: Model) -> None:
        self.model, self.slots = model, backend_of(model).slots()
        self.embeddings = backend_of(model).embeddings()
        self.now: dict[str, Tensor] = {}

    def _before(self, name: str) -> Tensor:
        slot = self.slots.get(name)
        if slot is None:
            raise ValueError(f"model must have the parameter {name}, into which an edit is folded. Keep the hooks.")
        if slot.parameter is None:  # a bias that this family does not have
            return torch.zeros(slot.shape, dtype=self.model.cfg.dtype, device=self.model.cfg.device)
        return slot.parameter.detach()

    def _turned(self, name: str) -> bool:
        """Whether a weight is stored as [d_model, what it reads]."""
        plain = len(self.slots[name].shape) == 1 or name in self.embeddings or self.slots[name].input_first
        return not plain

    def __getitem__(self, name: str) -> Tensor:
        weight = self.now.get(name, self._before(name))
        weight = as_matrix(name, weight).T if self._turned(name) else weight
        return weight.to(finest_dtype(weight.device))  # each of many weights is rounded once, not once for each product

    def __setitem__(self, name: str, value: Tensor) -> None:
        before = self._before(name)
        value = from_matrix(name, value.T, tuple(before.shape)) if self._turned(name) else value
        self.now[name] = value.to(before)

    def changes(self) -> dict[str, Tensor]:
        return {name: now - self._before(name) for name, now in self.now.items()}


def _check_exact(model: Model, hooks: Sequence[FwdHook], baked: WeightDelta) -> None:
    """Raises a ValueError where the change does not do what the hooks did, on tokens spread over the vocabulary."""
    backend, cfg = backend_of(model), model.cfg
    tokens = torch.linspace(0, cfg.d_vocab - 1, 32, device="cpu").long().view(2, 16).to(cfg.device)
    mask = torch.ones_like(tokens)

    def final() -> Tensor:
        with backend.quick():
            return backend.residual(tokens, mask).to(finest_dtype(cfg.device))

    plain = final()
    with model.hooks(fwd_hooks=list(hooks)), token_context(mask):
        steered = final()
    with baked.applied(model):
        error = (final() - steered).norm()
    # The fold must do all of what the edit does, up to the rounding of the residual stream.
    allowed = 1e-3 * (steered - plain).norm() + max(2e-5, 4 * torch.finfo(cfg.dtype).eps) * steered.norm()
    if not error <= allowed:
        raise ValueError(
            f"hooks have no exact fold into {model_name(model)} ({backend.family}), whose weights do not write their "
            "output into the residual stream as it is: a norm, a multiplier or a parallel path lies in between. Keep "
            "the hooks."
        )


def _constant(model: Model, name: str, edit: Any) -> Edit:
    """The edit, if it is an Edit that acts on every token alike and fits the hook point."""
    if not isinstance(edit, Edit):
        raise ValueError(
            f"hooks must be edits of rt_lens, got a condition or another function at {name}, which cannot be folded "
            "into weights. Keep the hook."
        )
    what = f"hooks: {type(edit.operator).__name__} at {name} has no exact fold:"
    if not edit.constant:
        raise ValueError(
            f"{what} it does not act on every token alike. Use positions='all', one multiplier, no schedule and no "
            "condition, or keep the hook."
        )
    if not name.startswith("blocks.") or _kind(name) not in _FOLDABLE:
        raise ValueError(f"{what} edits can be folded at {', '.join(_FOLDABLE)} of a block. Keep the hook.")
    edit(
        torch.zeros(1, 1, *_shape(model, name), device="cpu"), None
    )  # refuses wrong widths and heads, as the hook would
    if edit.operator.affine(1.0, _shape(model, name)) is None:
        raise ValueError(f"{what} it is not an affine map. Keep the hook.")
    return edit


def _kind(name: str) -> str:
    return name.rsplit("hook_", 1)[-1]


def _shape(model: Model, name: str) -> tuple[int, ...]:
    return (model.cfg.n_heads, model.cfg.d_head) if _kind(name) == "z" else (model.cfg.d_model,)


def _affine(model: Model, name: str, edits: Sequence[Edit]) -> Affine:
    """The edits at one hook point, one after the other, as h A + c; heads that are left alone get the identity."""
    shape, kind = _shape(model, name), {"device": model.cfg.device, "dtype": finest_dtype(model.cfg.device)}
    matrix, offset = torch.eye(shape[-1], **kind).expand(*shape, -1), torch.zeros(shape, **kind)
    for edit in edits:
        affine = edit.operator.affine(float(edit.multiplier), shape)
        assert affine is not None
        linear, shift = (part.to(**kind) for part in affine)
        if edit.heads is not None:
            others = [head for head in range(shape[0]) if head not in edit.heads]
            linear[others], shift[others] = torch.eye(shape[-1], **kind), 0.0
        matrix, offset = matrix @ linear, torch.einsum("...d,...de->...e", offset, linear) + shift
    return matrix, offset


def _only_adds(model: Model, name: str, edits: Sequence[Edit]) -> bool:
    matrix, _ = _affine(model, name, edits)
    return torch.equal(matrix, torch.eye(len(matrix), device="cpu").to(matrix))


def _writer(model: Model, name: str) -> tuple[str, str]:
    """Names of the weight and bias of what is written into the stream last before a point; the embedding is both."""
    layer, kind = layer_of(name), _kind(name)
    if kind == "resid_pre":
        layer, kind = layer - 1, "resid_post"
    backend = backend_of(model)
    if layer < 0:
        return (backend.embeddings()[0],) * 2
    of_attention = kind in ("z", "attn_out", "resid_mid") or getattr(model.cfg, "attn_only", False)
    return backend.writer(layer, "o" if of_attention else "down")


def _fold_one(model: Model, weights: _Weights, name: str, edits: Sequence[Edit]) -> None:
    """The edits of one block's output, or constants added to the stream."""
    matrix, offset = _affine(model, name, edits)
    weight, bias = _writer(model, name)
    if _kind(name) == "z":
        out = weights[weight].reshape(*_shape(model, name), -1)  # it reads what the edit leaves
        weights[bias] = weights[bias] + torch.einsum("hd,hdm->m", offset, out)
        weights[weight] = (matrix @ out).flatten(0, 1)
    elif _kind(name) in _RESIDUAL:
        weights[bias] = weights[bias] + offset
    else:
        weights[weight], weights[bias] = weights[weight] @ matrix, weights[bias] @ matrix + offset


def _fold_stream(model: Model, weights: _Weights, points: Mapping[str, Sequence[Edit]], stream: Sequence[str]) -> None:
    """One and the same projection at every point of the stream, up to some point: orthogonalise what writes to it."""
    first = stream[0]
    every = [name for layer in range(model.cfg.n_layers) for kind in _RESIDUAL for name in hook_names([layer], kind)]
    every = [name for name in every if name in model.hook_dict]
    what = f"hooks: {type(points[first][0].operator).__name__} at {first} has no exact fold:"
    if len(stream) != len(points):
        raise ValueError(
            f"{what} other edits are in the same list. Bake those first, and this one on the changed model: "
            "`with others.applied(model): delta = bake(model, ...)`."
        )
    if list(stream) != every[: len(stream)]:
        raise ValueError(
            f"{what} in the residual stream it must act at every point from {every[0]} on, since later blocks "
            "otherwise "
            "read what earlier blocks wrote before it is removed. Use `vectors.everywhere(model, layer)` with "
            "hook='any'."
        )
    matrix, offset = _affine(model, first, points[first])
    for name in stream[1:]:
        others = _affine(model, name, points[name])
        if not (torch.equal(others[0], matrix) and torch.equal(others[1], offset)):
            raise ValueError(f"{what} the one at {name} differs from it. Use one direction everywhere.")
    if not torch.allclose(matrix @ matrix, matrix, atol=1e-4) or (offset @ matrix).abs().max() > 1e-4 * max(
        1.0, float(offset.abs().max())
    ):
        raise ValueError(f"{what} it is not idempotent, and the stream passes it at every block. Keep the hooks.")
    for part in dict.fromkeys(part for name in stream for part in _writer(model, name)):
        weights[part] = weights[part] @ matrix
    tokens, *positions = backend_of(model).embeddings()
    weights[tokens] = weights[tokens] + offset
    for table in positions:
        weights[table] = weights[table] @ matrix
