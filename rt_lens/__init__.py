"""Find a behaviour's direction in a language model, steer with it, tune it into the weights, see what changed."""

from rt_lens import plots
from rt_lens.baking import bake
from rt_lens.delta import WeightDelta
from rt_lens.evaluation import correct_only, evaluate, text_fit
from rt_lens.exchange import import_vectors, load_gguf, save_gguf
from rt_lens.extraction import (
    covariate_vectors,
    extract_offsets,
    extract_vectors,
    fit_condition,
    logit_lens,
    separability,
    token_projections,
    trust,
)
from rt_lens.generation import generate, stream
from rt_lens.models import load_model
from rt_lens.prompts import ContrastPairs, load_pairs
from rt_lens.steering import (
    Linear,
    ablate,
    add,
    add_preserving_norm,
    clamp,
    conditional,
    erase,
    scale,
    steered,
)
from rt_lens.sweeping import Answers, LogitDifference, sweep
from rt_lens.tuning import TuneConfig, tune
from rt_lens.vectors import SteeringVectors, orthogonalised
from rt_lens.whereabouts import whereabouts

__all__ = [
    "Answers",
    "ContrastPairs",
    "Linear",
    "LogitDifference",
    "SteeringVectors",
    "TuneConfig",
    "WeightDelta",
    "ablate",
    "add",
    "add_preserving_norm",
    "bake",
    "clamp",
    "conditional",
    "correct_only",
    "covariate_vectors",
    "erase",
    "evaluate",
    "extract_offsets",
    "extract_vectors",
    "fit_condition",
    "generate",
    "import_vectors",
    "load_gguf",
    "load_model",
    "load_pairs",
    "logit_lens",
    "orthogonalised",
    "plots",
    "save_gguf",
    "scale",
    "separability",
    "steered",
    "stream",
    "sweep",
    "text_fit",
    "token_projections",
    "trust",
    "tune",
    "whereabouts",
]
