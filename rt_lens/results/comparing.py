"""Compares two runs row by row and reports what changed beyond noise: a guard against regressions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats
from scipy.optimize import brentq

from rt_lens.common.arm_labels import ArmLabel
from rt_lens.common.formatting import estimate, number, p_value
from rt_lens.common.statistics.comparisons import Comparison, holm, mcnemar, paired_comparison, unpaired_comparison
from rt_lens.common.statistics.intervals import Moments, moments
from rt_lens.results.schema import Results, choices_of

Key: TypeAlias = tuple[str, str, str, str]
"""Arm, direction, set and scorer."""

# Another batch size or number of threads can change a score by this much.
_SAME = 1e-5
_ALPHA = 0.05
_POWER = 0.8
_KEY = ["arm", "direction", "set", "scorer"]
_NOT_JUDGED = "not judged"
_NOT_SHOWN = "no change shown"


class _Side(NamedTuple):
    """One run's scores of one row: [seed, item], the seeds, and the key of each item, by which runs are paired."""

    grid: Float[np.ndarray, "seed item"]
    seeds: list[int]
    items: list[Any]


@dataclass(frozen=True)
class RunComparison:
    """Two runs compared row by row. `str()` prints what changed, what only one run has, and a closing sentence.

    Attributes:
        a: folder of the first run.
        b: folder of the second run.
        rows: a row per arm, direction, set and scorer that both runs have: n (items; of both runs together where
            unpaired), a_mean, b_mean, difference (b - a), low, high (95 %), p, p_holm (over all rows), test, paired,
            a_seeds, b_seeds, detectable (the smallest change that the test finds with a power of 0.8 after Holm's
            correction), verdict: `higher` or `lower` (p_holm below 0.05), `the same` (on every item),
            `no change shown`, or `not judged`.
        only_a: rows that only the first run has.
        only_b: rows that only the second run has.
        settings: a row per setting or version that differs: what, a, b.
        notes: how the runs were compared, where a reader needs to know.
        seed: seed for the permutation test, which is used where a row has no spread.

    Example:
        >>> comparison = compare_runs(load_results("runs/mood"), load_results("runs/mood_after"))
        >>> comparison.changed[["arm", "scorer", "verdict"]].drop_duplicates().to_string(index=False, header=False)
        'rep_tuned  vader  higher'
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
            parts.append(f"Changed beyond noise (b minus a, 95 % interval):\n{_summary_text(self.changed)}")
        for run, keys in (("a", self.only_a), ("b", self.only_b)):
            if keys:
                parts.append(f"Only in {run}:\n" + "\n".join(f"  {', '.join(key)}" for key in keys))
        text = "\n\n".join([*parts, "\n".join([*self.notes, *self._power(), self.closing])])
        # Names come from files, and can hold control characters.
        return "".join(sign if sign.isprintable() or sign == "\n" else "?" for sign in text)

    @property
    def closing(self) -> str:
        """The result of the comparison in one sentence."""
        verdicts = self.rows["verdict"].value_counts()
        same, unjudged = int(verdicts.get("the same", 0)), int(verdicts.get(_NOT_JUDGED, 0))
        n, changed = len(self.rows), len(self.changed)
        seeds = sorted({seed for side in ("a_seeds", "b_seeds") for row_seeds in self.rows[side] for seed in row_seeds})
        if same == n:
            return f"Nothing changed: {n} rows, the same on every item (seeds {_listed(seeds)})."
        counts = [f"the same on every item: {same}"] if same else []
        counts += [f"not judged: {unjudged}"] if unjudged else []
        unsure = int(((self.rows["p"] < _ALPHA) & ~self.rows.index.isin(self.changed.index)).sum())
        counts += (
            [f"p below 0.05 only before the correction, which can be chance in {n} rows: {unsure}"] if unsure else []
        )
        result = f"{changed} of {n} rows changed beyond noise" if changed else f"No change shown in {n} rows"
        details = "".join(f"; {count}" for count in counts)
        return (
            f"{result} (Holm's correction over all rows, 5 %){details}; n = {_sizes(self.rows)}, "
            f"seeds {_listed(seeds)}."
        )

    def _power(self) -> list[str]:
        """The change that the tests could find, so that nobody reads "no change shown" as "no change"."""
        not_shown = self.rows[(self.rows["verdict"] == _NOT_SHOWN) & self.rows["detectable"].notna()]
        if not len(not_shown):
            return []
        sizes = [f"{scorer} {_span(rows['detectable'])}" for scorer, rows in not_shown.groupby("scorer", sort=False)]
        n_seeds = max(len(seeds) for seeds in not_shown["a_seeds"])
        advice = " More tuning seeds lower these sizes most." if 1 < n_seeds < 5 else ""
        return [
            f'"{_NOT_SHOWN}" does not mean "no change": these tests find a change with a power of {_POWER} only from '
            f"this size on: {', '.join(sizes)}.{advice}"
        ]


def compare_runs(a: Results, b: Results, *, seed: int = 0) -> RunComparison:
    """Reports what changed from run a to run b beyond noise, for every arm, direction, set and scorer.

    A row is paired by prompt where the runs share at least half of their prompts; otherwise the runs are compared as
    two samples. 0/1 outcomes of one seed are tested by McNemar's exact test, all others by Student's t over prompts and
    tuning seeds, with the degrees of freedom of the seeds. Both runs contribute the same number of seeds. If each run
    has one seed and the two seeds differ, the noise of tuning cannot be separated from a change, so the row is not
    judged. Holm's correction covers all rows that were judged.

    Args:
        a: the reference run.
        b: the run to judge.
        seed: seed for the permutation test, which is used where all prompts changed alike.

    Raises:
        ValueError: if the runs have different behaviours, or no row in common.
        FileNotFoundError: if a run has no scores.

    Example:
        >>> before = load_results("runs/mood")
        >>> print(compare_runs(before, before).closing)
        Nothing changed: 28 rows, the same on every item (seeds 0, 1, 2, 3, 4).
        >>> comparison = compare_runs(before, load_results("runs/mood_after"))
        >>> comparison.closing.startswith("2 of 28 rows changed beyond noise (Holm's correction over all rows, 5 %)")
        True
    """
    content_a, content_b = a.content, b.content
    if content_a["behaviour"] != content_b["behaviour"]:
        raise ValueError(
            f"run_b must be a run of the same behaviour as run_a ({content_a['behaviour']!r}), got a run of "
            f"{content_b['behaviour']!r}. Give two runs of one behaviour."
        )
    notes, same_model = [], content_a["model"] == content_b["model"]
    if not same_model:
        notes.append(
            f"The runs have two models: {content_a['model']} and {content_b['model']}. A difference can come from the "
            "model. Perplexity and KL are left out, since the tokens differ."
        )
    sides = [_sides(run, with_texts=same_model) for run in (a, b)]
    common = [key for key in sides[0] if key in sides[1]]
    if not common:
        raise ValueError(
            f"run_b must share an arm, direction, set and scorer with run_a, got {b.folder} and {a.folder}, which have "
            "no arm, direction, set and scorer in common. Give two runs of one experiment."
        )
    rows = pd.DataFrame([_row(key, sides[0][key], sides[1][key], seed) for key in common])
    return RunComparison(
        str(a.folder), str(b.folder), _judged(rows),
        [key for key in sides[0] if key not in sides[1]], [key for key in sides[1] if key not in sides[0]],
        _settings(content_a, content_b), [*notes, *_caveats(rows)], seed,
    )  # fmt: skip


def _sides(run: Results, *, with_texts: bool) -> dict[Key, _Side]:
    sides: dict[Key, _Side] = {}
    scores = run.scores()
    # A prompt that was asked twice is two items.
    repeat = scores.groupby([*_KEY, "seed", "prompt"]).cumcount()
    scores = scores.assign(key=_zipped(scores["prompt"], repeat))
    for (arm, direction, name, scorer), rows in _groups(scores, _KEY):
        sides[arm, direction, name, scorer] = _side(rows, "score", run)
    texts = run.texts() if with_texts else None
    if texts is not None:
        sizes = texts.drop_duplicates("text").set_index("text")["tokens"]
        # Two runs read the same texts if the texts have the same numbers of tokens.
        texts = texts.assign(key=_zipped(texts["text"], texts["tokens"]))
        for (arm, direction), rows in _groups(texts, _KEY[:2]):
            for column, scorer in (("nll", "log-perplexity"), ("kl", "kl")):
                per_token = rows.assign(value=rows[column] / sizes.mean())  # so that their mean is nats per token
                sides[arm, direction, "texts", scorer] = _side(per_token, "value", run)
    return sides


def _groups(frame: pd.DataFrame, keys: list[str]) -> list[tuple[tuple[Any, ...], pd.DataFrame]]:
    return list(frame.groupby(keys, sort=False))  # type: ignore[arg-type]


def _zipped(first: pd.Series, second: pd.Series) -> list[Any]:
    return list(zip(first, second, strict=True))


def _side(rows: pd.DataFrame, value: str, run: Results) -> _Side:
    try:
        table = rows.pivot(index="seed", columns="key", values=value)
    except ValueError:
        table = None
    if table is None or table.isna().any(axis=None):
        raise ValueError(
            f"run must have one score per seed and item, got {run.folder}, where a score is missing or doubled. Run "
            "the experiment again."
        )
    return _Side(table.to_numpy(float), [int(seed) for seed in table.index], list(table.columns))


def _row(key: Key, a: _Side, b: _Side, seed: int) -> dict[str, Any]:
    row: dict[str, Any] = dict(zip(_KEY, key, strict=True))
    a, b = _as_many_seeds(a, b)
    shared = [item for item in a.items if item in set(b.items)]
    paired = 2 * len(shared) >= min(len(a.items), len(b.items))
    if paired:
        a, b = _of_items(a, shared), _of_items(b, shared)
    row |= {"a_mean": a.grid.mean(), "b_mean": b.grid.mean()}  # of the items and seeds that are compared
    result, spread = _paired(a.grid, b.grid, seed) if paired else _unpaired(a.grid, b.grid, seed)
    # Untuned and steered arms have one seed that changes nothing; two different seeds are two tuning runs.
    unjudged = len(a.seeds) == 1 and a.seeds != b.seeds and result.test != "the same"
    if unjudged:
        result = result._replace(p=float("nan"), test="one tuning seed each, and not the same")
    seeds = {"a_seeds": a.seeds, "b_seeds": b.seeds}
    return {**row, **result._asdict(), "paired": paired, **seeds, "spread": None if unjudged else spread}


def _as_many_seeds(a: _Side, b: _Side) -> tuple[_Side, _Side]:
    """The same number of seeds of each side; seeds that both sides have are taken first."""
    n = min(len(a.seeds), len(b.seeds))

    def first_seeds(side: _Side, other: _Side) -> _Side:
        chosen = sorted(side.seeds, key=lambda seed: (seed not in other.seeds, seed))[:n]
        return side._replace(grid=side.grid[[side.seeds.index(seed) for seed in chosen]], seeds=chosen)

    return first_seeds(a, b), first_seeds(b, a)


def _of_items(side: _Side, items: Sequence[Any]) -> _Side:
    column = {item: number for number, item in enumerate(side.items)}
    return side._replace(grid=side.grid[:, [column[item] for item in items]], items=list(items))


def _paired(
    a: Float[np.ndarray, "seed item"], b: Float[np.ndarray, "seed item"], seed: int
) -> tuple[Comparison, Moments | None]:
    change = b - a
    change = np.where(np.abs(change) < _SAME, 0.0, change)
    n = change.shape[1]
    if not change.any():
        return Comparison(n, 0.0, float("nan"), float("nan"), 1.0, "the same"), None
    spread = moments(change)
    if len(a) == 1 and np.isin(np.concatenate([a, b]), (0, 1)).all():
        return mcnemar(b[0], a[0]), spread
    if spread.variance == 0:  # every item changed alike
        return paired_comparison(b, a, seed), None
    low, high = spread.interval()[1:]
    cautious = spread.capped(len(a) - 1) if len(a) > 1 else spread
    seeds = f", {len(a)} seeds x {n} prompts" if len(a) > 1 else ""
    return Comparison(n, spread.mean, low, high, cautious.p, f"paired t{seeds}"), cautious


def _unpaired(
    a: Float[np.ndarray, "seed_a item_a"], b: Float[np.ndarray, "seed_b item_b"], seed: int
) -> tuple[Comparison, Moments | None]:
    result, (first, second) = unpaired_comparison(b, a, seed), (moments(b), moments(a))
    variance = first.variance + second.variance
    if not variance or np.isnan(result.low):
        return result, None
    df = variance**2 / sum(side.variance**2 / side.df for side in (first, second))
    n_seeds, cautious = min(len(a), len(b)), Moments(result.difference, variance, df)
    cautious = cautious.capped(n_seeds - 1) if n_seeds > 1 else cautious
    return result._replace(p=cautious.p), cautious


def _judged(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with Holm's p, a verdict, and the smallest change that the test can find."""
    judged = rows["p"].notna()
    rows = rows.assign(p_holm=np.nan)
    if judged.any():
        rows.loc[judged, "p_holm"] = holm(rows.loc[judged, "p"].to_numpy(float))
    strict = _ALPHA / max(int(judged.sum()), 1)
    verdicts = [
        _NOT_JUDGED if np.isnan(p) else test if test == "the same"
        else _NOT_SHOWN if p >= _ALPHA else "higher" if difference > 0 else "lower"
        for p, test, difference in zip(rows["p_holm"], rows["test"], rows["difference"], strict=True)
    ]  # fmt: skip
    sizes = [_detectable(spread, strict) for spread in rows["spread"]]
    order = [
        *(*_KEY, "n", "a_mean", "b_mean", "difference", "low", "high", "p", "p_holm", "test", "paired"),
        *("a_seeds", "b_seeds", "detectable", "verdict"),
    ]
    return rows.assign(verdict=verdicts, detectable=sizes)[order]


