"""What changed between two runs beyond noise: a guard against regressions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats
from scipy.optimize import brentq

from rt_lens.common.statistics.comparisons import Comparison, holm, mcnemar, paired_comparison, unpaired_comparison
from rt_lens.common.statistics.intervals import Moments, moments
from rt_lens.results.schema import Results, choices_of

Key: TypeAlias = tuple[str, str, str, str]
"""Arm, direction, set and scorer."""

# Another batch size or number of threads may move a score by so much.
_SAME = 1e-5
_ALPHA = 0.05
_POWER = 0.8
_KEY = ["arm", "direction", "set", "scorer"]
_NOT_JUDGED = "not judged"
_NONE_SHOWN = "no change shown"


class _Side(NamedTuple):
    """One run's scores of one row: [seed, item], the seeds, and what each item is, by which runs are paired."""

    grid: Float[np.ndarray, "seed item"]
    seeds: list[int]
    items: list[Any]


@dataclass(frozen=True)
class RunComparison:
    """Two runs, row by row. `str()` prints what changed, what only one has, and a closing sentence.

    Attributes:
        a: name of the first run.
        b: name of the second.
        rows: a row per arm, direction, set and scorer that both have: n (items; of both runs together where unpaired),
            a_mean, b_mean, difference (b - a), low, high (95 %), p, p_holm (over all rows), test, paired, a_seeds,
            b_seeds, detectable (smallest change that would be found four times in five, after Holm), verdict:
            `higher` or `lower` (p_holm below 0.05), `the same` (on every item), `no change shown`, or `not judged`.
        only_a: rows that only the first run has.
        only_b: rows that only the second has.
        settings: a row per setting or version that differs: what, a, b.
        notes: what a reader should know of how it was compared.
        seed: of permutations, where a row has no spread to judge by.
    """

    a: str
    b: str
    rows: pd.DataFrame = field(repr=False)
    only_a: list[Key]
    only_b: list[Key]
    settings: pd.DataFrame = field(repr=False)
    notes: list[str]
    seed: int

    @property
    def changed(self) -> pd.DataFrame:
        """The rows that changed beyond noise."""
        return self.rows[self.rows["verdict"].isin(["higher", "lower"])]

    def __str__(self) -> str:
        parts = [f"a: {self.a}\nb: {self.b}"]
        if len(self.settings):
            parts.append(f"Settings that differ:\n{self.settings.to_string(index=False)}")
        if len(self.changed):
            parts.append(f"Changed beyond noise (b minus a, 95 % interval):\n{_told(self.changed)}")
        for run, rows in (("a", self.only_a), ("b", self.only_b)):
            if rows:
                parts.append(f"Only in {run}:\n" + "\n".join(f"  {', '.join(row)}" for row in rows))
        text = "\n\n".join([*parts, "\n".join([*self.notes, *self._power(), self.closing])])
        # Names come from files, and may hold what a terminal obeys.
        return "".join(sign if sign.isprintable() or sign == "\n" else "?" for sign in text)

    @property
    def closing(self) -> str:
        """What was found, in a sentence."""
        verdicts = self.rows["verdict"].value_counts()
        same, unjudged = int(verdicts.get("the same", 0)), int(verdicts.get(_NOT_JUDGED, 0))
        n, changed = len(self.rows), len(self.changed)
        seeds = sorted({seed for side in ("a_seeds", "b_seeds") for own in self.rows[side] for seed in own})
        beside = [f"the same on every item: {same}"] if same else []
        beside += [f"not judged: {unjudged}"] if unjudged else []
        unsure = int(((self.rows["p"] < _ALPHA) & ~self.rows.index.isin(self.changed.index)).sum())
        beside += [f"p below 0.05 before the correction, which may be chance among so many: {unsure}"] if unsure else []
        about = "".join(f"; {each}" for each in beside)
        if same == n:
            return f"Nothing changed: {n} rows, the same on every item (seeds {_listed(seeds)})."
        found = f"{changed} of {n} rows changed beyond noise" if changed else f"No change shown in {n} rows"
        return (
            f"{found} (Holm's correction over all rows, 5 %){about}; n = {_sizes(self.rows)}, seeds {_listed(seeds)}."
        )

    def _power(self) -> list[str]:
        """What would have been found, so that no change shown is not read as no change."""
        open_rows = self.rows[(self.rows["verdict"] == _NONE_SHOWN) & self.rows["detectable"].notna()]
        if not len(open_rows):
            return []
        each = [f"{scorer} {_span(own['detectable'])}" for scorer, own in open_rows.groupby("scorer", sort=False)]
        few = max(len(own) for own in open_rows["a_seeds"])
        mend = " More tuning seeds would lower that most." if 1 < few < 5 else ""
        return [
            f'"{_NONE_SHOWN}" is not "no change": to be found four times in five, a change had to reach '
            f"{', '.join(each)}.{mend}"
        ]


