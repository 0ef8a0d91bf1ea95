"""Lists of texts, from whatever holds some in order. This room checks what came, and knows nothing of its meaning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def text_list(given: Iterable[str], argument: str = "prompts", *, blank: bool = False, none: bool = False) -> list[str]:
    """Texts as a list: from a list, a tuple, a column of a table, an array or a generator.

    Args:
        given: the texts.
        argument: what the caller calls them; messages begin with it.
        blank: a text may be empty.
        none: there may be no text at all.

    Raises:
        ValueError: one string, a table, something without order, or an item that is no text (NaN, None) or an empty
            one; the message names its number.

    Example:
        >>> text_list(frame["prompt"])
        ['How was your day?', 'Tell me about rivers.']
    """
    items = listed(given, argument, none=none)
    return [as_text(item, argument, number, blank=blank) for number, item in enumerate(items)]


def listed(given: Any, argument: str, *, none: bool = False) -> list[Any]:
    """The items of whatever holds some in order, unchecked; see `text_list`."""
    wanted = f"{argument} must be a list of {'texts' if none else 'at least one text'}"
    if isinstance(given, str | bytes):
        raise ValueError(f"{wanted}, got one string. Put a single text in brackets.")
    if isinstance(given, Mapping | set | frozenset) or not isinstance(given, Iterable):
        raise ValueError(f"{wanted}, got a {type(given).__name__}. Put the texts in a list.")
    if (n := getattr(given, "ndim", 1)) != 1:  # going through a table would give the names of its columns
        raise ValueError(f"{wanted}, got a {type(given).__name__} of {n} dimensions. Give one column of it.")
    items = list(given)
    if not items and not none:
        raise ValueError(f"{wanted}, got an empty one. Give at least one.")
    return items


def as_text(given: Any, argument: str, number: int | None = None, *, blank: bool = False) -> str:
    """One text, refused if it is something else, or empty where it may not be; `number` is its place in a list."""
    wanted = f"{argument} must be {'a text' if number is None else 'a list of texts'}"
    where = "" if number is None else f" as number {number} (the first is number 0)"
    if not isinstance(given, str):
        came = repr(given) if len(repr(given)) <= 60 else f"a {type(given).__name__}"
        cell = number is not None and (given is None or isinstance(given, float) or type(given).__name__ == "NAType")
        fix = "Leave empty cells out (dropna in pandas)" if cell else "Give a text"
        raise ValueError(f"{wanted}, got {came}{where}. {fix}.")
    if not blank and not given.strip():
        raise ValueError(f"{wanted}, got an empty one{where}. {'Fill it in' if number is None else 'Leave it out'}.")
    return str(given)  # numpy's kind of string becomes Python's
