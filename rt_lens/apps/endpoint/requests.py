"""What a client may ask of the endpoint, checked, and what it gets: the bodies of OpenAI's completions and chats."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rt_lens.common.conversations import Conversation

Kind = Literal["chat.completion", "text_completion"]

_DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "best_of": (1,), "echo": (False,), "suffix": ("",),
    "logprobs": (False,), "top_logprobs": (), "logit_bias": ({},), "response_format": ({"type": "text"},),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False), "modalities": (["text"],), "min_p": (0,), "use_beam_search": (False,),
    "ignore_eos": (False,), "length_penalty": (1,),
}  # fmt: skip
"""Arguments that the endpoint does not have -> values that ask for nothing."""
_HARMLESS = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "skip_special_tokens",
    "spaces_between_special_tokens", "add_generation_prompt",
}  # fmt: skip


def _is(value: Any, default: Any) -> bool:
    """Whether two values are the same; 0 and False are not, of which `logprobs` means the one and not the other."""
    return value == default and isinstance(value, bool) == isinstance(default, bool)


class Settings(BaseModel):
    """Sampling, as both kinds of request have it. What a client may ask and does not get is refused, not ignored."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=1.0, ge=0, le=2)
    top_p: float | None = Field(default=1.0, gt=0, le=1)
    n: int | None = Field(default=1, ge=1, le=16)
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    top_k: int | None = Field(default=None, ge=-1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    min_tokens: int | None = Field(default=None, ge=0)

    def refused(self) -> str | None:
        """The first argument that this endpoint does not have, and that asks for something."""
        for name, value in (self.model_extra or {}).items():
            asks = value is not None and not any(_is(value, default) for default in _DEFAULTS.get(name, ()))
            if asks and name not in _HARMLESS:
                return name
        return None

    def generation(self) -> dict[str, Any]:
        """Keywords of `generate`. Without a seed every request draws another one."""
        n, temperature = self.n or 1, 1.0 if self.temperature is None else self.temperature
        return {
            "max_new_tokens": self.max_completion_tokens or self.max_tokens or 256,
            "temperature": temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "stop": self.stop or (),
            "seed": secrets.randbelow(2**31) if self.seed is None else self.seed % 2**31,
            "top_k": max(0, self.top_k or 0),
            "repetition_penalty": self.repetition_penalty or 1.0,
            "min_new_tokens": self.min_tokens or 0,
            "num_return_sequences": n,
        }


class ChatRequest(Settings):
    """A request for a response to a conversation."""

    messages: list[dict[str, Any]]

    def prompts(self) -> list[str]:
        """The conversation as a prompt of `generate`, to which the template is applied whatever it begins with."""
        return [Conversation(self.messages)]


class CompletionRequest(Settings):
    """A request to continue texts, without a chat template."""

    prompt: str | list[str]

    def prompts(self) -> list[str]:
        """The texts as they are."""
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)


@dataclass
class Reply:
    """A reply as it grows: what was said of it to the client, and the bodies of OpenAI's API.

    Attributes:
        kind: of request.
        model: name of the arm.
        n: number of choices.
        most: tokens after which a choice is cut off.
        prompt_tokens: of all prompts.
        texts: of each choice so far.
        tokens: of each choice so far.
    """

    kind: Kind
    model: str
    n: int
    most: int
    prompt_tokens: int
    id: str = field(default_factory=lambda: f"rt-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    texts: list[str] = field(init=False)
    tokens: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.texts, self.tokens = [""] * self.n, [0] * self.n

    def add(self, index: int, text: str) -> None:
        """Another token of a choice."""
        self.texts[index] += text
        self.tokens[index] += 1

    def finish_reason(self, index: int) -> str:
        """`stop`, or `length` where the choice was cut off."""
        return "length" if self.tokens[index] >= self.most else "stop"

    @property
    def usage(self) -> dict[str, int]:
        new = sum(self.tokens)
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": new, "total_tokens": self.prompt_tokens + new}

    def whole(self) -> dict[str, Any]:
        """The body of a reply that is not streamed."""
        choices = [
            {"index": i, "finish_reason": self.finish_reason(i), "logprobs": None, **self._said(text)}
            for i, text in enumerate(self.texts)
        ]
        return {**self._head(), "choices": choices, "usage": self.usage}

    def _said(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}} if self.kind == "chat.completion" else {"text": text}

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """The body of a part of a stream."""
        said = {"delta": {"content": text}} if self.kind == "chat.completion" else {"text": text}
        return {**self._head(), "choices": [{"index": index, "finish_reason": None, "logprobs": None, **said}]}

    def last(self, index: int) -> dict[str, Any]:
        """The body that ends a choice of a stream."""
        said: Mapping[str, Any] = {"delta": {}} if self.kind == "chat.completion" else {"text": ""}
        choice = {"index": index, "finish_reason": self.finish_reason(index), "logprobs": None, **said}
        return {**self._head(), "choices": [choice]}

    def spent(self) -> dict[str, Any]:
        """The body that tells the tokens of a stream, at its end."""
        return {**self._head(), "choices": list[Any](), "usage": self.usage}

    def _head(self) -> dict[str, Any]:
        streamed = "chat.completion.chunk" if self.kind == "chat.completion" else "text_completion"
        return {"id": self.id, "object": streamed, "created": self.created, "model": self.model}


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """The body of a refusal, as clients of OpenAI's API read it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def said_plainly(errors: Sequence[Mapping[str, Any]]) -> str:
    """Pydantic's errors in a sentence each."""
    return " ".join(
        f"{'.'.join(str(part) for part in error['loc'] if part != 'body') or 'body'} must be valid, got "
        f"{str(error.get('input'))[:60]!r}: {error['msg']}."
        for error in errors
    )
