"""What a model said -> numbers. One callable type, whatever is read of the answers and whoever judges them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from rt_lens.common.statistics.calibration import calibration_curve
from rt_lens.data.questions import Answer, Likelihoods, Question

Reads = Literal["text", "answers", "letters"]
"""What of an answer is read: what the model wrote, or how likely it found the options in one of two forms."""


@runtime_checkable
class Scorer(Protocol):
    """Answers in, one number for each out; higher means more of the behaviour.

    It sees all answers of one arm at once, so that a judge can work in batches, and never the model that gave them.

    Attributes:
        name: for tables.
        reads: what of the answers is read, and so has to be measured.
        share: whether every number is 0 or 1, so that a mean is a share (`is_share` reads it; False if it is missing).
    """

    @property
    def name(self) -> str: ...

    @property
    def reads(self) -> Reads: ...

    def __call__(self, answers: Sequence[Answer]) -> Sequence[float]: ...


def is_share(scorer: Scorer) -> bool:
    """Whether a scorer gives 0 or 1 (a tie may give a half)."""
    return bool(getattr(scorer, "share", False))


@dataclass(frozen=True)
class OfText:
    """A scorer from a function of one answer's text.

    Attributes:
        name: for tables.
        score: text to number.
        share: whether it gives 0 or 1.
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
    """VADER's compound mood, from -1 (sad) to 1 (happy) (Hutto and Gilbert 2014)."""
    return float(_vader().polarity_scores(answer)["compound"])


@dataclass(frozen=True)
class Lexicon:
    """Balance of two word lists: (positive - negative) / (positive + negative) matches, 0 where there is none.

    Attributes:
        positive: words or phrases that count for the behaviour.
        negative: words or phrases that count against it.
    """

    positive: tuple[str, ...]
    negative: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.positive or not self.negative:
            raise ValueError("scorer: a lexicon needs words in both lists, positive and negative.")

    def __call__(self, answer: str) -> float:
        hits, misses = (len(_words(words).findall(_plain(answer))) for words in (self.positive, self.negative))
        return (hits - misses) / (hits + misses) if hits + misses else 0.0


@dataclass(frozen=True)
class Pattern:
    """1 for an answer in which a regular expression is found, else 0.

    Attributes:
        pattern: as Python's `re` reads it; case does not matter.
    """

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"scorer: the pattern {self.pattern!r} is no regular expression ({error}).") from None

    def __call__(self, answer: str) -> float:
        return float(re.search(self.pattern, answer, re.IGNORECASE) is not None)


@cache
def _words(words: tuple[str, ...]) -> re.Pattern[str]:
    # Longest first, so that "kind of" is not taken for "kind".
    either = "|".join(re.escape(word.lower()) for word in sorted(words, key=len, reverse=True))
    return re.compile(rf"(?<![\w'])(?:{either})(?![\w'])")


def _plain(text: str) -> str:
    return text.lower().replace("’", "'")


@dataclass(frozen=True)
class ContainsAnswer:
    """1 for an answer that names a right option and no wrong one, as whole words, else 0. Case does not matter."""

    name: str = "names_right"
    reads: Reads = "text"
    share: bool = True

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        return [float(self._right(answer)) for answer in answers]

    @staticmethod
    def _right(answer: Answer) -> bool:
        asked, text = answer.question, _plain(answer.text)
        if not asked.right:
            raise ValueError(f"scorer: {asked.prompt[:60]!r} has no right option to look for. Give it one.")
        wrong = bool(asked.wrong) and _words(asked.wrong).search(text) is not None
        return _words(asked.right).search(text) is not None and not wrong