def compare_runs(a: Results, b: Results, *, seed: int = 0) -> RunComparison:
    """What changed from run a to run b beyond noise, over every arm, direction, set and scorer.

    Rows are paired by prompt where the runs share at least half of theirs, and as two samples else; 0/1 outcomes of one
    seed by McNemar's exact test, all others by Student's t, over prompts and tuning seeds, with
    the degrees of freedom of the seeds. As many seeds of each run
    are read as the other has. With one seed each, and not the same one, tuning's own noise cannot be told from a
    change: such a row is not judged. Holm's correction runs over all rows that were judged.

    Args:
        a: the run to refer to.
        b: the run to judge.
        seed: of the permutation test, used where no prompt differs from another.

    Raises:
        ValueError: runs of two behaviours, whose sets of one name hold other questions; or with no row in common.
        FileNotFoundError: a run without its scores.

    Example:
        >>> print(compare_runs(load_results("runs/before"), load_results("runs/after")))
    """
    mine, theirs = a.content, b.content
    if mine["behaviour"] != theirs["behaviour"]:
        raise ValueError(
            f"run_b: of the behaviour {theirs['behaviour']!r}, run_a of {mine['behaviour']!r}; their sets and scores "
            "mean other things. Give two runs of one behaviour."
        )
    notes, same_model = [], mine["model"] == theirs["model"]
    if not same_model:
        notes.append(
            f"Two models: {mine['model']} and {theirs['model']}. Differences are theirs too; their tokens differ, so "
            "perplexity and KL are left out."
        )
    sides = [_sides(run, with_texts=same_model) for run in (a, b)]
    common = [key for key in sides[0] if key in sides[1]]
    if not common:
        raise ValueError(f"run_b: {b.folder} and {a.folder} have no arm, direction, set and scorer in common.")
    rows = pd.DataFrame([_row(key, sides[0][key], sides[1][key], seed) for key in common])
    return RunComparison(
        str(a.folder), str(b.folder), _judged(rows),
        [key for key in sides[0] if key not in sides[1]], [key for key in sides[1] if key not in sides[0]],
        _settings(mine, theirs), [*notes, *_caveats(rows)], seed,
    )  # fmt: skip


def _sides(run: Results, *, with_texts: bool) -> dict[Key, _Side]:
    found: dict[Key, _Side] = {}
    scores = run.scores()
    # A prompt asked twice is two items.
    again = scores.groupby([*_KEY, "seed", "prompt"]).cumcount()
    scores = scores.assign(what=_zipped(scores["prompt"], again))
    for (arm, direction, name, scorer), own in _groups(scores, _KEY):
        found[arm, direction, name, scorer] = _side(own, "what", "score", run)
    texts = run.texts() if with_texts else None
    if texts is not None:
        first = texts.drop_duplicates("text").set_index("text")["tokens"]
        # Two runs read the same texts if each has as many tokens.
        texts = texts.assign(what=_zipped(texts["text"], texts["tokens"]))
        for (arm, direction), own in _groups(texts, _KEY[:2]):
            for column, scorer in (("nll", "log-perplexity"), ("kl", "kl")):
                per_token = own.assign(value=own[column] / first.mean())  # so that their mean is nats per token
                found[arm, direction, "texts", scorer] = _side(per_token, "what", "value", run)
    return found


def _groups(frame: pd.DataFrame, keys: list[str]) -> list[tuple[tuple[Any, ...], pd.DataFrame]]:
    return list(frame.groupby(keys, sort=False))  # type: ignore[arg-type]


def _zipped(first: pd.Series, second: pd.Series) -> list[Any]:
    return list(zip(first, second, strict=True))


