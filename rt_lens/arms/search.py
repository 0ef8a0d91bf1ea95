"""Which weights should which loss train? Every candidate tuned and measured on validation data; resumable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from rt_lens.arms.older_files import check_older, older_search
from rt_lens.common.progress import Bar
from rt_lens.common.statistics.intervals import mean_interval
from rt_lens.common.store import Store
from rt_lens.data.contrast_pairs import ContrastPairs
from rt_lens.evaluation.tasks import Measure
from rt_lens.models.checksums import measure_sha256
from rt_lens.models.protocol import Model
from rt_lens.tuning.checkpoint import contents_of, run_of
from rt_lens.tuning.config import LOSSES, MATRICES, TuneConfig
from rt_lens.tuning.direction_targets import DirectionTarget, described, resolve_targets
from rt_lens.tuning.loop import tune
from rt_lens.tuning.targets import Target, TokenTarget
from rt_lens.tuning.tuning_data import TuningData, prepare_data
from rt_lens.tuning.weights import trained_by
from rt_lens.vectors.steering_vectors import SteeringVectors

_ATTENTION = (("v", "o"), ("q", "k"), ("q", "k", "v", "o"))
_MLP = (("gate", "up"), ("down",), ("gate", "up", "down"))


def candidates_of(config: TuneConfig) -> list[TuneConfig]:
    """Candidates for a first search: all matrices for both losses, or attention for one loss and MLP for the other.

    The cosine loss trains subsets of the attention while the token loss trains subsets of the MLP (Ackerman 2024), and
    the other way round: 19 in all.

    Example:
        >>> len(candidates_of(config))
        19
        >>> candidates_of(config)[1].target_modules
        {'cosine': ('v', 'o'), 'token': ('gate', 'up')}
    """
    both = [(a, m) for a in _ATTENTION for m in _MLP] + [(m, a) for a in _ATTENTION for m in _MLP]
    return [
        replace(config, target_modules=MATRICES),
        *(replace(config, target_modules={"cosine": cosine, "token": token}) for cosine, token in both),
    ]


def block_search(
    model: Model,
    vectors: SteeringVectors | Sequence[DirectionTarget],
    train: ContrastPairs | Sequence[TokenTarget] | TuningData,
    candidates: Sequence[TuneConfig],
    *,
    measure: Measure | None = None,
    validation: ContrastPairs | Sequence[TokenTarget] | None = None,
    neutral: Iterable[str] | Iterable[Target] = (),
    path: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Tunes each candidate on the same material, and sets validation losses and effects side by side.

    Args:
        model: left as it was.
        vectors: as for `tune`.
        train: as for `tune`.
        candidates: configurations that differ in `target_modules` and `trained_layers` only, such as `candidates_of`
            gives.
        measure: the effect on validation prompts, larger for better: an EvalTask, or a function from the model to one
            number per prompt. Without one the table has the losses only.
        validation: as for `tune`.
        neutral: as for `tune`.
        path: JSON file that keeps finished candidates; a search with the same settings, weights and measure resumes
            there.
        progress: show bars.

    Returns:
        A row per candidate, in the order given: cosine, token, kl (kinds and blocks that each loss trains), n_weights,
        step (of the weights kept), total_loss, token_loss, cosine_loss, kl_loss (on validation rows), n, mean, low,
        high (of the measure, bootstrap 95 % interval), seed.

    Raises:
        ValueError: if there is no candidate, they differ in more, or `path` holds another search.

    Example:
        >>> measure = LogitDifference(prompts, " sad", " happy")  # tuned away from happy: higher is better
        >>> candidates = [replace(config, target_modules=["down"]), replace(config, target_modules=["v", "o"])]
        >>> table = block_search(
        ...     model, vectors, train.sample(4), candidates, measure=measure, neutral=neutral, progress=False
        ... )
        >>> table["cosine"].tolist()
        ['down, blocks 21', 'v o, blocks 21']
    """
    _check_candidates(candidates)
    if path is not None and "<lambda>" in getattr(measure, "__qualname__", ""):
        raise ValueError(
            "measure must be a function with a name where path is given, got a lambda. Define it with def, or leave "
            "path out."
        )
    for candidate in candidates:
        trained_by(model, candidate)
        resolve_targets(model, vectors, candidate)
    if not isinstance(train, TuningData):
        lowest = min(candidates, key=lambda candidate: min(candidate.blocks))
        train = prepare_data(
            model, vectors, train, lowest, validation=validation, neutral=neutral, progress=progress
        )  # fmt: skip
    store = _store(path, _settings(model, vectors, train, candidates[0], measure), model)
    with Bar(candidates, desc="block search", unit="candidate", disable=not progress) as bar:
        for candidate in bar:
            trained = _trained_by_loss(candidate)
            bar.set_postfix(trained)
            if _key(trained) not in store:
                store.keep(_key(trained), _row(model, vectors, train, candidate, measure))
    trained_by_each = [_trained_by_loss(candidate) for candidate in candidates]
    return pd.DataFrame([{**trained, **store.get(_key(trained))} for trained in trained_by_each])


