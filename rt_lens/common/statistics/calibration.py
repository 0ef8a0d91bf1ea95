"""Whether stated probabilities come true as often as they say."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from rt_lens.common.statistics.intervals import Interval, Values, mean_interval, numbers, share_interval


class CalibrationError(NamedTuple):
    """Expected calibration error, and what chance alone would give.

    Attributes:
        n: number of probabilities.
        error: mean |share right - mean probability| over bins, weighted by the bins' sizes.
        chance_low: 2.5 % quantile of the error of outcomes drawn with these very probabilities.
        chance_high: 97.5 % quantile; an error below it is no sign of miscalibration.
        seed: of the draws.
    """

    n: int
    error: float
    chance_low: float
    chance_high: float
    seed: int


def calibration_curve(probabilities: Values, outcomes: Values, bins: int = 10) -> pd.DataFrame:
    """Stated probability against the share that came true, in bins of equal width (a reliability diagram's table).

    Args:
        probabilities: of the outcome 1, 0 to 1.
        outcomes: 0 or 1.
        bins: number of bins; empty ones are left out.

    Returns:
        A row per bin: bin_low, bin_high, n, predicted (mean probability), right, low, high (share of 1s with Wilson's
        95 % interval). A probability on an edge belongs to the bin above it, 1 to the last.

    Raises:
        ValueError: unlike lengths, a probability outside 0 to 1, another outcome than 0 and 1, or no bin.

    Example:
        >>> calibration_curve([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], bins=2)
    """
    stated, observed = _checked(probabilities, outcomes, bins)
    where = _bin_of(stated, bins)
    rows = []
    for number in np.unique(where):
        inside = where == number
        share = share_interval(int(observed[inside].sum()), int(inside.sum()))
        rows.append(
            {"bin_low": number / bins, "bin_high": (number + 1) / bins, "n": share.n,
             "predicted": float(stated[inside].mean()), "right": share.mean, "low": share.low, "high": share.high}
        )  # fmt: skip
    return pd.DataFrame(rows)


def calibration_error(
    probabilities: Values, outcomes: Values, bins: int = 10, seed: int = 0, draws: int = 2000
) -> CalibrationError:
    """Expected calibration error (Naeini et al. 2015) beside its 95 % range under perfect calibration.

    The error is above 0 even for perfect probabilities, the more so the fewer there are in a bin; the range, from
    outcomes drawn with the stated probabilities (Broecker and Smith 2007), says how far.

    Args:
        probabilities: of the outcome 1, 0 to 1.
        outcomes: 0 or 1.
        bins: number of bins of equal width.
        seed: of the draws.
        draws: sets of outcomes.

    Raises:
        ValueError: as for `calibration_curve`.

    Example:
        >>> calibration_error([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], bins=2).error  # 0.15
    """
    stated, observed = _checked(probabilities, outcomes, bins)
    where = _bin_of(stated, bins)
    drawn = (np.random.default_rng(seed).random((draws, stated.size)) < stated).astype(float)
    low, high = np.quantile(_error(drawn, stated, where, bins), [0.025, 0.975])
    error = float(_error(observed[None], stated, where, bins)[0])
    return CalibrationError(stated.size, error, float(low), float(high), seed)


def brier_score(probabilities: Values, outcomes: Values, seed: int = 0) -> Interval:
    """Mean squared distance of probability and outcome (Brier 1950): 0 is perfect, 0.25 is a constant 0.5.

    Args:
        probabilities: of the outcome 1, 0 to 1.
        outcomes: 0 or 1.
        seed: of the bootstrap interval (`mean_interval`).

    Raises:
        ValueError: as for `calibration_curve`.

    Example:
        >>> brier_score([0.1, 0.8, 0.9], [0, 1, 1]).mean  # 0.02
    """
    stated, observed = _checked(probabilities, outcomes, 1)
    return mean_interval((stated - observed) ** 2, seed)


def _error(
    outcomes: Float[np.ndarray, "draw n"], stated: Float[np.ndarray, " n"], where: Int[np.ndarray, " n"], bins: int
) -> Float[np.ndarray, " draw"]:
    member = where[:, None] == np.arange(bins)  # [n, bin]
    return np.abs((outcomes - stated) @ member).sum(1) / stated.size


def _bin_of(stated: Float[np.ndarray, " n"], bins: int) -> Int[np.ndarray, " n"]:
    # Against the edges themselves: 0.7 * 10 is just below 7, but 0.7 is the edge 7 / 10.
    return np.searchsorted(np.arange(1, bins) / bins, stated, side="right")


def _checked(
    probabilities: Values, outcomes: Values, bins: int
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    stated, observed = numbers("probabilities", probabilities), numbers("outcomes", outcomes)
    if stated.size != observed.size:
        raise ValueError(
            f"outcomes must be as many as the probabilities ({stated.size}), got {observed.size}. Give one for each."
        )
    if stated.min() < 0 or stated.max() > 1:
        raise ValueError(
            f"probabilities must be between 0 and 1, got {stated.min():g} to {stated.max():g}. Divide percentages by "
            "100."
        )
    if not np.isin(observed, (0, 1)).all():
        raise ValueError(
            f"outcomes must be 0 or 1, got {observed[~np.isin(observed, (0, 1))][0]:g}. Give 1 for what happened, "
            "else 0."
        )
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}. The default is 10.")
    return stated, observed
