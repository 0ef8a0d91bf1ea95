"""Power of the paired t-test: the prompts that a difference needs, and the difference that prompts can show."""

from __future__ import annotations

import math

import numpy as np
from statsmodels.stats.power import TTestPower

from rt_lens.common.statistics.intervals import Values, numbers


def prompts_needed(differences: Values, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """Number of prompts that a new run needs to show a difference as large as the one observed here.

    Use it to plan the next run. It says nothing about the present one: "observed power" only restates the p-value
    (Hoenig and Heisey 2001). A difference that was picked because it looked large is partly luck, so plan with the
    lower bound of its interval. More prompts do not make up for too few tuning seeds.

    Args:
        differences: first minus second, one number per prompt (averaged over seeds).
        power: probability of detecting the difference (two-sided test).
        alpha: level of the test.

    Returns:
        None if the mean difference is 0, which no number of prompts shows.

    Raises:
        ValueError: fewer than two differences, no spread, or a power or alpha outside (0, 1).

    Example:
        >>> prompts_needed([0.4, -0.1, 0.3, 0.0, 0.2])
        16
    """
    _check(power, alpha)
    sample = numbers("differences", differences)
    if sample.size < 2 or np.ptp(sample) == 0:
        raise ValueError(
            f"differences must be at least two numbers that differ, got {sample.size} without spread. Measure more "
            "prompts."
        )
    effect = abs(float(sample.mean())) / float(sample.std(ddof=1))
    return None if effect == 0 else prompts_for_effect(effect, power, alpha)


def prompts_for_effect(effect: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Number of prompts on which a paired t-test shows an effect of this size.

    Args:
        effect: mean difference divided by the standard deviation of the differences (Cohen 1988: 0.2 is small, 0.5
            medium, 0.8 large).
        power: probability of detecting it (two-sided test).
        alpha: level of the test.

    Raises:
        ValueError: an effect of 0 or less, or a power or alpha outside (0, 1).

    Example:
        >>> [prompts_for_effect(0.5, power) for power in (0.8, 0.9)]
        [34, 44]
    """
    _check(power, alpha)
    if not effect > 0:
        raise ValueError(f"effect must be above 0, got {effect}. Give its size without a sign.")
    few = 16  # from here on statsmodels' solver converges for every effect; below, try each n
    for n in range(2, few):
        if _power(effect, n, alpha) >= power:
            return n
    return math.ceil(float(np.ravel(TTestPower().solve_power(effect_size=effect, power=power, alpha=alpha))[0]))


def detectable(n: int, sd: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest mean difference that n prompts show with this power, in the unit of the differences.

    Args:
        n: prompts.
        sd: standard deviation of the differences over prompts.
        power: probability of detecting it (two-sided paired t-test).
        alpha: level of the test.

    Raises:
        ValueError: n below 2, a negative sd, or a power or alpha outside (0, 1).

    Example:
        >>> round(detectable(60, 0.5), 3)
        0.184
    """
    _check(power, alpha)
    if n < 2 or not sd >= 0:
        raise ValueError(
            f"n must be at least 2 and sd at least 0, got n={n} and sd={sd}. Give prompts and their spread."
        )
    return sd * float(np.ravel(TTestPower().solve_power(nobs=n, power=power, alpha=alpha))[0])  # at times an array


def _power(effect: float, n: int, alpha: float) -> float:
    # For large effects scipy's noncentral t is NaN, and there the power is 1.
    value = float(TTestPower().power(effect, n, alpha))
    return 1.0 if math.isnan(value) else value


def _check(power: float, alpha: float) -> None:
    if not (0 < alpha < power < 1):
        raise ValueError(
            f"power and alpha must satisfy 0 < alpha < power < 1, got power={power} and alpha={alpha}. "
            "Usual values are power=0.8 and alpha=0.05."
        )
