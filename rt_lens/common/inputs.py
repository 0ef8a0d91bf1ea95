"""Lists of texts from any ordered container. This module checks arguments and knows nothing of their meaning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rt_lens.common.conversations import Conversation, Message, is_messages


def text_list(
    given: Iterable[str | Sequence[Message]],
    argument: str = "prompts",
    *,
    blank: bool = False,
    none: bool = False,
    chats: bool = False,
) -> list[str]:
    """Texts as a list: from a list, a tuple, a column of a table, an array or a generator.

    Args:
        given: the texts.
        argument: the caller's name for them; messages begin with it.
        blank: allow empty texts.
        none: allow an empty list.
        chats: allow conversations, as lists of messages, to which a chat template will be applied.

    Raises:
        ValueError: for a str, a table, a container without order, or an item that is empty or no text (NaN,
            None); the message names its index.

    Example:
        >>> import pandas as pd
        >>> text_list(pd.Series(["How was your day?", "Tell me about rivers."]))
        ['How was your day?', 'Tell me about rivers.']
        >>> text_list("How was your day?")
        Traceback (most recent call last):
        ValueError: prompts must be a list of at least one text, got a str. Wrap it in a list: ['...'].
    """
    items = listed(given, argument, none=none)
    return [as_text(item, argument, number, blank=blank, chats=chats) for number, item in enumerate(items)]


def listed(given: Any, argument: str, *, none: bool = False) -> list[Any]:
    """The items of any ordered container, unchecked; see `text_list`."""
    rule = f"{argument} must be a list of {'texts' if none else 'at least one text'}"
    if isinstance(given, str | bytes):
        raise ValueError(f"{rule}, got a {type(given).__name__}. Wrap it in a list: ['...'].")
    if isinstance(given, Mapping | set | frozenset) or not isinstance(given, Iterable):
        raise ValueError(f"{rule}, got a {type(given).__name__}. Put the texts in a list.")
    if (n := getattr(given, "ndim", 1)) != 1:  # a table's items are the names of its columns
        raise ValueError(f"{rule}, got a {type(given).__name__} of {n} dimensions. Give one column of it.")
    items = list(given)
    if not items and not none:
        raise ValueError(f"{rule}, got an empty one. Give at least one.")
    return items


def as_text(given: Any, argument: str, number: int | None = None, *, blank: bool = False, chats: bool = False) -> str:
    """One text; a ValueError if it is something else, or empty and not `blank`.

    Args:
        given: the text, or with `chats` a list of messages.
        argument: the caller's name for it.
        number: its index in a list.
        blank: allow an empty one.
        chats: allow a conversation.
    """
    rule = f"{argument} must be {'a string' if number is None else 'a list of texts'}"
    where = "" if number is None else f" at index {number}"
    if is_messages(given) and chats:
        return Conversation(given, f"{argument}{where}")
    if is_messages(given) or (isinstance(given, Conversation) and not chats):
        raise ValueError(
            f"{rule}, got a conversation{where}. Apply the chat template first: rtl.models.chat_text(model, ...)."
        )
    if number is not None and chats and isinstance(given, Mapping) and "role" in given:
        raise ValueError(
            f"{rule} or conversations, got a message{where}. Wrap the conversation in a list: [[{{...}}, ...]]."
        )
    if not isinstance(given, str):
        shown = repr(given) if len(repr(given)) <= 60 else f"a {type(given).__name__}"
        is_cell = number is not None and (given is None or isinstance(given, float) or type(given).__name__ == "NAType")
        fix = "Leave empty cells out (dropna in pandas)" if is_cell else "Give a string"
        raise ValueError(f"{rule}, got {shown}{where}. {fix}.")
    if not blank and not given.strip():
        raise ValueError(f"{rule}, got an empty one{where}. {'Fill it in' if number is None else 'Leave it out'}.")
    return str(given)  # numpy's str_ becomes str
