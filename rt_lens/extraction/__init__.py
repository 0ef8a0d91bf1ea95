"""Finding a behaviour's direction, knowing whether to believe it, and reading with it."""

from rt_lens.extraction.conditions import FittedCondition, fit_condition
from rt_lens.extraction.evidence import Trust, trust
from rt_lens.extraction.extract import covariate_vectors, extract_offsets, extract_vectors, package_version
from rt_lens.extraction.maps import activation_map, cosines, norms
from rt_lens.extraction.reading import logit_lens, separability, token_projections

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
