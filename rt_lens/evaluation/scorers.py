"""From a model's responses to numbers: one callable type, whatever a scorer reads and whoever judges.

A scorer sees questions, texts and likelihoods, and never the model that produced them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol, TypeAlias, get_args, runtime_checkable

import numpy as np
import pandas as pd
from jaxtyping import Float

from rt_lens.common.statistics.calibration import calibration_curve
from rt_lens.data.questions import Answer, Likelihoods, Question

Form: TypeAlias = Literal["completion", "multiple_choice"]
"""How options are put to a model. `completion`: each option follows the question as its response;
`multiple_choice`: the options are listed under letters, and the letters are compared."""

Reads: TypeAlias = Literal["text", "completion", "multiple_choice"]
"""What a scorer reads of an answer: the generated text, or the likelihoods of the options in one of the two forms."""


@runtime_checkable
class Scorer(Protocol):
    """A callable from answers to one number each; a higher number means more of the behaviour.

    A scorer receives all answers of one arm at once, so that a judge can work in batches. It never sees the model.

    Attributes:
        name: the scorer's name in tables.
        reads: what the scorer reads of an answer; `ask` measures only that.
        share: optional; True if every number is 0 or 1, so that a mean is a share with Wilson's interval.

    Example:
        >>> class Exclamations:
        ...     name, reads = "exclamations", "text"
        ...
        ...     def __call__(self, answers):
        ...         return [float(answer.text.count("!")) for answer in answers]
        >>> isinstance(Exclamations(), Scorer)
        True
        >>> Exclamations()([Answer(Question("How are you?"), "Great! You?")])
        [1.0]
    """

    @property
    def name(self) -> str: ...

    @property
    def reads(self) -> Reads: ...

    def __call__(self, answers: Sequence[Answer]) -> Sequence[float]: ...


def is_share(scorer: Scorer) -> bool:
    """Whether a scorer gives 0 or 1 for each answer (a tie may give 0.5)."""
    return bool(getattr(scorer, "share", False))


@dataclass(frozen=True)
class OfText:
    """A scorer made of a function of the response's text.

    Attributes:
        name: the scorer's name in tables.
        score: function from a text to a number.
        share: True if the function gives 0 or 1.

    Example:
        >>> n_characters = OfText("n_characters", len)
        >>> n_characters([Answer(Question("How are you?"), "Fine.")])
        [5.0]
    """

    name: str
    score: Callable[[str], float]
    reads: Reads = "text"
    share: bool = False

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        return [float(self.score(answer.text)) for answer in answers]


@cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def vader(answer: str) -> float:
    """VADER's compound sentiment, from -1 (sad) to 1 (happy) (Hutto and Gilbert 2014).

    Example:
        >>> vader("I am so happy, this is wonderful!") > 0.5
        True
        >>> vader("I am miserable.") < 0 == vader("The box is here.")
        True
    """
    return float(_vader().polarity_scores(answer)["compound"])


@dataclass(frozen=True)
class Lexicon:
    """Balance of two word lists: (positive - negative) / (positive + negative) matches, 0 without a match.

    Matches are whole words or phrases, in any case.

    Attributes:
        positive: words or phrases that count for the behaviour.
        negative: words or phrases that count against it.

    Raises:
        ValueError: if one of the lists is empty.

    Example:
        >>> formality = Lexicon(("therefore", "indeed"), ("yeah", "kind of"))
        >>> formality("Yeah, it is kind of late, therefore I leave.")
        -0.333...
    """

    positive: tuple[str, ...]
    negative: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.positive or not self.negative:
            raise ValueError(
                f"scorer 'lexicon' must have words in both lists, got positive={list(self.positive)} and "
                f"negative={list(self.negative)}. Add at least one word to each."
            )

    def __call__(self, answer: str) -> float:
        hits, misses = (len(_any_of(words).findall(_plain(answer))) for words in (self.positive, self.negative))
        return (hits - misses) / (hits + misses) if hits + misses else 0.0

    def matches(self, answer: str) -> list[str]:
        """The words and phrases of both lists that occur in a text, in lower case."""
        return [match for words in (self.positive, self.negative) for match in _any_of(words).findall(_plain(answer))]


@dataclass(frozen=True)
class Pattern:
    """1 for a response in which a regular expression matches anywhere, else 0.

    Attributes:
        pattern: a regular expression of Python's `re`; case does not matter.

    Raises:
        ValueError: if it is not a valid regular expression.

    Example:
        >>> refuses = Pattern(r"\\b(sorry|cannot)\\b")
        >>> refuses("I am SORRY, no."), refuses("Sure!")
        (1.0, 0.0)
    """

    pattern: str

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise ValueError(
                f"scorer 'pattern' must have a regular expression as text, got {self.pattern!r}. For several words "
                r"write '\b(one|two)\b'."
            )
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"scorer 'pattern' must have a valid regular expression, got {self.pattern!r} ({error}). Escape "
                "special characters with a backslash."
            ) from None

    def __call__(self, answer: str) -> float:
        return float(re.search(self.pattern, answer, re.IGNORECASE) is not None)

    def matches(self, answer: str) -> list[str]:
        """What the expression matches in a text."""
        return [match[0] for match in re.finditer(self.pattern, answer, re.IGNORECASE)]


@cache
def _any_of(phrases: tuple[str, ...]) -> re.Pattern[str]:
    """Expression that matches any of the phrases as whole words."""
    # Longest first, so that "kind of" does not match as "kind".
    either = "|".join(re.escape(phrase.lower()) for phrase in sorted(phrases, key=len, reverse=True))
    return re.compile(rf"(?<![\w'])(?:{either})(?![\w'])")


def _plain(text: str) -> str:
    return text.lower().replace("’", "'")


@dataclass(frozen=True)
class ContainsAnswer:
    """1 for a response that contains a right option and no wrong one, as whole words, else 0. Case does not matter.

    Example:
        >>> question = Question("What is 20 + 18?", right=("38",), wrong=("40",))
        >>> ContainsAnswer()([Answer(question, text) for text in ("It is 38.", "It is 138.", "38 or 40.")])
        [1.0, 0.0, 0.0]
    """

    name: str = "contains_answer"
    reads: Reads = "text"
    share: bool = True

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        return [float(self._is_right(answer)) for answer in answers]

    def _is_right(self, answer: Answer) -> bool:
        question, text = answer.question, _plain(answer.text)
        if not question.right:
            raise ValueError(
                f"scorer {self.name!r} must have questions with right options, got none for "
                f"{question.prompt[:60]!r}. Add them, as in Question(prompt, right=('Paris',))."
            )
        wrong = bool(question.wrong) and _any_of(question.wrong).search(text) is not None
        return _any_of(question.right).search(text) is not None and not wrong


_MEASURES = ("accuracy", "share", "margin", "log_odds")


@dataclass(frozen=True)
class Likelihood:
    """How likely the model finds the right options of a question, compared with the wrong ones.

    An option's share is its likelihood divided by the likelihood of all options. Several right options add up, since
    they are ways to say the same.

    Attributes:
        measure: `accuracy` (1 if the likeliest option is right; a tie counts 0.5), `share` (of the right options, 0 to
            1), `margin` (that share minus the share of the likeliest wrong option, -1 to 1), or `log_odds` (natural
            logarithm of right over wrong options, which has no ceiling: the propensity of Tan et al. 2024).
        form: `completion` or `multiple_choice`, see `likelihoods`.
        per_token: divide each log-likelihood by its number of tokens first, so that length does not decide.

    Raises:
        ValueError: for an unknown measure or form; when called, for a question without right and wrong options.

    Example:
        >>> capitals = [question for question in load_questions("capitals") if question.wrong][:3]
        >>> scores = Likelihood("share")(ask(model, capitals, {"completion"}))
        >>> len(scores), all(0 <= share <= 1 for share in scores)
        (3, True)
    """

    measure: Literal["accuracy", "share", "margin", "log_odds"] = "share"
    form: Form = "completion"
    per_token: bool = False

    def __post_init__(self) -> None:
        if self.measure not in _MEASURES:
            known = ", ".join(map(repr, _MEASURES))
            raise ValueError(f"scorer 'likelihood' must have as measure one of {known}, got {self.measure!r}.")
        check_form(self.form)

    @property
    def name(self) -> str:
        form = ["multiple_choice"] if self.form == "multiple_choice" else []
        return "_".join(["likelihood", self.measure, *form, *(["per_token"] if self.per_token else [])])

    @property
    def reads(self) -> Reads:
        return self.form

    @property
    def share(self) -> bool:
        return self.measure == "accuracy"

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        return [self._score(answer) for answer in answers]

    def _score(self, answer: Answer) -> float:
        question = answer.question
        if not question.right or not question.wrong:
            raise ValueError(
                f"scorer {self.name!r} must have questions with right and wrong options, got "
                f"{len(question.right)} right and {len(question.wrong)} wrong for {question.prompt[:60]!r}. Add "
                "options, as in Question(prompt, right=('Paris',), wrong=('Lyon',))."
            )
        options = answer.options[self.form]
        if self.measure == "log_odds":
            logs, n = _logs(options, self.per_token), len(question.right)
            return float(np.logaddexp.reduce(logs[:n]) - np.logaddexp.reduce(logs[n:]))
        shares = option_shares(options, per_token=self.per_token)
        right, wrong = shares[: len(question.right)], shares[len(question.right) :]
        if self.measure == "accuracy":
            return 0.5 if max(right) == max(wrong) else float(max(right) > max(wrong))
        return sum(right) - (max(wrong) if self.measure == "margin" else 0.0)


def check_form(form: str) -> None:
    """Raises ValueError for a word that names no form."""
    if form not in get_args(Form):
        raise ValueError(f"form must be 'completion' or 'multiple_choice', got {form!r}.")


@dataclass(frozen=True)
class OffOptionMass:
    """Probability the model leaves to anything but the options: refusals, other words, other forms of a response.

    Attributes:
        form: `completion` or `multiple_choice`, see `likelihoods`.

    Raises:
        ValueError: for an unknown form.

    Example:
        >>> capitals = load_questions("capitals")[:2]
        >>> masses = OffOptionMass()(ask(model, capitals, {"completion"}))
        >>> all(0 <= mass <= 1 for mass in masses)
        True
        >>> OffOptionMass("multiple_choice").name
        'off_option_mass_multiple_choice'
    """

    form: Form = "completion"

    def __post_init__(self) -> None:
        check_form(self.form)

    @property
    def name(self) -> str:
        return "off_option_mass_multiple_choice" if self.form == "multiple_choice" else "off_option_mass"

    @property
    def reads(self) -> Reads:
        return self.form

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        return [answer.options[self.form].off_options for answer in answers]


def calibration(answers: Sequence[Answer], form: Form = "completion") -> pd.DataFrame:
    """How often the likeliest option is right, by the share of likelihood that it has.

    Args:
        answers: answers with their options measured, see `ask`. Several right options count as one.
        form: `completion` or `multiple_choice`.

    Returns:
        The columns of `rt_lens.common.statistics.calibration_curve`: one row for each tenth of the share that occurs.

    Example:
        >>> capitals = load_questions("capitals")[:4]
        >>> table = calibration(ask(model, capitals, {"completion"}))
        >>> list(table.columns)
        ['bin_low', 'bin_high', 'n', 'predicted', 'right', 'low', 'high']
        >>> int(table["n"].sum())
        4
    """
    highest, right = [], []
    for answer in answers:
        shares = option_shares(answer.options[form])
        n_right = len(answer.question.right)
        joined = [sum(shares[:n_right]), *shares[n_right:]]
        highest.append(max(joined))
        right.append(float(joined[0] == max(joined)))
    return calibration_curve(highest, right)


def option_shares(options: Likelihoods, *, per_token: bool = False) -> list[float]:
    """Each option's likelihood as a share of all options' likelihood.

    Args:
        options: log-likelihoods of one question's options.
        per_token: divide each log-likelihood by its number of tokens first.

    Example:
        >>> two = likelihoods(model, [Question("Is ice cold?", ("Yes",), ("No",))])[0]
        >>> shares = option_shares(two)
        >>> len(shares), round(sum(shares), 6)
        (2, 1.0)
    """
    values = _logs(options, per_token)
    odds = np.exp(values - values.max())
    return list(map(float, odds / odds.sum()))


def _logs(options: Likelihoods, per_token: bool) -> Float[np.ndarray, "option"]:
    totals = np.asarray(options.totals, dtype=float)
    return totals / np.asarray(options.sizes) if per_token else totals


@dataclass(frozen=True)
class FollowsInstruction:
    """1 for a response that passes its question's `check`, else 0: instructions that a program can verify.

    Checks: `one_word`, `max_words` (n), `contains` (words), `starts_with` and `ends_with` (text), `upper`, `list`
    (n items), `no_letter` (letter).

    Example:
        >>> question = Question("Name a colour in one word.", check={"kind": "one_word"})
        >>> FollowsInstruction()([Answer(question, "Green."), Answer(question, "I like green.")])
        [1.0, 0.0]
    """

    name: str = "follows_instruction"
    reads: Reads = "text"
    share: bool = True

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        return [float(self._passes(answer.question, answer.text.strip())) for answer in answers]

    def _passes(self, question: Question, text: str) -> bool:
        kind = question.check.get("kind")
        passes = _CHECKS.get(kind) if isinstance(kind, str) else None
        if passes is None:
            raise ValueError(
                f"scorer {self.name!r} must have questions whose check is one of {', '.join(_CHECKS)}, got {kind!r} "
                f"for {question.prompt[:60]!r}. Add one, as in Question(prompt, check={{'kind': 'one_word'}})."
            )
        return passes(text, question.check)


def _has_items(text: str, check: Any) -> bool:
    return len(re.findall(r"^\s*(?:\d+[.)]|[-*•])\s+\S", text, re.MULTILINE)) == check["n"]


_CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "one_word": lambda text, _: len(text.split()) == 1,
    "max_words": lambda text, check: 1 <= len(text.split()) <= check["n"],
    "contains": lambda text, check: all(word.lower() in text.lower() for word in check["words"]),
    "starts_with": lambda text, check: text.lower().startswith(check["text"].lower()),
    "ends_with": lambda text, check: text.lower().rstrip(" .!\"'").endswith(check["text"].lower().rstrip(" .!")),
    "upper": lambda text, _: text.upper() == text and text.lower() != text,
    "list": _has_items,
    "no_letter": lambda text, check: bool(text) and check["letter"].lower() not in text.lower(),
}
"""Kind of check -> whether a response passes it."""
