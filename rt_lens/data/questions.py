"""What a model is asked, and what it said. This room reads files and knows no model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

from rt_lens.common.inputs import as_text, listed
from rt_lens.data.builtin import QUESTIONS, question_file
from rt_lens.data.contrast_pairs import ContrastPairs
from rt_lens.data.readers import ROW_ENDINGS, Row, current_names, read_lines, read_rows, refuse_misspelt


@dataclass(frozen=True, slots=True)
class Question:
    """Something to ask, with the options to choose from where there are any.

    Attributes:
        prompt: what the user says.
        right: options that count for the behaviour (right answers); several are other ways to say it.
        wrong: options that count against it.
        category: for results by category, and for holding whole categories out.
        system: a persona or instruction.
        prefill: first words of the answer, already written.
        check: what a scorer needs to know of this question (`FollowsInstruction` reads it).

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
    prefill: str = ""
    check: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("prompt", "category", "system", "prefill"):
            if not isinstance(text := getattr(self, name), str):
                raise ValueError(f"{name} must be a text, got {text!r}. Leave rows with empty cells out.")
        if not self.prompt.strip():
            raise ValueError("prompt must be a text, got an empty one. Fill it in.")
        for side in ("right", "wrong"):
            if isinstance(getattr(self, side), str):
                raise ValueError(
                    f"{side} must be a list of texts, got one string for {self.prompt[:60]!r}. Put it in brackets."
                )
        options = [*self.right, *self.wrong]
        if not all(isinstance(option, str) for option in options):
            raise ValueError(f"options of {self.prompt[:60]!r} must be texts, got {options}. Put numbers in quotes.")
        if not all(option.strip() for option in options) or len(set(options)) < len(options):
            raise ValueError(
                f"options of {self.prompt[:60]!r} must be different texts, none of them empty, got {options}. Leave "
                "out those that are empty or occur twice."
            )

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


Asked: TypeAlias = ContrastPairs | Iterable[str] | Iterable[Question]
"""Contrast pairs (each topic once, with no persona), prompts, or questions; a column of a table will do."""


def as_questions(asked: Asked) -> list[Question]:
    """Whatever is to be asked, as questions.

    Raises:
        ValueError: if there is none, one string came for a list, or an item is no text (NaN, None) or empty.
    """
    if isinstance(asked, ContrastPairs):
        return [Question(topic) for topic in asked.topics]
    return [
        each if isinstance(each, Question) else Question(as_text(each, "prompts", number))
        for number, each in enumerate(listed(asked, "prompts"))
    ]


def load_questions(name_or_path: str | Path) -> list[Question]:
    """Questions of a shipped set (`capitals`, `arithmetic`, `honesty`, ...), or of a file of your own.

    Lines of JSONL and rows of CSV (with commas, semicolons or tabs) have the field `prompt` (or `question`) and, if
    wanted, `right` (or `answers`), `wrong`, `category`, `system`, `prefill`; in CSV several options are parted by `|`. A
    .txt file has a prompt a line. Files are UTF-8.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: unknown ending, a field that is not known, a question without a prompt, or a file that is no such
            text; the message says where.
    """
    path = question_file(name_or_path)
    if not path.is_file():
        known = ", ".join(QUESTIONS)
        raise FileNotFoundError(
            f"questions must be a built-in set ({known}) or a .jsonl, .csv or .txt file, got {path}. Check the path."
        )
    ending = path.suffix.lower()
    if ending in ROW_ENDINGS:
        rows = read_rows(path, "questions", [*_FIELDS, *_ALSO])
    elif ending == ".txt":
        lines = read_lines(path, "questions")
        rows = [Row(f"{path.name}, line {number}", {"prompt": line.strip()}) for number, line in lines]
    else:
        raise ValueError(f"questions must be a .jsonl, .csv, .tsv or .txt file, got {path.name}. Rename or convert it.")
    if not rows:
        raise ValueError(f"questions: {path.name} must hold at least one question, got none. Write one.")
    made = (lambda cells: cells) if ending == ".jsonl" else _split
    return [question_of(made(row.cells), row.where) for row in rows]


_FIELDS = tuple(each.name for each in fields(Question))
_ALSO = {"question": "prompt", "answers": "right"}


def question_of(row: Any, where: str = "a question") -> Question:
    """A question from a JSON object: `question` also serves for `prompt`, and `answers` for `right`.

    Raises:
        ValueError: for a field that is not known, or a question without a prompt; the message says where.
    """
    if not isinstance(row, dict):
        raise ValueError(f"questions: {where} must be a JSON object with a prompt, got {row!r}. Write it in braces.")
    given = current_names(row, f"questions: {where}")
    for other, name in _ALSO.items():
        if other in given and name in given:
            raise ValueError(f"questions: {where} must have either {name!r} or {other!r}, got both. Leave one out.")
    named: dict[str, Any] = {_ALSO.get(key, key): value for key, value in given.items()}
    if "kind" in named:  # a check of the answer, see `FollowsInstruction`
        named["check"] = {key: named.pop(key) for key in set(named) - set(_FIELDS)}
    if unknown := refuse_misspelt(Row(where, named), "questions", _FIELDS):
        raise ValueError(
            f"questions: {where} must have no fields but {', '.join(_FIELDS)}, got {', '.join(map(repr, unknown))}. "
            "Leave the others out."
        )
    for side in ("right", "wrong"):
        if side in named:
            named[side] = _options(named[side], f"{where}, {side}")
    try:
        return Question(**named)
    except (TypeError, AttributeError):
        raise ValueError(
            f"questions: {where} must have a prompt, and texts as its fields, got {named!r}. Fill in the prompt, and "
            "put numbers in quotes."
        ) from None
    except ValueError as error:
        raise ValueError(f"questions: {where}: {error}") from None


def _split(cells: Mapping[str, str]) -> dict[str, Any]:
    """A CSV row, with its options parted."""
    return {key: value.split("|") if key in ("right", "answers", "wrong") else value for key, value in cells.items()}


def _options(value: Any, where: str) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not all(isinstance(each, str) for each in given):
        raise ValueError(f"questions: {where} must be a list of texts, got {value!r}. Put numbers in quotes.")
    return tuple(each.strip() for each in given)
