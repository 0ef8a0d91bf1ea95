"""Arms at equal damage: each at the strengths whose KL is one of some budgets, and what it then does to a behaviour."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from rt_lens.arms.calibration import Calibrated, KLMeter, calibrate, has_strength, scaled
from rt_lens.arms.comparison import ArmEvaluator, ArmLike, ArmScores
from rt_lens.arms.intervention import Interventions, each_of
from rt_lens.common.arm_labels import ArmLabel
from rt_lens.common.progress import Bar
from rt_lens.common.statistics.intervals import Interval
from rt_lens.data.questions import Answer
from rt_lens.evaluation.tasks import EvalTask
from rt_lens.evaluation.texts import Response, Scored, scored_list
from rt_lens.models.protocol import Model

UNTUNED = "untuned"
N_OWN = 24
"""Untuned responses to the first set's prompts on which KL is reported, at most."""
BUDGETS = (0.003, 0.01, 0.03, 0.1)
"""KL from the untuned model in nats per token: from hardly measurable to plainly another model."""


@dataclass(frozen=True)
class KLCurves:
    """The scores of arms at equal damage.

    Attributes:
        scores: of the untuned model, of each arm at each budget, as the arm `name at KL budget`, and of arms without a
            strength, by their name.
        strengths: a row per arm, direction, seed and budget: strength, kl, kl_low, kl_high (on the calibration's
            texts), n_texts; own_kl, own_kl_low, own_kl_high, n_own (on the untuned responses to the first 24 prompts
            of the first set); reason (empty where the budget was reached; else all these are empty). An arm without a
            strength has one row, without a budget.

    Example:
        >>> arms = {"steered, away": add(vectors, [21], -1.0), "rep_tuned, away": {0: delta}}
        >>> curves = compare_at_kl(
        ...     model, arms, EvalTask(prompts, max_new_tokens=4), [0.01], calibration=texts, texts=neutral,
        ...     progress=False,
        ... )
        >>> curves.table()[["arm", "direction", "budget", "n"]].values.tolist()
        [['untuned', 'none', nan, 2], ['steered', 'away', 0.01, 2], ['rep_tuned', 'away', 0.01, 2]]
    """

    scores: ArmScores = field(repr=False)
    strengths: pd.DataFrame

    def table(self, name: str | None = None, scorer: str | None = None) -> pd.DataFrame:
        """A row per arm, direction and budget that every seed reached; the untuned model first.

        An arm without a strength has one row, without a budget. `plots.effect_at_kl` draws the table.

        Args:
            name: of the set. Defaults to the first.
            scorer: its name. Defaults to the set's first.

        Returns:
            The columns of `ArmScores.summary`, and budget (NaN for the untuned model, and for an arm without a
            strength). `kl` is the KL reached on texts that the calibration has not seen, `own_kl` that on `n_own`
            untuned responses to the behaviour's prompts (mean over seeds; NaN where there are none).

        Raises:
            ValueError: for an unknown set or scorer.
        """
        summary = self.summary()
        known = list(dict.fromkeys(zip(summary["set"], summary["scorer"], strict=True)))
        wanted = [(a, b) for a, b in known if name in (None, a) and scorer in (None, b)]
        if not wanted:
            raise ValueError(f"name and scorer must be one of {known}, got ({name!r}, {scorer!r}).")
        of_it = (summary["set"] == wanted[0][0]) & (summary["scorer"] == wanted[0][1])
        return summary[of_it].reset_index(drop=True)

    def summary(self) -> pd.DataFrame:
        """The rows of `table` of all sets and scorers, side effects too."""
        rows = self.scores.summary()
        parts = [_parsed(arm) for arm in rows["arm"]]
        rows = rows.assign(arm=[arm for arm, _ in parts], budget=[budget for _, budget in parts])
        missed = set(self.gaps[_CELL].itertuples(index=False, name=None))
        kept = [cell not in missed for cell in rows[_CELL].itertuples(index=False, name=None)]
        own = self.strengths.groupby(_CELL, dropna=False)[["own_kl", "n_own"]].mean().reset_index()
        return rows[kept].merge(own, on=_CELL, how="left")

    def at(self, budget: float, *, same: bool = True) -> ArmScores:
        """The scores at one budget, by the arms' own names.

        An arm that does not reach the budget with every seed is left out.

        Args:
            budget: one of those measured; any, where no arm has a strength.
            same: with what is the same at every budget: the untuned model, and the arms without a strength.

        Raises:
            ValueError: for a budget that was not measured.
        """
        self._check(budget)
        missed = set(self.gaps[_CELL].itertuples(index=False, name=None))

        def here(arm: str, direction: str) -> bool:
            name, its = _parsed(arm)
            return (same and math.isnan(its)) or (its == budget and (name, direction, budget) not in missed)

        def of(table: pd.DataFrame) -> pd.DataFrame:
            kept = table[[here(*cell) for cell in zip(table["arm"], table["direction"], strict=True)]]
            return kept.assign(arm=[_parsed(arm)[0] for arm in kept["arm"]]).reset_index(drop=True)

        kept = [row for row in self.scores.answers if here(row["arm"], row["direction"])]
        answers = [{**row, "arm": _parsed(row["arm"])[0]} for row in kept]
        return replace(self.scores, scores=of(self.scores.scores), texts=of(self.scores.texts), answers=answers)

    @property
    def gaps(self) -> pd.DataFrame:
        """The rows of `strengths` whose budget was not reached."""
        return self.strengths[self.strengths["reason"] != ""].reset_index(drop=True)

    def comparisons(self, budget: float, against: Sequence[str], of: tuple[str, str] | None = None) -> pd.DataFrame:
        """Paired differences at one budget: every arm minus each of those named, in the same direction.

        State budget, arms and set before you look: Holm's correction is over this table alone.

        Args:
            budget: one of those measured.
            against: names of arms, such as `["rep_tuned", "untuned"]`. Two of them are compared once.
            of: (set, scorer). Defaults to the first.

        Returns:
            The columns of `ArmScores.comparisons`, and budget. An arm that has not reached it has no row.

        Raises:
            ValueError: for a budget or arm that was not measured.
        """
        self._check(budget)
        table = self.table(*(of or (None, None)))
        arms = list(dict.fromkeys([UNTUNED, *self.strengths["arm"]]))
        if unknown := [arm for arm in against if arm not in arms]:
            raise ValueError(f"against must name arms of {', '.join(arms)}, got {unknown[0]!r}.")
        reached = table[table["budget"] == budget]
        labels = list(zip(reached["arm"], reached["direction"], strict=True))
        pairs = []
        for number, other in enumerate(against):
            for arm, direction in labels:
                base = (other, "none" if other == UNTUNED else direction)
                if arm not in (other, *against[:number]) and base in [(UNTUNED, "none"), *labels]:
                    pairs.append(((_named(arm, budget), direction), (_named(base[0], budget), base[1])))
        rows = self.scores.comparisons(pairs, [(table["set"].iloc[0], table["scorer"].iloc[0])])
        if rows.empty:
            return rows
        return rows.assign(a=[_parsed(a)[0] for a in rows["a"]], b=[_parsed(b)[0] for b in rows["b"]], budget=budget)

    def _check(self, budget: float) -> None:
        budgets = sorted(self.strengths["budget"].dropna().unique())
        if budgets and budget not in budgets:  # without an arm that has a strength there is no budget to miss
            raise ValueError(f"budget must be one of {', '.join(f'{b:g}' for b in budgets)}, got {budget:g}.")


