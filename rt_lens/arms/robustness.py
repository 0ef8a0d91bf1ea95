"""Whether a tuned model withstands steering: arms x multipliers, each arm steered online along the same vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from rt_lens.arms.intervention import Intervention, applied
from rt_lens.arms.sweeping import sweep
from rt_lens.common.statistics.intervals import mean_interval
from rt_lens.data.questions import Asked
from rt_lens.evaluation.tasks import Measure, measure_of
from rt_lens.models.protocol import Model
from rt_lens.vectors.steering_vectors import SteeringVectors


@dataclass(frozen=True)
class Resistance:
    """How far online steering moves each arm.

    Attributes:
        table: a row per arm and multiplier: arm, multiplier, n, mean, low, high (of the score), seed.
        moved: a row per arm: arm, multiplier, n, mean, low, high of score at +multiplier minus score at -multiplier,
            prompt by prompt; of_first, of_first_low, of_first_high: that mean as a fraction of the first arm's; seed.
        scores: a row per arm, multiplier and prompt: arm, multiplier, prompt (its index), score.

    Example:
        >>> rows = [("untuned", m, p, m + p) for m in (-1, 1) for p in (0, 1)]
        >>> scores = pd.DataFrame(rows, columns=["arm", "multiplier", "prompt", "score"])
        >>> Resistance.of(scores).moved["mean"].tolist()
        [2.0]
    """

    table: pd.DataFrame
    moved: pd.DataFrame
    scores: pd.DataFrame = field(repr=False)

    @classmethod
    def of(cls, scores: pd.DataFrame, seed: int = 0) -> Resistance:
        """The tables of scores: a row per arm, multiplier and prompt, every arm with the same multipliers.

        Scores of several tuning seeds can be averaged prompt by prompt first.
        """
        cells = [
            {
                "arm": arm,
                "multiplier": dose,
                **mean_interval(cell["score"].to_numpy(float), seed)._asdict(),
                "seed": seed,
            }
            for (arm, dose), cell in scores.groupby(["arm", "multiplier"], sort=False)
        ]
        return cls(pd.DataFrame(cells), _moved(scores, seed), scores)


def resistance(
    model: Model,
    arms: Mapping[str, Intervention],
    vectors: SteeringVectors,
    task: Measure | Asked,
    *,
    layer: int,
    multipliers: Sequence[float] = (-2, -1, 0, 1, 2),
    hook: str = "resid_post",
    seed: int = 0,
    progress: bool = True,
) -> Resistance:
    """Steers every arm at one layer with each multiplier (claim (d) of Ackerman 2024: a suppressed direction resists).

    Args:
        model: the untuned model.
        arms: name -> Intervention. Shares are of the first one.
        vectors: the directions, the same for all arms.
        task: what is measured, as for `sweep`.
        layer: the block whose output they are added to.
        multipliers: in units of the vector's own length; the largest must be there with both signs.
        hook: kind of hook point.
        seed: seed for the bootstrap intervals, over prompts.
        progress: show a bar for each arm.

    Raises:
        ValueError: if there is no arm, or the largest multiplier lacks its opposite.

    Example:
        >>> task = LogitDifference(prompts, " happy", " sad")
        >>> arms = {"untuned": None, "tuned": delta}
        >>> result = resistance(model, arms, vectors, task, layer=21, multipliers=(-2, 0, 2), progress=False)
        >>> result.moved[["arm", "multiplier", "n"]].values.tolist()
        [['untuned', 2.0, 2], ['tuned', 2.0, 2]]
    """
    if not isinstance(arms, Mapping) or not arms:
        raise ValueError(
            "arms must map at least one name to an intervention, got none. Try {'untuned': None, 'tuned': delta}."
        )
    most = max(abs(float(multiplier)) for multiplier in multipliers) if multipliers else 0.0
    if most == 0 or not {most, -most} <= {float(multiplier) for multiplier in multipliers}:
        raise ValueError(
            f"multipliers must hold the largest with both signs, got {list(multipliers)}. Try multipliers=(-2, 0, 2)."
        )
    measure, parts = measure_of(task), []
    for name, intervention in arms.items():
        with applied(model, intervention):
            result = sweep(
                model, vectors, measure, layers=[layer], multipliers=multipliers, hook=hook, seed=seed,
                progress=progress,
            )  # fmt: skip
        parts.append(result.table.drop(columns="layer").assign(arm=name))
    return Resistance.of(pd.concat(parts, ignore_index=True)[["arm", "multiplier", "prompt", "score"]], seed)


def _moved(scores: pd.DataFrame, seed: int) -> pd.DataFrame:
    grid = scores.pivot(index=["arm", "prompt"], columns="multiplier", values="score")
    most = float(grid.columns.max())
    differences = (grid[most] - grid[-most]).unstack("prompt")
    names = list(dict.fromkeys(scores["arm"]))
    by_prompt = {name: differences.loc[name].to_numpy(float) for name in names}
    n = differences.shape[1]
    drawn = np.random.default_rng(seed).integers(0, n, (4000, n))
    first = by_prompt[names[0]]
    rows = []
    for name in names:
        with np.errstate(divide="ignore", invalid="ignore"):  # a first arm that nothing moves has no share
            shares = by_prompt[name][drawn].mean(1) / first[drawn].mean(1)
            share = by_prompt[name].mean() / first.mean()
        low, high = np.nanquantile(shares, [0.025, 0.975]) if np.isfinite(shares).any() else (np.nan, np.nan)
        rows.append(
            {"arm": name, "multiplier": most, **mean_interval(by_prompt[name], seed)._asdict(), "of_first": share,
             "of_first_low": low, "of_first_high": high, "seed": seed}
        )  # fmt: skip
    return pd.DataFrame(rows)
