"""Builds scorers from names and tables, as a TOML file or the command line gives them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

from rt_lens.common.inputs import text_list
from rt_lens.data.contrast_pairs import load_pairs
from rt_lens.data.questions import Answer
from rt_lens.evaluation.endpoint import EndpointJudge
from rt_lens.evaluation.fluency import distinct, length, loops, repetition
from rt_lens.evaluation.judges import LogitJudge
from rt_lens.evaluation.scorers import (
    ContainsAnswer,
    FollowsInstruction,
    Form,
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
"""A Scorer, a function of a response's text, a name such as `vader`, or a `[scorer]` table."""

_OLD_NAMES = {
    "names_right": "contains_answer",
    "obeys": "follows_instruction",
    "other": "off_option_mass",
    "answers": "completion",
    "letters": "multiple_choice",
}
"""Kinds and forms of older files -> today's words."""


def make_scorer(scorer: ScorerLike) -> Scorer:
    """A Scorer from a name, a `[scorer]` table, or a function of a response's text; a Scorer stays as it is.

    Names and kinds: `vader`, `repetition`, `length`, `distinct_2`, `loop`, `lexicon`, `pattern`, `contains_answer`,
    `follows_instruction`, `likelihood`, `off_option_mass`, `logit_judge`, `endpoint_judge`, `classifier`.

    Raises:
        ValueError: for an unknown name or kind, or a key that the kind does not take.

    Example:
        >>> score = make_scorer({"kind": "lexicon", "positive": ["indeed"], "negative": ["yeah"]})
        >>> score.name, score([Answer(Question("Is it late?"), "Yeah.")])
        ('lexicon', [-1.0])
        >>> make_scorer(len).name
        'len'
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
    """Checks a scorer without building it, since building may load a model: for a plan, and to check a file.

    Raises:
        ValueError: for an unknown name or kind, a key that the kind does not take or that is missing, or a value that
            can be checked without a model, such as a regular expression.

    Example:
        >>> unmade_scorer({"kind": "likelihood", "form": "multiple_choice"}).reads
        'multiple_choice'
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
    if kind in _LIGHT:
        make_scorer({**table, "kind": kind})  # refuses a wrong value
    return Unmade(kind, table.get("form", "completion") if kind in ("likelihood", "off_option_mass") else "text")


def scorer_kinds() -> dict[str, dict[str, Any]]:
    """Kind of scorer -> key of its table -> default; `...` for a key that it needs.

    Example:
        >>> scorer_kinds()["pattern"]
        {'pattern': Ellipsis}
    """
    return {
        kind: {
            key: ... if parameter.default is inspect.Parameter.empty else parameter.default
            for key, parameter in inspect.signature(make).parameters.items()
        }
        for kind, make in _KINDS.items()
    }


@dataclass(frozen=True)
class Unmade:
    """A scorer that is checked but not built: it knows what it would read, and cannot score.

    Attributes:
        name: kind of the scorer.
        reads: what the scorer would read of an answer.
    """

    name: str
    reads: Reads

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        raise RuntimeError(f"scorer must be built before it can score, got the unbuilt {self.name!r}. Use make_scorer.")


def _table_of(scorer: Any) -> tuple[str, dict[str, Any]]:
    """The kind that a name or table names, and the table's other keys, all in today's words."""
    table = dict(scorer) if isinstance(scorer, Mapping) else {"kind": scorer}
    kind = _renamed(table.pop("kind", None), _KINDS)
    if not isinstance(kind, str) or kind not in _KINDS:
        known = ", ".join(map(repr, _KINDS))
        raise ValueError(f"scorer must be a Scorer, a function, or one of {known}, got {kind!r}.")
    if "form" in table:
        table["form"] = _renamed(table["form"], get_args(Form))
    return kind, table


def _renamed(word: Any, known: Collection[str]) -> Any:
    """Today's word for an old one, with a warning; any other value as it is."""
    new = _OLD_NAMES.get(word) if isinstance(word, str) else None
    if new not in known:
        return word
    warnings.warn(f"{word!r} is now {new!r}; the old name still works.", stacklevel=4)
    return new


def _refusal(kind: str, table: Mapping[str, Any], error: TypeError) -> ValueError:
    keys = [repr(key) for key in inspect.signature(_KINDS[kind]).parameters]
    allowed = f"the key{'s' * (len(keys) > 1)} {', '.join(keys)}" if keys else "no key"
    given = ", ".join(map(repr, table)) or "no key"
    reason = str(error).partition(") ")[2] or error
    return ValueError(f"scorer {kind!r} takes {allowed}, got {given}: {reason}.")


def _lexicon(positive: Any = (), negative: Any = ()) -> Scorer:
    for name, given in (("positive", positive), ("negative", negative)):
        text_list(given, f"{name} of scorer 'lexicon'", none=True)  # a str would become a list of letters
    return OfText("lexicon", Lexicon(tuple(positive), tuple(negative)))


def _classifier(model: str, pairs: str, seed: int = 0) -> Scorer:
    from rt_lens.evaluation.classifier import classifier_of  # scikit-learn, which no other scorer needs

    return classifier_of(load_model(model), load_pairs(pairs), seed=seed)


_LIGHT = {"lexicon", "pattern", "likelihood", "off_option_mass"}
"""Kinds that check their table when they are made, and load nothing."""

_KINDS: dict[str, Callable[..., Scorer]] = {
    "vader": lambda: OfText("vader", vader),
    "repetition": lambda: OfText("repetition", repetition),
    "length": lambda: OfText("length", length),
    "distinct_2": lambda: OfText("distinct_2", distinct),
    "loop": lambda: OfText("loop", loops, share=True),
    "lexicon": _lexicon,
    "pattern": lambda pattern: OfText("pattern", Pattern(pattern), share=True),
    "contains_answer": ContainsAnswer,
    "follows_instruction": FollowsInstruction,
    "likelihood": Likelihood,
    "off_option_mass": OffOptionMass,
    "logit_judge": LogitJudge,
    "endpoint_judge": EndpointJudge,
    "classifier": _classifier,
}
