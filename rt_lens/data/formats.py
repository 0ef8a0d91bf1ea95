"""Other people's formats, recognised by their columns and never by a file's name, as rows in rt_lens's own columns.

Pairs have the columns `positive`, `negative`, `user`, `prefill` and so on, questions `prompt`, `right`, `wrong`, and
targets `prompt`, `answer`, `rejected`; what each format gives of these is in `FORMATS`. A question with
lettered options, as in Anthropic's model-written evaluations and CAA, is taken apart: the options are known as texts,
and pairs come in both orders of the letters, so that neither side's vector holds a letter.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from rt_lens.common.conversations import Conversation, as_prompt, checked
from rt_lens.data.readers import Row, Table, nearest, read_rows, table_rows

Kind: TypeAlias = Literal["pairs", "questions", "targets"]
Cells: TypeAlias = Mapping[str, Any]
Read: TypeAlias = Callable[[Cells], dict[str, Any]]

OWN = {
    "pairs": ("positive", "negative", "user", "prefill", "negative_user", "negative_prefill", "group"),
    "questions": ("prompt", "question", "right", "answers", "wrong", "category", "system", "prefill"),
    "targets": ("prompt", "answer", "rejected"),
}
"""The columns that rt_lens's own files may have."""


@dataclass(frozen=True)
class Format:
    """Rows with certain columns, and what they are as pairs, questions and targets.

    Attributes:
        name: as a reader knows it.
        columns: all of which the rows have.
        pairs: a row's cells -> those of a pair; None if the format holds none.
        questions: likewise for questions.
        targets: likewise for targets of tuning.
    """

    name: str
    columns: tuple[str, ...]
    pairs: Read | None = None
    questions: Read | None = None
    targets: Read | None = None


class Choices(NamedTuple):
    """A question with lettered options, taken apart.

    Attributes:
        stem: the question without its options.
        options: letter -> text.
        text: the question with its options, as it was.
    """

    stem: str
    options: dict[str, str]
    text: str


_OPTION = re.compile(r"^[ \t]*\(([A-J])\)[ \t]*(.+?)[ \t]*$", re.MULTILINE)
_LETTER = re.compile(r"\s*\(?([A-J])\)?\.?\s*")


def choices_of(text: str) -> Choices | None:
    """A question's lettered options, `(A) ...` on lines of their own; None if it has none.

    Example:
        >>> choices_of("Is it wet?\\n\\nChoices:\\n (A) Yes\\n (B) No").options
        {'A': 'Yes', 'B': 'No'}
    """
    found = list(_OPTION.finditer(text))
    letters = [match[1] for match in found]
    if len(found) < 2 or letters != [chr(ord("A") + number) for number in range(len(found))]:
        return None
    stem = re.sub(r"\s*(Choices|Options)\s*:\s*$", "", text[: found[0].start()]).strip()
    return Choices(stem, {match[1]: match[2] for match in found}, text)


def letter_of(answer: str) -> str:
    """The letter of an answer that is one: ` (A)`, `A`, `A.`; empty if it is none."""
    match = _LETTER.fullmatch(answer)
    return match[1] if match else ""


def in_other_order(choices: Choices) -> Choices:
    """The same question with its options in the reverse order, under the letters as they stand."""
    letters, texts = list(choices.options), list(choices.options.values())
    swapped = dict(zip(letters, texts[::-1], strict=True))

    def written(match: re.Match[str]) -> str:
        return (
            match.string[match.start() : match.start(2)] + swapped[match[1]] + match.string[match.end(2) : match.end()]
        )

    text = _OPTION.sub(written, choices.text)
    return Choices(choices.stem, swapped, text)