def _key(trained: Mapping[str, str]) -> str:
    return " | ".join(trained.values())


def _store(path: str | Path | None, settings: Mapping[str, Any], model: Model) -> Store:
    """The store of finished candidates; a file of an older version is continued in the new format, if it fits."""
    older = None if path is None else older_search(Path(path))
    if path is None or older is None:
        return Store(None if path is None else Path(path), settings, kind="block search")
    check_older(Path(path), older["settings"], settings, model)
    return Store.of_older(Path(path), settings, older["parts"], kind="block search")


def _check_candidates(candidates: Sequence[TuneConfig]) -> None:
    if isinstance(candidates, TuneConfig):
        raise ValueError("candidates must be a list, got one TuneConfig. Use `candidates_of(config)` for a first look.")
    if not candidates:
        raise ValueError("candidates must not be empty, got []. Use `candidates_of(config)` for a first look.")
    shared = [_without(candidate) for candidate in candidates]
    for settings in shared[1:]:
        if differing := [name for name, value in settings.items() if shared[0][name] != value]:
            raise ValueError(
                f"candidates must differ in target_modules and trained_layers only, got other {', '.join(differing)}. "
                "Search those apart."
            )


def _without(config: TuneConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if name not in ("target_modules", "trained_layers")}


def _trained_by_loss(candidate: TuneConfig) -> dict[str, str]:
    """What each loss trains, in words: `v o, blocks 17-24`; a dash for a loss without weight."""
    trained = {}
    for loss in LOSSES:
        blocks = sorted(candidate.blocks_of(loss))
        contiguous = blocks == list(range(blocks[0], blocks[-1] + 1)) if blocks else False
        written = f"{blocks[0]}-{blocks[-1]}" if contiguous and len(blocks) > 1 else ",".join(map(str, blocks))
        trained[loss] = f"{' '.join(candidate.target_modules_of(loss))}, blocks {written}" if blocks else "–"
    return trained


def _row(
    model: Model, vectors: Any, material: TuningData, candidate: TuneConfig, measure: Measure | None
) -> dict[str, Any]:
    """One candidate's row."""
    delta = tune(model, vectors, material, candidate, progress=False)
    kept = min((row for row in delta.history if row["split"] == "validation"), key=lambda row: row["total"])
    row = {
        "n_weights": sum(change.numel() for change in delta.changes.values()),
        "step": kept["step"],
        **{f"{part}_loss": kept[part] for part in ("total", "token", "cosine", "kl")},
        "seed": candidate.seed,
    }
    if measure is None:
        return {**row, "n": 0, "mean": None, "low": None, "high": None}
    with delta.applied(model):
        scores = [float(value) for value in measure(model)]
    return {**row, **mean_interval(scores, candidate.seed)._asdict()}


def _settings(
    model: Model, vectors: Any, material: TuningData, candidate: TuneConfig, measure: Measure | None
) -> dict[str, Any]:
    """What makes two searches the same, beside the candidates' kinds and blocks."""
    about = {
        "vectors": described(vectors),
        "measure": None if measure is None else getattr(measure, "__qualname__", type(measure).__qualname__),
    }
    weights = material.weights or None  # `tune` will see to it that they are the model's
    code = None if measure is None else measure_sha256(measure, model)
    run = {**run_of(candidate, model, about, weights), **contents_of(material), "code": code}
    return {name: value for name, value in run.items() if name not in ("target_modules", "trained_layers")}
