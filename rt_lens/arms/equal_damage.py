"""Arms at equal damage: each at the strengths whose KL is one of some budgets, and what it then does to a behaviour."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from rt_lens.arms.calibration import Calibrated, KLMeter, calibrate, scaled
from rt_lens.arms.comparison import ArmEvaluator, ArmLike, ArmScores
from rt_lens.arms.intervention import Interventions, each_of
from rt_lens.common.arm_labels import ArmLabel
from rt_lens.common.inputs import text_list
from rt_lens.common.progress import Bar
from rt_lens.evaluation.tasks import EvalTask
from rt_lens.models.protocol import Model

UNTUNED = "untuned"
BUDGETS = (0.003, 0.01, 0.03, 0.1)
"""KL from the untuned model in nats per token: from hardly measurable to plainly another model."""


@dataclass(frozen=True)
class KLCurves:
    """The scores of arms at equal damage.

    Attributes:
        scores: of the untuned model, and of each arm at each budget, as the arm `name at KL budget`.
        strengths: a row per arm, direction, seed and budget: strength, kl, kl_low, kl_high (on the calibration's
            texts), n_texts, reason (empty where the budget was reached; else strength and kl are empty).

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
        """A row per arm, direction and budget that was reached, for `plots.effect_at_kl`; the untuned model first.

        Args:
            name: of the set. Defaults to the first.
            scorer: its name. Defaults to the set's first.

        Returns:
            The columns of `ArmScores.summary`, and budget (NaN for the untuned model). `kl` is the KL reached on texts
            that the calibration has not seen.

        Raises:
            ValueError: for an unknown set or scorer.
        """
        summary = self.scores.summary()
        known = list(dict.fromkeys(zip(summary["set"], summary["scorer"], strict=True)))
        wanted = [(a, b) for a, b in known if name in (None, a) and scorer in (None, b)]
        if not wanted:
            raise ValueError(f"name and scorer must be one of {known}, got ({name!r}, {scorer!r}).")
        rows = summary[(summary["set"] == wanted[0][0]) & (summary["scorer"] == wanted[0][1])]
        parts = [_parsed(arm) for arm in rows["arm"]]
        return rows.assign(arm=[arm for arm, _ in parts], budget=[budget for _, budget in parts]).reset_index(drop=True)

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
        table, budgets = self.table(*(of or (None, None))), sorted(self.strengths["budget"].unique())
        if budget not in budgets:
            raise ValueError(f"budget must be one of {', '.join(f'{b:g}' for b in budgets)}, got {budget:g}.")
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


def compare_at_kl(
    model: Model,
    arms: Mapping[str, ArmLike],
    tasks: Mapping[str, EvalTask] | EvalTask,
    kl: Sequence[float] = BUDGETS,
    *,
    calibration: Iterable[str],
    texts: Iterable[str],
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> KLCurves:
    """Measures arms at equal damage: the strength of each is set so that its KL to the untuned model is the budget.

    An arm is scaled as a whole: the multipliers of its edits, the differences of its weights (`scaled`). With several
    tuning seeds each has its own strength. A budget that an arm does not reach with every seed is a gap in its curve,
    with the reason in `gaps`.

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
        ValueError: for no arm, an arm named `untuned` or without a strength, a text in both lists, or a budget that is
            not above 0.

    Example:
        >>> curves = compare_at_kl(
        ...     model, {"steered, away": add(vectors, [21], -1.0)}, EvalTask(prompts, max_new_tokens=4), [0.003, 0.01],
        ...     calibration=texts, texts=neutral, progress=False,
        ... )
        >>> low, high = curves.strengths["strength"]
        >>> 0 < low < high and curves.gaps.empty
        True
    """
    budgets = list(dict.fromkeys(map(float, kl)))
    if not budgets:
        raise ValueError("kl must be at least one budget, got none. Try [0.01].")
    calibration, texts = text_list(calibration, "calibration"), text_list(texts, "texts")
    _check_arms(arms)
    if shared := set(calibration) & set(texts):
        raise ValueError(f"texts must be other texts than those of calibration, got {min(shared)[:60]!r} in both.")
    tasks = {"test": tasks} if isinstance(tasks, EvalTask) else tasks
    evaluator = ArmEvaluator(model, tasks, texts, seed=seed, batch_size=batch_size)
    meter = KLMeter(model, calibration, seed=seed)
    rows: list[dict[str, Any]] = []
    with Bar(total=len(arms), desc="arms at equal KL", unit="arm", disable=not progress) as bar:
        evaluator.measure(UNTUNED)
        for name, arm in arms.items():
            bar.set_postfix(arm=name)
            label = ArmLabel.parse(name)
            found = {number: calibrate(each_of(of_seed), meter, budgets) for number, of_seed in _by_seed(arm).items()}
            rows += [_row(label, number, result) for number, results in found.items() for result in results]
            _measure(evaluator, label, found, budgets)
            bar.update()
    return KLCurves(evaluator.scores(), pd.DataFrame(rows))


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
            scaled(intervention, 1.0)  # refuses what has no strength


def _by_seed(arm: ArmLike) -> Mapping[int, Interventions]:
    return arm if isinstance(arm, Mapping) else {0: arm}


def _measure(
    evaluator: ArmEvaluator, label: ArmLabel, found: Mapping[int, Sequence[Calibrated]], budgets: Sequence[float]
) -> None:
    """Measures an arm at the budgets that every seed reaches."""
    for number, budget in enumerate(budgets):
        at_budget = {seed: results[number] for seed, results in found.items()}
        if all(result.reached for result in at_budget.values()):
            for seed, result in at_budget.items():
                assert isinstance(result.intervention, tuple)
                evaluator.measure(_named(label.arm, budget), *result.intervention, direction=label.direction, seed=seed)


def _row(label: ArmLabel, seed: int, result: Calibrated) -> dict[str, Any]:
    n_texts, kl, low, high = result.kl or (None,) * 4
    return {
        **label._asdict(), "seed": seed, "budget": result.budget, "strength": result.strength,
        "kl": kl, "kl_low": low, "kl_high": high, "n_texts": n_texts, "reason": result.reason,
    }  # fmt: skip


_AT = " at KL "


def _named(arm: str, budget: float) -> str:
    return arm if arm == UNTUNED else f"{arm}{_AT}{budget}"


def _parsed(name: str) -> tuple[str, float]:
    arm, found, budget = name.rpartition(_AT)
    return (arm, float(budget)) if found else (name, math.nan)