def read_source(source: str | Path | Table, kind: Kind, *, both_orders: bool = True) -> tuple[list[Row], str | None]:
    """Rows of a file or a table in rt_lens's own columns, with the name of the format that they had; None for its own.

    Args:
        source: a .jsonl, .json, .csv or .tsv file, or a table in memory.
        kind: what the rows are to be.
        both_orders: gives each pair of lettered options twice, the second time with the options in reverse order.

    Raises:
        ValueError: columns of no known format, a format that holds no such thing, or an item that cannot be read; the
            message names the line.

    Warns:
        UserWarning: if most right answers are the same word, and its opposite cannot be exchanged with it.
    """
    is_file = isinstance(source, str | Path)
    rows = read_rows(Path(source), kind, OWN[kind], FOREIGN) if is_file else table_rows(source, kind)  # type: ignore[arg-type]
    if not rows:
        raise ValueError(f"{kind} must hold at least one row, got none{f' in {Path(source).name}' if is_file else ''}.")  # type: ignore[arg-type]
    return as_kind(rows, kind, both_orders=both_orders)


def as_kind(rows: Sequence[Row], kind: Kind, *, both_orders: bool = True) -> tuple[list[Row], str | None]:
    """Rows in rt_lens's own columns; see `read_source`."""
    of = format_of(rows)
    if of is None:
        return list(rows), None
    read: Read | None = getattr(of, kind)
    if read is None:
        others = [name for name in ("pairs", "questions", "targets") if getattr(of, name)]
        raise ValueError(f"{kind}: {rows[0].where} must hold {kind}, got {of.name}, which holds {', '.join(others)}.")
    converted = [Row(row.where, _under_system(_read(read, row, kind), row, kind), row.names_at) for row in rows]
    if kind == "pairs":
        if both_orders:
            converted = [each for row in converted for each in _both(row)]
        _warn_of_one_answer(converted)
    return converted, of.name


