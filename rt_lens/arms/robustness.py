"""Whether a tuned model withstands steering: arms x multipliers, each arm steered online along the same vectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from rt_lens.arms.intervention import Intervention, applied
from rt_lens.arms.sweeping import Metric, sweep
from rt_lens.common.inputs import text_list
from rt_lens.common.statistics.intervals import mean_interval
from rt_lens.models.protocol import Model
from rt_lens.vectors.steering_vectors import SteeringVectors


@dataclass(frozen=True)
class Resistance:
    """How far online steering moves each arm.

    Attributes:
        table: a row per arm and multiplier: arm, multiplier, n, mean, low, high (of the score), seed.
        moved: a row per arm: arm, multiplier, n, mean, low, high of score at +multiplier minus score at -multiplier,
            prompt by prompt; of_first, of_first_low, of_first_high: that mean as a share of the first arm's; seed.
        scores: a row per arm, multiplier and prompt: arm, multiplier, prompt (its number), score.
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
    prompts: Iterable[str],
    *,
    layer: int,
    multipliers: Sequence[float] = (-2, -1, 0, 1, 2),
    metric: str | Metric = "vader",
    hook: str = "resid_post",
    seed: int = 0,
    progress: bool = True,
) -> Resistance:
    """Steers every arm at one layer with each multiplier (claim (d) of Ackerman 2024: a tuned-out model resists).

    Args:
        model: the untuned model.
        arms: name -> WeightDelta, hooks, or None for the untuned model. Shares are of the first one.
        vectors: the directions, the same for all arms.
        prompts: user messages.
        layer: the block whose output they are added to.
        multipliers: in units of the vector's own length; the largest must be there with both signs.
        metric: as for `sweep`.
        hook: kind of hook point.
        seed: of the bootstrap intervals, over prompts.
        progress: show a bar for each arm.

    Raises:
        ValueError: if there is no arm, or the largest multiplier lacks its opposite.

    Example:
        >>> found = resistance(model, {"untuned": None, "out": delta}, vectors, prompts, layer=21)
        >>> plots.resistance(found.table, found.moved).show()
    """
    if not isinstance(arms, Mapping) or not arms:
        raise ValueError("arms: none came. Give at least one, as in {'untuned': None, 'out': delta}.")
    most = max(abs(float(multiplier)) for multiplier in multipliers) if multipliers else 0.0
    if most == 0 or not {most, -most} <= {float(multiplier) for multiplier in multipliers}:
        raise ValueError(
            f"multipliers: {list(multipliers)} came; the largest is wanted with both signs, as in (-2, 0, 2)."
        )
    prompts, parts = text_list(prompts, "prompts"), []
    for name, arm in arms.items():
        with applied(model, arm):
            found = sweep(
                model, vectors, prompts, layers=[layer], multipliers=multipliers, metric=metric, hook=hook, seed=seed,
                progress=progress,
            )  # fmt: skip
        parts.append(found.table.drop(columns="layer").assign(arm=name))
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