def _side(own: pd.DataFrame, what: str, value: str, run: Results) -> _Side:
    try:
        table = own.pivot(index="seed", columns=what, values=value)
    except ValueError:
        table = None
    if table is None or table.isna().any(axis=None):
        raise ValueError(
            f"{run.folder}: a score is missing, or came twice: not every seed has one for each item. Run it again."
        )
    return _Side(table.to_numpy(float), [int(each) for each in table.index], list(table.columns))


def _row(key: Key, a: _Side, b: _Side, seed: int) -> dict[str, Any]:
    row: dict[str, Any] = dict(zip(_KEY, key, strict=True))
    a, b = _as_many_seeds(a, b)
    shared = [item for item in a.items if item in set(b.items)]
    paired = 2 * len(shared) >= min(len(a.items), len(b.items))
    if paired:
        a, b = _of_items(a, shared), _of_items(b, shared)
    row |= {"a_mean": a.grid.mean(), "b_mean": b.grid.mean()}  # of what is compared
    found, spread = _paired(a.grid, b.grid, seed) if paired else _unpaired(a.grid, b.grid, seed)
    # Untuned and steered arms have one seed that changes nothing; two of another number are two tunings.
    lone = len(a.seeds) == 1 and a.seeds != b.seeds and found.test != "the same"
    if lone:
        found = found._replace(p=float("nan"), test="one tuning seed each, and not the same")
    seeds = {"a_seeds": a.seeds, "b_seeds": b.seeds}
    return {**row, **found._asdict(), "paired": paired, **seeds, "spread": None if lone else spread}


def _as_many_seeds(a: _Side, b: _Side) -> tuple[_Side, _Side]:
    """As many seeds of each, those in common first."""
    n = min(len(a.seeds), len(b.seeds))

    def kept(own: _Side, other: _Side) -> _Side:
        chosen = sorted(own.seeds, key=lambda seed: (seed not in other.seeds, seed))[:n]
        return own._replace(grid=own.grid[[own.seeds.index(seed) for seed in chosen]], seeds=chosen)

    return kept(a, b), kept(b, a)


def _of_items(own: _Side, items: Sequence[Any]) -> _Side:
    place = {item: number for number, item in enumerate(own.items)}
    return own._replace(grid=own.grid[:, [place[item] for item in items]], items=list(items))


def _paired(
    a: Float[np.ndarray, "seed item"], b: Float[np.ndarray, "seed item"], seed: int
) -> tuple[Comparison, Moments | None]:
    moved = b - a
    moved = np.where(np.abs(moved) < _SAME, 0.0, moved)
    n = moved.shape[1]
    if not moved.any():
        return Comparison(n, 0.0, float("nan"), float("nan"), 1.0, "the same"), None
    found = moments(moved)
    if len(a) == 1 and np.isin(np.concatenate([a, b]), (0, 1)).all():
        return mcnemar(b[0], a[0]), found
    if found.variance == 0:  # each item moved alike
        return paired_comparison(b, a, seed), None
    low, high = found.interval()[1:]
    sure = found.capped(len(a) - 1) if len(a) > 1 else found
    seeds = f", {len(a)} seeds x {n} prompts" if len(a) > 1 else ""
    return Comparison(n, found.mean, low, high, sure.p, f"paired t{seeds}"), sure


def _unpaired(
    a: Float[np.ndarray, "seed_a item_a"], b: Float[np.ndarray, "seed_b item_b"], seed: int
) -> tuple[Comparison, Moments | None]:
    found, (first, second) = unpaired_comparison(b, a, seed), (moments(b), moments(a))
    variance = first.variance + second.variance
    if not variance or np.isnan(found.low):
        return found, None
    df = variance**2 / sum(side.variance**2 / side.df for side in (first, second))
    n_seeds, sure = min(len(a), len(b)), Moments(found.difference, variance, df)
    sure = sure.capped(n_seeds - 1) if n_seeds > 1 else sure
    return found._replace(p=sure.p), sure


