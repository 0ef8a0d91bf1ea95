"""Calibration: whether stated probabilities come true as often as they say."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from rt_lens.common.statistics.intervals import Values, numbers, share_interval


def calibration_curve(probabilities: Values, outcomes: Values, bins: int = 10) -> pd.DataFrame:
    """Stated probability against the fraction of outcomes 1, in bins of equal width (a reliability diagram's table).

    Args:
        probabilities: of the outcome 1, 0 to 1.
        outcomes: 0 or 1.
        bins: number of bins; empty ones are left out.

    Returns:
        A row per bin: bin_low, bin_high, n, predicted (mean probability), right, low, high (fraction of 1s with
        Wilson's 95 % interval). A probability on an edge belongs to the bin above it, 1 to the last.

    Raises:
        ValueError: different lengths, a probability outside 0 to 1, an outcome other than 0 and 1, or no bin.

    Example:
        >>> curve = calibration_curve([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], bins=2)
        >>> curve[["bin_low", "bin_high", "n", "predicted", "right"]]
           bin_low  bin_high  n  predicted  right
        0      0.0       0.5  2       0.15    0.0
        1      0.5       1.0  2       0.85    1.0
    """
    stated, observed = _checked(probabilities, outcomes, bins)
    bin_of = _bin_of(stated, bins)
    rows = []
    for number in np.unique(bin_of):
        inside = bin_of == number
        share = share_interval(int(observed[inside].sum()), int(inside.sum()))
        rows.append(
            {"bin_low": number / bins, "bin_high": (number + 1) / bins, "n": share.n,
             "predicted": float(stated[inside].mean()), "right": share.mean, "low": share.low, "high": share.high}
        )  # fmt: skip
    return pd.DataFrame(rows)


def _bin_of(stated: Float[np.ndarray, " n"], bins: int) -> Int[np.ndarray, " n"]:
    # Compared with the edges themselves: 0.7 * 10 is just below 7, but 0.7 is the edge 7 / 10.
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
            f"outcomes must be 0 or 1, got {observed[~np.isin(observed, (0, 1))][0]:g}. Use 1 if the event "
            "occurred, otherwise 0."
        )
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}. The default is 10.")
    return stated, observed
