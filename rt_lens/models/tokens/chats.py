"""Chats in a model's own template: the text that it reads, and where its response begins and ends. Runs no model.

A chat is a `ChatText`, a string that remembers that the template has been applied. Nothing guesses this from the first
characters, so no start token is added twice and no template is applied twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from rt_lens.common.conversations import Conversation, Message, as_prompt
from rt_lens.models.protocol import HasTokenizer, TextModel

TEMPLATE_DATE = datetime(2024, 7, 26, 12, 0, 0)
"""The date for templates that write today's: with the real one, the same seed would give other numbers tomorrow."""


class ChatText(str):
    """A chat as the model reads it, special tokens written out, up to the point where the assistant continues.

    A string like any other. `+` appends words of the assistant unchanged; `answered` applies the template to them.

    Attributes:
        messages: the turns before the assistant's.
        prefill: first words of the response, which the text contains; may be empty.
        answer_at: index of the character at which the response begins.
    """

    messages: tuple[Message, ...]
    prefill: str
    answer_at: int

    def __new__(cls, text: str, messages: Sequence[Message] = (), prefill: str = "") -> ChatText:
        chat = super().__new__(cls, text)
        chat.messages, chat.prefill = tuple(messages), prefill
        stripped = prefill.strip()  # as templates may strip it
        chat.answer_at = text.rfind(stripped) if stripped and stripped in text else len(text)
        return chat

    def __str__(self) -> str:
        return self

    def __add__(self, more: str) -> ChatText:
        return ChatText(str.__add__(self, more), self.messages, self.prefill + more)


def tokenizer_of(model: HasTokenizer) -> Any:
    """The model's tokenizer.

    Raises:
        ValueError: if the model has none.
    """
    if getattr(model, "tokenizer", None) is None:
        raise ValueError("model must have a tokenizer to read text, got none. Set model.tokenizer first.")
    return model.tokenizer


def has_chat_template(model: HasTokenizer) -> bool:
    """True if the model's tokenizer has a chat template."""
    return bool(getattr(tokenizer_of(model), "chat_template", None))


def is_chat(model: HasTokenizer, text: str) -> bool:
    """Whether the chat template has been applied to a text: by rt_lens, or elsewhere if a special token comes first."""
    if isinstance(text, ChatText):
        return True
    return has_chat_template(model) and text.startswith(tuple(map(str, tokenizer_of(model).all_special_tokens)))


@contextmanager
def system_prompt(model: HasTokenizer, text: str) -> Iterator[None]:
    """Context manager: `chat_text` writes this text as the system prompt of every chat that has none of its own.

    Args:
        model: its configuration holds the text meanwhile.
        text: a persona or instruction.
    """
    cfg: Any = model.cfg  # type: ignore[attr-defined]
    before = system_of(model)
    cfg.rt_lens_system_prompt = text
    try:
        yield
    finally:
        cfg.rt_lens_system_prompt = before


def system_of(model: HasTokenizer) -> str:
    """The system prompt that `system_prompt` has set; empty if none is."""
    return str(getattr(getattr(model, "cfg", None), "rt_lens_system_prompt", "") or "")


def chat_text(model: HasTokenizer, user: str | Sequence[Message], *, system: str = "", prefill: str = "") -> str:
    """A user message or a conversation in the model's chat template, up to the point where the assistant continues.

    For templates that refuse or ignore a system role, the system text goes in front of the user's. The template writes
    the prefill as it writes a response, so its first word is the same token as in a whole response. Without a template
    the parts become plain paragraphs.

    Args:
        model: for its tokenizer, and for `chat_template_kwargs` of `load_model`.
        user: the user message, or several turns: a Conversation, or a list of messages that the assistant answers.
        system: a persona or instruction, in front of the conversation's own; empty takes that of `system_prompt` where
            the conversation has none, or leaves the template's default.
        prefill: first words of the response, put into the assistant's mouth.

    Returns:
        A ChatText; a plain string if there is no template.

    Example:
        >>> print(chat_text(model, "How was your day?", system="You are cheerful.", prefill="It was"))
        <|im_start|>system
        You are cheerful.<|im_end|>
        <|im_start|>user
        How was your day?<|im_end|>
        <|im_start|>assistant
        It was
    """
    messages = _turns(model, user if isinstance(user, str) else as_prompt(user), system)
    if not has_chat_template(model):
        return "\n\n".join(text for text in (*(turn["content"] for turn in messages), prefill) if text)
    return _opened(model, messages, prefill)


def _turns(model: HasTokenizer, prompt: str, system: str) -> list[Message]:
    """A prompt's messages, the system text first."""
    plain: list[Message] = [{"role": "user", "content": prompt}]
    turns = list(prompt.messages) if isinstance(prompt, Conversation) else plain
    if turns[0]["role"] in ("system", "developer"):
        first, *turns = turns
        system = "\n\n".join(text for text in (system, first["content"]) if text)
    system = system or system_of(model)
    return [{"role": "system", "content": system}, *turns] if system else turns


def _opened(model: HasTokenizer, messages: Sequence[Message], prefill: str) -> ChatText:
    """The messages, and the assistant's turn with its prefill."""
    if prefill:
        try:
            turns = [*messages, {"role": "assistant", "content": prefill}]
            return ChatText(rendered(model, turns, open_answer=False), messages, prefill)
        except Exception:  # a template that rewrites responses, or has none
            pass
    return ChatText(rendered(model, messages) + prefill, messages, prefill)


