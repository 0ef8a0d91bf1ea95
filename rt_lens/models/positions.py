"""Positions at which activations are read: names such as `last` or `mean response` -> token indices. Runs no model.

One vocabulary serves vectors (`position=`), edits (`positions=`) and losses (`positions=` of TuneConfig and
DirectionTarget). A model is *given* a text (the chat prompt, and a prefill of the response where there is one) and then
*writes* what follows. Each word has one meaning:

- `last`: the last token of the text that the model is given, which predicts the first token that it writes. For vectors
  the given text is the chat prompt with the pair's prefill, for edits the prompt as `generate` passes it on, for losses
  the target's prompt.
- `first`: the first token of the given text (vectors, losses).
- `mean`: all tokens of the text, given or, in a loss, given and to be learnt.
- `letter`: the last token of the given text with a letter or digit in it: of a prefill "(A)" the A, where contrastive
  activation addition (Rimsky et al. 2024) reads (vectors, losses).
- `mean prompt`: the tokens of the chat prompt, without a prefill (vectors, losses).
- `mean response`: the tokens of the response themselves: the prefill of a pair, the answer of a target.
- `mean last 5`, `mean "some words"`, a token index: the last tokens of the given text, the last occurrence of some
  words in it, one of its tokens (vectors, losses; edits take lists of numbers).
- `all`, `prompt`, `generated`: every token, every token given, every token written (edits). A generated token is edited
  as the model reads it; it was chosen at the token before, the first one at `last`.
- `response`: the tokens that predict the response, one before each of its tokens, `last` among them (losses).
- `vector`: whichever of these the vectors were read at (losses).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from rt_lens.models.protocol import HasTokenizer
from rt_lens.models.tokens.batches import encode
from rt_lens.models.tokens.chats import tokenizer_of
from rt_lens.models.tokens.texts import token_texts


@dataclass(frozen=True)
class Row:
    """One text in the form that a position function receives.

    Attributes:
        text: special tokens included.
        ids: its token ids.
        labels: its tokens as strings, see `token_texts`.
        spans: the characters that each token covers; empty for tokens that the tokenizer adds.
        prompt_end: character at which the response begins: the start of the prefill, or the end of the text.
    """

    text: str
    ids: tuple[int, ...]
    labels: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    prompt_end: int

    def within(self, start: int, end: int) -> list[int]:
        """Indices of the tokens that cover a character from `start` up to but not including `end`."""
        return [i for i, (low, high) in enumerate(self.spans) if low < end and high > start]


Position = Callable[[Row], Sequence[int]]
"""A function from a Row to the indices (negative from the end) of the tokens whose mean activation is read."""

OF_A_PAIR = " of the chat prompt and the prefill of the response"
"""The ending that the provenance of vectors gives a position's meaning."""

_MEANINGS = {
    "last": "last token",
    "first": "first token",
    "letter": "last token with a letter or digit",
    "mean": "mean over all tokens",
    "mean prompt": "mean over the prompt's tokens",
    "mean response": "mean over the tokens of the response's prefill",
}
_OLD_ENDINGS = (" of the chat prompt and the answer's opener", " of the chat prompt and the answer's prefill")
_OLD_NAMES = {"mean over the tokens of the answer's opening words": "mean over the tokens of the response's prefill"}
"""Meanings as the provenance of older files has them -> today's."""


@dataclass(frozen=True)
class Named:
    """A position with its meaning in words.

    Attributes:
        meaning: as provenance and messages write it.
        of: the function from a Row to token indices.
    """

    meaning: str
    of: Position


def position_of(position: str | int | Position) -> Named:
    """A position from its name, a token index, or your own function.

    Args:
        position: `last`, `first`, `letter`, `mean`, `mean prompt`, `mean response`, `mean last 5`, `mean "some words"`
            (their last occurrence in each text), a token index (negative from the end), or a function from a Row to
            indices.

    Raises:
        ValueError: unknown name.

    Example:
        >>> position_of("mean last 5").meaning
        'mean over the last 5 tokens'
        >>> position_of(-1).meaning
        'token 1 from the end'
    """
    if callable(position):
        return Named(getattr(position, "__name__", type(position).__name__), position)
    if isinstance(position, int):
        side = f"token {-position} from the end" if position < 0 else f"token {position} from the beginning"
        return Named(side, lambda row: [position])
    if position in ("last", "first"):
        return Named(_MEANINGS[position], lambda row: [-1 if position == "last" else 0])
    if position == "letter":
        return Named(_MEANINGS[position], _letter)
    if position in _MEANINGS:
        part = position.removeprefix("mean").strip()
        return Named(_MEANINGS[position], lambda row: _part(row, part))
    if match := re.fullmatch(r"token (-?\d+)", position):
        return position_of(int(match[1]))
    if match := re.fullmatch(r"mean last (\d+)", position):
        k = int(match[1])
        if k:
            return Named(f"mean over the last {k} tokens", lambda row: range(-k, 0))
    if match := re.fullmatch(r"mean \"(.+)\"", position, re.DOTALL):
        return Named(f"mean over the tokens of {match[1]!r}", lambda row: _substring(row, match[1]))
    raise ValueError(
        f"position must be {', '.join(map(repr, _MEANINGS))}, 'mean last 5', 'mean \"some words\"', a token index or "
        f"a function, got {position!r}. Use one of these."
    )


