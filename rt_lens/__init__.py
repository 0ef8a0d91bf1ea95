"""Find a behaviour's direction in a language model, steer with it, tune it into the weights, see what changed."""

from rt_lens import plots
from rt_lens.apps.dashboard.opening import dashboard
from rt_lens.arms.comparison import Exam, compare_arms
from rt_lens.arms.inspection import residual_shifts, weight_changes
from rt_lens.arms.intervention import under
from rt_lens.arms.projections import mean_projections, projection_changes
from rt_lens.arms.robustness import resistance
from rt_lens.arms.search import block_search
from rt_lens.arms.sweeping import Answers, LogitDifference, sweep
from rt_lens.data.contrast_pairs import ContrastPairs, load_pairs
from rt_lens.data.questions import Question, load_questions
from rt_lens.evaluation.answering import ask, correct_only, evaluate
from rt_lens.evaluation.choices import likelihoods
from rt_lens.evaluation.classifier import classifier_of
from rt_lens.evaluation.endpoint import EndpointJudge
from rt_lens.evaluation.harness import harness_model
from rt_lens.evaluation.judges import LogitJudge
from rt_lens.evaluation.registry import make_scorer
from rt_lens.evaluation.scorers import calibration
from rt_lens.evaluation.texts import text_fit
from rt_lens.models.context import whereabouts
from rt_lens.models.generation import generate, stream
from rt_lens.models.load import load_model
from rt_lens.plots.figure_export import save_figure
from rt_lens.results.comparing import compare_runs
from rt_lens.results.schema import load_results
from rt_lens.steering.binding import ablate, add, add_preserving_norm, clamp, erase, scale, steered
from rt_lens.steering.condition_fit import fit_condition
from rt_lens.steering.conditions import conditional
from rt_lens.steering.edits import Linear
from rt_lens.tuning.aims import Aim, KLThenSteer
from rt_lens.tuning.baking import bake
from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.delta import WeightDelta
from rt_lens.tuning.export.hf import export_hf
from rt_lens.tuning.export.peft import export_peft
from rt_lens.tuning.loop import tune
from rt_lens.tuning.targets import Choice, Target
from rt_lens.vectors.extraction import covariate_vectors, extract_offsets, extract_vectors
from rt_lens.vectors.geometry import activation_map, cosines, norms
from rt_lens.vectors.interop.gguf import load_gguf, save_gguf
from rt_lens.vectors.interop.tensors import import_vectors
from rt_lens.vectors.reading import logit_lens, separability, token_projections
from rt_lens.vectors.steering_vectors import SteeringVectors, orthogonalised
from rt_lens.vectors.validation import trust

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
