"""What a model is asked, and what it said. This room reads files and knows no model."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

from rt_lens.prompts import ContrastPairs
from rt_lens.shipped import QUESTIONS, question_file


@dataclass(frozen=True, slots=True)
class Question:
    """Something to ask, with the options to choose from where there are any.

    Attributes:
        prompt: what the user says.
        right: options that count for the behaviour (right answers); several are other ways to say it.
        wrong: options that count against it.
        category: for results by category, and for holding whole categories out.
        system: a persona or instruction.
        opener: first words of the answer, already written.
        check: what a scorer needs to know of this question (`Obeys` reads it).

    Raises:
        ValueError: if the prompt is empty, or an option is empty or on both sides.

    Example:
        >>> Question("What is the capital of France?", right=("Paris",), wrong=("Lyon", "Madrid"))
    """

    prompt: str
    right: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    category: str = ""
    system: str = ""
    opener: str = ""
    check: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("prompt: a question's is empty. Fill it in.")
        for side in ("right", "wrong"):
            if isinstance(getattr(self, side), str):
                raise ValueError(f"{side}: one string came for {self.prompt[:60]!r}. Put it in brackets.")
        options = [*self.right, *self.wrong]
        if not all(option.strip() for option in options) or len(set(options)) < len(options):
            raise ValueError(f"options: {options} came for {self.prompt[:60]!r}; each wants text of its own.")

    @property
    def options(self) -> tuple[str, ...]:
        """The right ones, then the wrong ones."""
        return (*self.right, *self.wrong)


@dataclass(frozen=True)
class Likelihoods:
    """How likely a model finds the options of one question, as its answer.

    Attributes:
        totals: natural log-likelihood of each option, summed over its tokens; averaged over the orders asked.
        sizes: tokens of each.
        other: probability that is left to anything else, averaged over the orders.
    """

    totals: tuple[float, ...]
    sizes: tuple[int, ...]
    other: float


@dataclass(frozen=True)
class Answer:
    """What a model said to one question: all that a scorer may read.

    Attributes:
        question: what was asked.
        text: what it wrote; empty where nothing was to be read of it.
        options: form (`answers`, `letters`) -> the options' likelihoods, where they were measured.
        baseline: what the model it is compared with wrote to the same question, for judges of pairs.
    """

    question: Question
    text: str = ""
    options: Mapping[str, Likelihoods] = field(default_factory=dict)
    baseline: str | None = None


LETTERS = "ABCDEFGHIJ"


def lettered(prompt: str, options: Sequence[str]) -> str:
    """A question with its options listed under A, B, ..., of which a letter is wanted."""
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return f"{prompt}\n\n{lines}\n\nAnswer with the letter only."


Asked: TypeAlias = ContrastPairs | Sequence[str] | Sequence[Question]
"""Contrast pairs (each topic once, with no persona), prompts, or questions."""


def as_questions(asked: Asked) -> list[Question]:
    """Whatever is to be asked, as questions.

    Raises:
        ValueError: if there is none, or one string came for a list.
    """
    if isinstance(asked, ContrastPairs):
        return [Question(topic) for topic in asked.topics]
    if isinstance(asked, str) or not asked:
        raise ValueError("prompts: a list of at least one text is wanted. Put a single text in brackets.")
    return [each if isinstance(each, Question) else Question(each) for each in asked]


def load_questions(name_or_path: str | Path) -> list[Question]:
    """Questions of a shipped set (`capitals`, `arithmetic`, `honesty`, ...), or of a file of your own.

    Lines of JSONL and rows of CSV have the field `prompt` (or `question`) and, if wanted, `right` (or `answers`),
    `wrong`, `category`, `system`, `opener`; in CSV several options are parted by `|`. A .txt file has a prompt a line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: unknown ending, a field that is not known, or a question without a prompt; the message says where.
    """
    path = question_file(name_or_path)
    if not path.is_file():
        known = ", ".join(QUESTIONS)
        raise FileNotFoundError(f"questions: there is no file {path}. Give a .jsonl, .csv or .txt file, or: {known}.")
    if path.suffix == ".jsonl":
        rows = [(number, _object(line)) for number, line in _lines(path)]
    elif path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            rows = [(reader.line_num, _split(row)) for row in reader]
    elif path.suffix == ".txt":
        rows = [(number, {"prompt": line.strip()}) for number, line in _lines(path)]
    else:
        raise ValueError(f"questions: {path.name} has an unknown ending. Give a .jsonl, .csv or .txt file.")
    if not rows:
        raise ValueError(f"questions: {path.name} holds none. Write at least one.")
    return [question_of(row, f"{path.name}, line {number}") for number, row in rows]


def question_of(row: Any, where: str = "a question") -> Question:
    """A question from a JSON object: `question` also serves for `prompt`, and `answers` for `right`.

    Raises:
        ValueError: for a field that is not known, or a question without a prompt; the message says where.
    """
    if not isinstance(row, dict):
        raise ValueError(f"questions: {where} is no JSON object. Each needs a prompt.")
    given: dict[Any, Any] = row
    if None in given:  # what csv calls the cells beyond the last column
        raise ValueError(f"questions: {where} has more cells than columns. Put texts with commas in quotes.")
    also = {"question": "prompt", "answers": "right"}
    named: dict[str, Any] = {also.get(key, key): value for key, value in given.items()}
    if "kind" in named:  # a check of the answer, see `Obeys`
        named["check"] = {key: named.pop(key) for key in set(named) - {each.name for each in fields(Question)}}
    known = [each.name for each in fields(Question)]
    if unknown := sorted(set(named) - set(known)):
        raise ValueError(f"questions: {where} has {', '.join(unknown)}; known are {', '.join(known)}.")
    for side in ("right", "wrong"):
        if side in named:
            named[side] = _options(named[side], f"{where}, {side}")
    try:
        return Question(**named)
    except (TypeError, AttributeError):
        raise ValueError(f"questions: {where} lacks a prompt, or has a field that is no text. Mend it.") from None
    except ValueError as error:
        raise ValueError(f"questions: {where}: {error}") from None


def _lines(path: Path) -> list[tuple[int, str]]:
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _object(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _split(row: Mapping[Any, Any]) -> dict[Any, Any]:
    """A CSV row, with its options parted; empty cells are left out."""
    return {
        key: value.split("|") if key in ("right", "answers", "wrong") else value
        for key, value in row.items()
        if value not in (None, "")
    }


def _options(value: Any, where: str) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not all(isinstance(each, str) for each in given):
        raise ValueError(f"questions: {where} is {value!r}; a list of texts is wanted.")
    return tuple(each.strip() for each in given)
