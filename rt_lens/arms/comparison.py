"""Any number of arms x exams x scorers, measured in one go: one table of scores, from which all others follow.

Each arm is put on once. What its exams read is measured once for all scorers; these are asked when the arm is off
again, so that a judge may be the untuned model itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Float

from rt_lens.arms.intervention import Intervention, applied
from rt_lens.common.inputs import text_list
from rt_lens.common.progress import Bar
from rt_lens.common.statistics.comparisons import holm, paired_comparison
from rt_lens.common.statistics.intervals import Interval, crossed_interval, ratio_interval, share_interval
from rt_lens.data.questions import Answer, Asked, Question, as_questions
from rt_lens.evaluation.answering import ask, response_text
from rt_lens.evaluation.registry import ScorerLike, make_scorer
from rt_lens.evaluation.scorers import Scorer, is_share
from rt_lens.evaluation.texts import PerplexityResult, perplexity
from rt_lens.models.protocol import Model

ArmLike: TypeAlias = Intervention | tuple[Intervention, ...] | Mapping[int, Intervention | tuple[Intervention, ...]]
"""What an arm puts on: a WeightDelta, hooks, None, several of them in a tuple, or one of these for each tuning seed."""

_LABEL = ["arm", "direction"]
_ABOUT = (*_LABEL, "seed", "set", "prompt", "response")
_CELL = [*_LABEL, "set", "scorer"]


@dataclass(frozen=True)
class EvalTask:
    """Questions, and how their answers are scored.

    Attributes:
        questions: prompts, questions, or pairs (each topic once).
        scorers: names, tables, functions or Scorers; the first is the one that figures show.
        max_new_tokens: length of what is written, where a scorer reads text.

    Example:
        >>> EvalTask(load_questions("capitals"), ["names_right", {"kind": "likelihood", "measure": "accuracy"}])
    """

    questions: Asked
    scorers: Sequence[ScorerLike] = ("vader",)
    max_new_tokens: int = 24

    def __post_init__(self) -> None:
        if isinstance(self.scorers, str | Mapping) or not self.scorers:
            raise ValueError(f"scorers: {self.scorers!r} came; a list of at least one is wanted.")
        object.__setattr__(self, "questions", tuple(as_questions(self.questions)))
        object.__setattr__(self, "scorers", tuple(make_scorer(scorer) for scorer in self.scorers))
        names = [scorer.name for scorer in self.made]
        if len({*names, *_ABOUT}) < len(names) + len(_ABOUT):
            raise ValueError(
                f"scorers: {', '.join(names)} came; each wants a name of its own, and none of {', '.join(_ABOUT)}."
            )

    @property
    def made(self) -> tuple[Scorer, ...]:
        """The scorers, made."""
        return self.scorers  # type: ignore[return-value]

    @property
    def asked(self) -> tuple[Question, ...]:
        """The questions, made."""
        return self.questions  # type: ignore[return-value]


class ArmEvaluator:
    """Measures one arm after the other, and keeps scores only: a delta can be forgotten once it was measured.

    Args:
        model: the untuned model.
        exams: set name -> exam.
        texts: for perplexity and KL; none measures neither.
        seed: of the bootstraps.
        batch_size: texts per batch.

    Example:
        >>> board = ArmEvaluator(model, {"test": EvalTask(test)}, neutral_paragraphs())
        >>> board.measure("untuned")
        >>> board.measure("rep_tuned", delta, direction="away", seed=0)
        >>> print(board.scoreboard().summary())
    """

    def __init__(
        self,
        model: Model,
        exams: Mapping[str, EvalTask],
        texts: Iterable[str] = (),
        *,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        if not isinstance(exams, Mapping) or not exams:
            raise ValueError("exams: none came. Give at least one, as in {'test': EvalTask(prompts)}.")
        self.model, self.exams, self.seed, self.batch_size = model, dict(exams), seed, batch_size
        self.texts = text_list(texts, "texts", blank=True, none=True)
        self._scores: list[dict[str, Any]] = []
        self._texts: list[dict[str, Any]] = []
        self._answers: list[dict[str, Any]] = []
        self._baseline: dict[str, list[Answer]] = {}
        self._reference: PerplexityResult | None = None

    def measure(self, arm: str, *worn: Intervention, direction: str = "none", seed: int = 0) -> None:
        """Puts an arm on, asks everything, takes it off, and scores. The first arm is what KL and pairs refer to.

        Raises:
            ValueError: if this arm was measured with this direction and seed before.
        """
        label = {"arm": arm, "direction": direction, "seed": seed}
        if any(label.items() <= row.items() for row in self._scores):
            raise ValueError(f"arms: {arm}, {direction}, seed {seed} was measured already. Give it another name.")
        answers: dict[str, list[Answer]] = {}
        with applied(self.model, *worn):
            for name, exam in self.exams.items():
                answers[name] = ask(
                    self.model, exam.asked, {scorer.reads for scorer in exam.made}, seed=self.seed,
                    max_new_tokens=exam.max_new_tokens, batch_size=self.batch_size,
                )  # fmt: skip
            fit = self._fit() if self.texts else None
        self._baseline = self._baseline or answers
        for name, given in answers.items():
            self._score(label, name, given)
        if fit is not None:
            self._keep_fit(label, fit)

    def scoreboard(self) -> ArmScores:
        """What was measured so far.

        Raises:
            ValueError: if nothing was.
        """
        if not self._scores:
            raise ValueError("arms: none was measured yet. Call measure first.")
        texts = pd.DataFrame(self._texts, columns=[*_LABEL, "seed", "text", "tokens", "nll", "kl"])
        shares = frozenset(scorer.name for exam in self.exams.values() for scorer in exam.made if is_share(scorer))
        return ArmScores(pd.DataFrame(self._scores), texts, list(self._answers), self.seed, shares)

    def _fit(self) -> PerplexityResult:
        first = self._reference is None
        fit = perplexity(self.model, self.texts, reference=self._reference, keep=first, seed=self.seed)
        if first:
            self._reference = fit
        return fit

    def _keep_fit(self, label: Mapping[str, Any], fit: PerplexityResult) -> None:
        kl = np.zeros(len(fit.nll)) if fit is self._reference else fit.kl
        assert kl is not None
        for text, (tokens, nll, divergence) in enumerate(zip(fit.sizes, fit.nll, kl, strict=True)):
            row = {"text": text, "tokens": int(tokens), "nll": float(nll), "kl": float(divergence)}
            self._texts.append({**label, **row})

    def _score(self, label: Mapping[str, Any], name: str, given: Sequence[Answer]) -> None:
        first = self._baseline[name]
        answers = [replace(each, baseline=theirs.text) for each, theirs in zip(given, first, strict=True)]
        scored = {scorer.name: [float(score) for score in scorer(answers)] for scorer in self.exams[name].made}
        made = self.exams[name].made
        for item, answer in enumerate(answers):
            about = {**label, "set": name, "item": item, "category": answer.question.category}
            self._answers.append(
                {**label, "set": name, "prompt": answer.question.prompt, "response": response_text(answer, *made),
                 **{scorer: scores[item] for scorer, scores in scored.items()}}
            )  # fmt: skip
            self._scores += [{**about, "scorer": scorer, "score": scores[item]} for scorer, scores in scored.items()]


@dataclass(frozen=True)
class ArmScores:
    """What arms scored.

    Attributes:
        scores: a row per arm, direction, seed, set, scorer and item: with category and score.
        texts: a row per arm, direction, seed and text: tokens, nll and kl, both in nats summed over its tokens.
        answers: a dictionary per arm, direction, seed, set and item: prompt, response, and each scorer's number.
        seed: of the bootstraps.
        shares: names of the scorers that give 0 or 1.
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
        damage = self._damage()
        rows = []
        for cell, scores in self.scores.groupby([*_CELL, *by], sort=False):
            found = self.interval(matrix(scores), share=cell[3] in self.shares)
            row = dict(zip([*_CELL, *by], cell, strict=True)) | found._asdict()
            seeds = sorted(scores["seed"].unique().tolist())
            rows.append({**row, "seeds": seeds, **damage.get((row["arm"], row["direction"]), {})})
        return pd.DataFrame(rows)

    def interval(self, values: Float[np.ndarray, "seed item"], *, share: bool = False) -> Interval:
        """Mean over seeds and items with its 95 % interval.

        Args:
            values: a row for each tuning seed.
            share: whether they are 0 or 1: then Wilson's interval, where the seeds do not differ.
        """
        if share and (values == values[0]).all() and set(np.unique(values)) <= {0.0, 1.0}:
            return share_interval(int(values[0].sum()), values.shape[1])
        found = crossed_interval(values, self.seed)
        # Over several seeds it is a t-interval, which knows no bounds.
        return found._replace(low=max(found.low, 0.0), high=min(found.high, 1.0)) if share else found

    def comparisons(
        self,
        pairs: Iterable[tuple[tuple[str, str], tuple[str, str]]] | None = None,
        of: Iterable[tuple[str, str]] | None = None,
    ) -> pd.DataFrame:
        """Paired differences, first arm minus second; p as it is, and by Holm over all rows of this table.

        Holm's starts from p-values that are careful with few tuning seeds (`paired_comparison`, cautious). Where both
        arms have several tuning seeds, seed stands against the same seed.

        Args:
            pairs: of (arm, direction); every arm against the first one for None.
            of: set and scorer of what is compared; all for None. Ask for what you want to know only: the more rows,
                the more Holm's correction takes.

        Returns:
            Columns a, a_direction, b, b_direction, set, scorer, n, difference, low, high, p, test, p_holm, seeds.
        """
        if pairs is None:
            first, *others = self.scores[_LABEL].drop_duplicates().itertuples(index=False, name=None)
            pairs = [(other, first) for other in others]
        rows, careful, wanted = [], [], None if of is None else set(of)
        for a, b in pairs:
            for (name, scorer), scores in self.scores.groupby(["set", "scorer"], sort=False):
                mine, theirs = (self._cell(scores, label) for label in (a, b))
                if not len(mine) or not len(theirs) or (wanted is not None and (name, scorer) not in wanted):
                    continue
                one, other, seeds = _matched(mine, theirs)
                found = paired_comparison(one, other, seed=self.seed)
                seeded = one.ndim + other.ndim > 2  # else there are no degrees of freedom to be careful with
                careful.append(paired_comparison(one, other, self.seed, cautious=True).p if seeded else found.p)
                about = {"a": a[0], "a_direction": a[1], "b": b[0], "b_direction": b[1], "set": name, "scorer": scorer}
                rows.append({**about, **found._asdict(), "seeds": seeds})
        table = pd.DataFrame(rows)
        return table.assign(p_holm=holm(careful)) if len(table) else table

    def pareto(self, name: str, scorer: str, *, higher: bool = True) -> pd.DataFrame:
        """Effect against side effect: summary rows of one set and scorer, and whether no arm beats a row on both.

        Args:
            name: of the set.
            scorer: its name.
            higher: whether a higher score is wanted.

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
            raise ValueError(f"set, scorer: {name!r}, {scorer!r} came; measured were {known}.")
        if "kl" not in rows:
            raise ValueError("texts: none were measured, so there is no side effect to draw. Give compare_arms texts.")
        sign, each = 1 if higher else -1, list(zip(rows["mean"], rows["kl"], strict=True))
        beaten = [any(beats(sign * (other - mine), kl - less) for other, less in each) for mine, kl in each]
        return rows.assign(efficient=~np.asarray(beaten)).reset_index(drop=True)

    def _cell(self, scores: pd.DataFrame, label: tuple[str, str]) -> pd.DataFrame:
        return scores[(scores["arm"] == label[0]) & (scores["direction"] == label[1])]

    def _damage(self) -> dict[tuple[Any, ...], dict[str, Any]]:
        """Perplexity, and KL in nats per token, of each arm; intervals over texts, and seeds where there are more."""
        found = {}
        for label, rows in self.texts.groupby(_LABEL, sort=False):
            nll, kl, sizes = (
                rows.pivot(index="seed", columns="text", values=name).to_numpy(float)
                for name in ("nll", "kl", "tokens")
            )
            loss, divergence = (ratio_interval(totals, sizes[0], self.seed) for totals in (nll, kl))
            perplexity = Interval(loss.n, *(math.exp(value) for value in loss[1:]))
            found[label] = {**_named("perplexity", perplexity), **_named("kl", divergence), "n_texts": loss.n}
        return found


def beats(gain: float, saved: float) -> bool:
    """Whether so much more score at so much less harm is at least as good on both, and better on one."""
    return gain >= 0 and saved >= 0 and (gain > 0 or saved > 0)


def compare_arms(
    model: Model,
    arms: Mapping[str, ArmLike],
    exams: Mapping[str, EvalTask],
    *,
    texts: Iterable[str] = (),
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> ArmScores:
    """Any number of arms on any number of exams.

    Args:
        model: the untuned model.
        arms: name -> WeightDelta, hooks, None, a tuple of them, or {tuning seed: one of these}. KL, judges of pairs and
            the default comparisons refer to the first arm, usually `"untuned": None`.
        exams: set name -> EvalTask.
        texts: for perplexity and KL.
        seed: of the bootstraps.
        batch_size: texts per batch.
        progress: show a bar.

    Raises:
        ValueError: no arm, no exam, or an arm that is something else.

    Example:
        >>> arms = {"untuned": None, "steered": add(vectors, [21], -2.0), "tuned": {0: first, 1: second}}
        >>> board = compare_arms(model, arms, {"test": EvalTask(test)}, texts=neutral_paragraphs())
        >>> print(board.summary(), board.comparisons())
    """
    if not isinstance(arms, Mapping) or not arms:
        raise ValueError("arms: none came. Give at least one, as in {'untuned': None, 'tuned': delta}.")
    board = ArmEvaluator(model, exams, texts, seed=seed, batch_size=batch_size)
    each = [
        (name, tuning_seed, one)
        for name, worn in arms.items()
        for tuning_seed, one in (worn.items() if isinstance(worn, Mapping) else [(0, worn)])
    ]
    with Bar(each, desc="arms", disable=not progress) as bar:
        for name, tuning_seed, one in bar:
            bar.set_postfix(arm=name, seed=tuning_seed)
            board.measure(name, *(one if _several(one) else (one,)), seed=tuning_seed)  # type: ignore[misc]
    return board.scoreboard()


def _several(worn: Any) -> bool:
    """Whether a tuple is of arms, and not of hooks, which are pairs of a name and a function."""
    return isinstance(worn, tuple) and not all(isinstance(each, tuple) for each in worn)


def matrix(scores: pd.DataFrame) -> Float[np.ndarray, "seed item"]:
    """The scores of one arm, set and scorer, a row for each tuning seed."""
    return scores.pivot(index="seed", columns="item", values="score").to_numpy(float)


def _matched(a: pd.DataFrame, b: pd.DataFrame) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."], list[int]]:
    """The scores of two arms, by the seeds that both have; one without seeds of its own stands against each."""
    mine, theirs = set(a["seed"]), set(b["seed"])
    if min(len(mine), len(theirs)) > 1 and mine != theirs:
        if not mine & theirs:
            raise ValueError(f"arms: tuning seeds {sorted(mine)} and {sorted(theirs)} have none in common to pair by.")
        a, b = (side[side["seed"].isin(mine & theirs)] for side in (a, b))
    first, second = (matrix(side) for side in (a, b))
    seeds = sorted(set(a["seed"]) if len(first) >= len(second) else set(b["seed"]))
    return (first[0] if len(first) == 1 else first), (second[0] if len(second) == 1 else second), seeds


def _named(name: str, found: Interval) -> dict[str, float]:
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
