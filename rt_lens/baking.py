"""Folding steering into weights: edits that are an affine map of what is written into the residual stream.

What goes in is `fwd_hooks`, what comes out is a WeightDelta: the baked model computes the same without a hook.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from rt_lens.delta import WeightDelta
from rt_lens.forward import model_name
from rt_lens.operators import Affine
from rt_lens.steering import Edit, FwdHook
from rt_lens.vectors import forward_order, hook_names, layer_of

_RESIDUAL = ("resid_pre", "resid_mid", "resid_post")


@torch.no_grad()
def bake(model: Any, hooks: Sequence[FwdHook]) -> WeightDelta:
    """The change of weights that does what constant edits do, exactly.

    An edit has an exact fold if it acts on every token alike (positions `all`, one multiplier, no schedule, no
    condition) and is

    - `add` anywhere in the residual stream, at `attn_out`, `mlp_out` or `z`: it goes into a bias (at the first block's
      `resid_pre` into the embedding); a bias that was there stays;
    - any affine edit (`ablate`, `clamp`, `scale`, `erase` too) at `attn_out`, `mlp_out` or `z`;
    - the same `ablate`, `clamp` or `erase` at every point of the residual stream from the first block to some last one
      (`ablate(vectors.everywhere(model, 18), hook="any")`): what writes into the stream is orthogonalised (Arditi et
      al. 2024).

    `add_preserving_norm`, `conditional` and edits limited to some tokens have none.

    Args:
        model: a HookedTransformer; it stays as it is.
        hooks: what `add`, `ablate` and so on gave; lists add up.

    Returns:
        A WeightDelta: `with delta.applied(model)` computes without hooks what the hooks did.

    Raises:
        ValueError: names the edit that has no exact fold, and why.

    Example:
        >>> delta = bake(model, add(vectors, layers=[18], multiplier=2.0))
        >>> delta.save("happy.safetensors")
    """
    if not isinstance(model, HookedTransformer):
        raise ValueError(
            "model: a TransformerBridge keeps its source's parameters, which may lack the biases that edits fold into. "
            "Load it with backend='hooked'."
        )
    if model.cfg.parallel_attn_mlp or model.cfg.use_normalization_before_and_after:
        raise ValueError(f"model: the blocks of {model_name(model)} do not write their outputs as they are; no fold.")
    if not hooks:
        raise ValueError("hooks: the list is empty. Give what `add` or `ablate` gave.")
    edits = [(name, _constant(model, name, edit)) for name, edit in hooks]
    weights = _Weights(model)
    stream = [(name, edit) for name, edit in edits if _kind(name) in _RESIDUAL and not _only_adds(model, name, edit)]
    if stream:
        _fold_stream(model, weights, edits, stream)
    else:
        for name, edit in sorted(edits, key=lambda named: forward_order(named[0])):  # stable: lists keep their order
            _fold_one(model, weights, name, edit)
    config = {
        "baked": [f"{name}: {type(edit.operator).__name__}, multiplier {edit.multiplier:g}" for name, edit in edits]
    }
    return WeightDelta(weights.changes(), model_name(model), config, [])


class _Weights:
    """The parameters that are changed, as copies."""

    def __init__(self, model: HookedTransformer) -> None:
        self.model = model
        self.before = dict(model.named_parameters())
        self.now: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self.now.get(name, self.before[name].detach())

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.now[name] = value

    def changes(self) -> dict[str, Tensor]:
        return {name: value - self.before[name].detach() for name, value in self.now.items()}


def _constant(model: Any, name: str, edit: Any) -> Edit:
    """The edit, if it is one of ours that acts on every token alike."""
    if name not in model.hook_dict:
        raise ValueError(f"hooks: {name!r} is not in this model ({model.cfg.n_layers} blocks).")
    if not isinstance(edit, Edit):
        raise ValueError(f"hooks: the one at {name} is no edit of rt_lens, so it cannot be folded into weights.")
    what = f"hooks: {type(edit.operator).__name__} at {name} has no exact fold:"
    if not edit.constant:
        raise ValueError(
            f"{what} it does not act on every token alike. Use positions='all', one multiplier, no schedule and no "
            "condition, or keep the hook."
        )
    if edit.operator.affine(1.0, _shape(model, name)) is None:
        raise ValueError(f"{what} it is not an affine map. Keep the hook.")
    return edit


def _kind(name: str) -> str:
    return name.rsplit("hook_", 1)[-1]


def _shape(model: Any, name: str) -> tuple[int, ...]:
    return (model.cfg.n_heads, model.cfg.d_head) if _kind(name) == "z" else (model.cfg.d_model,)


def _affine(model: Any, name: str, edit: Edit) -> Affine:
    """The edit as h A + c; heads that it leaves alone get the identity."""
    shape = _shape(model, name)
    found = edit.operator.affine(float(edit.multiplier), shape)
    assert found is not None
    matrix, offset = (part.to(model.cfg.device, model.cfg.dtype) for part in found)
    if edit.heads is not None:
        others = [head for head in range(shape[0]) if head not in edit.heads]
        matrix[others], offset[others] = torch.eye(shape[-1]).to(matrix), 0.0
    return matrix, offset


def _only_adds(model: Any, name: str, edit: Edit) -> bool:
    matrix, _ = _affine(model, name, edit)
    return torch.equal(matrix, torch.eye(len(matrix)).to(matrix))


def _fold_one(model: Any, weights: _Weights, name: str, edit: Edit) -> None:
    """An edit of one block's output, or a constant added to the stream."""
    layer, kind = layer_of(name), _kind(name)
    matrix, offset = _affine(model, name, edit)
    attention = (f"blocks.{layer}.attn.W_O", f"blocks.{layer}.attn.b_O")
    mlp = (f"blocks.{layer}.mlp.W_out", f"blocks.{layer}.mlp.b_out")
    if kind == "resid_pre" and layer == 0:
        weights["embed.W_E"] = weights["embed.W_E"] + offset
    elif kind == "resid_pre":
        weights[f"blocks.{layer - 1}.mlp.b_out"] = weights[f"blocks.{layer - 1}.mlp.b_out"] + offset
    elif kind in ("resid_mid", "resid_post"):
        bias = attention[1] if kind == "resid_mid" else mlp[1]
        weights[bias] = weights[bias] + offset
    elif kind in ("attn_out", "mlp_out"):
        weight, bias = attention if kind == "attn_out" else mlp
        weights[weight], weights[bias] = weights[weight] @ matrix, weights[bias] @ matrix + offset
    elif kind == "z":
        out = weights[attention[0]]  # [head d_head d_model]: it reads what the edit leaves
        weights[attention[1]] = weights[attention[1]] + torch.einsum("hd,hdm->m", offset, out)
        weights[attention[0]] = matrix @ out
    else:
        raise ValueError(
            f"hooks: {type(edit.operator).__name__} at {name} has no exact fold: it can be folded at resid_pre, "
            "resid_mid, resid_post, attn_out, mlp_out and z. Keep the hook."
        )


