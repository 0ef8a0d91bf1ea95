"""Edits whose own tensors are trained, while the weights stay: a vector (BiPO), a low-rank shift (LoReFT)."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from rt_lens.models.forward import check_layers
from rt_lens.models.protocol import Model
from rt_lens.steering.edits import Edit, FwdHook
from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.loop import Loop
from rt_lens.tuning.objective import Objective
from rt_lens.tuning.references import with_references
from rt_lens.tuning.tuning_data import Row, TuningData
from rt_lens.tuning.weights import Learned, TrainableParam, trainable_params
from rt_lens.vectors.operators import Add, LowRankShift
from rt_lens.vectors.steering_vectors import SteeringVectors

History = list[dict[str, Any]]


@torch.inference_mode(mode=False)
@torch.enable_grad()
def tune_vector(
    model: Model, vectors: SteeringVectors, layer: int, data: TuningData, config: TuneConfig, *, progress: bool = True
) -> tuple[SteeringVectors, History]:
    """A steering vector optimised on pairs of answers (BiPO, Cao et al. 2024, arXiv 2406.00045).

    Each step draws a sign d and lowers -log sigmoid(d beta [log p(given | h + d v) / p(given | h) - log p(rejected |
    h + d v) / p(rejected | h)]): added, the vector makes the answers to give likelier, and subtracted the others. It
    starts at zero.

    Args:
        model: HookedTransformer or TransformerBridge; left as it was.
        vectors: whose model, behaviour and size the new one has.
        layer: block to whose output the vector is added.
        data: prepared with `config`, of targets with rejected answers (`preferences`).
        config: `token_loss` must be "preference"; weights of other losses are ignored.
        progress: show a bar.

    Returns:
        The vector, and the history of its losses.

    Raises:
        ValueError: for data without rejected answers, or that stands after the layer.

    Example:
        >>> import dataclasses
        >>> pairs = [rtl.tuning.Target(f"Day {day} was", " great.", rejected=" bleak.") for day in (1, 2, 3)]
        >>> settings = dataclasses.replace(config, token_loss="preference", cosine_weight=0.0, kl_weight=0.0)
        >>> data = prepare_data(model, vectors, pairs, settings)
        >>> found, history = rtl.tuning.tune_vector(model, vectors, 21, data, settings, progress=False)
        >>> found.hook_names, found.provenance.method, history[0]["step"]
        (['blocks.21.hook_resid_post'], 'bipo', 1)
    """
    if config.token_loss != "preference":
        raise ValueError(f"token_loss must be 'preference' to optimise a vector, got {config.token_loss!r}.")
    name = _hook_name(model, layer, data)
    vector = nn.Parameter(torch.zeros(model.cfg.d_model, device=model.cfg.device))

    def edits(sign: float) -> list[FwdHook]:
        return [(name, Edit(Add(vector), sign))]

    config = replace(config, kl_weight=0.0)
    history = _tuned(model, {"vector": vector}, edits, data, config, _BothWays, progress)
    provenance = replace(vectors.provenance, method="bipo", seed=config.seed)
    return type(vectors)({name: vector.detach().clone()}, provenance), history


@torch.inference_mode(mode=False)
@torch.enable_grad()
def tune_shift(
    model: Model, layer: int, data: TuningData, config: TuneConfig, *, rank: int = 1, progress: bool = True
) -> tuple[list[FwdHook], History]:
    """A learned low-rank edit of the residual stream, by cross-entropy on the targets (LoReFT, Wu et al. 2024).

    h + R^T (W h + b - R h) with orthonormal rows of R, at every token. It starts where it changes nothing: W is R, and
    b is 0.

    Args:
        model: HookedTransformer or TransformerBridge; left as it was.
        layer: block whose output is edited.
        data: prepared with `config`.
        config: weights of the cross-entropy and of the KL on neutral prompts, learning rate, steps and seed; weights of
            other losses are ignored.
        rank: k, of the subspace.
        progress: show a bar.

    Returns:
        Hooks with one Edit, and the history of the losses.

    Raises:
        ValueError: for data that stands after the layer, or a rank that is not between 1 and the model's width.

    Example:
        >>> import dataclasses
        >>> settings = dataclasses.replace(config, cosine_weight=0.0)
        >>> data = prepare_data(model, vectors, train.sample(4), settings, neutral=neutral)
        >>> hooks, history = rtl.tuning.tune_shift(model, 21, data, settings, progress=False)
        >>> hooks[0][1], history[0]["split"]
        (Edit(LowRankShift), 'train')
    """
    if not 1 <= rank < model.cfg.d_model:
        raise ValueError(f"rank must be from 1 to {model.cfg.d_model - 1}, got {rank}.")
    name, generator = _hook_name(model, layer, data), torch.Generator().manual_seed(config.seed)
    start = torch.randn(model.cfg.d_model, rank, generator=generator, device="cpu").to(model.cfg.device)
    spanned = nn.Parameter(start)
    weight = nn.Parameter(_orthonormal(start).clone())
    bias = nn.Parameter(torch.zeros(rank, device=model.cfg.device))

    def edits(sign: float) -> list[FwdHook]:
        def edit(activation: Tensor, hook: Any) -> Tensor:  # anew in each pass, whose gradients are taken by itself
            return LowRankShift(_orthonormal(spanned), weight, bias)(activation, sign)

        return [(name, edit)]

    parameters = {"spanned": spanned, "weight": weight, "bias": bias}
    history = _tuned(model, parameters, edits, data, config, _Edited, progress)
    with torch.no_grad():
        found = LowRankShift(_orthonormal(spanned).clone(), weight.detach().clone(), bias.detach().clone())
    return [(name, Edit(found))], history


def _orthonormal(columns: Tensor) -> Tensor:
    """Float[Tensor, "k d"] with orthonormal rows that span the columns; the sign is that of the columns."""
    basis, triangle = torch.linalg.qr(columns)
    return (basis * triangle.diagonal().sign()).T


def _hook_name(model: Model, layer: int, data: TuningData) -> str:
    check_layers(model, [layer])
    if data.first_block > layer:
        raise ValueError(
            f"data must begin at block {layer} or before, got data from block {data.first_block} on. Prepare it with "
            f"trained_layers=[{layer}]."
        )
    return f"blocks.{layer}.hook_resid_post"


class _Edited(Objective):
    """The losses under an edit that is being learned."""

    edited = True
    edits: Callable[[float], list[FwdHook]]
    sign = 1.0

    def _terms(self, rows: Sequence[Row], neutral: Sequence[Row], hooks: Sequence[FwdHook]) -> Any:
        return super()._terms(rows, neutral, self.edits(self.sign))


class _BothWays(_Edited):
    """BiPO: in each step the edit is added or subtracted, and the answers change their places with it."""

    def at(self, step: int, steps: int) -> None:
        super().at(step, steps)
        self.sign = random.Random(f"{self.config.seed}-sign-{step}").choice((1.0, -1.0))

    def values(
        self, rows: Sequence[Row], neutral: Sequence[Row], hook_lists: Sequence[Sequence[FwdHook]]
    ) -> dict[str, float]:
        """Both signs' mean."""
        found: list[Mapping[str, float]] = []
        for sign in (1.0, -1.0):
            self.sign = sign
            found.append(super().values(rows, neutral, hook_lists))
        return {name: (found[0][name] + found[1][name]) / 2 for name in found[0]}

    def _beta(self) -> float:
        return self.sign * self.config.beta


def _tuned(
    model: Model,
    parameters: Mapping[str, nn.Parameter],
    edits: Callable[[float], list[FwdHook]],
    data: TuningData,
    config: TuneConfig,
    kind: type[_Edited],
    progress: bool,
) -> History:
    """Trains the edit's tensors in place, by the loop that trains weights."""
    config = replace(config, cosine_weight=0.0)
    data = with_references(model, data, config, [])
    trained = {loss: dict(parameters) for loss in ("token", "kl") if config.weight(loss) > 0}
    with trainable_params(model, {}, config):
        objective = kind(model, [], config, data, trained)
        objective.edits = edits
        leaves: dict[str, TrainableParam] = {name: Learned(tensor) for name, tensor in parameters.items()}
        loop = Loop(model, objective, leaves, trained, data, config, None, {}, asdict(config))
        return loop.run(None, 1, progress).history