def answered(model: HasTokenizer, prompt: str, answer: str) -> str:
    """A prompt with its response, as the template writes a whole one: Llama-2's puts a space before it, say.

    Args:
        model: for its tokenizer.
        prompt: from `chat_text`; to any other text the response is simply appended.
        answer: the response, which continues the prompt's prefill.
    """
    if isinstance(prompt, ChatText) and prompt.messages:
        return _opened(model, prompt.messages, prompt.prefill + answer)
    return prompt + answer


def rendered(model: HasTokenizer, messages: Sequence[Message], *, open_answer: bool = True) -> str:
    """A conversation in the model's chat template.

    Args:
        model: for its tokenizer, and for `chat_template_kwargs` of `load_model`.
        messages: with `role` and `content` each.
        open_answer: end where the assistant's turn begins; False leaves the last message open, to be continued.

    Raises:
        Exception: the template's own error, for a role that it does not know, say.
    """

    def through(turns: Sequence[Message]) -> str:
        return tokenizer_of(model).apply_chat_template(
            list(turns), tokenize=False, chat_template=_dated(tokenizer_of(model)), add_generation_prompt=open_answer,
            continue_final_message=not open_answer, **_variables(model),
        )  # fmt: skip

    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return through(messages)
    system, user, *others = messages
    folded = [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *others]
    try:
        text = through(messages)
    except Exception as refusal:  # templates raise jinja errors for a role that they do not know
        try:
            return through(folded)
        except Exception:
            raise refusal from None
    # Phi-3's template takes any role and writes only those that it knows: another system text changes nothing there.
    ignored = text == through([{**system, "content": f"{system['content']} (another)"}, user, *others])
    return through(folded) if ignored else text


def _variables(model: HasTokenizer) -> dict[str, Any]:
    return dict(getattr(getattr(model, "cfg", None), "rt_lens_chat_template_kwargs", None) or {})


def _dated(tokenizer: Any) -> str | None:
    """The template with a fixed date for `strftime_now`; None if the template writes no date."""
    template = tokenizer.get_chat_template()
    if "strftime_now" not in template:
        return None
    # Functions passed as variables do not reach a template, but a macro that it defines takes precedence.
    # The longer spelling of each code comes first: "%-d" before "%d".
    codes = [f"%-{code}" for code in "dmHIMSjy"] + [f"%{code}" for code in "aAbBcdeHIjmMpSUwWxXyYZ%"]
    written = {code: TEMPLATE_DATE.strftime(code).strip() for code in codes}
    replaced = "".join(f"|replace({code!r}, {text!r})" for code, text in written.items())
    # The empty string keeps a line end at the template's start: jinja drops one that follows a block.
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}{{{{ '' }}}}{template}"


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that a tokenizer marks as special."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}


def end_ids(model: TextModel) -> tuple[int, ...]:
    """Token ids that end a response.

    Those of the model's generation settings, as in Hugging Face's `generate`. Without such settings, or with settings
    derived from the model's configuration alone: the end-of-text token, and the token that the template writes after a
    response.
    """
    settings = getattr(model.cfg, "rt_lens_generation", None) or {}
    named = settings.get("eos_token_id")
    if named is None:
        named = tokenizer_of(model).eos_token_id
    ends = {named} if named is None or isinstance(named, int) else set(named)
    if settings.get("eos_token_id") is None or settings.get("_from_model_config"):
        ends |= set(_after_an_answer(model)[:1])
    return tuple(sorted(number for number in ends if number is not None))


def end_of_answer(model: TextModel) -> int | None:
    """The end token of a whole response in training: the template's, if it is an end token; None if there is none."""
    ends = end_ids(model)
    return next((number for number in [*_after_an_answer(model), *ends] if number in ends), None)


def _after_an_answer(model: HasTokenizer) -> list[int]:
    """Special tokens that the chat template writes after a response, in order."""
    if not has_chat_template(model):
        return []
    tokenizer, word = tokenizer_of(model), "Certainly"
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": word}]
    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, chat_template=_dated(tokenizer), **_variables(model)
        )
    except Exception:  # a template without an assistant's turn
        return []
    ids = tokenizer.encode(text.rpartition(word)[2], add_special_tokens=False)
    special = special_ids(tokenizer)
    return [number for number in ids if number in special]


_MARKS = ("think", "thinking", "thought", "reasoning", "seed:think")
_THOUGHT = rf"<({'|'.join(_MARKS)})>"


def begins_with_thought(prompt: str, answer: str) -> bool:
    """Whether a response begins inside a model's thoughts, as with models that reason first."""
    return bool(re.match(rf"\s*{_THOUGHT}", answer) or re.search(rf"{_THOUGHT}\s*$", prompt))


def without_thought(prompt: str, answer: str) -> str:
    """A response after the model's thoughts; empty if these do not end, and unchanged if there are none.

    Example:
        >>> without_thought("Hi!", "<think>A greeting.</think>\\n\\nHello.")
        'Hello.'
    """
    if not begins_with_thought(prompt, answer):
        return answer
    _, end, rest = re.split(rf"(</(?:{'|'.join(_MARKS)})>)", answer, maxsplit=1) if "</" in answer else (answer, "", "")
    return rest.lstrip() if end else ""


def empty_thought(model: HasTokenizer, prompt: str) -> str:
    """What to append to a prompt so that no thought precedes the response; empty for a model that has none."""
    if opened := re.search(rf"{_THOUGHT}\s*$", prompt):
        return f"\n</{opened[1]}>\n\n"
    template = str(getattr(tokenizer_of(model), "chat_template", None) or "")
    closed = re.search(rf"</({'|'.join(_MARKS)})>", template)
    done = re.search(rf"</(?:{'|'.join(_MARKS)})>\s*$", prompt)  # the template's own switch has written one
    return f"<{closed[1]}>\n\n</{closed[1]}>\n\n" if closed and not done else ""