def _fold_stream(
    model: Any, weights: _Weights, edits: Sequence[tuple[str, Edit]], stream: Sequence[tuple[str, Edit]]
) -> None:
    """One and the same projection at every point of the stream, up to some point: orthogonalise what writes to it."""
    names = [name for name, _ in stream]
    points = [name for layer in range(model.cfg.n_layers) for kind in _RESIDUAL for name in hook_names([layer], kind)]
    what = f"hooks: {type(stream[0][1].operator).__name__} at {names[0]} has no exact fold:"
    if len(stream) != len(edits):
        raise ValueError(
            f"{what} other edits are in the same list. Bake one, and the other on the model that it gives: "
            "`with first.applied(model): second = bake(model, ...)`."
        )
    if names != [point for point in points if point in names] or names != points[: len(names)]:
        raise ValueError(
            f"{what} in the residual stream it must act at every point from {points[0]} on, once each, or what earlier "
            "blocks wrote is read before it is removed. Use `vectors.everywhere(model, layer)` with hook='any'."
        )
    matrix, offset = _affine(model, *stream[0])
    for name, edit in stream[1:]:
        others = _affine(model, name, edit)
        if not (torch.equal(others[0], matrix) and torch.equal(others[1], offset)):
            raise ValueError(f"{what} the one at {name} differs from it. Use one direction everywhere.")
    if not torch.allclose(matrix @ matrix, matrix, atol=1e-4) or (offset @ matrix).abs().max() > 1e-4 * max(
        1.0, float(offset.abs().max())
    ):
        raise ValueError(f"{what} applied twice it does more than once, and the stream passes it at every block.")
    weights["embed.W_E"] = weights["embed.W_E"] @ matrix + offset
    if "pos_embed.W_pos" in weights.before:
        weights["pos_embed.W_pos"] = weights["pos_embed.W_pos"] @ matrix
    for name in names:
        layer, kind = layer_of(name), _kind(name)
        writer = {"resid_mid": ("attn.W_O", "attn.b_O"), "resid_post": ("mlp.W_out", "mlp.b_out")}.get(kind, ())
        for part in writer:
            weights[f"blocks.{layer}.{part}"] = weights[f"blocks.{layer}.{part}"] @ matrix
