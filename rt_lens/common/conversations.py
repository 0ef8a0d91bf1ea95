"""Conversations of several turns. This module checks messages and applies no template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Message: TypeAlias = Mapping[str, Any]
"""`role` and `content`, as chat templates take them."""

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class Conversation(str):
    """Several turns as one prompt: a string, its transcript, that remembers the messages.

    Whatever takes a user message takes a conversation, and applies the chat template to all of its turns.

    Attributes:
        messages: the turns, the last of which waits for a response.

    Raises:
        ValueError: as `to_be_answered`.

    Example:
        >>> chat = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]
        >>> talk = Conversation([*chat, {"role": "user", "content": "How are you?"}])
        >>> print(talk)
        User: Hi!
        Assistant: Hello.
        User: How are you?
        >>> len(talk.messages)
        3
    """

    messages: tuple[Message, ...]

    def __new__(cls, messages: Sequence[Message], where: str = "messages") -> Conversation:
        turns = tuple(to_be_answered(messages, where))
        lines = (f"{str(turn['role']).capitalize()}: {turn['content']}" for turn in turns)
        conversation = super().__new__(cls, "\n".join(lines))
        conversation.messages = turns
        return conversation

    def __str__(self) -> str:
        return self

    def ending(self, content: str) -> Conversation:
        """The conversation with other words as its last message."""
        return Conversation([*self.messages[:-1], {**self.messages[-1], "content": content}])

    def __getnewargs__(self) -> tuple[Any, ...]:  # for copies
        return (self.messages,)


def is_messages(given: Any) -> bool:
    """Whether something is a list of messages, right or wrong ones."""
    return isinstance(given, list | tuple) and bool(given) and all(isinstance(item, Mapping) for item in given)


def as_prompt(messages: Sequence[Message], where: str = "messages") -> str:
    """Messages as a prompt: a Conversation, or the plain text of a single user message.

    Raises:
        ValueError: as `to_be_answered`.

    Example:
        >>> as_prompt([{"role": "user", "content": "Hi!"}])
        'Hi!'
    """
    turns = to_be_answered(messages, where)
    return turns[0]["content"] if [turn["role"] for turn in turns] == ["user"] else Conversation(turns)


def to_be_answered(messages: Sequence[Message], where: str = "messages") -> list[dict[str, Any]]:
    """Messages that a response follows, as `checked`.

    Args:
        messages: with `role` and `content` each; the last is none of the assistant's. Content may be a list of parts of
            type `text`.
        where: what the messages are, for errors.

    Raises:
        ValueError: a message without role or content, an unknown role, content that is no text, or an assistant's last.
    """
    turns = checked(messages, where)
    if turns[-1]["role"] == "assistant":
        raise ValueError(
            f"{where} must end with a message to be answered, got the assistant's {turns[-1]['content'][:40]!r} as the "
            "last. Leave it out, or give it as the prefill."
        )
    return turns


def checked(messages: Sequence[Message], where: str = "messages") -> list[dict[str, Any]]:
    """Messages with roles that are known and contents that are texts; other keys stay.

    Raises:
        ValueError: names the message.
    """
    if not is_messages(messages):
        raise ValueError(
            f"{where} must be a list of messages with role and content, got {str(messages)[:60]!r}. Write "
            '[{"role": "user", "content": "..."}].'
        )
    return [_turn(message, f"{where}: message {number}") for number, message in enumerate(messages, start=1)]


def _turn(message: Message, where: str) -> dict[str, Any]:
    if message.get("role") not in _ROLES:
        raise ValueError(f"{where} must have a role of {', '.join(_ROLES)}, got {message.get('role')!r}. Correct it.")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str) or not (content.strip() or message.get("tool_calls")):
        raise ValueError(f"{where} must have a text as its content, got {str(content)[:60]!r}. Fill it in.")
    return {**message, "content": content}
