"""Which weights should which loss train? Every candidate tuned and measured on validation data; resumable."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from rt_lens.common.files import write_atomically
from rt_lens.common.progress import Bar
from rt_lens.common.statistics.intervals import mean_interval
from rt_lens.data.contrast_pairs import ContrastPairs
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

Measure = Callable[[Any], Sequence[float]]
"""The model with a candidate's weights in it goes in, a number for each validation prompt comes out."""


def candidates_of(config: TuneConfig) -> list[TuneConfig]:
    """A first look: all matrices for both losses, and each side's subsets for one loss beside the other's.

    The cosine on subsets of the attention with the tokens on subsets of the MLP (Ackerman 2024), and the other way
    round; 19 in all.
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
        candidates: configurations that differ in `target_modules` and `trained_layers` only (`candidates_of` gives some).
        measure: the effect on validation prompts, larger for better; without one the losses must do.
        validation: as for `tune`.
        neutral: as for `tune`.
        path: JSON file that keeps finished candidates; a search of the same settings, weights and measure goes on from
            there.
        progress: show bars.

    Returns:
        A row per candidate, in the order given: cosine, token, kl (kinds and blocks that each loss trains), n_weights,
        step (of the weights kept), total_loss, token_loss, cosine_loss, kl_loss (on validation rows), n, mean, low,
        high (of the measure, bootstrap 95 % interval), seed.

    Raises:
        ValueError: if there is no candidate, they differ in more, or `path` holds another search.

    Example:
        >>> score = lambda tuned: [-s for s in evaluate(tuned, validation).scores]  # away: lower is better
        >>> table = block_search(model, vectors, train, candidates_of(config), measure=score, neutral=neutral)
        >>> plots.block_search(table).show()
    """
    _check_candidates(candidates)
    if path is not None and "<lambda>" in getattr(measure, "__qualname__", ""):
        raise ValueError(
            "measure: a lambda cannot be told from others when the search goes on. Give it a name, or no path."
        )
    for candidate in candidates:
        trained_by(model, candidate)
        resolve_targets(model, vectors, candidate)
    if not isinstance(train, TuningData):
        lowest = min(candidates, key=lambda candidate: min(candidate.blocks))
        train = prepare_data(
            model, vectors, train, lowest, validation=validation, neutral=neutral, progress=progress
        )  # fmt: skip
    done = _Done(path, _settings(model, vectors, train, candidates[0], measure))
    with Bar(candidates, desc="block search", unit="candidate", disable=not progress) as bar:
        for candidate in bar:
            named = _named(candidate)
            bar.set_postfix(named)
            if done.row(named) is None:
                done.keep(named, _tried(model, vectors, train, candidate, measure))
    return pd.DataFrame([{**_named(candidate), **(done.row(_named(candidate)) or {})} for candidate in candidates])


def _check_candidates(candidates: Sequence[TuneConfig]) -> None:
    if isinstance(candidates, TuneConfig):
        raise ValueError("candidates: one TuneConfig came, a list is wanted. `candidates_of(config)` gives some.")
    if not candidates:
        raise ValueError("candidates: none came. Give some, as `candidates_of(config)` does.")
    shared = [_without(candidate) for candidate in candidates]
    for each in shared[1:]:
        if differing := [name for name, value in each.items() if shared[0][name] != value]:
            raise ValueError(
                f"candidates: they differ in {', '.join(differing)}, and only target_modules and trained_layers may. Search "
                "those apart."
            )


def _without(config: TuneConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if name not in ("target_modules", "trained_layers")}


def _named(candidate: TuneConfig) -> dict[str, str]:
    """What each loss trains, in words: `v o, blocks 17-24`; a dash for a loss without weight."""
    words = {}
    for loss in LOSSES:
        blocks = sorted(candidate.blocks_of(loss))
        there = blocks == list(range(blocks[0], blocks[-1] + 1)) if blocks else False
        named = f"{blocks[0]}-{blocks[-1]}" if there else ",".join(map(str, blocks))
        words[loss] = f"{' '.join(candidate.target_modules_of(loss))}, blocks {named}" if blocks else "–"
    return words


def _tried(
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


class _Done:
    """Finished candidates, in memory and, given a path, on disk after each."""

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.settings, self.rows = json.loads(json.dumps(settings)), {}
        if self.path is None or not self.path.exists():
            return
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            theirs, self.rows = dict(stored["settings"]), dict(stored["rows"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"path: {self.path} is no file of a block search. Give another name.") from None
        theirs = {"code": self.settings["code"], **theirs}  # older files do not say
        differing = [name for name, value in self.settings.items() if theirs.get(name) != value]
        if differing:
            differing = ["measure" if name == "code" else name for name in differing]
            raise ValueError(
                f"path: {self.path} holds a search with other {', '.join(differing)}. Give another name, or remove it."
            )

    def row(self, named: Mapping[str, str]) -> dict[str, Any] | None:
        return self.rows.get(" | ".join(named.values()))

    def keep(self, named: Mapping[str, str], row: dict[str, Any]) -> None:
        self.rows[" | ".join(named.values())] = row
        if self.path is not None:
            content = {"settings": self.settings, "rows": self.rows}
            write_atomically(self.path, json.dumps(content).encode())
