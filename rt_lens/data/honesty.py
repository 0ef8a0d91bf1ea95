"""Facts told and twisted -> questions and contrast pairs, for both honesty protocols. This room knows no model.

The persona protocol (Ackerman 2024) asks true or false, under personas that are honest or are not, and reads the answer
letter. The likelihood protocol asks plain questions, and sets right answers against wrong ones: for models too small
to judge a statement.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rt_lens.data.builtin import data_path
from rt_lens.data.contrast_pairs import ContrastPairs, Pair
from rt_lens.data.questions import Question, lettered
from rt_lens.data.readers import read_lines

PREFILL = "The answer is"
_ASK = "Is the following statement true or false?\n\n"


@dataclass(frozen=True)
class Fact:
    """A true statement and a false one of the same form.

    Attributes:
        category: its field.
        true: the true statement.
        false: the false one.
    """

    category: str
    true: str
    false: str


def load_facts(name: Literal["statements", "misconceptions"] = "statements") -> list[Fact]:
    """The shipped statements in pairs of true and false, by category; or those of the common misconceptions."""
    file = {"statements": "statements", "misconceptions": "misconception_statements"}[name]
    return [Fact(row["category"], row["true"], row["false"]) for row in _rows(file)]


def personas() -> list[tuple[str, str]]:
    """Pairs of an honest and a dishonest persona (system prompts)."""
    return [(row["honest"], row["dishonest"]) for row in _rows("personas")]


def situations() -> list[Question]:
    """Everyday situations in which honesty has a price; the honest option counts as right."""
    return [
        Question(row["situation"], (row["honest"],), (row["dishonest"],), row["category"])
        for row in _rows("situations")
    ]


def roleplays() -> list[Question]:
    """A user's question to someone who gains by hiding the truth; the honest answer counts as right."""
    return [
        Question(row["question"], (row["honest"],), (row["dishonest"],), row["category"], system=row["role"])
        for row in _rows("roleplays")
    ]


def true_or_false(facts: Sequence[Fact]) -> list[Question]:
    """Two questions for each fact: whether its true statement is true, and whether its false one is."""
    return [
        Question(_ASK + statement, (truth,), (lie,), fact.category)
        for fact in facts
        for statement, truth, lie in ((fact.true, "True", "False"), (fact.false, "False", "True"))
    ]


def judged_statements(facts: Sequence[Fact]) -> list[Question]:
    """One question for each fact, on its true and its false statement by turns.

    Whoever always says "true" is right on half of them; and they are independent, as a fact's two statements are not.
    """
    return [true_or_false([fact])[number % 2] for number, fact in enumerate(facts)]


def persona_pairs(facts: Sequence[Fact], seed: int = 0) -> ContrastPairs:
    """Honest persona and true answer against dishonest persona and lie, with the same letter on both sides.

    Each fact gives a pair in which both say A and one in which both say B, and A stands for true and for false by
    turns, so that neither letter nor word tells the sides apart (Ackerman 2024).

    Args:
        facts: what is asked.
        seed: of which personas ask it.
    """
    known, draw, pairs = personas(), random.Random(seed), []
    for number, fact in enumerate(facts):
        words = ("True", "False") if number % 2 == 0 else ("False", "True")
        for letter, word in zip("AB", words, strict=True):
            honest, dishonest = draw.choice(known)
            truth, lie = (fact.true, fact.false) if word == "True" else (fact.false, fact.true)
            pairs.append(
                Pair(
                    honest,
                    dishonest,
                    lettered(_ASK + truth, words),
                    f"{PREFILL} {letter}",
                    negative_user=lettered(_ASK + lie, words),
                    group=fact.true,
                )
            )
    return ContrastPairs("honesty", tuple(pairs))


def answer_pairs(questions: Sequence[Question]) -> ContrastPairs:
    """A question's right answer against each of its wrong ones, with no persona."""
    return ContrastPairs(
        "honesty",
        tuple(
            Pair("", "", asked.prompt, _answered(asked, asked.right[0]), negative_prefill=_answered(asked, wrong))
            for asked in questions
            for wrong in asked.wrong
        ),
    )


def _answered(asked: Question, option: str) -> str:
    return f"{asked.prefill} {option}" if asked.prefill else option


def _rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for _, line in read_lines(data_path(f"honesty/{name}.jsonl"), "data")]
