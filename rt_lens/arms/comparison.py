"""Any number of arms x tasks x scorers, measured in one go: one table of scores, from which all others follow.

Each arm is applied once. What its tasks read is measured once for all scorers; these run after the arm is reverted, so
that a judge may be the untuned model itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Float

from rt_lens.arms.intervention import Intervention, Interventions, applied, each_of
from rt_lens.common.progress import Bar
from rt_lens.common.statistics.comparisons import holm, paired_comparison
from rt_lens.common.statistics.intervals import Interval, crossed_interval, ratio_interval, share_interval
from rt_lens.data.questions import Answer
from rt_lens.evaluation.answering import ask, response_text
from rt_lens.evaluation.scorers import is_share
from rt_lens.evaluation.tasks import EvalTask
from rt_lens.evaluation.texts import PerplexityResult, Scored, perplexity, scored_list
from rt_lens.models.prompts import SharedBelow
from rt_lens.models.protocol import Model

ArmLike: TypeAlias = Interventions | Mapping[int, Interventions]
"""What acts in an arm: an Intervention, several in a tuple, or {tuning seed: one of these}."""

_LABEL = ["arm", "direction"]
_CELL = [*_LABEL, "set", "scorer"]


class ArmEvaluator:
    """Measures one arm after the other, and keeps scores only: a delta can be forgotten once it was measured.

    Args:
        model: the untuned model.
        tasks: set name -> EvalTask.
        texts: for perplexity and KL; none measures neither.
        seed: seed for the bootstraps.
        batch_size: texts per batch.

    Attributes:
        rows: what was measured: `scores`, `texts` and `answers`, as in ArmScores. Rows of an earlier process can be
            added.

    Example:
        >>> evaluator = ArmEvaluator(model, {"test": EvalTask(prompts, max_new_tokens=4)}, texts)
        >>> evaluator.measure("untuned")
        >>> evaluator.measure("rep_tuned", delta, direction="away", seed=0)
        >>> evaluator.scores().summary()[["arm", "direction", "n"]].values.tolist()
        [['untuned', 'none', 2], ['rep_tuned', 'away', 2]]
    """

    def __init__(
        self,
        model: Model,
        tasks: Mapping[str, EvalTask],
        texts: Iterable[Scored] = (),
        *,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        if not isinstance(tasks, Mapping) or not tasks:
            raise ValueError(
                "tasks must map at least one name to an EvalTask, got none. Try {'test': EvalTask(prompts)}."
            )
        self.model, self.tasks, self.seed, self.batch_size = model, dict(tasks), seed, batch_size
        self.texts = scored_list(texts, "texts", none=True)
        self.rows: dict[str, list[dict[str, Any]]] = {"scores": [], "texts": [], "answers": []}
        self._baseline: dict[str, list[Answer]] = {}
        self._reference: PerplexityResult | None = None
        self._shared = SharedBelow(model)  # the blocks below what an arm changes read the same texts in all arms

    def measure(
        self,
        arm: str,
        *interventions: Intervention,
        direction: str = "none",
        seed: int = 0,
        only: Iterable[str] | None = None,
    ) -> None:
        """Applies an arm, asks everything, reverts it, and scores. KL and pairwise judges refer to the first arm.

        Args:
            arm: its name.
            interventions: applied in order.
            direction: which way it goes.
            seed: tuning seed.
            only: names of the sets to ask. Defaults to all. The first arm is asked all.

        Raises:
            ValueError: if this arm was measured with this direction and seed before.
        """
        label = {"arm": arm, "direction": direction, "seed": seed}
        if any(label.items() <= row.items() for row in self.rows["scores"]):
            raise ValueError(f"arm {arm!r} ({direction}, seed {seed}) was already measured. Choose a different name.")
        answers: dict[str, list[Answer]] = {}
        asked = set(self.tasks) if only is None or not self._baseline else set(only)
        with self._shared, applied(self.model, *interventions):
            for name, task in self.tasks.items():
                if name not in asked:
                    continue
                answers[name] = ask(
                    self.model, task.asked, {scorer.reads for scorer in task.made}, seed=self.seed,
                    max_new_tokens=task.max_new_tokens, batch_size=self.batch_size,
                )  # fmt: skip
            perplexities = self._perplexity() if self.texts else None
        self._baseline = self._baseline or answers
        for name, of_task in answers.items():
            self._score(label, name, of_task)
        if perplexities is not None:
            self._keep_texts(label, perplexities)

    @property
    def baseline(self) -> Mapping[str, Sequence[Answer]]:
        """Set name -> the answers of the first arm."""
        return self._baseline

    def scores(self) -> ArmScores:
        """What was measured so far.

        Raises:
            ValueError: if nothing was.
        """
        if not self.rows["scores"]:
            raise ValueError("scores needs at least one measured arm, got none. Call measure first.")
        texts = pd.DataFrame(self.rows["texts"], columns=[*_LABEL, "seed", "text", "tokens", "nll", "kl"])
        shares = frozenset(scorer.name for task in self.tasks.values() for scorer in task.made if is_share(scorer))
        return ArmScores(pd.DataFrame(self.rows["scores"]), texts, list(self.rows["answers"]), self.seed, shares)

    def _perplexity(self) -> PerplexityResult:
        first = self._reference is None
        result = perplexity(self.model, self.texts, reference=self._reference, keep=first, seed=self.seed)
        if first:
            self._reference = result
        return result

    def _keep_texts(self, label: Mapping[str, Any], result: PerplexityResult) -> None:
        kl = np.zeros(len(result.nll)) if result is self._reference else result.kl
        assert kl is not None
        for text, (tokens, nll, divergence) in enumerate(zip(result.sizes, result.nll, kl, strict=True)):
            row = {"text": text, "tokens": int(tokens), "nll": float(nll), "kl": float(divergence)}
            self.rows["texts"].append({**label, **row})

    def _score(self, label: Mapping[str, Any], name: str, answers: Sequence[Answer]) -> None:
        baseline = zip(answers, self._baseline[name], strict=True)
        answers = [replace(answer, baseline=untouched.text) for answer, untouched in baseline]
        scorers = self.tasks[name].made
        scores = {scorer.name: [float(score) for score in scorer(answers)] for scorer in scorers}
        for item, answer in enumerate(answers):
            cell = {**label, "set": name, "item": item, "category": answer.question.category}
            self.rows["answers"].append(
                {**label, "set": name, "prompt": answer.question.prompt, "response": response_text(answer, *scorers),
                 **{scorer: of_scorer[item] for scorer, of_scorer in scores.items()}}
            )  # fmt: skip
            self.rows["scores"] += [
                {**cell, "scorer": scorer, "score": of_scorer[item]} for scorer, of_scorer in scores.items()
            ]


@dataclass(frozen=True)
class ArmScores:
    """The scores of all arms, and the tables made from them.

    Attributes:
        scores: a row per arm, direction, seed, set, scorer and item: with category and score.
        texts: a row per arm, direction, seed and text: tokens, nll and kl, both in nats summed over its tokens.
        answers: a dictionary per arm, direction, seed, set and item: prompt, response, and each scorer's number.
        seed: seed for the bootstraps.
        shares: names of the scorers that give 0 or 1.

    Example:
        >>> arms = {"untuned": None, "steered": add(vectors, [21], -2.0)}
        >>> scores = compare_arms(model, arms, EvalTask(prompts, len, 4), progress=False)
        >>> scores.comparisons()[["a", "b", "scorer", "n"]].values.tolist()
        [['steered', 'untuned', 'len', 2]]
    """

    scores: pd.DataFrame
    texts: pd.DataFrame
    answers: list[dict[str, Any]] = field(repr=False)
    seed: int
    shares: frozenset[str] = frozenset()

    def summary(self, by: Sequence[str] = ()) -> pd.DataFrame:
        """A row per arm, direction, set and scorer: n, mean, low, high, seeds, and perplexity and KL of the arm.

        Intervals of 95 % are over items, and over tuning seeds too where there are several; shares have Wilson's.

        Args:
            by: further columns of `scores` to keep apart, such as `category`.
        """
        side_effects = self._side_effects()
        rows = []
        for cell, scores in self.scores.groupby([*_CELL, *by], sort=False):
            interval = self.interval(matrix(scores), share=cell[3] in self.shares)
            row = dict(zip([*_CELL, *by], cell, strict=True)) | interval._asdict()
            seeds = sorted(scores["seed"].unique().tolist())
            rows.append({**row, "seeds": seeds, **side_effects.get((row["arm"], row["direction"]), {})})
        return pd.DataFrame(rows)

    def interval(self, values: Float[np.ndarray, "seed item"], *, share: bool = False) -> Interval:
        """Mean over seeds and items with its 95 % interval.

        Args:
            values: a row for each tuning seed.
            share: whether they are 0 or 1: then Wilson's interval, where the seeds do not differ.
        """
        if share and (values == values[0]).all() and set(np.unique(values)) <= {0.0, 1.0}:
            return share_interval(int(values[0].sum()), values.shape[1])
        interval = crossed_interval(values, self.seed)
        # Over several seeds it is a t-interval, which knows no bounds.
        return interval._replace(low=max(interval.low, 0.0), high=min(interval.high, 1.0)) if share else interval

    def comparisons(
        self,
        pairs: Iterable[tuple[tuple[str, str], tuple[str, str]]] | None = None,
        of: Iterable[tuple[str, str]] | None = None,
    ) -> pd.DataFrame:
        """Paired differences, first arm minus second; p as it is, and by Holm over all rows of this table.

        Holm's correction starts from p-values that allow for few tuning seeds (`paired_comparison`, cautious). Where
        both arms have several tuning seeds, each seed is compared with the same seed.

        Args:
            pairs: pairs of (arm, direction). Defaults to every arm against the first one.
            of: (set, scorer) pairs to compare. Defaults to all. Holm's correction grows with the number of rows, so
                name only those that you need.

        Returns:
            Columns a, a_direction, b, b_direction, set, scorer, n, difference, low, high, p, test, p_holm, seeds.
        """
        if pairs is None:
            first, *others = self.scores[_LABEL].drop_duplicates().itertuples(index=False, name=None)
            pairs = [(other, first) for other in others]
        rows, cautious, compared = [], [], None if of is None else set(of)
        for a, b in pairs:
            for (name, scorer), scores in self.scores.groupby(["set", "scorer"], sort=False):
                of_a, of_b = (self._cell(scores, label) for label in (a, b))
                if not len(of_a) or not len(of_b) or (compared is not None and (name, scorer) not in compared):
                    continue
                values_a, values_b, seeds = _matched(of_a, of_b)
                comparison = paired_comparison(values_a, values_b, seed=self.seed)
                seeded = values_a.ndim + values_b.ndim > 2  # without seeds there are no degrees of freedom to allow for
                cautious.append(
                    paired_comparison(values_a, values_b, self.seed, cautious=True).p if seeded else comparison.p
                )
                cell = {"a": a[0], "a_direction": a[1], "b": b[0], "b_direction": b[1], "set": name, "scorer": scorer}
                rows.append({**cell, **comparison._asdict(), "seeds": seeds})
        table = pd.DataFrame(rows)
        return table.assign(p_holm=holm(cautious)) if len(table) else table

    def pareto(self, name: str, scorer: str, *, higher: bool = True) -> pd.DataFrame:
        """Effect against side effect: summary rows of one set and scorer, and whether no arm beats a row on both.

        Args:
            name: of the set.
            scorer: its name.
            higher: whether a higher score is better.

        Returns:
            The summary's columns and `efficient`: no other row has a score at least as good and a KL at most as large,
            one of them strictly.

        Raises:
            ValueError: unknown set or scorer, or no texts were measured.
        """
        table = self.summary()
        known = sorted(set(zip(table["set"], table["scorer"], strict=True)))
        rows = table[(table["set"] == name) & (table["scorer"] == scorer)]
        if not len(rows):
            raise ValueError(f"name and scorer must be one of {known}, got ({name!r}, {scorer!r}).")
        if "kl" not in rows:
            raise ValueError("pareto needs the KL of each arm, got none. Give compare_arms texts=neutral_paragraphs().")
        sign, points = 1 if higher else -1, list(zip(rows["mean"], rows["kl"], strict=True))
        beaten = [any(beats(sign * (other - mean), kl - less) for other, less in points) for mean, kl in points]
        return rows.assign(efficient=~np.asarray(beaten)).reset_index(drop=True)

    def _cell(self, scores: pd.DataFrame, label: tuple[str, str]) -> pd.DataFrame:
        return scores[(scores["arm"] == label[0]) & (scores["direction"] == label[1])]

    def _side_effects(self) -> dict[tuple[Any, ...], dict[str, Any]]:
        """Perplexity, and KL in nats per token, of each arm; intervals over texts, and seeds where there are more."""
        by_arm = {}
        for label, rows in self.texts.groupby(_LABEL, sort=False):
            nll, kl, sizes = (
                rows.pivot(index="seed", columns="text", values=name).to_numpy(float)
                for name in ("nll", "kl", "tokens")
            )
            loss, divergence = (ratio_interval(totals, sizes[0], self.seed) for totals in (nll, kl))
            per_token = Interval(loss.n, *(math.exp(value) for value in loss[1:]))
            by_arm[label] = {**_columns("perplexity", per_token), **_columns("kl", divergence), "n_texts": loss.n}
        return by_arm


def beats(gain: float, saved: float) -> bool:
    """Whether a gain in score and a saving in side effect is no loss on either, and an improvement on one."""
    return gain >= 0 and saved >= 0 and (gain > 0 or saved > 0)


def compare_arms(
    model: Model,
    arms: Mapping[str, ArmLike],
    tasks: Mapping[str, EvalTask] | EvalTask,
    *,
    texts: Iterable[Scored] = (),
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> ArmScores:
    """Measures any number of arms on any number of tasks.

    Args:
        model: the untuned model.
        arms: name -> Intervention, a tuple of them, or {tuning seed: one of these}. KL, pairwise judges and the default
            comparisons refer to the first arm, usually `"untuned": None`.
        tasks: set name -> EvalTask; a single EvalTask is named `test`.
        texts: neutral texts for perplexity and KL.
        seed: seed for the bootstraps.
        batch_size: texts per batch.
        progress: show a bar.

    Raises:
        ValueError: for no arm, no task, or an arm that is no Intervention.

    Example:
        >>> arms = {"untuned": None, "steered": add(vectors, [21], -2.0), "tuned": {0: delta}}
        >>> scores = compare_arms(model, arms, EvalTask(prompts, max_new_tokens=4), texts=texts, progress=False)
        >>> scores.summary()[["arm", "set", "scorer", "n"]].values.tolist()
        [['untuned', 'test', 'vader', 2], ['steered', 'test', 'vader', 2], ['tuned', 'test', 'vader', 2]]
    """
    if not isinstance(arms, Mapping) or not arms:
        raise ValueError(
            "arms must map at least one name to an intervention, got none. Try {'untuned': None, 'tuned': delta}."
        )
    tasks = {"test": tasks} if isinstance(tasks, EvalTask) else tasks
    evaluator = ArmEvaluator(model, tasks, texts, seed=seed, batch_size=batch_size)
    runs = [
        (name, tuning_seed, of_seed)
        for name, arm in arms.items()
        for tuning_seed, of_seed in (arm.items() if isinstance(arm, Mapping) else [(0, arm)])
    ]
    with Bar(runs, desc="arms", disable=not progress) as bar:
        for name, tuning_seed, arm in bar:
            bar.set_postfix(arm=name, seed=tuning_seed)
            evaluator.measure(name, *each_of(arm), seed=tuning_seed)
    return evaluator.scores()


def matrix(scores: pd.DataFrame) -> Float[np.ndarray, "seed item"]:
    """The scores of one arm, set and scorer, a row for each tuning seed."""
    return scores.pivot(index="seed", columns="item", values="score").to_numpy(float)


def _matched(a: pd.DataFrame, b: pd.DataFrame) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."], list[int]]:
    """The scores of two arms at the seeds that both have; an arm with a single seed is compared with every seed."""
    seeds_a, seeds_b = set(a["seed"]), set(b["seed"])
    if min(len(seeds_a), len(seeds_b)) > 1 and seeds_a != seeds_b:
        if not seeds_a & seeds_b:
            raise ValueError(
                f"arms must share tuning seeds to be compared, got {sorted(seeds_a)} and {sorted(seeds_b)}. Measure "
                "both with the same seeds."
            )
        a, b = (side[side["seed"].isin(seeds_a & seeds_b)] for side in (a, b))
    first, second = (matrix(side) for side in (a, b))
    seeds = sorted(set(a["seed"]) if len(first) >= len(second) else set(b["seed"]))
    return (first[0] if len(first) == 1 else first), (second[0] if len(second) == 1 else second), seeds


def _columns(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