def _detectable(spread: Moments | None, alpha: float) -> float:
    """The smallest change that a t-test of this variance and these degrees of freedom finds with the wanted power.

    The power is that of the noncentral t, computed as the mean of the normal's over the standard deviations that a
    sample can have: few seeds under Holm's correction need levels so far out in the tails that library functions for
    the noncentral t fail.
    """
    if spread is None or spread.variance == 0:
        return float("nan")
    sample_sd = np.sqrt(stats.chi2.ppf((np.arange(1000) + 0.5) / 1000, spread.df) / spread.df)
    threshold = stats.t.ppf(1 - alpha / 2, spread.df) * sample_sd

    def excess_power(change: float) -> float:
        return float(stats.norm.cdf(change - threshold).mean()) - _POWER

    return float(brentq(excess_power, 0.0, threshold.max() + 10) * np.sqrt(spread.variance))


def _caveats(rows: pd.DataFrame) -> list[str]:
    notes = []
    if not rows["paired"].all():
        sets = ", ".join(dict.fromkeys(rows[~rows["paired"]]["set"]))
        notes.append(f"The prompts of the two runs differ, so these sets are compared as two samples: {sets}.")
    unjudged = rows[rows["p"].isna()]
    if len(unjudged):
        labels = zip(unjudged["arm"], unjudged["direction"], strict=True)
        arms = "; ".join(dict.fromkeys(str(ArmLabel(*label)) for label in labels))
        notes.append(
            f"Not judged, because each run has one tuning seed and the two differ: {arms}. Tune with two or more seeds."
        )
    return notes