@dataclass(frozen=True)
class Likelihood:
    """How the right options of a question fare against the wrong ones, by likelihood.

    An option's share is its likelihood divided by that of all options; ways to say the right answer add up.

    Attributes:
        measure: `accuracy` (1 where the likeliest option is right; ties count by half), `share` (of the right options,
            0 to 1), or `margin` (that share minus the likeliest wrong option's, -1 to 1).
        form: `answers` or `letters`, see `likelihoods`.
        per_token: divide each log-likelihood by its number of tokens first, so that length does not decide.
    """

    measure: Literal["accuracy", "share", "margin"] = "share"
    form: Literal["answers", "letters"] = "answers"
    per_token: bool = False

    def __post_init__(self) -> None:
        if self.measure not in ("accuracy", "share", "margin") or self.form not in ("answers", "letters"):
            raise ValueError(
                f"scorer: measure {self.measure!r}, form {self.form!r} came; 'accuracy', 'share' or 'margin', and "
                "'answers' or 'letters' are wanted."
            )

    @property
    def name(self) -> str:
        return "_".join(["likelihood", self.measure, *(["letters"] if self.form == "letters" else []),
                         *(["per_token"] if self.per_token else [])])  # fmt: skip

    @property
    def reads(self) -> Reads:
        return self.form

    @property
    def share(self) -> bool:
        return self.measure == "accuracy"

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        return [self._score(answer) for answer in answers]

    def _score(self, answer: Answer) -> float:
        asked = answer.question
        if not asked.right or not asked.wrong:
            raise ValueError(f"scorer: {asked.prompt[:60]!r} wants right and wrong options to choose from.")
        shares = option_shares(answer.options[self.form], per_token=self.per_token)
        right, wrong = shares[: len(asked.right)], shares[len(asked.right) :]
        if self.measure == "accuracy":
            return 0.5 if max(right) == max(wrong) else float(max(right) > max(wrong))
        return sum(right) - (max(wrong) if self.measure == "margin" else 0.0)


@dataclass(frozen=True)
class OffOptionMass:
    """Probability left to anything but the options: refusals, other words, other forms of an answer.

    Attributes:
        form: `answers` or `letters`, see `likelihoods`.
    """

    form: Literal["answers", "letters"] = "answers"

    @property
    def name(self) -> str:
        return "other_letters" if self.form == "letters" else "other"

    @property
    def reads(self) -> Reads:
        return self.form

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        return [answer.options[self.form].other for answer in answers]


def calibration(answers: Sequence[Answer], form: Literal["answers", "letters"] = "answers") -> pd.DataFrame:
    """How often the option found likeliest is right, by the share of likelihood that it has.

    Args:
        answers: with options measured, see `ask`; several ways to say the right answer count as one option.
        form: `answers` or `letters`.

    Returns:
        The columns of `rt_lens.common.statistics.calibration_curve`: a row for each tenth of the share that occurs.

    Example:
        >>> calibration(ask(model, load_questions("capitals"), {"answers"}))
    """
    surest, right = [], []
    for answer in answers:
        shares = option_shares(answer.options[form])
        n = len(answer.question.right)
        sides = [sum(shares[:n]), *shares[n:]]
        surest.append(max(sides))
        right.append(float(sides[0] == max(sides)))
    return calibration_curve(surest, right)


def option_shares(found: Likelihoods, *, per_token: bool = False) -> list[float]:
    """Each option's likelihood as a share of all options'."""
    totals = np.asarray(found.totals, dtype=float)
    values = totals / np.asarray(found.sizes) if per_token else totals
    odds = np.exp(values - values.max())
    return list(map(float, odds / odds.sum()))


@dataclass(frozen=True)
class FollowsInstruction:
    """1 for an answer that does what its question's `check` says, else 0: a check of following instructions.

    Checks: `one_word`, `max_words` (n), `contains` (words), `starts_with` and `ends_with` (text), `upper`, `list`
    (n items), `no_letter` (letter).
    """

    name: str = "obeys"
    reads: Reads = "text"
    share: bool = True

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        return [float(self._obeyed(answer.question, answer.text.strip())) for answer in answers]

    @staticmethod
    def _obeyed(asked: Question, text: str) -> bool:
        check, words = asked.check, text.split()
        kind = check.get("kind")
        if kind == "one_word":
            return len(words) == 1
        if kind == "max_words":
            return 1 <= len(words) <= check["n"]
        if kind == "contains":
            return all(word.lower() in text.lower() for word in check["words"])
        if kind == "starts_with":
            return text.lower().startswith(check["text"].lower())
        if kind == "ends_with":
            return text.lower().rstrip(" .!\"'").endswith(check["text"].lower().rstrip(" .!"))
        if kind == "upper":
            return text.upper() == text and text.lower() != text
        if kind == "list":
            return len(re.findall(r"^\s*(?:\d+[.)]|[-*•])\s+\S", text, re.MULTILINE)) == check["n"]
        if kind == "no_letter":
            return bool(text) and check["letter"].lower() not in text.lower()
        raise ValueError(f"scorer: {asked.prompt[:60]!r} has no check that is known ({kind!r} came).")
