"""Finding a behaviour's direction, knowing whether to believe it, and reading with it."""

from rt_lens.extraction.conditions import FittedCondition, fit_condition
from rt_lens.vectors.extraction import covariate_vectors, extract_offsets, extract_vectors, package_version
from rt_lens.vectors.geometry import activation_map, cosines, norms
from rt_lens.vectors.reading import logit_lens, separability, token_projections
from rt_lens.vectors.validation import Trust, trust

__all__ = [
    "FittedCondition",
    "Trust",
    "activation_map",
    "cosines",
    "covariate_vectors",
    "extract_offsets",
    "extract_vectors",
    "fit_condition",
    "logit_lens",
    "norms",
    "package_version",
    "separability",
    "token_projections",
    "trust",
]