def _settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> pd.DataFrame:
    first, second = _settings_text(a), _settings_text(b)
    rows = [
        {"what": name, "a": first.get(name, "–"), "b": second.get(name, "–")}
        for name in {**first, **second}
        if first.get(name, "–") != second.get(name, "–")
    ]
    return pd.DataFrame(rows, columns=["what", "a", "b"])


def _settings_text(content: Mapping[str, Any]) -> dict[str, str]:
    settings = {key: str(content[key]) for key in ("model", "seed", "bound")}
    settings["protocol"] = str(content["protocol"]["name"])
    for direction, choice in choices_of(content).items():
        settings[f"choice {direction}"] = f"layer {choice['layer']}, multiplier {choice['multiplier']}"
    for row in content["summary"]:
        settings[f"seeds of {ArmLabel(row['arm'], row['direction'])}"] = _listed(row["seeds"])
    return settings | {f"version of {package}": str(version) for package, version in content["versions"].items()}


def _summary_text(rows: pd.DataFrame) -> str:
    table = pd.DataFrame(
        {
            **{key: rows[key] for key in _KEY},
            "n": rows["n"],
            "a": rows["a_mean"].map(number),
            "b": rows["b_mean"].map(number),
            "b - a": [estimate(*row) for row in rows[["difference", "low", "high"]].to_numpy(float)],
            "p (Holm)": [p_value(p).removeprefix("= ") for p in rows["p_holm"]],
            "verdict": rows["verdict"],
        }
    )
    return table.to_string(index=False)


def _span(values: pd.Series) -> str:
    low, high = f"{values.min():.2g}", f"{values.max():.2g}"
    return low if low == high else f"{low} to {high}"


def _sizes(rows: pd.DataFrame) -> str:
    low, high = rows["n"].min(), rows["n"].max()
    return f"{low}" if low == high else f"{low} to {high}"


def _listed(seeds: Sequence[Any]) -> str:
    return ", ".join(map(str, seeds))
