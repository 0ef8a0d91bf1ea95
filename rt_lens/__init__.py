"""Find a behaviour's direction in a language model, steer with it, tune it into the weights, see what changed."""

from rt_lens import plots
from rt_lens.arms import under
from rt_lens.baking import bake
from rt_lens.dashboard import dashboard
from rt_lens.delta import WeightDelta
from rt_lens.evaluation import (
    EndpointJudge,
    LogitJudge,
    ask,
    calibration,
    classifier_of,
    correct_only,
    evaluate,
    harness_model,
    likelihoods,
    make_scorer,
    text_fit,
)
from rt_lens.exchange import import_vectors, load_gguf, save_gguf
from rt_lens.export import export_hf, export_peft
from rt_lens.extraction import (
    activation_map,
    cosines,
    covariate_vectors,
    extract_offsets,
    extract_vectors,
    fit_condition,
    logit_lens,
    mean_projections,
    norms,
    separability,
    token_projections,
    trust,
)
from rt_lens.generation import generate, stream
from rt_lens.inspection import projection_changes, residual_shifts, weight_changes
from rt_lens.models import load_model
from rt_lens.printing import save_figure
from rt_lens.prompts import ContrastPairs, load_pairs
from rt_lens.questions import Question, load_questions
from rt_lens.resistance import resistance
from rt_lens.results import compare_runs, load_results
from rt_lens.scoreboard import Exam, compare_arms
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
from rt_lens.tuning import Aim, Choice, KLThenSteer, Target, TuneConfig, block_search, tune
from rt_lens.vectors import SteeringVectors, orthogonalised
from rt_lens.whereabouts import whereabouts

__all__ = [
    "Aim",
    "Answers",
    "Choice",
    "ContrastPairs",
    "EndpointJudge",
    "Exam",
    "KLThenSteer",
    "Linear",
    "LogitDifference",
    "LogitJudge",
    "Question",
    "SteeringVectors",
    "Target",
    "TuneConfig",
    "WeightDelta",
    "ablate",
    "activation_map",
    "add",
    "add_preserving_norm",
    "ask",
    "bake",
    "block_search",
    "calibration",
    "clamp",
    "classifier_of",
    "compare_arms",
    "compare_runs",
    "conditional",
    "correct_only",
    "cosines",
    "covariate_vectors",
    "dashboard",
    "erase",
    "evaluate",
    "export_hf",
    "export_peft",
    "extract_offsets",
    "extract_vectors",
    "fit_condition",
    "generate",
    "harness_model",
    "import_vectors",
    "likelihoods",
    "load_gguf",
    "load_model",
    "load_pairs",
    "load_questions",
    "load_results",
    "logit_lens",
    "make_scorer",
    "mean_projections",
    "norms",
    "orthogonalised",
    "plots",
    "projection_changes",
    "residual_shifts",
    "resistance",
    "save_figure",
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
    "under",
    "weight_changes",
    "whereabouts",
]