class KLEvaluator:
    """Measures one arm after the other at the strengths of some budgets; a delta can be forgotten once it was measured.

    Args:
        model: the untuned model, which is measured first, as `untuned`.
        tasks: set name -> EvalTask.
        kl: the budgets, in nats per token.
        calibration: texts that set the strengths. Use them for nothing else.
        texts: other neutral texts, on which the KL reached is reported.
        always: names of the sets that are asked at every budget. Defaults to all.
        stated: the budget at which the others are asked.
        seed: seed for the bootstraps.
        batch_size: texts per batch.

    Example:
        >>> task = EvalTask(prompts, max_new_tokens=4)
        >>> evaluator = KLEvaluator(model, {"test": task}, [0.01], calibration=texts, texts=neutral)
        >>> (found,) = evaluator.measure("rep_tuned, away", delta, seed=3)
        >>> found.reached, evaluator.curves().strengths[["arm", "seed"]].values.tolist()
        (True, [['rep_tuned', 3]])
    """

    def __init__(
        self,
        model: Model,
        tasks: Mapping[str, EvalTask],
        kl: Sequence[float] = BUDGETS,
        *,
        calibration: Iterable[Scored],
        texts: Iterable[Scored],
        always: Collection[str] | None = None,
        stated: float | None = None,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        self.budgets = list(dict.fromkeys(map(float, kl)))
        if not self.budgets:
            raise ValueError("kl must be at least one budget, got none. Try [0.01].")
        calibration, texts = scored_list(calibration, "calibration"), scored_list(texts, "texts")
        if shared := set(calibration) & set(texts):
            text = min(map(str, shared))
            raise ValueError(f"texts must be other texts than those of calibration, got {text[:60]!r} in both.")
        self.always, self.stated = always, stated
        self.evaluator = ArmEvaluator(model, tasks, texts, seed=seed, batch_size=batch_size)
        self.meter = KLMeter(model, calibration, seed=seed)
        self._rows: list[dict[str, Any]] = []
        self.evaluator.measure(UNTUNED)
        self._seen = self._lengths()
        own = standing_alone(next(iter(self.evaluator.baseline.values())))[:N_OWN]
        self.own = KLMeter(model, own, seed=seed) if own else None

    def measure(self, arm: str, interventions: Interventions, seed: int = 0) -> list[Calibrated]:
        """Finds the strengths of an arm and measures it at each; an arm without a strength as it is.

        Args:
            arm: `name, direction`, or a name.
            interventions: at any strength above 0.
            seed: tuning seed.

        Returns:
            A result for each budget; none for an arm without a strength.
        """
        label, parts = ArmLabel.parse(arm), each_of(interventions)
        if not has_strength(interventions):
            self.evaluator.measure(label.arm, *parts, direction=label.direction, seed=seed)
            with_kl = Calibrated(math.nan, math.nan, interventions, self.meter(interventions), None, {})
            self._rows.append(_row(label, seed, with_kl, self._own_kl(interventions)))
            return []
        results = calibrate(parts, self.meter, self.budgets)
        for result in results:
            if result.reached:
                assert isinstance(result.intervention, tuple)
                self.evaluator.measure(
                    _named(label.arm, result.budget), *result.intervention, direction=label.direction, seed=seed,
                    only=None if result.budget == self.stated else self.always,
                )  # fmt: skip
            self._rows.append(_row(label, seed, result, self._own_kl(result.intervention) if result.reached else None))
        return results

    def unavailable(self, arm: str, reason: str, seed: int = 0) -> None:
        """Records that an arm could not be made: a gap at every budget, with the reason."""
        label = ArmLabel.parse(arm)
        gaps = (Calibrated(budget, None, None, None, None, {}, reason) for budget in self.budgets)
        self._rows += [_row(label, seed, gap, None) for gap in gaps]

    def since_last(self) -> dict[str, list[dict[str, Any]]]:
        """The rows measured since the last call (at first, since the untuned model), as JSON can hold them.

        `add` gives them to another evaluator of the same model, tasks and texts: a run that was stopped goes on.
        """
        new = {name: rows[self._seen[name] :] for name, rows in self._all_rows().items()}
        self._seen = self._lengths()
        return new

    def add(self, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Adds what `since_last` gave."""
        for name, own in self._all_rows().items():
            own += [dict(row) for row in rows[name]]
        self._seen = self._lengths()

    def curves(self) -> KLCurves:
        """What was measured so far."""
        return KLCurves(self.evaluator.scores(), pd.DataFrame(self._rows, columns=_STRENGTHS))

    def _all_rows(self) -> dict[str, list[dict[str, Any]]]:
        return {**self.evaluator.rows, "strengths": self._rows}

    def _lengths(self) -> dict[str, int]:
        return {name: len(rows) for name, rows in self._all_rows().items()}

    def _own_kl(self, intervention: Interventions) -> Interval | None:
        return None if self.own is None else self.own(intervention)


def compare_at_kl(
    model: Model,
    arms: Mapping[str, ArmLike],
    tasks: Mapping[str, EvalTask] | EvalTask,
    kl: Sequence[float] = BUDGETS,
    *,
    calibration: Iterable[Scored],
    texts: Iterable[Scored],
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> KLCurves:
    """Measures arms at equal damage: the strength of each is set so that its KL to the untuned model is the budget.

    An arm is scaled as a whole: the multipliers of its edits, the differences of its weights (`scaled`). One without a
    strength, a system prompt, is measured as it is. With several tuning seeds each has its own strength. A budget that
    an arm does not reach with every seed is a gap in its curve, with the reason in `gaps`.

    Args:
        model: the untuned model, which is measured too, as `untuned`.
        arms: `name, direction` (`steered, away`) or name -> Intervention, a tuple of them, or {tuning seed: one of
            these}; at any strength above 0.
        tasks: set name -> EvalTask; a single EvalTask is named `test`.
        kl: the budgets, in nats per token.
        calibration: texts that set the strengths. Use them for nothing else.
        texts: other neutral texts, on which the KL reached is reported.
        seed: seed for the bootstraps.
        batch_size: texts per batch.
        progress: show a bar.

    Raises:
        ValueError: for no arm, an arm named `untuned`, a hook without a multiplier, a text in both lists, or a budget
            that is not above 0.

    Example:
        >>> curves = compare_at_kl(
        ...     model, {"steered, away": add(vectors, [21], -1.0)}, EvalTask(prompts, max_new_tokens=4), [0.003, 0.01],
        ...     calibration=texts, texts=neutral, progress=False,
        ... )
        >>> low, high = curves.strengths["strength"]
        >>> 0 < low < high and curves.gaps.empty
        True
    """
    _check_arms(arms)
    tasks = {"test": tasks} if isinstance(tasks, EvalTask) else tasks
    with Bar(total=len(arms), desc="arms at equal KL", unit="arm", disable=not progress) as bar:
        evaluator = KLEvaluator(
            model, tasks, kl, calibration=calibration, texts=texts, seed=seed, batch_size=batch_size
        )
        for name, arm in arms.items():
            bar.set_postfix(arm=name)
            for number, of_seed in _by_seed(arm).items():
                evaluator.measure(name, of_seed, number)
            bar.update()
    return evaluator.curves()


def _check_arms(arms: Any) -> None:
    if not isinstance(arms, Mapping) or not arms:
        raise ValueError("arms must map at least one name to an intervention, got none. Try {'tuned, away': delta}.")
    if any(ArmLabel.parse(name).arm == UNTUNED for name in arms):
        raise ValueError("arms must not be named 'untuned', which is measured by itself, got one. Leave it out.")
    labels = [ArmLabel.parse(name) for name in arms]
    if repeated := [name for name, label in zip(arms, labels, strict=True) if labels.count(label) > 1]:
        raise ValueError(f"arms must have different names and directions, got {', '.join(repeated)}. Rename one.")
    for arm in arms.values():
        for intervention in _by_seed(arm).values():
            if has_strength(intervention):
                scaled(intervention, 1.0)  # refuses a hook without a multiplier


def _by_seed(arm: ArmLike) -> Mapping[int, Interventions]:
    return arm if isinstance(arm, Mapping) else {0: arm}


def standing_alone(answers: Sequence[Answer]) -> list[Scored]:
    """The responses to prompts that stand alone: without persona, prefill or options."""
    return [
        Response(answer.question.prompt, answer.text)
        for answer in answers
        if answer.text and not (answer.question.system or answer.question.prefill or answer.question.options)
    ]


def _row(label: ArmLabel, seed: int, result: Calibrated, own: Interval | None) -> dict[str, Any]:
    n_texts, kl, low, high = result.kl or (None,) * 4
    n_own, own_kl, own_low, own_high = own or (None,) * 4
    return {
        **label._asdict(), "seed": seed, "budget": result.budget, "strength": result.strength,
        "kl": kl, "kl_low": low, "kl_high": high, "n_texts": n_texts,
        "own_kl": own_kl, "own_kl_low": own_low, "own_kl_high": own_high, "n_own": n_own, "reason": result.reason,
    }  # fmt: skip


_CELL = ["arm", "direction", "budget"]
_STRENGTHS = [
    *("arm", "direction", "seed", "budget", "strength", "kl", "kl_low", "kl_high", "n_texts"),
    *("own_kl", "own_kl_low", "own_kl_high", "n_own", "reason"),
]
_AT = " at KL "


def _named(arm: str, budget: float) -> str:
    return arm if arm == UNTUNED else f"{arm}{_AT}{budget}"


def _parsed(name: str) -> tuple[str, float]:
    arm, found, budget = name.rpartition(_AT)
    return (arm, float(budget)) if found else (name, math.nan)
