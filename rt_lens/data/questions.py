"""Questions for a model, and its answers. This module reads files and knows no model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

from rt_lens.common.conversations import Conversation, Message
from rt_lens.common.inputs import as_text, listed
from rt_lens.data.builtin import QUESTIONS, question_file
from rt_lens.data.contrast_pairs import ContrastPairs
from rt_lens.data.formats import read_source
from rt_lens.data.readers import ROW_ENDINGS, Row, Table, current_names, read_lines, refuse_misspelt


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt with the options to choose from, if there are any.

    Attributes:
        prompt: the user message, or a `Conversation` of several turns.
        right: options that count for the behaviour (right answers); several are different wordings.
        wrong: options that count against it.
        category: for results by category, and for holding out whole categories.
        system: a persona or instruction.
        prefill: first words of the response.
        check: settings of this question for a scorer (`FollowsInstruction` reads them).

    Raises:
        ValueError: if the prompt is empty, or an option is empty or on both sides.

    Example:
        >>> Question("What is the capital of France?", right=("Paris",), wrong=("Lyon", "Madrid")).options
        ('Paris', 'Lyon', 'Madrid')
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
                raise ValueError(f"{name} must be a string, got {text!r}. Leave rows with empty cells out.")
        if not self.prompt.strip():
            raise ValueError("prompt must be a string, got an empty one. Fill it in.")
        for side in ("right", "wrong"):
            if isinstance(getattr(self, side), str):
                raise ValueError(
                    f"{side} must be a list of texts, got a str for {self.prompt[:60]!r}. Wrap it in a list."
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
        """The right options, then the wrong ones."""
        return (*self.right, *self.wrong)


@dataclass(frozen=True)
class Likelihoods:
    """A model's log-likelihoods of the options of one question.

    Attributes:
        totals: natural log-likelihood of each option, summed over its tokens; averaged over the orders of the options.
        sizes: number of tokens of each option.
        off_options: probability of everything but the options, averaged over the orders.
    """

    totals: tuple[float, ...]
    sizes: tuple[int, ...]
    off_options: float


@dataclass(frozen=True)
class Answer:
    """A model's response to one question: all that a scorer may read.

    Attributes:
        question: the question.
        text: the response; empty if no scorer reads it.
        options: form of the question -> the options' likelihoods, where they were measured.
        baseline: the baseline model's response to the same question, for judges that compare two responses.

    Example:
        >>> answer = Answer(Question("How are you?"), text="Wonderful!", baseline="Fine.")
        >>> answer.question.prompt, answer.text
        ('How are you?', 'Wonderful!')
    """

    question: Question
    text: str = ""
    options: Mapping[str, Likelihoods] = field(default_factory=dict)
    baseline: str | None = None


LETTERS = "ABCDEFGHIJ"


def lettered(prompt: str, options: Sequence[str]) -> str:
    """A question with its options listed as A, B, ..., that asks for a letter."""
    if isinstance(prompt, Conversation):
        return prompt.ending(lettered(prompt.messages[-1]["content"], options))
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return f"{prompt}\n\n{lines}\n\nAnswer with the letter only."


Asked: TypeAlias = ContrastPairs | Iterable[str | Sequence[Message]] | Iterable[Question]
"""Contrast pairs (each topic once, without personas), prompts, conversations or questions; also a column of a table."""


def as_questions(asked: Asked) -> list[Question]:
    """Pairs, prompts or questions, as a list of questions.

    Raises:
        ValueError: for an empty list, for a str instead of a list, or for an item that is empty or no text.
    """
    if isinstance(asked, ContrastPairs):
        if not asked.topics:
            raise ValueError(
                f"prompts must be user messages, got the whole texts of {asked.name!r}. Give prompts to ask."
            )
        return [Question(topic) for topic in asked.topics]
    return [
        item if isinstance(item, Question) else Question(as_text(item, "prompts", number, chats=True))
        for number, item in enumerate(listed(asked, "prompts"))
    ]


def load_questions(source: str | Path | Table, *, form: str | None = None) -> list[Question]:
    """Questions of a built-in set (`capitals`, `arithmetic`, `honesty`, ...), of a file, or of a table in memory.

    Lines of JSONL, items of a JSON list and rows of CSV (with commas, semicolons or tabs), of a pandas frame or of a
    `datasets.Dataset` have the field `prompt` (or `question`) and optionally `right` (or `answers`), `wrong`,
    `category`, `system`, `prefill`; in CSV, `|` separates options. A .txt file has one prompt per line. Files are
    UTF-8.

    Formats of other tools are known by their columns (`rt_lens.data.formats`): model-written evaluations and CAA,
    TruthfulQA, preferences (`chosen`, `rejected`), chats (`messages`), steering-bench.

    Args:
        source: name of a built-in set, path, or table.
        form: what questions with several right options become: `mc1` keeps the best (first) of them, `mc2` (or None)
            all, and `true_false` asks of each option whether it is true.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: an unknown ending, field or form, a question without a prompt, or a file that cannot be read as
            such; the message names the line.

    Example:
        >>> load_questions("capitals")[0]
        Question(prompt='What is the capital of France?', right=('Paris',), wrong=('Lyon', 'Madrid'), ...)
    """
    if form not in (None, *_FORMS):
        raise ValueError(f"form must be one of {', '.join(map(repr, _FORMS))}, got {form!r}. Or leave it out.")
    questions = _file(source) if isinstance(source, str | Path) else _questions(*read_source(source, "questions"))
    return [each for question in questions for each in _FORMS[form](question)] if form else questions


def _file(source: str | Path) -> list[Question]:
    path = question_file(source)
    if not path.is_file():
        known = ", ".join(QUESTIONS)
        raise FileNotFoundError(
            f"questions must be a built-in set ({known}) or a .jsonl, .json, .csv or .txt file, got {path}. Check the "
            "path."
        )
    ending = path.suffix.lower()
    if ending in ROW_ENDINGS:
        return _questions(*read_source(path, "questions"), split=ending in (".csv", ".tsv"))
    if ending != ".txt":
        raise ValueError(
            f"questions must be a .jsonl, .json, .csv, .tsv or .txt file, got {path.name}. Rename or convert it."
        )
    lines = read_lines(path, "questions")
    if not lines:
        raise ValueError(f"questions: {path.name} must hold at least one question, got none. Write one.")
    return [question_of({"prompt": line.strip()}, f"{path.name}, line {number}") for number, line in lines]


def _questions(rows: Sequence[Row], foreign: str | None, *, split: bool = False) -> list[Question]:
    read = _split if split and foreign is None else dict
    return [question_of(read(row.cells), row.where) for row in rows]


def _true_false(question: Question) -> list[Question]:
    """Each option as a statement to be judged."""
    return [
        replace(
            question, prompt=f"{question.prompt}\n\nProposed answer: {option}\n\nIs the proposed answer true or false?",
            right=("True" if truth else "False",), wrong=("False" if truth else "True",),
        )
        for truth, options in ((True, question.right), (False, question.wrong))
        for option in options
    ]  # fmt: skip


_FORMS: dict[str, Callable[[Question], list[Question]]] = {
    "mc1": lambda question: [replace(question, right=question.right[:1])],
    "mc2": lambda question: [question],
    "true_false": _true_false,
}
_FIELDS = tuple(entry.name for entry in fields(Question))
_SYNONYMS = {"question": "prompt", "answers": "right"}


def question_of(row: Any, where: str = "a question") -> Question:
    """A question from a JSON object; `question` is a synonym of `prompt`, and `answers` of `right`.

    Raises:
        ValueError: for an unknown field, or a question without a prompt; the message names the line.
    """
    if not isinstance(row, dict):
        raise ValueError(f"questions: {where} must be a JSON object with a prompt, got {row!r}. Write it in braces.")
    given = current_names(row, f"questions: {where}")
    for other, name in _SYNONYMS.items():
        if other in given and name in given:
            raise ValueError(f"questions: {where} must have either {name!r} or {other!r}, got both. Leave one out.")
    named: dict[str, Any] = {_SYNONYMS.get(key, key): value for key, value in given.items()}
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
    """A CSV row with its options as lists."""
    return {key: value.split("|") if key in ("right", "answers", "wrong") else value for key, value in cells.items()}


def _options(value: Any, where: str) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not all(isinstance(option, str) for option in given):
        raise ValueError(f"questions: {where} must be a list of texts, got {value!r}. Put numbers in quotes.")
    return tuple(option.strip() for option in given)
