"""Intervals, tests, effect sizes, power and calibration, thin over scipy and statsmodels. This room knows no model."""

from rt_lens.common.statistics.calibration import CalibrationError, brier_score, calibration_curve, calibration_error
from rt_lens.common.statistics.comparisons import (
    Comparison,
    cliffs_delta,
    holm,
    mcnemar,
    paired_comparison,
    standardised_difference,
    unpaired_comparison,
    wilcoxon,
)
from rt_lens.common.statistics.intervals import (
    Interval,
    Moments,
    crossed_interval,
    mean_interval,
    moments,
    ratio_interval,
    share_interval,
)
from rt_lens.common.statistics.power import detectable, prompts_needed

__all__ = [
    "CalibrationError",
    "Comparison",
    "Interval",
    "Moments",
    "brier_score",
    "calibration_curve",
    "calibration_error",
    "cliffs_delta",
    "crossed_interval",
    "detectable",
    "holm",
    "mcnemar",
    "mean_interval",
    "moments",
    "paired_comparison",
    "prompts_needed",
    "ratio_interval",
    "share_interval",
    "standardised_difference",
    "unpaired_comparison",
    "wilcoxon",
]
