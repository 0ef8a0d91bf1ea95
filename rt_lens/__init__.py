"""Find a behaviour's direction in a language model, steer with it, tune it into the weights, see what changed."""

from rt_lens import plots
from rt_lens.evaluation import evaluate, text_fit
from rt_lens.extraction import extract_vectors
from rt_lens.models import load_model
from rt_lens.prompts import ContrastPairs, load_pairs
from rt_lens.steering import add, generate
from rt_lens.tuning import TuneConfig, WeightDelta, tune
from rt_lens.vectors import SteeringVectors

__all__ = [
    "ContrastPairs",
    "SteeringVectors",
    "TuneConfig",
    "WeightDelta",
    "add",
    "evaluate",
    "extract_vectors",
    "generate",
    "load_model",
    "load_pairs",
    "plots",
    "text_fit",
    "tune",
]
