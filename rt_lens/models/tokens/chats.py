"""Chats through a model's own template: what it reads, and where its answer begins and ends. This room runs no model.

A chat is a `ChatText`: that it went through a template is remembered with the string, never guessed from its first
characters, so that no start token comes twice and nothing is put through the template again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rt_lens.models.protocol import HasTokenizer, TextModel

TEMPLATE_DATE = datetime(2024, 7, 26, 12, 0, 0)
"""What templates that write today's date get: else the same seed would give other numbers tomorrow."""

Message = Mapping[str, str]
"""`role` and `content`."""


class ChatText(str):
    """A chat as the model reads it, special tokens written out, up to where the assistant goes on.

    A string like any other. `+` goes on with the assistant's words as they are; `answered` puts them through the
    template.

    Attributes:
        messages: the turns before the assistant's.
        prefill: first words of the answer, which the text holds already; may be empty.
        answer_at: number of the character at which the answer begins.
    """

    messages: tuple[Message, ...]
    prefill: str
    answer_at: int

    def __new__(cls, text: str, messages: Sequence[Message] = (), prefill: str = "") -> ChatText:
        made = super().__new__(cls, text)
        made.messages, made.prefill = tuple(messages), prefill
        words = prefill.strip()  # templates may strip what they are given
        made.answer_at = text.rfind(words) if words and words in text else len(text)
        return made

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
    """True if the model's tokenizer knows how to write a chat."""
    return bool(getattr(tokenizer_of(model), "chat_template", None))


def is_chat(model: HasTokenizer, text: str) -> bool:
    """Whether a text went through the chat template: here, or elsewhere if it begins with a special token."""
    if isinstance(text, ChatText):
        return True
    return has_chat_template(model) and text.startswith(tuple(map(str, tokenizer_of(model).all_special_tokens)))


def chat_text(model: HasTokenizer, user: str, *, system: str = "", prefill: str = "") -> str:
    """One exchange through the model's chat template, up to the point where the assistant writes.

    Templates that refuse a system role, or pass over it, get the system text in front of the user's. The prefill is
    written as the template writes an answer, so that its first word is the token that it would be in a whole answer.
    Tokenizers without a template get plain paragraphs.

    Args:
        model: for its tokenizer, and for `chat_template_kwargs` of `load_model`.
        user: what the user says.
        system: a persona or instruction; empty leaves the template's default.
        prefill: first words of the assistant's answer, already written.

    Returns:
        A ChatText; a plain string where there is no template.

    Example:
        >>> chat_text(model, "How was your day?", system="You are cheerful.", prefill="It was")
    """
    if not has_chat_template(model):
        return "\n\n".join(part for part in (system, user, prefill) if part)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": user})
    return _opened(model, messages, prefill)


def _opened(model: HasTokenizer, messages: Sequence[Message], prefill: str) -> ChatText:
    """The messages, and the assistant's turn opened with some words."""
    if prefill:
        try:
            turns = [*messages, {"role": "assistant", "content": prefill}]
            return ChatText(rendered(model, turns, open_answer=False), messages, prefill)
        except Exception:  # a template that rewrites answers, or knows none
            pass
    return ChatText(rendered(model, messages) + prefill, messages, prefill)


def answered(model: HasTokenizer, prompt: str, answer: str) -> str:
    """A prompt with its answer, as the template writes a whole one: Llama-2's puts a space before it, say.

    Args:
        model: for its tokenizer.
        prompt: from `chat_text`; the answer follows any other text as it is.
        answer: goes on from the prompt's prefill.
    """
    if isinstance(prompt, ChatText) and prompt.messages:
        return _opened(model, prompt.messages, prompt.prefill + answer)
    return prompt + answer


def rendered(model: HasTokenizer, messages: Sequence[Message], *, open_answer: bool = True) -> str:
    """A conversation through the model's chat template.

    Args:
        model: for its tokenizer, and for `chat_template_kwargs` of `load_model`.
        messages: with `role` and `content` each.
        open_answer: end where the assistant is to write; False leaves the last message open, to be gone on with.

    Raises:
        Exception: what the template raises, for a role that it does not know, say.
    """

    def through(turns: Sequence[Message]) -> str:
        return tokenizer_of(model).apply_chat_template(
            list(turns), tokenize=False, chat_template=_dated(tokenizer_of(model)), add_generation_prompt=open_answer,
            continue_final_message=not open_answer, **_variables(model),
        )  # fmt: skip

    if len(messages) < 2 or messages[0]["role"] != "system":
        return through(messages)
    system, user, *others = messages
    folded = [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *others]
    try:
        text = through(messages)
    except Exception as refusal:  # templates raise jinja errors of their own for a role they do not know
        try:
            return through(folded)
        except Exception:
            raise refusal from None
    # Phi-3's takes any role and writes only those that it knows: another system text changes nothing there.
    passed_over = text == through([{**system, "content": f"{system['content']} (another)"}, user, *others])
    return through(folded) if passed_over else text


def _variables(model: HasTokenizer) -> dict[str, Any]:
    return dict(getattr(getattr(model, "cfg", None), "rt_lens_chat_template_kwargs", None) or {})


def _dated(tokenizer: Any) -> str | None:
    """The template with one date for `strftime_now`; None for the tokenizer's own where it asks for none."""
    template = tokenizer.get_chat_template()
    if "strftime_now" not in template:
        return None
    # Functions given as variables do not reach a template, but one that it defines itself goes before all others.
    # Of each code the longer spelling first: "%-d" before "%d".
    codes = [f"%-{code}" for code in "dmHIMSjy"] + [f"%{code}" for code in "aAbBcdeHIjmMpSUwWxXyYZ%"]
    written = {code: TEMPLATE_DATE.strftime(code).strip() for code in codes}
    replaced = "".join(f"|replace({code!r}, {text!r})" for code, text in written.items())
    # The empty word keeps a line end with which the template may begin: one after a block would be dropped.
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}{{{{ '' }}}}{template}"


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that a tokenizer marks as special."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}


def end_ids(model: TextModel) -> tuple[int, ...]:
    """Token ids that end an answer.

    Those of the model's generation settings, which may be several, as in Hugging Face's `generate`. A model without
    such settings, or with those that follow from its sizes alone, ends at its end of text, and at what its template
    writes after an answer.
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
    """The token that a whole answer is learnt to end with: the template's, if it ends answers; None if nothing does."""
    ends = end_ids(model)
    return next((number for number in [*_after_an_answer(model), *ends] if number in ends), None)


def _after_an_answer(model: HasTokenizer) -> list[int]:
    """Special tokens that the chat template writes after an answer, in order."""
    if not has_chat_template(model):
        return []
    tokenizer, word = tokenizer_of(model), "Certainly"
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": word}]
    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, chat_template=_dated(tokenizer), **_variables(model)
        )
    except Exception:  # a template that knows no answers
        return []
    ids = tokenizer.encode(text.rpartition(word)[2], add_special_tokens=False)
    special = special_ids(tokenizer)
    return [number for number in ids if number in special]


_THOUGHT = r"<(?:think|thinking|thought|reasoning|seed:think)>"


def begins_with_thought(prompt: str, answer: str) -> bool:
    """Whether an answer begins inside a model's thoughts, as those of models that think first do."""
    return bool(re.match(rf"\s*{_THOUGHT}", answer) or re.search(rf"{_THOUGHT}\s*$", prompt))
