"""Measuring whatever model is handed over: what it writes, which options it prefers, how it predicts texts.

Knows nothing of steering or tuning; callers wrap the model in a context.
"""

from rt_lens.evaluation.answering import Evaluation, Kept, ask, correct_only, evaluate, said
from rt_lens.evaluation.choices import likelihoods, start_of
from rt_lens.evaluation.classifier import TextClassifier, classifier_of
from rt_lens.evaluation.endpoint import EndpointJudge, Usage
from rt_lens.evaluation.fluency import distinct, length, loops, repetition
from rt_lens.evaluation.harness import harness_model
from rt_lens.evaluation.judges import LogitJudge
from rt_lens.evaluation.registry import ScorerLike, make_scorer, unmade_scorer
from rt_lens.evaluation.scorers import (
    Lexicon,
    Likelihood,
    NamesRight,
    Obeys,
    OfText,
    OtherMass,
    Pattern,
    Scorer,
    calibration,
    is_share,
    option_shares,
    vader,
)
from rt_lens.evaluation.texts import TextFit, text_fit

__all__ = [
    "EndpointJudge",
    "Evaluation",
    "Kept",
    "Lexicon",
    "Likelihood",
    "LogitJudge",
    "NamesRight",
    "Obeys",
    "OfText",
    "OtherMass",
    "Pattern",
    "Scorer",
    "ScorerLike",
    "TextClassifier",
    "TextFit",
    "Usage",
    "ask",
    "calibration",
    "classifier_of",
    "correct_only",
    "distinct",
    "evaluate",
    "harness_model",
    "is_share",
    "length",
    "likelihoods",
    "loops",
    "make_scorer",
    "option_shares",
    "repetition",
    "said",
    "start_of",
    "text_fit",
    "unmade_scorer",
    "vader",
]
