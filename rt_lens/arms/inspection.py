"""What tuning did inside: the changed weights themselves, and what they do to the residual stream beside steering.

Tables come out, for `plots.weight_changes` and its neighbours to draw. It tunes nothing, and judges no answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rt_lens.arms.intervention import Intervention
from rt_lens.arms.projections import by_arm, check_arms
from rt_lens.common.inputs import text_list
from rt_lens.common.progress import Bar
from rt_lens.common.statistics.intervals import mean_interval
from rt_lens.models.activations import last_token_activations
from rt_lens.models.backends import slots_of
from rt_lens.models.forward import check_layers, finest_dtype
from rt_lens.models.generation import as_chat
from rt_lens.models.parameter_names import (
    block_and_modules,
    module_label,
    reads_from_stream,
    writes_to_stream,
    written_by_read,
)
from rt_lens.models.protocol import Model
from rt_lens.tuning.delta import WeightDelta, fitting
from rt_lens.vectors.guards import refuse_heads
from rt_lens.vectors.steering_vectors import SteeringVectors, hook_names, layer_of


def weight_changes(
    model: Model,
    delta: WeightDelta,
    vectors: SteeringVectors | None = None,
    *,
    hook: str = "resid_post",
    progress: bool = True,
) -> pd.DataFrame:
    """How much each weight changed, over how many directions, and how much of it lies along the layer's vector.

    A weight counts as one matrix, all heads together; biases and norms as one column. The effective rank is the
    exponential of the entropy of the singular values, taken as shares (Roy and Vetterli 2007): 1 for a change along
    one direction, `rank_limit` for one that prefers none. The alignment of what writes into the residual stream (o,
    down, their biases, embed) is |v' dW| / |dW| with the layer's own unit vector v; that of what reads from it (q, k,
    v, gate, up) is |dW v| / |dW| with the vector of the stream before the block, that is, of the layer below at
    `resid_post` where there is one, else the layer's own. The norm in front of a reader is left out of it.
    All is computed on the model's device, in float64 where that has it.

    Args:
        model: the untuned model, HookedTransformer or TransformerBridge.
        delta: the change.
        vectors: of the residual stream; without them there is no alignment.
        hook: kind of hook point of the vectors.
        progress: show a bar.

    Returns:
        One row per parameter of the delta: parameter, layer (NaN outside the blocks), kind (q, k, v, o, gate, up, down,
        bias, norm, embed, other, or several of a fused matrix: q+k+v), norm (Frobenius), relative (to the weight's
        own; NaN where that is zero), effective_rank, rank_limit, top_share (of the largest singular value in the sum
        of squares); with vectors also alignment (0 to 1; NaN where it has no meaning or no vector) and chance (1 /
        sqrt(d_model): root mean square over random directions). No sampling, so no interval. Ranks and shares of a
        change of zero are NaN.

    Raises:
        ValueError: if the delta or the vectors do not fit the model.

    Example:
        >>> table = weight_changes(model, delta, vectors)
        >>> plots.weight_changes(table).show()
    """
    units = units_of(model, vectors, hook) if vectors is not None else {}
    slots, changes = slots_of(model), fitting(delta, model)
    rows = []
    for name, change in Bar(changes.items(), desc="weights", unit="parameter", disable=not progress):
        exact: dict[str, Any] = {"device": model.cfg.device, "dtype": finest_dtype(model.cfg.device)}
        slot = slots[name]
        matrix = written_by_read(name, change.detach().to(**exact), input_first=slot.input_first)
        before = 0.0 if slot.parameter is None else float(slot.parameter.detach().to(**exact).norm())
        norm = float(matrix.norm())
        row = {
            "parameter": name,
            "layer": block_and_modules(name)[0],
            "kind": module_label(name),
            "norm": norm,
            "relative": norm / before if before else float("nan"),
            **_spectrum(matrix),
        }
        if vectors is not None:
            row["alignment"] = _alignment(name, matrix, units, hook)
            row["chance"] = model.cfg.d_model**-0.5
        rows.append(row)
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class ResidualShifts:
    """How arms move the residual stream at the last token of each text. Every interval is a 95 % bootstrap one.

    Attributes:
        along: columns arm, layer, n (texts), norm_mean, norm_low, norm_high (length of the shift, activation units),
            n_cosine (texts that are shifted at all), cosine_mean, cosine_low, cosine_high (of the shift and the
            layer's vector; NaN where nothing is shifted or the layer has no vector), seed.
        between: columns a, b (arms), layer, n (texts that both shift), mean, low, high (cosine of the two shifts, text
            by text; NaN where n is 0), seed.

    Example:
        >>> arms = {"steered": add(vectors, [21]), "rep_tuned": delta}
        >>> shifts = residual_shifts(model, arms, prompts, vectors, layers=[21])
        >>> shifts.between[["a", "b", "layer", "n"]].values.tolist()
        [['steered', 'rep_tuned', 21, 2]]
    """

    along: pd.DataFrame = field(repr=False)
    between: pd.DataFrame = field(repr=False)


def residual_shifts(
    model: Model,
    arms: Mapping[str, Intervention],
    texts: Iterable[str],
    vectors: SteeringVectors,
    *,
    layers: Iterable[int] | None = None,
    hook: str = "resid_post",
    seed: int = 0,
) -> ResidualShifts:
    """How each arm shifts the residual stream, and whether tuning shifts it as steering does (cosines between arms).

    The shift is the arm's activation minus the untuned model's at the prompt's last token, where the response begins.

    Args:
        model: HookedTransformer or TransformerBridge.
        arms: name -> Intervention.
        texts: user messages, put through the chat template as `generate` does.
        vectors: of the residual stream.
        layers: block indices. Defaults to all.
        hook: kind of hook point at which to look; the vectors are those of the same kind.
        seed: seed for the bootstrap.

    Raises:
        ValueError: names the arm, layer or hook point that is wrong.

    Example:
        >>> shifts = residual_shifts(model, {"steered": add(vectors, [21])}, prompts, vectors, layers=[20, 21])
        >>> shifts.along[["arm", "layer", "n"]].values.tolist()
        [['steered', 20, 2], ['steered', 21, 2]]
        >>> plots.residual_shifts(shifts.along, shifts.between).show()
    """
    check_arms(model, arms)
    units, names = units_of(model, vectors, hook), hook_names(check_layers(model, layers), hook)
    chats = as_chat(model, text_list(texts, "texts", chats=True))
    activations = by_arm(model, arms, lambda: last_token_activations(model, chats, names))
    shifts = {
        (arm, name): (activations[arm][name] - activations[None][name]).double() for arm in arms for name in names
    }
    along, between = [], []
    for arm, name in itertools.product(arms, names):
        shift, unit = shifts[arm, name], units.get(layer_of(name))
        length = mean_interval(shift.norm(dim=-1).numpy(), seed)
        turned = _cosines(shift, unit.expand_as(shift)) if unit is not None else np.empty(0)
        row = {"arm": arm, "layer": layer_of(name), "n": length.n}
        row |= {f"norm_{end}": getattr(length, end) for end in ("mean", "low", "high")}
        row |= {"n_cosine": len(turned)}
        row |= {f"cosine_{end}": value for end, value in _interval(turned, seed).items()}
        along.append({**row, "seed": seed})
    for (a, b), name in itertools.product(itertools.combinations(arms, 2), names):
        turned = _cosines(shifts[a, name], shifts[b, name])
        row = {"a": a, "b": b, "layer": layer_of(name), "n": len(turned), **_interval(turned, seed), "seed": seed}
        between.append(row)
    columns = ["a", "b", "layer", "n", "mean", "low", "high", "seed"]
    return ResidualShifts(pd.DataFrame(along), pd.DataFrame(between, columns=columns))


def units_of(model: Model, vectors: SteeringVectors, hook: str) -> dict[int, Float[Tensor, "d_model"]]:
    """Unit vectors by layer, of one kind of hook point; those without a direction are left out."""
    vectors.check_fits(model)
    chosen = vectors.at_layers(None, hook)
    refuse_heads(chosen)
    vectors64 = {layer_of(name): vector.detach().cpu().double() for name, vector in chosen.items()}
    return {layer: vector / vector.norm() for layer, vector in vectors64.items() if vector.norm() > 0}


def _spectrum(matrix: Float[Tensor, "write read"]) -> dict[str, float]:
    singular = _singular_values(matrix)
    shares = singular / singular.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()  # 0 log 0 is 0; all is NaN where there is no change
    return {
        "effective_rank": float(entropy.exp()),
        "rank_limit": min(matrix.shape),
        "top_share": float(singular.max() ** 2 / (singular**2).sum()),
    }


def _singular_values(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rank"]:
    """The singular values, in no order, from eigenvalues of the Gram matrix of the smaller side.

    They cost a fraction of a decomposition of the matrix itself, but squares lose what is small: beside the largest
    square, those below the type's precision are noise. So the large ones are taken away with their directions, and the
    rest has a Gram matrix of its own, until all that is left is alike in size, or nothing is.
    """
    rest = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    n, cut = len(rest), torch.finfo(matrix.dtype).eps ** 0.5
    found, least = matrix.new_empty(0), 8 * torch.finfo(matrix.dtype).eps * matrix.norm()
    while len(found) < n and rest.norm() > least:
        squares, directions = _large_squares(rest @ rest.T, n - len(found), cut)
        found = torch.cat([found, squares.clamp(min=0).sqrt()])
        rest = rest - directions @ (directions.T @ rest)
    return torch.cat([found, matrix.new_zeros(n - len(found))])


def _large_squares(
    gram: Float[Tensor, "n n"], n_left: int, cut: float
) -> tuple[Float[Tensor, "found"], Float[Tensor, "n taken"]]:
    """The eigenvalues above a share of the largest, with their directions; no directions where that is all of them.

    Args:
        gram: of what is left of a matrix.
        n_left: dimensions that were not taken away; the others have an eigenvalue of 0.
        cut: the share.
    """
    n, few = len(gram), min(len(gram), 64)
    noise = torch.Generator().manual_seed(0)
    basis = torch.randn(n, few, generator=noise, dtype=torch.float64, device="cpu").to(gram)
    for _ in range(3):  # a change of low rank is found by a few products (Halko et al. 2011)
        basis = torch.linalg.qr(gram @ basis)[0]
    values, turn = torch.linalg.eigh(basis.T @ gram @ basis)
    large = _large(values, n_left, cut)
    directions = basis @ turn[:, large]
    miss = (gram @ directions - directions * values[large]).norm()
    apart = miss <= n**0.5 * torch.finfo(gram.dtype).eps * gram.norm()
    if not large.all() and apart:
        return values[large], directions
    values = torch.linalg.eigvalsh(gram)[n - n_left :].clamp(min=0)
    noise, singular = torch.finfo(gram.dtype).eps * values[-1], values.sqrt()
    lost = (noise / (singular + noise.sqrt())).sum() / singular.sum()  # of the singular values, as a share of their sum
    if n * lost < 4e6 * torch.finfo(gram.dtype).eps:  # 1e-9, in float64
        return values, gram.new_zeros(n, 0)
    values, directions = torch.linalg.eigh(gram)
    large = _large(values, n_left, cut)
    return values[large], directions[:, large]


def _large(values: Float[Tensor, "n"], most: int, cut: float) -> Bool[Tensor, "n"]:
    """Which of some values in rising order are above a share of the last; at most so many."""
    return (values > cut * values[-1]) & (torch.arange(len(values), 0, -1, device=values.device) <= most)


def _alignment(name: str, matrix: Float[Tensor, "write read"], units: Mapping[int, Tensor], hook: str) -> float:
    """The share of a change that writes along, or reads from, the vector at its point of the residual stream."""
    layer = block_and_modules(name)[0] or 0  # what the embedding writes is read by the first block
    if writes_to_stream(name):
        unit = units.get(layer)
        along = unit.to(matrix) @ matrix if unit is not None else None
    elif reads_from_stream(name):
        unit = units.get(layer - 1, units.get(layer)) if hook.endswith("resid_post") else units.get(layer)
        along = matrix @ unit.to(matrix) if unit is not None else None
    else:
        along = None
    return float(along.norm() / matrix.norm()) if along is not None else float("nan")


def _cosines(a: Float[Tensor, "text d_model"], b: Float[Tensor, "text d_model"]) -> np.ndarray:
    """Text by text, of those texts where neither is zero."""
    lengths = a.norm(dim=-1) * b.norm(dim=-1)
    return ((a * b).sum(-1) / lengths)[lengths > 0].numpy()


def _interval(values: np.ndarray, seed: int) -> dict[str, float]:
    if not len(values):
        return dict.fromkeys(("mean", "low", "high"), float("nan"))
    found = mean_interval(values, seed)
    return {"mean": found.mean, "low": found.low, "high": found.high}
