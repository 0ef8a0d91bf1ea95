"""An experiment as its TOML file says it, checked when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from rt_lens.losses import Direction
from rt_lens.models import DEFAULT_MODEL
from rt_lens.prompts import ContrastPairs, pairs_from_table, read_toml
from rt_lens.shipped import behaviour_file
from rt_lens.tuning import TuneConfig

DIRECTIONS: tuple[Direction, ...] = ("toward", "away")
T = TypeVar("T")


@dataclass(frozen=True)
class SplitConfig:
    """Shares of the topics: the test part gets the rest."""

    train: float = 0.4
    validation: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class ExtractConfig:
    """How many pairs the vectors are made from, and measured on (one held-out pair per validation topic)."""

    n_pairs: int = 96


@dataclass(frozen=True)
class ChooseConfig:
    """Layers and multipliers to try on validation prompts, and the most that perplexity may rise (as a ratio)."""

    layers: tuple[int, ...] = (18, 21)
    multipliers: tuple[float, ...] = (1.5, 3.0)
    bound: float = 1.1
    n_prompts: int = 16
    n_paragraphs: int = 6
    max_new_tokens: int = 24


@dataclass(frozen=True)
class TestConfig:
    """How the test prompts are asked; the paragraphs for perplexity and KL are those that no choice has seen."""

    n_prompts: int = 60
    max_new_tokens: int = 24
    n_facts: int = 25
    seed: int = 0


@dataclass(frozen=True)
class Experiment:
    """One behaviour's whole experiment, as its TOML file says.

    Attributes:
        name: of the behaviour.
        description: in a sentence.
        pairs: contrast pairs.
        scorer: name or `[scorer]` table.
        tune: settings of the rep-tuned arm; the token-tuned arm is the same without the cosine loss.
        tune_seeds: direction -> seeds; each tuned arm is tuned once per seed.
        model: name or path for `load_model`.
    """

    name: str
    description: str
    pairs: ContrastPairs
    scorer: str | Mapping[str, Any]
    tune: TuneConfig
    tune_seeds: Mapping[str, tuple[int, ...]]
    model: str = DEFAULT_MODEL
    split: SplitConfig = field(default_factory=SplitConfig)
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    choose: ChooseConfig = field(default_factory=ChooseConfig)
    test: TestConfig = field(default_factory=TestConfig)


def load_experiment(name_or_path: str | Path, *, model: str | None = None) -> Experiment:
    """Reads an experiment's TOML file, or a shipped behaviour's.

    Args:
        name_or_path: for example `mood`, or `my_behaviour.toml`.
        model: overrides the file's model.

    Raises:
        ValueError: unknown behaviour, a table or key that is not known (the nearest is named), or a value out of range.
    """
    path = behaviour_file(name_or_path)
    content = read_toml(path)
    tables = {"pairs", "scorer", "model", "split", "extract", "choose", "tune", "test"}
    _refuse_unknown(path.name, content, {"name", "description"} | tables)
    name = content.get("name", path.stem)
    tuning = dict(content.get("tune", {}))
    seeds = _seeds(tuning.pop("seeds", [0, 1, 2]))
    return Experiment(
        name=name,
        description=content.get("description", ""),
        pairs=pairs_from_table(name, content.get("pairs", {}), source=path.name),
        scorer=content.get("scorer", "vader"),
        tune=_table(TuneConfig, "tune", tuning),
        tune_seeds=seeds,
        model=model or content.get("model", {}).get("name", DEFAULT_MODEL),
        split=_table(SplitConfig, "split", content.get("split", {})),
        extract=_table(ExtractConfig, "extract", content.get("extract", {})),
        choose=_table(ChooseConfig, "choose", content.get("choose", {})),
        test=_table(TestConfig, "test", content.get("test", {})),
    )


def _seeds(seeds: Any) -> dict[str, tuple[int, ...]]:
    """Seeds for each direction, from one list for both or a table with a list for each."""
    each = seeds if isinstance(seeds, dict) else dict.fromkeys(DIRECTIONS, seeds)
    _refuse_unknown("tune.seeds", each, set(DIRECTIONS))
    for direction in DIRECTIONS:
        if not each.get(direction):
            raise ValueError(f"tune.seeds: none for {direction!r}. Give at least one, as in seeds = [0].")
    return {direction: tuple(each[direction]) for direction in DIRECTIONS}


def _table(kind: type[T], name: str, values: Mapping[str, Any]) -> T:
    _refuse_unknown(f"[{name}]", values, {entry.name for entry in fields(kind)})  # type: ignore[arg-type]
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _refuse_unknown(where: str, values: Mapping[str, Any], known: set[str]) -> None:
    for key in values:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(known))}."
            raise ValueError(f"config: {where} has an unknown key {key!r}. {hint}")