def _judged(rows: pd.DataFrame) -> pd.DataFrame:
    """Holm's p, the verdicts, and how large a change would have been found."""
    judged = rows["p"].notna()
    rows = rows.assign(p_holm=np.nan)
    if judged.any():
        rows.loc[judged, "p_holm"] = holm(rows.loc[judged, "p"].to_numpy(float))
    strict = _ALPHA / max(int(judged.sum()), 1)
    verdicts = [
        _NOT_JUDGED if np.isnan(p) else test if test == "the same"
        else _NONE_SHOWN if p >= _ALPHA else "higher" if difference > 0 else "lower"
        for p, test, difference in zip(rows["p_holm"], rows["test"], rows["difference"], strict=True)
    ]  # fmt: skip
    sizes = [_detectable(spread, strict) for spread in rows["spread"]]
    order = [
        *(*_KEY, "n", "a_mean", "b_mean", "difference", "low", "high", "p", "p_holm", "test", "paired"),
        *("a_seeds", "b_seeds", "detectable", "verdict"),
    ]
    return rows.assign(verdict=verdicts, detectable=sizes)[order]


def _detectable(spread: Moments | None, alpha: float) -> float:
    """The smallest change that a t-test of this variance and these degrees of freedom finds four times in five.

    The power is the noncentral t's, as the mean of the normal's over the spread that a sample may show: few seeds under
    Holm's correction ask for levels so far out in the tails that library functions for the noncentral t fail.
    """
    if spread is None or spread.variance == 0:
        return float("nan")
    shown = np.sqrt(stats.chi2.ppf((np.arange(1000) + 0.5) / 1000, spread.df) / spread.df)
    asked = stats.t.ppf(1 - alpha / 2, spread.df) * shown

    def missing(change: float) -> float:
        return float(stats.norm.cdf(change - asked).mean()) - _POWER

    return float(brentq(missing, 0.0, asked.max() + 10) * np.sqrt(spread.variance))


def _caveats(rows: pd.DataFrame) -> list[str]:
    notes = []
    if not rows["paired"].all():
        sets = ", ".join(dict.fromkeys(rows[~rows["paired"]]["set"]))
        notes.append(f"Other prompts in the two runs, so compared as two samples: {sets}.")
    lone = rows[rows["p"].isna()]
    if len(lone):
        arms = ", ".join(dict.fromkeys(f"{row.arm} {row.direction}" for row in lone.itertuples()))
        notes.append(
            f"Not judged, since each run has one tuning seed and not the same: {arms}. Tune with two seeds or more."
        )
    return notes


def _settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> pd.DataFrame:
    told = [_told_settings(content) for content in (a, b)]
    rows = [
        {"what": what, "a": told[0].get(what, "–"), "b": told[1].get(what, "–")}
        for what in {**told[0], **told[1]}
        if told[0].get(what, "–") != told[1].get(what, "–")
    ]
    return pd.DataFrame(rows, columns=["what", "a", "b"])


def _told_settings(content: Mapping[str, Any]) -> dict[str, str]:
    found = {key: str(content[key]) for key in ("model", "seed", "bound")}
    found["protocol"] = str(content["protocol"]["name"])
    for direction, choice in choices_of(content).items():
        found[f"choice {direction}"] = f"layer {choice['layer']}, multiplier {choice['multiplier']}"
    for row in content["summary"]:
        found[f"seeds of {row['arm']} {row['direction']}"] = _listed(row["seeds"])
    return found | {f"version of {package}": str(version) for package, version in content["versions"].items()}


def _told(rows: pd.DataFrame) -> str:
    table = pd.DataFrame(
        {
            **{key: rows[key] for key in _KEY},
            "n": rows["n"],
            "a": rows["a_mean"].map(_number),
            "b": rows["b_mean"].map(_number),
            "b - a": [
                f"{_number(mean)} [{_number(low)}, {_number(high)}]"
                for mean, low, high in rows[["difference", "low", "high"]].to_numpy(float)
            ],
            "p (Holm)": ["< 0.001" if p < 0.001 else f"{p:.3f}" for p in rows["p_holm"]],
            "verdict": rows["verdict"],
        }
    )
    return table.to_string(index=False)


def _number(value: float) -> str:
    # Adding zero turns a rounded -0.0 into 0.0.
    return "–" if np.isnan(value) else f"{round(value, 3) + 0.0:.3f}"


def _span(values: pd.Series) -> str:
    low, high = f"{values.min():.2g}", f"{values.max():.2g}"
    return low if low == high else f"{low} to {high}"


def _sizes(rows: pd.DataFrame) -> str:
    low, high = rows["n"].min(), rows["n"].max()
    return f"{low}" if low == high else f"{low} to {high}"


def _listed(seeds: Sequence[Any]) -> str:
    return ", ".join(map(str, seeds))
