"""What happens inside a model under an arm: how residuals move, which weights changed, which texts became likelier."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rt_lens.arms.inspection import units_of, weight_changes
from rt_lens.arms.intervention import Interventions, applied, each_of
from rt_lens.common.arm_labels import ArmLabel
from rt_lens.common.statistics.intervals import Interval, mean_interval, ratio_interval
from rt_lens.evaluation.texts import PerplexityResult, Response, perplexity
from rt_lens.models.context import current_context
from rt_lens.models.protocol import Model
from rt_lens.tuning.delta import WeightDelta
from rt_lens.vectors.steering_vectors import SteeringVectors, layer_of

Rows: TypeAlias = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Inside:
    """Tables of what happens inside; each row has arm, direction and seed. Intervals are of 95 %, over responses.

    Attributes:
        shifts: by layer: n, along (shift of the residual stream along the vector, in lengths of the layer's vector),
            share (of the shift's squared length that lies along it, 0 to 1), each with _low and _high. The shift is
            averaged over the tokens that predict each of the untuned model's own responses.
        likelihoods: by set of responses: n, before and after (negative log-likelihood of their tokens, nats per token),
            change with low and high.
        weights: by block, of weight changes only: relative (norm of the change to that of the block's changed weights),
            effective_rank (mean over its matrices, by squared norm), rank_limit.

    Example:
        >>> responses = {"own": [Response("Name a metal.", "Iron is a metal."), Response("Hello", "Hello to you.")]}
        >>> meter = InsideMeter(model, vectors, responses)
        >>> rows = meter.measure("steered, away", add(vectors, [21], -2.0))
        >>> tables = meter.tables()
        >>> tables.likelihoods[["arm", "set", "n"]].values.tolist(), tables.weights.empty
        ([['steered', 'own', 2]], True)
    """

    shifts: pd.DataFrame = field(repr=False)
    likelihoods: pd.DataFrame = field(repr=False)
    weights: pd.DataFrame = field(repr=False)


class InsideMeter:
    """Measures arms on the same responses; the untuned model runs once.

    Args:
        model: the untuned model.
        vectors: of the residual stream after blocks.
        responses: set -> responses. In the first set, the model's own, the residual stream is read.
        seed: seed for the bootstraps.

    Raises:
        ValueError: for no set or an empty one.

    Example:
        >>> meter = InsideMeter(model, vectors, {"own": [Response("Name a metal.", "Iron is a metal.")]})
        >>> rows = meter.measure("rep_tuned, away", delta)
        >>> meter.tables().weights["block"].tolist()
        [21]
    """

    def __init__(
        self, model: Model, vectors: SteeringVectors, responses: Mapping[str, Sequence[Response]], *, seed: int = 0
    ) -> None:
        if not responses or not all(responses.values()):
            raise ValueError("responses must be sets of at least one Response each, got none or an empty one.")
        self.model, self.vectors, self.responses, self.seed = model, vectors, dict(responses), seed
        self.own = next(iter(self.responses))
        self.units = units_of(model, vectors, "resid_post")
        self._before, self._untuned = self._read(None)
        self.rows: Rows = {"shifts": [], "likelihoods": [], "weights": []}

    def measure(self, arm: str, interventions: Interventions, seed: int = 0) -> Rows:
        """Measures an arm, keeps its rows, and returns them.

        Args:
            arm: `name, direction`, or a name.
            interventions: as they act.
            seed: tuning seed.
        """
        label = {**ArmLabel.parse(arm)._asdict(), "seed": seed}
        after, residuals = self._read(interventions)
        deltas = [part for part in each_of(interventions) if isinstance(part, WeightDelta)]
        rows: Rows = {
            "shifts": [label | row for row in self._shifts(residuals)],
            "likelihoods": [label | row for row in self._likelihoods(after)],
            "weights": [label | row for delta in deltas for row in self._weights(delta)],
        }
        self.add(rows)
        return rows

    def add(self, rows: Rows) -> None:
        """Adds what `measure` gave, perhaps in another process."""
        for name, own in self.rows.items():
            own += [dict(row) for row in rows[name]]

    def tables(self) -> Inside:
        """The rows so far."""
        return Inside(*(pd.DataFrame(self.rows[name]) for name in ("shifts", "likelihoods", "weights")))

    def _read(self, interventions: Interventions) -> tuple[dict[str, PerplexityResult], dict[int, Tensor]]:
        """Likelihoods of each set, and layer -> mean residuals of the first one's responses."""
        results: dict[str, PerplexityResult] = {}
        names = [f"blocks.{layer}.hook_resid_post" for layer in self.units]
        reading = _ResponseMeans(names, len(self.responses[self.own]), self.model.cfg.d_model)
        with applied(self.model, *each_of(interventions)):
            for name, responses in self.responses.items():
                with ExitStack() as stack:
                    if name == self.own:  # after the arm's own hooks, so that it reads what they leave
                        stack.enter_context(self.model.hooks(fwd_hooks=reading.hooks()))
                    results[name] = perplexity(self.model, responses, seed=self.seed)
        return results, {layer_of(name): mean for name, mean in reading.means().items()}

    def _shifts(self, residuals: Mapping[int, Tensor]) -> list[dict[str, Any]]:
        rows = []
        for layer, unit in self.units.items():
            shift = residuals[layer] - self._untuned[layer]
            length = float(self.vectors[f"blocks.{layer}.hook_resid_post"].norm())
            along = (shift @ unit).numpy()
            squares = (shift**2).sum(-1).numpy()
            shares = along[squares > 0] ** 2 / squares[squares > 0]
            share = mean_interval(shares, self.seed) if len(shares) == len(along) else Interval(0, *[math.nan] * 3)
            moved = mean_interval(along / length, self.seed)
            rows.append({"layer": layer, "n": len(along), **_ends("along", moved), **_ends("share", share)})
        return rows

    def _likelihoods(self, after: Mapping[str, PerplexityResult]) -> list[dict[str, Any]]:
        rows = []
        for name, now in after.items():
            was = self._before[name]
            change = ratio_interval(now.nll - was.nll, was.sizes, self.seed)
            total = float(was.sizes.sum())
            rows.append(
                {"set": name, "n": len(was.sizes), "before": float(was.nll.sum()) / total,
                 "after": float(now.nll.sum()) / total, "change": change.mean, "low": change.low, "high": change.high}
            )  # fmt: skip
        return rows

    def _weights(self, delta: WeightDelta) -> list[dict[str, Any]]:
        table = weight_changes(self.model, delta, progress=False).dropna(subset=["layer"])
        rows = []
        for block in sorted(table["layer"].astype(int).unique()):
            of_block = table[table["layer"] == block]
            squares = of_block["norm"] ** 2
            whole = (of_block["norm"] / of_block["relative"]) ** 2
            ranks = of_block["effective_rank"]
            there = ranks.notna() & (squares > 0)
            rank = float(np.average(ranks[there], weights=squares[there])) if there.any() else float("nan")
            rows.append(
                {"block": int(block), "relative": float(np.sqrt(squares.sum() / whole.sum())), "effective_rank": rank,
                 "rank_limit": int(of_block["rank_limit"].max())}
            )  # fmt: skip
        return rows


class _ResponseMeans:
    """Hooks that average activations over the tokens that predict each row's response."""

    def __init__(self, names: Sequence[str], n_rows: int, width: int) -> None:
        self.sums = {name: torch.zeros(n_rows, width, dtype=torch.float64, device="cpu") for name in names}
        self.counts = {name: torch.zeros(n_rows, dtype=torch.float64, device="cpu") for name in names}

    def hooks(self) -> list[Any]:
        return [(name, self._adding(name)) for name in self.sums]

    def _adding(self, name: str) -> Any:
        def add(activation: Tensor, hook: Any) -> None:
            context = current_context()
            assert context is not None
            assert context.rows is not None
            reads = (context.positions >= context.lengths[:, None] - 1).double()  # padding stands at -1
            sums = torch.einsum("bp,bpd->bd", reads, activation.double())
            for row, summed, count in zip(context.rows, sums.cpu(), reads.sum(1).cpu(), strict=True):
                self.sums[name][row] += summed
                self.counts[name][row] += count

        return add

    def means(self) -> dict[str, Float[Tensor, "row d_model"]]:
        return {name: self.sums[name] / self.counts[name][:, None] for name in self.sums}


def _ends(name: str, interval: Any) -> dict[str, float]:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