def _read(read: Read, row: Row, kind: str) -> dict[str, Any]:
    try:
        return {name: value for name, value in read(_normal(row.cells)).items() if value not in ("", (), [])}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__} at {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{kind}: {row.where} cannot be read: {why}. Correct it, or leave it out.") from None


def _under_system(cells: dict[str, Any], row: Row, kind: str) -> dict[str, Any]:
    """The cells with a `system` column's text in front of the prompt, as a conversation."""
    system = _normal(row.cells).get("system")
    key = "user" if kind == "pairs" else "prompt"
    if system is None or key not in cells:
        return cells
    if not isinstance(system, str):
        raise ValueError(f"{kind}: {row.where} must have a text as system, got {str(system)[:40]!r}. Put it in quotes.")
    prompt = cells[key]
    turns = list(prompt.messages) if isinstance(prompt, Conversation) else [{"role": "user", "content": prompt}]
    return {**cells, key: Conversation([{"role": "system", "content": system}, *turns])}


def format_of(rows: Sequence[Row]) -> Format | None:
    """The format of other people whose columns the rows have; None for rt_lens's own columns, right or misspelt."""
    columns = {_column(name) for row in rows for name in row.cells}
    if columns & {"user", "right", "wrong", "prefill", "negative_user", "negative_prefill"}:
        return None
    of = next((of for of in FORMATS if columns.issuperset(of.columns)), None)
    sides = [side for row in rows if (side := _normal(row.cells).get("positive")) is not None]
    if of is FORMATS[-1] and isinstance(sides[0], Mapping):
        return _SIDES
    misspelt = [name for name in columns - {*OWN["pairs"]} if nearest(name, OWN["pairs"])]
    return None if of is FORMATS[-1] and misspelt else of


def _column(name: Any) -> str:
    """`Best Answer` and `best_answer` are one name."""
    return re.sub(r"[\s-]+", "_", str(name).strip().casefold())


def _normal(cells: Cells) -> dict[str, Any]:
    return {_column(name): value for name, value in cells.items()}


# Model-written evaluations (Perez et al. 2022) and CAA (Rimsky et al. 2024)


def _matching(cells: Cells) -> tuple[str, str, str]:
    """Question, answer that matches the behaviour, and one that does not."""
    right, wrong = cells["answer_matching_behavior"], cells["answer_not_matching_behavior"]
    first, other = (side[0] if isinstance(side, list) else side for side in (right, wrong))
    return _text(cells["question"]), _text(first).strip(), _text(other).strip()


def _matching_pair(cells: Cells) -> dict[str, Any]:
    question, right, wrong = _matching(cells)
    return _answers_pair(question, right, wrong)


def _matching_question(cells: Cells) -> dict[str, Any]:
    return _answers_question(*_matching(cells))


def _answers_pair(question: str, right: str, wrong: str) -> dict[str, Any]:
    """One question, answered in two ways; questions that differ in the order of options are of one group."""
    if right == wrong:
        raise ValueError(f"the two answers must differ, got {right!r} twice")
    choices = choices_of(question)
    return {"user": question, "prefill": right, "negative_prefill": wrong, "group": choices.stem if choices else ""}


def _answers_question(question: str, right: str, wrong: str) -> dict[str, Any]:
    choices, letter = choices_of(question), letter_of(right)
    if choices is None or not letter:
        return {"prompt": question, "right": (right,), "wrong": (wrong,)}
    others = tuple(text for key, text in choices.options.items() if key != letter)
    return {"prompt": choices.stem, "right": (choices.options[letter],), "wrong": others}


def _answers_target(question: str, right: str, wrong: str) -> dict[str, Any]:
    return {"prompt": question, "answer": right, "rejected": wrong}


# Plain pairs of texts


def _text_pair(cells: Cells) -> dict[str, Any]:
    """Two texts as they are; two that differ in a letter at their end are one question with two answers."""
    positive, negative = _text(cells["positive"]), _text(cells["negative"])
    if asked := _asked(positive, negative):
        return _answers_pair(*asked)
    if positive == negative:
        raise ValueError(f"the two texts must differ, got {positive[:40]!r} twice")
    group = cells.get("group", "")
    return {"positive": positive, "negative": negative, "group": str(group) if type(group) is int else group}


def _text_question(cells: Cells) -> dict[str, Any]:
    asked = _asked(_text(cells["positive"]), _text(cells["negative"]))
    if asked is None:
        raise ValueError("pairs of texts are no questions unless they end in the letter of an option")
    return _answers_question(*asked)


def _asked(positive: str, negative: str) -> tuple[str, str, str] | None:
    """Question and both answers, of two texts that end in different letters of the same options."""
    ends = [re.search(r"\s*(\([A-J]\))\s*$", text) for text in (positive, negative)]
    if not all(ends) or (stem := positive[: ends[0].start()]) != negative[: ends[1].start()]:  # type: ignore[union-attr]
        return None
    question = re.sub(r"\s*Answer:\s*$", "", stem)
    if choices_of(question) is None:
        return None
    return question, ends[0][1], ends[1][1]  # type: ignore[index]


# Preferences, chats, steering-bench


def _preferred(cells: Cells) -> tuple[str, str, str]:
    """Prompt, answer chosen and answer rejected; chats that share all but their last turn are taken apart."""
    chosen, rejected = cells["chosen"], cells["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if "prompt" not in cells:
            raise ValueError("it must have a prompt beside the texts chosen and rejected")
        prompt = cells["prompt"]
        return _prompt(prompt), chosen, rejected
    first, second = checked(chosen, "chosen"), checked(rejected, "rejected")
    if len(first) == 1 and "prompt" in cells:
        return _prompt(cells["prompt"]), first[0]["content"], second[-1]["content"]
    if first[:-1] != second[:-1] or first[-1]["role"] != "assistant" or second[-1]["role"] != "assistant":
        raise ValueError("the chats chosen and rejected must be alike but for the assistant's last turn")
    return as_prompt(first[:-1]), first[-1]["content"], second[-1]["content"]


def _preferred_pair(cells: Cells) -> dict[str, Any]:
    prompt, chosen, rejected = _preferred(cells)
    return {"user": prompt, "prefill": chosen, "negative_prefill": rejected}


def _preferred_question(cells: Cells) -> dict[str, Any]:
    prompt, chosen, rejected = _preferred(cells)
    return {"prompt": prompt, "right": (chosen,), "wrong": (rejected,)}


_SHARE_GPT = {"human": "user", "gpt": "assistant", "system": "system"}


def _turns(cells: Cells) -> list[dict[str, Any]]:
    given = cells.get("messages") or cells["conversations"]
    if not isinstance(given, list) or not given:
        raise ValueError(f"messages must be a list, got {str(given)[:40]!r}")
    named = [
        {"role": _SHARE_GPT.get(turn["from"], turn["from"]), "content": turn["value"]} if "from" in turn else turn
        for turn in given
    ]
    return checked(named)


def _chat_question(cells: Cells) -> dict[str, Any]:
    turns = _turns(cells)
    return {"prompt": as_prompt(turns[:-1] if turns[-1]["role"] == "assistant" else turns)}


def _chat_target(cells: Cells) -> dict[str, Any]:
    turns = _turns(cells)
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise ValueError("a chat to learn from must end with the assistant's turn, after another")
    return {"prompt": as_prompt(turns[:-1]), "answer": turns[-1]["content"]}


def _completed(cells: Cells) -> dict[str, Any]:
    return {"prompt": _prompt(cells["prompt"]), "answer": _text(cells["completion"])}


def _instructed(cells: Cells) -> dict[str, Any]:
    given = [_text(cells[name]) for name in ("instruction", "input") if name in cells]
    return {"prompt": "\n\n".join(given), "answer": _text(cells["output"])}


def _both_sides(cells: Cells) -> tuple[tuple[str, str], tuple[str, str]]:
    """Prompt and response of both sides."""
    sides = (cells["positive"], cells["negative"])
    if not all(isinstance(side, Mapping) for side in sides):
        raise ValueError("positive and negative must both be objects with a prompt and a response")
    positive, negative = ((_prompt(side["prompt"]), _text(side["response"])) for side in sides)
    return positive, negative


def _sides_pair(cells: Cells) -> dict[str, Any]:
    (user, prefill), (negative_user, negative_prefill) = _both_sides(cells)
    other = negative_user if negative_user != user else ""
    choices = choices_of(user)
    return {
        "user": user, "prefill": prefill, "negative_user": other, "negative_prefill": negative_prefill,
        "group": choices.stem if choices and not other else "",
    }  # fmt: skip


def _sides_question(cells: Cells) -> dict[str, Any]:
    (prompt, right), (other, wrong) = _both_sides(cells)
    if prompt != other:
        raise ValueError("the two sides ask different things, so they are no question with two answers")
    return _answers_question(prompt, right.strip(), wrong.strip())


# TruthfulQA (Lin et al. 2022)


def _truthful(cells: Cells) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Question, true answers (the best one first) and false ones."""
    if "correct_answers" in cells:
        best = _text(cells["best_answer"]).strip()
        right = tuple(dict.fromkeys((best, *_several(cells["correct_answers"]))))
        return _text(cells["question"]), right, _several(cells["incorrect_answers"])
    targets = cells.get("mc2_targets") or cells["mc1_targets"]
    if not any(bool(label) for label in targets["labels"]) or all(bool(label) for label in targets["labels"]):
        raise ValueError("it must have a true and a false answer")
    of = list(zip(targets["choices"], targets["labels"], strict=True))
    right, wrong = (tuple(text for text, label in of if bool(label) is truth) for truth in (True, False))
    return _text(cells["question"]), right, wrong


def _truthful_pair(cells: Cells) -> dict[str, Any]:
    question, right, wrong = _truthful(cells)
    false = cells.get("best_incorrect_answer") or wrong[0]
    return {"user": question, "prefill": right[0], "negative_prefill": _text(false).strip()}


def _truthful_question(cells: Cells) -> dict[str, Any]:
    question, right, wrong = _truthful(cells)
    return {"prompt": question, "right": right, "wrong": wrong, "category": cells.get("category", "")}


def _truthful_target(cells: Cells) -> dict[str, Any]:
    question, right, wrong = _truthful(cells)
    return {"prompt": question, "answer": right[0], "rejected": wrong[0]}


def _several(cell: Any) -> tuple[str, ...]:
    parts = cell.split(";") if isinstance(cell, str) else [_text(part) for part in cell]
    return tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))


def _text(cell: Any) -> str:
    if not isinstance(cell, str):
        raise ValueError(f"a text must stand where {str(cell)[:40]!r} does")
    return cell


def _prompt(cell: Any) -> str:
    return cell if isinstance(cell, str) else as_prompt(cell, "prompt")


FORMATS = (
    Format(
        "a model-written evaluation (Anthropic, CAA)",
        ("question", "answer_matching_behavior", "answer_not_matching_behavior"),
        _matching_pair, _matching_question, lambda cells: _answers_target(*_matching(cells)),
    ),
    Format(
        "TruthfulQA", ("question", "best_answer", "correct_answers", "incorrect_answers"),
        _truthful_pair, _truthful_question, _truthful_target,
    ),
    *(
        Format("TruthfulQA, multiple choice", ("question", name), _truthful_pair, _truthful_question, _truthful_target)
        for name in ("mc2_targets", "mc1_targets")
    ),
    Format(
        "preferences", ("chosen", "rejected"),
        _preferred_pair, _preferred_question, lambda cells: _answers_target(*_preferred(cells)),
    ),
    Format("prompts and completions", ("prompt", "completion"), None, None, _completed),
    Format("instructions (Alpaca)", ("instruction", "output"), None, None, _instructed),
    Format("chats", ("messages",), None, _chat_question, _chat_target),
    Format("chats (ShareGPT)", ("conversations",), None, _chat_question, _chat_target),
    Format("pairs of texts", ("positive", "negative"), _text_pair, _text_question),
)  # fmt: skip
_SIDES = Format("pairs of prompt and response (steering-bench)", ("positive", "negative"), _sides_pair, _sides_question)
FOREIGN = tuple(dict.fromkeys([
    *(name for of in FORMATS for name in of.columns), "best_incorrect_answer", "category",
    "Question", "Best Answer", "Best Incorrect Answer", "Correct Answers", "Incorrect Answers", "Category", "Type",
]))  # fmt: skip
"""Columns of other formats, as they stand in files."""


def _both(row: Row) -> list[Row]:
    """A pair as it is and with its lettered options in reverse order; other pairs alone."""
    cells = row.cells
    choices = choices_of(cells.get("user", "")) if not isinstance(cells.get("user"), Conversation) else None
    letters = [letter_of(cells.get(name, "")) for name in ("prefill", "negative_prefill")]
    if choices is None or "negative_user" in cells or not all(letter in choices.options for letter in letters):
        return [row]
    mirrored = dict(zip(choices.options, reversed(choices.options), strict=True))
    other = {
        name: cells[name].replace(letter, mirrored[letter])
        for name, letter in zip(("prefill", "negative_prefill"), letters, strict=True)
    }
    return [row, row._replace(cells={**cells, **other, "user": in_other_order(choices).text})]


def _warn_of_one_answer(rows: Sequence[Row]) -> None:
    """Warns where most positive sides give the same short answer: the vector would hold that word."""
    answers = Counter(row.cells["prefill"] for row in rows if row.cells.get("negative_prefill"))
    if not answers or len(answers) > 10 or answers.total() < 10:
        return
    answer, n = answers.most_common(1)[0]
    if n / answers.total() > 0.6:
        warnings.warn(
            f"pairs: {n} of {answers.total()} positive sides answer {answer!r}, so the vector holds that word too. "
            "Give as many of each.",
            stacklevel=5,
        )
