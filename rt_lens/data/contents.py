"""What a file or a table holds, in a paragraph: kind, number, balance, repetitions, lengths, and its first item."""

from __future__ import annotations

import statistics
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rt_lens.data.contrast_pairs import ContrastPairs, load_pairs
from rt_lens.data.formats import FOREIGN, OWN, Format, choices_of, format_of, letter_of, read_source
from rt_lens.data.questions import Question, load_questions
from rt_lens.data.readers import Row, Table, read_rows, table_rows
from rt_lens.models.protocol import HasTokenizer
from rt_lens.models.tokens.batches import encode
from rt_lens.models.tokens.chats import answered, chat_text

_ENDING = {"pairs": "load_pairs", "questions": "load_questions", "targets": "rtl.tuning.load_targets"}


@dataclass(frozen=True)
class Contents:
    """What a source holds; as a string, a paragraph with the first item below it.

    Attributes:
        name: of the file, or `the table`.
        format: of its rows.
        n: rows.
        holds: what the rows can be read as: `pairs`, `questions`, `targets`.
        lines: sentences on balance, repetitions and lengths.
        first: the first item as the model reads it.
        lettered: whether its pairs answer by the letter of an option.

    Example:
        >>> print(rtl.data.look([{"prompt": "Say hello."}], model))
        The table holds 1 row: questions of rt_lens. They can be read as questions (load_questions).
        Lengths in tokens: 33 to 33, median 33.
        The first, as the model reads it:
        ...
    """

    name: str
    format: str
    n: int
    holds: tuple[str, ...]
    lines: tuple[str, ...]
    first: str
    lettered: bool = False

    def __str__(self) -> str:
        loaders = ", ".join(f"{kind} ({_ENDING[kind]})" for kind in self.holds)
        rows = "1 row" if self.n == 1 else f"{self.n:,} rows"
        about = f"{self.name} holds {rows}: {self.format}. They can be read as {loaders}."
        return "\n".join([about, *self.lines, "The first, as the model reads it:", self.first])


def look(source: str | Path | Table, model: HasTokenizer) -> Contents:
    """Says what a file or a table holds before anything is made of it.

    Args:
        source: a .jsonl, .json, .csv or .tsv file, or a table in memory.
        model: for its tokenizer and chat template.

    Raises:
        ValueError: if it cannot be read, or its columns are none that rt_lens knows.

    Example:
        >>> rows = [{"prompt": "Say hello.", "chosen": "Hello!", "rejected": "Go away."}]
        >>> contents = rtl.data.look(rows, model)
        >>> contents.format, contents.n, contents.holds
        ('preferences', 1, ('pairs', 'questions', 'targets'))
    """
    path = Path(source) if isinstance(source, str | Path) else None
    if path is not None and path.suffix.lower() == ".toml":
        raise ValueError(f"source must be a table, got {path.name}, a behaviour's file. Try rt-lens check {path}.")
    known = list(dict.fromkeys(name for names in OWN.values() for name in names))
    rows = read_rows(path, "source", known, FOREIGN) if path else table_rows(source, "source")  # type: ignore[arg-type]
    if not rows:
        raise ValueError(f"source must hold at least one row, got none in {path.name if path else 'the table'}.")
    of = format_of(rows)
    holds = _kinds(rows, of)
    lines, first, lettered = [], "", False
    with warnings.catch_warnings():  # what they warn of is said here
        warnings.simplefilter("ignore")
        if "pairs" in holds:
            pairs = load_pairs(source, both_orders=False)
            lines, first = _of_pairs(pairs, model, both=of is not None), _side_by_side(pairs, model)
            lettered = all(letter_of(pair.prefill) and choices_of(pair.user) for pair in pairs.pairs)
        elif "questions" in holds:
            questions = load_questions(source)
            lines, first = _of_questions(questions, model), chat_text(model, questions[0].prompt)
        else:
            targets = [row.cells for row in read_source(source, "targets")[0]]
            lines, first = _of_targets(targets, model), _whole(targets[0], model)
    name = of.name if of else f"{holds[0]} of rt_lens"
    return Contents(path.name if path else "The table", name, len(rows), holds, tuple(lines), first, lettered)


def _kinds(rows: Sequence[Row], of: Format | None) -> tuple[str, ...]:
    if of is not None:
        kinds = ("pairs", "questions", "targets")
        lettered = of.name != "pairs of texts" or choices_of(str(rows[0].cells.get("positive", ""))) is not None
        return tuple(kind for kind in kinds if getattr(of, kind) and (kind != "questions" or lettered))
    columns = {name for row in rows for name in row.cells}
    if columns & {"answer", "rejected"}:
        return ("targets",)
    if columns & {"positive", "negative", "user"}:
        return ("pairs",)
    if columns & {"prompt", "question"}:
        return ("questions",)
    raise ValueError(
        f"source must have columns that rt_lens knows, got {', '.join(sorted(map(str, columns)))}. Pairs have "
        "positive, negative and user, questions prompt, right and wrong; docs/formats.md lists formats of other tools."
    )


def _of_pairs(pairs: ContrastPairs, model: HasTokenizer, both: bool) -> list[str]:
    positive, negative = (
        [encode(model, text) for text in side] for side in (pairs.texts(model).positive, pairs.texts(model).negative)
    )
    lines = []
    answers = Counter(pair.prefill for pair in pairs.pairs if pair.negative_prefill)
    if answers and len(answers) <= 10:
        shares = ", ".join(f"{answer!r} {n:,}" for answer, n in answers.most_common())
        both = both and any(letter_of(answer) for answer in answers) and any(choices_of(p.user) for p in pairs.pairs)
        orders = " Pairs come in both orders of the letters, so these are balanced." if both else ""
        lines.append(f"Balance: positive sides answer {shares}.{orders}")
    lines += _repeated((pair.user, pair.positive, pair.prefill) for pair in pairs.pairs)
    lines.append(f"Lengths in tokens: positive {_span(positive)}; negative {_span(negative)}.")
    return lines


def _of_questions(questions: Sequence[Question], model: HasTokenizer) -> list[str]:
    prompts = [encode(model, chat_text(model, question.prompt)) for question in questions]
    with_options = sum(bool(question.options) for question in questions)
    return [
        *([f"{with_options:,} have options to choose from."] if with_options else []),
        *_repeated(question.prompt for question in questions),
        f"Lengths in tokens: {_span(prompts)}.",
    ]


def _of_targets(targets: Sequence[Mapping[str, Any]], model: HasTokenizer) -> list[str]:
    texts = [encode(model, _whole(cells, model)) for cells in targets]
    repeated = _repeated((cells["prompt"], cells["answer"]) for cells in targets)
    return [*repeated, f"Lengths in tokens, with the answer: {_span(texts)}."]


def _whole(cells: Mapping[str, Any], model: HasTokenizer) -> str:
    return answered(model, chat_text(model, cells["prompt"]), cells["answer"])


def _repeated(items: Iterable[object]) -> list[str]:
    n = sum(count - 1 for count in Counter(items).values())
    return [f"{n:,} {'row repeats an earlier one' if n == 1 else 'rows repeat earlier ones'}."] if n else []


def _span(encoded: Sequence[Sequence[int]]) -> str:
    lengths = sorted(map(len, encoded))
    return f"{lengths[0]:,} to {lengths[-1]:,}, median {statistics.median(lengths):,.0f}"


def _side_by_side(pairs: ContrastPairs, model: HasTokenizer) -> str:
    first = ContrastPairs(pairs.name, pairs.pairs[:1]).texts(model)
    return f"--- positive ---\n{first.positive[0]}\n--- negative ---\n{first.negative[0]}"
