"""Prompts with two answers to choose from: what an edit of activations is to turn from one to the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rt_lens.data.builtin import data_path
from rt_lens.data.readers import ROW_ENDINGS, Row, read_rows, refuse_misspelt

_FIELDS = ("prompt", "positive", "negative", "group", "part", "roles")


@dataclass(frozen=True)
class TwoAnswers:
    """A prompt and two continuations, of which an edit makes one likelier, and its opposite the other.

    Attributes:
        prompt: as the model reads it; for a chat model through `chat_text` already, if it is a chat.
        positive: continuation that strength 1 is to favour, with its leading space if it has one.
        negative: continuation that strength -1 is to favour. The answers' first tokens are compared.
        group: prompts of one group stay together when they are split; empty for none.
        part: train, validation or test, for data that are split already; empty for none.
        roles: name -> start and end of that phrase in the prompt, in characters, for edits by role.

    Raises:
        ValueError: for an empty text, equal answers, or a role outside the prompt.

    Example:
        >>> pair = TwoAnswers("Rome is in", " Italy", " France", roles={"city": (0, 4)})
        >>> pair.prompt[slice(*pair.roles["city"])]
        'Rome'
    """

    prompt: str
    positive: str
    negative: str
    group: str = ""
    part: str = ""
    roles: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("prompt", "positive", "negative"):
            if not isinstance(text := getattr(self, name), str) or not text.strip():
                raise ValueError(f"{name} must be a text that is not empty, got {text!r}. Fill it in.")
        if self.positive == self.negative:
            raise ValueError(
                f"positive and negative must differ, got {self.positive!r} twice for {self.prompt[:60]!r}. Give the "
                "answer that is to become likelier, and the one that it takes the place of."
            )
        for role, (start, end) in self.roles.items():
            if role in ("all", "last"):
                raise ValueError(f"roles must not be called 'all' or 'last', which name other tokens, got {role!r}.")
            if not 0 <= start < end <= len(self.prompt):
                raise ValueError(
                    f"roles must be start and end of a phrase in the prompt, got {role} = ({start}, {end}) in "
                    f"{self.prompt[:60]!r}. Use `prompt.index(phrase)`."
                )


def two_answer_tasks() -> list[str]:
    """Names of the built-in tasks, in alphabetical order.

    Example:
        >>> two_answer_tasks()
        ['capitals', 'indirect_object']
    """
    return sorted(path.stem for path in data_path("two_answers").glob("*.jsonl"))


def load_two_answers(name_or_path: str | Path, *, part: str | None = None) -> list[TwoAnswers]:
    """Prompts with two answers: those of a built-in task, or of a .jsonl, .csv or .tsv file.

    `capitals` states a wrong capital first, so that what the prompt says and what the model knows are in conflict
    (positive: what it knows). `indirect_object` asks for whom of two people something was given to (positive: the one
    who did not give). Their parts share no country and no name.

    Args:
        name_or_path: a built-in task, or a file with the columns prompt, positive and negative; optional group, part
            and (in .jsonl) roles.
        part: keep this part only: train, validation or test.

    Raises:
        ValueError: for an unknown name, a row that lacks a column, or a part that no row has.

    Example:
        >>> pairs = load_two_answers("capitals", part="test")
        >>> len(pairs), pairs[0].positive, pairs[0].negative in pairs[0].prompt
        (72, ' Caracas', True)
    """
    path = Path(name_or_path)
    if not path.is_file():
        known = two_answer_tasks()
        if str(name_or_path) not in known:
            near = get_close_matches(str(name_or_path), known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Built in: {', '.join(known)}."
            raise ValueError(
                f"name_or_path must be a built-in task or a file ({', '.join(ROW_ENDINGS)}), got "
                f"{str(name_or_path)!r}. {hint}"
            )
        path = data_path(f"two_answers/{name_or_path}.jsonl")
    rows = read_rows(path, "two answers", _FIELDS)
    pairs = list(_read(rows))
    parts = dict.fromkeys(pair.part for pair in pairs if pair.part)
    if part is not None and part not in parts:
        raise ValueError(f"part must be one that a row has ({', '.join(parts) or 'none'}), got {part!r}.")
    return [pair for pair in pairs if part in (None, pair.part)]


def _read(rows: Iterable[Row]) -> Iterable[TwoAnswers]:
    for row in rows:
        refuse_misspelt(row, "two answers", _FIELDS)
        if missing := [name for name in _FIELDS[:3] if name not in row.cells]:
            raise ValueError(
                f"two answers: {row.where} must have {', '.join(missing)}, which is empty there. Fill it in."
            )
        try:
            cells: dict[str, Any] = {name: row.cells[name] for name in _FIELDS if name in row.cells}
            yield TwoAnswers(**{**cells, "roles": {role: tuple(span) for role, span in cells.get("roles", {}).items()}})
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"two answers: {row.where}: {error}") from None
