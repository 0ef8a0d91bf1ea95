"""Steering over layers x multipliers x prompts, with any measure: resumable, and a tidy table in the end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from rt_lens.arms.older_files import check_older, older_sweep
from rt_lens.common.progress import Bar
from rt_lens.common.statistics.intervals import Interval, mean_interval, share_interval
from rt_lens.common.store import Store
from rt_lens.data.questions import Asked
from rt_lens.evaluation.tasks import Measure, Repeatable, measure_of
from rt_lens.models.checksums import (
    Untellable,
    buffers_sha256,
    hooks_of,
    measure_sha256,
    parameters_sha256,
    tensors_sha256,
)
from rt_lens.models.forward import model_name
from rt_lens.models.prompts import SharedBelow
from rt_lens.models.protocol import Model
from rt_lens.steering.binding import add, steered
from rt_lens.steering.edits import FwdHook
from rt_lens.vectors.steering_vectors import SteeringVectors, layer_of


@dataclass(frozen=True)
class Sweep:
    """The scores of a sweep.

    Attributes:
        table: a row per layer, multiplier and prompt: layer, multiplier, prompt (its index), score.
        prompts: the prompts; empty if a function of your own was swept, which does not say them.
        metric: name of the scorer or function.
        seed: seed for the bootstraps.

    Example:
        >>> result = sweep(model, vectors, EvalTask(prompts, len, 2), layers=[21], multipliers=[0, 1], progress=False)
        >>> list(result.table.columns)
        ['layer', 'multiplier', 'prompt', 'score']
    """

    table: pd.DataFrame = field(repr=False)
    prompts: list[str] = field(repr=False)
    metric: str
    seed: int

    def summary(self) -> pd.DataFrame:
        """A row per layer and multiplier: n, mean, low, high (bootstrap 95 % interval over prompts), seed."""
        rows = []
        for (layer, multiplier), cell in self.table.groupby(["layer", "multiplier"], sort=True):
            interval = mean_interval(cell["score"].to_numpy(float), self.seed)
            rows.append({"layer": layer, "multiplier": multiplier, **interval._asdict(), "seed": self.seed})
        return pd.DataFrame(rows)

    def dose_response(self, layer: int) -> DoseResponse:
        """How the metric follows the multiplier at one layer.

        Raises:
            ValueError: if the layer was not swept, or had fewer than three multipliers.
        """
        cells = self.table[self.table["layer"] == layer]
        grid = cells.pivot(index="prompt", columns="multiplier", values="score").sort_index(axis=1)
        if len(grid.columns) < 3:
            swept = sorted(self.table["layer"].unique().tolist())
            raise ValueError(
                f"layer must be one that was swept with at least 3 multipliers, got {layer} with {len(grid.columns)}. "
                f"Layers swept: {swept}."
            )
        doses = grid.columns.to_numpy(float)
        by_prompt = grid.to_numpy(float)
        drawn = np.random.default_rng(self.seed).integers(0, len(by_prompt), (1000, len(by_prompt)))
        low, high = np.quantile([_rank(doses, means) for means in by_prompt[drawn].mean(1)], [0.025, 0.975])
        centred = doses - doses.mean()
        moved = by_prompt - by_prompt[:, :1]  # so that the slope of a prompt that does not move is 0, not -1e-17
        slopes = moved @ centred / (centred @ centred)
        return DoseResponse(
            layer,
            Interval(len(by_prompt), _rank(doses, by_prompt.mean(0)), float(low), float(high)),
            mean_interval(slopes, self.seed),
            share_interval(int((slopes < 0).sum()), len(slopes)),
            cells.assign(wrong_way=cells["prompt"].map(dict(zip(grid.index, slopes < 0, strict=True)))),
            self.summary().query("layer == @layer"),
            self.seed,
        )


@dataclass(frozen=True)
class DoseResponse:
    """How the metric follows the multiplier at one layer.

    Attributes:
        layer: block index.
        spearman: rank correlation of multiplier and mean metric (0 if nothing moves); bootstrap interval over prompts.
        slope: metric per unit of the multiplier (steerability, Tan et al. 2024), mean over prompts.
        wrong_way: fraction of the prompts whose own slope is below zero, with a Wilson interval.
        table: columns layer, multiplier, prompt (its index), score, wrong_way: for `plots.steerability`.
        summary: columns layer, multiplier, n, mean, low, high, seed: for `plots.steerability` too.
        seed: seed for the bootstrap.

    Example:
        >>> task = LogitDifference(prompts, " happy", " sad")
        >>> result = sweep(model, vectors, task, layers=[21], multipliers=[-2, 0, 2], progress=False)
        >>> print(result.dose_response(21))
        Layer 21: Spearman 1.00 ...
    """

    layer: int
    spearman: Interval
    slope: Interval
    wrong_way: Interval
    table: pd.DataFrame = field(repr=False, compare=False)
    summary: pd.DataFrame = field(repr=False, compare=False)
    seed: int

    def __str__(self) -> str:
        rank, slope, wrong = self.spearman, self.slope, self.wrong_way
        return (
            f"Layer {self.layer}: Spearman {rank.mean:.2f} [{rank.low:.2f}, {rank.high:.2f}], slope {slope.mean:.2f} "
            f"[{slope.low:.2f}, {slope.high:.2f}] per unit, {wrong.mean:.0%} of prompts move the wrong way "
            f"[{wrong.low:.0%}, {wrong.high:.0%}] (n = {rank.n}, seed {self.seed})"
        )


def _rank(doses: Float[np.ndarray, "dose"], means: Float[np.ndarray, "dose"]) -> float:
    return float(stats.spearmanr(doses, means).statistic) if np.ptp(means) > 0 else 0.0


def sweep(
    model: Model,
    vectors: SteeringVectors,
    task: Measure | Asked,
    *,
    layers: Iterable[int] | None = None,
    multipliers: Sequence[float] = (-3, -2, -1, 0, 1, 2, 3),
    steer: Callable[..., list[FwdHook]] = add,
    hook: str = "resid_post",
    path: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Sweep:
    """Steers at each layer with each multiplier, measures every prompt, and returns a tidy table.

    For an EvalTask or a LogitDifference, all multipliers of a layer run as one list of prompts, each with its own; a
    function of your own is called once per multiplier. Multiplier 0 runs once for all layers.

    Args:
        model: HookedTransformer or TransformerBridge, including any hooks already attached.
        vectors: the directions.
        task: what is measured: an EvalTask, a LogitDifference, or a function from a model to one number per prompt.
            Prompts alone are scored with `vader`.
        layers: block indices. Defaults to every block that has a vector.
        multipliers: in units of the vectors' own lengths.
        steer: `add`, `add_preserving_norm`, or another function with the keywords layers, multiplier and hook.
        hook: kind of hook point.
        path: JSON file that keeps finished layers; a sweep with the same settings and weights resumes there.
            Resuming requires the same hooks: they are compared by source code and captured state, so a stateful hook
            counts as changed. Measures are compared by source code, and by the tensors and functions that they hold.
        seed: seed for the bootstrap intervals.
        progress: show a bar.

    Returns:
        A Sweep; `plots.sweep(result.summary())` draws its heat map.

    Raises:
        ValueError: if there is no prompt or multiplier, a layer has no vector, `path` holds another sweep, or
            something on the model cannot be compared with what the file says.

    Example:
        >>> task = LogitDifference(prompts, " happy", " sad")
        >>> result = sweep(model, vectors, task, layers=[21], multipliers=[-2, 0, 2], progress=False)
        >>> result.summary()[["layer", "multiplier", "n"]].values.tolist()
        [[21.0, -2.0, 2.0], [21.0, 0.0, 2.0], [21.0, 2.0, 2.0]]
        >>> result.dose_response(21).slope.mean > 0
        True
    """
    measure = measure_of(task)
    doses = sorted({float(multiplier) for multiplier in multipliers})
    if not doses or not np.isfinite(doses).all():
        raise ValueError(
            f"multipliers must be finite numbers, at least one, got {list(multipliers)}. Try multipliers=(-2, 0, 2)."
        )
    chosen = list(dict.fromkeys(layer_of(name) for name in vectors.at_layers(layers, hook)))
    vectors.select(chosen, hook).check_fits(model)
    steer = partial(steer, hook=hook)
    store = _store(path, model, vectors, doses, measure, steer)
    with Bar(chosen, desc="sweep", unit="layer", disable=not progress) as bar, SharedBelow(model) as shared:
        for index, layer in enumerate(bar):
            if str(layer) in store:
                continue
            shared.floor = min(chosen[index:])
            if 0.0 in doses and _UNSTEERED not in store:
                store.keep(_UNSTEERED, _numbers(measure, model))
            scores = _one_layer(model, vectors, layer, doses, measure, steer, store.get(_UNSTEERED))
            store.keep(str(layer), scores)
            bar.set_postfix(layer=layer)
    rows = [
        {"layer": layer, "multiplier": dose, "prompt": number, "score": score}
        for layer in chosen
        for dose, scores in zip(doses, store.get(str(layer)), strict=True)
        for number, score in enumerate(scores)
    ]
    return Sweep(pd.DataFrame(rows), list(getattr(measure, "prompts", [])), _name(measure), seed)


_UNSTEERED = "unsteered"


def _one_layer(
    model: Model,
    vectors: SteeringVectors,
    layer: int,
    doses: Sequence[float],
    measure: Measure,
    steer: Callable[..., list[FwdHook]],
    unsteered: Sequence[float] | None,
) -> list[list[float]]:
    """Scores at each multiplier, each a list over prompts."""
    steps = [dose for dose in doses if dose]
    if isinstance(measure, Repeatable) and steps:
        by_dose = _all_at_once(model, vectors, layer, steps, measure, steer)
    else:
        by_dose = []
        for dose in steps:
            with steered(model, steer(vectors, layers=[layer], multiplier=dose)):
                by_dose.append(_numbers(measure, model))
    if unsteered is not None:
        by_dose.insert(doses.index(0.0), list(unsteered))
    if len(sizes := {len(scores) for scores in by_dose}) > 1:
        raise ValueError(
            f"task must give a number for each prompt, got {sorted(sizes)} numbers in turn. Give one each."
        )
    return by_dose


def _all_at_once(
    model: Model, vectors: SteeringVectors, layer: int, steps: Sequence[float], measure: Any, steer: Callable[..., Any]
) -> list[list[float]]:
    """One list of prompts for all multipliers, each copy of a prompt steered with its own."""
    n = len(measure.prompts)
    by_row: Float[Tensor, "row"] = torch.tensor(steps, device="cpu").repeat_interleave(n)
    with steered(model, steer(vectors, layers=[layer], multiplier=by_row)):
        scores = _numbers(measure.repeated(len(steps)), model)
    return [scores[start : start + n] for start in range(0, len(scores), n)]


def _numbers(measure: Measure, model: Model) -> list[float]:
    scores = [float(score) for score in measure(model)]
    expected = len(getattr(measure, "prompts", scores))
    if not scores or len(scores) != expected:
        raise ValueError(
            f"task must give one number for each of {expected or 'the'} prompts, in order, got {len(scores)} numbers."
        )
    return scores


def _name(measure: Measure) -> str:
    return str(getattr(measure, "name", None) or getattr(measure, "__name__", type(measure).__name__))


def _store(
    path: str | Path | None, model: Model, vectors: SteeringVectors, doses: Sequence[float], measure: Any, steer: Any
) -> Store:
    """The store of finished layers; a file of an older version is continued in the new format, if it fits."""
    if path is None:
        return Store(None, {}, kind="sweep")
    path, settings = Path(path), _settings(model, vectors, doses, measure, steer)
    older = older_sweep(path)
    if older is None:
        return Store(path, settings, kind="sweep")
    check_older(path, older["settings"], settings, model)
    return Store.of_older(path, settings, older["parts"], kind="sweep")


def _settings(
    model: Model, vectors: SteeringVectors, doses: Sequence[float], measure: Any, steer: Any
) -> dict[str, Any]:
    """What makes two sweeps the same."""
    erasers = [(name, part) for name, eraser in vectors.erasers.items() for part in vars(eraser).values()]
    try:
        on_model = {"weights": parameters_sha256(model), "buffers": buffers_sha256(model), "hooks": hooks_of(model)}
    except Untellable as error:
        raise ValueError(
            f"path: {error}, so a later sweep could not tell whether it is the same. Let it hold numbers, tensors and "
            "functions, or leave path out."
        ) from None
    prompts = getattr(measure, "prompts", [])
    return {
        "model": model_name(model),
        **on_model,
        "vectors": {**vectors.described(), "erasers": tensors_sha256(erasers)},
        "prompts": hashlib.sha256("\0".join(prompts).encode()).hexdigest(),
        "multipliers": list(doses),
        "task": {"is": described(measure), "code": measure_sha256(measure, model)},
        "steer": {"is": described(steer), "code": measure_sha256(steer, model)},
    }


def described(value: Any) -> Any:
    """A measure or a function as JSON, the same in every process; questions by their checksum.

    Raises:
        ValueError: for a lambda or a function made in a function, since two of them have the same name.
    """
    if is_dataclass(value) and not isinstance(value, type):
        parts = {part.name: described(getattr(value, part.name)) for part in fields(value) if part.name != "questions"}
        questions = {"questions": sha256_of(value.questions)} if hasattr(value, "questions") else {}
        return {"kind": type(value).__name__, **parts, **questions}
    if isinstance(value, partial):
        return {"kind": "partial", "of": described([value.func, value.args, value.keywords])}
    if callable(value):
        name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
        if "<" in name:
            raise ValueError(
                f"path needs functions with a name of their own, got {name}. Use a function of a module, or a "
                "dataclass with __call__, or leave path out."
            )
        return name
    if isinstance(value, Mapping):
        return {str(key): described(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [described(part) for part in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def sha256_of(questions: Iterable[Any]) -> str:
    """Checksum of prompts or questions."""
    return hashlib.sha256("\0".join(map(repr, questions)).encode()).hexdigest()
