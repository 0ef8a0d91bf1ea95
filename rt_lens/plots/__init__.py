"""Result tables and projections -> plotly figures. A figure function shows and writes nothing, and knows no model.

A table is a pandas DataFrame, or a list of dicts with the same columns. Error bars and bands are 95 % intervals, an arm
has one colour in every figure, and signed values have a diverging scale centred on zero. Text appears literally: every
figure escapes what Plotly would read as HTML or TeX (a token `<s>`, an arm `$x$`), so no caller escapes it.
"""

from rt_lens.plots.at_kl import effect_at_kl
from rt_lens.plots.calibration import calibration
from rt_lens.plots.directions import activation_map, cosines, norms
from rt_lens.plots.effects import arms, dose_response, side_effects
from rt_lens.plots.inside import projection_changes, projection_curves, residual_shifts, weight_changes
from rt_lens.plots.inside_arms import inside_arms
from rt_lens.plots.layers import logit_lens, projection_by_layer, projection_heatmap, separability
from rt_lens.plots.pareto import pareto
from rt_lens.plots.ranked import arms_at_kl
from rt_lens.plots.scaling import few_numbers, scaling
from rt_lens.plots.screening import screening
from rt_lens.plots.style import ARM_COLOURS
from rt_lens.plots.sweep import steerability, sweep
from rt_lens.plots.text import coloured_tokens, trace
from rt_lens.plots.training import losses
from rt_lens.plots.trials import trials
from rt_lens.plots.tuned import block_search, kinds, variants
from rt_lens.plots.tuned_steered import effect_against_side_effect, resistance
from rt_lens.plots.validation import validation

__all__ = [
    "ARM_COLOURS",
    "activation_map",
    "arms",
    "arms_at_kl",
    "block_search",
    "calibration",
    "coloured_tokens",
    "cosines",
    "dose_response",
    "effect_against_side_effect",
    "effect_at_kl",
    "few_numbers",
    "inside_arms",
    "kinds",
    "logit_lens",
    "losses",
    "norms",
    "pareto",
    "projection_by_layer",
    "projection_changes",
    "projection_curves",
    "projection_heatmap",
    "residual_shifts",
    "resistance",
    "scaling",
    "screening",
    "separability",
    "side_effects",
    "steerability",
    "sweep",
    "trace",
    "trials",
    "validation",
    "variants",
    "weight_changes",
]
