"""Scorers from names and tables, as a TOML file or the command line gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from rt_lens.evaluation.classifier import classifier_of
from rt_lens.evaluation.endpoint import EndpointJudge
from rt_lens.evaluation.judges import LogitJudge
from rt_lens.evaluation.scorers import (
    Lexicon,
    Likelihood,
    NamesRight,
    Obeys,
    OfText,
    OtherMass,
    Pattern,
    Scorer,
    vader,
)
from rt_lens.evaluation.writing import distinct, length, loops, repetition
from rt_lens.models import load_model
from rt_lens.prompts import load_pairs

ScorerLike: TypeAlias = str | Mapping[str, Any] | Callable[[str], float] | Scorer
"""A scorer, a function of an answer's text, a name, or a `[scorer]` table."""


def make_scorer(scorer: ScorerLike) -> Scorer:
    """A scorer from a name, a `[scorer]` table, a function of an answer's text, or a scorer.

    Raises:
        ValueError: unknown name or kind, or a key that the kind does not know.

    Example:
        >>> make_scorer({"kind": "lexicon", "positive": ["indeed"], "negative": ["yeah"]}).name
        'lexicon'
    """
    if isinstance(scorer, Scorer):
        return scorer
    if callable(scorer):
        return OfText(getattr(scorer, "__name__", type(scorer).__name__), scorer)
    table = dict(scorer) if isinstance(scorer, Mapping) else {"kind": scorer}
    kind = table.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        known = ", ".join(map(repr, _KINDS))
        raise ValueError(f"scorer: {kind!r} came; one of {known}, a function or a Scorer is wanted.")
    try:
        return _KINDS[kind](**table)
    except TypeError as error:
        reason = str(error).partition(") ")[2] or error
        raise ValueError(f"scorer: {kind!r} came with {', '.join(table) or 'nothing else'}: {reason}.") from None


def _lexicon(positive: Any = (), negative: Any = ()) -> Scorer:
    return OfText("lexicon", Lexicon(tuple(positive), tuple(negative)))


def _classifier(model: str, pairs: str, seed: int = 0) -> Scorer:
    return classifier_of(load_model(model), load_pairs(pairs), seed=seed)


_KINDS: dict[str, Callable[..., Scorer]] = {
    "vader": lambda: OfText("vader", vader),
    "repetition": lambda: OfText("repetition", repetition),
    "length": lambda: OfText("length", length),
    "distinct_2": lambda: OfText("distinct_2", distinct),
    "loop": lambda: OfText("loop", loops, share=True),
    "lexicon": _lexicon,
    "pattern": lambda pattern: OfText("pattern", Pattern(pattern), share=True),
    "names_right": NamesRight,
    "obeys": Obeys,
    "likelihood": Likelihood,
    "other": OtherMass,
    "logit_judge": LogitJudge,
    "endpoint_judge": EndpointJudge,
    "classifier": _classifier,
}
