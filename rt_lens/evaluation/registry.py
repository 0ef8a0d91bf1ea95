"""Scorers from names and tables, as a TOML file or the command line gives them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from rt_lens.data.contrast_pairs import load_pairs
from rt_lens.data.questions import Answer
from rt_lens.evaluation.classifier import classifier_of
from rt_lens.evaluation.endpoint import EndpointJudge
from rt_lens.evaluation.fluency import distinct, length, loops, repetition
from rt_lens.evaluation.judges import LogitJudge
from rt_lens.evaluation.scorers import (
    ContainsAnswer,
    FollowsInstruction,
    Lexicon,
    Likelihood,
    OffOptionMass,
    OfText,
    Pattern,
    Reads,
    Scorer,
    vader,
)
from rt_lens.models.load import load_model

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
    kind, table = _table_of(scorer)
    try:
        return _KINDS[kind](**table)
    except TypeError as error:
        raise _refusal(kind, table, error) from None


def unmade_scorer(scorer: ScorerLike) -> Scorer:
    """What can be said of a scorer without making it, which may load a model: for a plan, and to check a file.

    Raises:
        ValueError: unknown name or kind, or a key that the kind does not know or lacks.
    """
    if isinstance(scorer, Scorer):
        return scorer
    if callable(scorer):
        return make_scorer(scorer)
    kind, table = _table_of(scorer)
    try:
        inspect.signature(_KINDS[kind]).bind(**table)
    except TypeError as error:
        raise _refusal(kind, table, error) from None
    return Unmade(kind, table.get("form", "answers") if kind in ("likelihood", "other") else "text")


@dataclass(frozen=True)
class Unmade:
    """A scorer that was not made: it says what it would read, and scores nothing.

    Attributes:
        name: its kind.
        reads: what of the answers it would read.
    """

    name: str
    reads: Reads

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        raise RuntimeError(f"scorer: {self.name!r} was not made, so it cannot score. Use make_scorer.")


def _table_of(scorer: Any) -> tuple[str, dict[str, Any]]:
    """The kind of a name or table, and the other keys."""
    table = dict(scorer) if isinstance(scorer, Mapping) else {"kind": scorer}
    kind = table.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        known = ", ".join(map(repr, _KINDS))
        raise ValueError(f"scorer: {kind!r} came; one of {known}, a function or a Scorer is wanted.")
    return kind, table


def _refusal(kind: str, table: Mapping[str, Any], error: TypeError) -> ValueError:
    reason = str(error).partition(") ")[2] or error
    return ValueError(f"scorer: {kind!r} came with {', '.join(table) or 'nothing else'}: {reason}.")


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
    "names_right": ContainsAnswer,
    "obeys": FollowsInstruction,
    "likelihood": Likelihood,
    "other": OffOptionMass,
    "logit_judge": LogitJudge,
    "endpoint_judge": EndpointJudge,
    "classifier": _classifier,
}