def position_named(meaning: str) -> str:
    """The name of a position from its meaning: the inverse of `position_of(...).meaning`.

    Takes the meaning as the provenance of vectors writes it, in older files too.

    Raises:
        ValueError: if the vectors were read with a function, which has no name.
    """
    for ending in (OF_A_PAIR, *_OLD_ENDINGS):
        meaning = meaning.removesuffix(ending)
    meaning = _OLD_NAMES.get(meaning, meaning)
    for name, known in _MEANINGS.items():
        if meaning in (known, name):  # files of other tools may hold the bare name
            return name
    patterns = {
        r"mean over the last (\d+) tokens": "mean last {}",
        r"token (\d+) from the end": "token -{}",
        r"token (\d+) from the beginning": "token {}",
    }
    for pattern, name in patterns.items():
        if match := re.fullmatch(pattern, meaning):
            return name.format(match[1])
    if match := re.fullmatch(r"mean over the tokens of (['\"].+['\"])", meaning):
        with suppress(SyntaxError, ValueError):  # the words are written as a Python string
            return f'mean "{ast.literal_eval(match[1])}"'
    raise ValueError(
        f"positions must be given for vectors read at {meaning!r}, which has no name. Use positions='response' or "
        "'last'."
    )


def _part(row: Row, part: str) -> list[int]:
    if not part:
        return list(range(len(row.ids)))
    if part == "prompt":
        return [i for i, (low, high) in enumerate(row.spans) if high <= row.prompt_end]
    tokens = row.within(row.prompt_end, len(row.text))
    if not tokens:
        raise ValueError("these pairs have no prefills, so there is no response to read; use 'mean prompt' or 'last'")
    return tokens


def _letter(row: Row) -> list[int]:
    """The last token that covers a letter or digit: of a text that begins a response, one of the response."""
    start = row.prompt_end if any(character.isalnum() for character in row.text[row.prompt_end :]) else 0
    numbers = [i for i, (low, high) in enumerate(row.spans) if any(map(str.isalnum, row.text[max(low, start) : high]))]
    if not numbers:
        raise ValueError("the text has no letter or digit")
    return numbers[-1:]


def _substring(row: Row, phrase: str) -> list[int]:
    start = row.text.rfind(phrase)
    if start < 0:
        raise ValueError(f"the text does not contain {phrase!r}")
    return row.within(start, start + len(phrase))


def rows_of(model: HasTokenizer, texts: Sequence[str], prompt_ends: Sequence[int] | None = None) -> list[Row]:
    """Rows of texts, for positions.

    Args:
        model: for its tokenizer.
        texts: with the chat template applied.
        prompt_ends: character at which each response begins. Defaults to the text's end.
    """
    tokenizer = tokenizer_of(model)
    rows = []
    for text, end in zip(texts, prompt_ends or [len(text) for text in texts], strict=True):
        ids = encode(model, text)
        plain = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = [(int(low), int(high)) for low, high in plain["offset_mapping"]]
        before = next((n for n in range(len(ids)) if ids[n : n + len(spans)] == plain["input_ids"]), 0)
        spans = [(0, 0)] * before + spans + [(len(text), len(text))] * (len(ids) - len(spans) - before)
        rows.append(Row(text, tuple(ids), tuple(token_texts(model, ids)), tuple(spans), end))
    return rows


def numbers_in(row: Row, position: Named, which: str) -> list[int]:
    """Token indices of one position in one row, from 0.

    Args:
        row: the text.
        position: which tokens to read.
        which: the text's name in an error message, for example `text 3 of the positive side`.

    Raises:
        ValueError: names the text, its length and the position.
    """
    n = len(row.ids)
    beginning = row.text if len(row.text) <= 80 else f"{row.text[:80]}..."
    try:
        chosen = [int(number) for number in position.of(row)]
    except ValueError as error:
        raise ValueError(
            f"position must be in every text, got {position.meaning!r} for {which}: {error}. It begins {beginning!r}."
        ) from None
    if not chosen:
        raise ValueError(
            f"position must name at least one token of every text, got {position.meaning!r} for {which}, where it "
            f"names none. It begins {beginning!r}."
        )
    for number in chosen:
        if not -n <= number < n:
            raise ValueError(
                f"position must be between {-n} and {n - 1} for {which}, which has {n} tokens, got "
                f"{position.meaning!r}. It begins {beginning!r}."
            )
    return [number % n for number in chosen]
