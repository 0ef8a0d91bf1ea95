"""Interventions on a model: hooks, weight deltas, system prompts, several of them, or none. It measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from rt_lens.models.protocol import Model
from rt_lens.models.tokens.chats import system_prompt
from rt_lens.steering.binding import steered
from rt_lens.steering.edits import FwdHook
from rt_lens.tuning.delta import WeightDelta


@dataclass(frozen=True)
class SystemPrompt:
    """An intervention that asks for the behaviour: a system prompt for every chat that has none of its own.

    It acts on prompts that get the chat template while it is applied, and not on plain texts or finished chats. A model
    without a template reads it as a paragraph before the prompt.

    Attributes:
        text: a persona or instruction.

    Example:
        >>> with applied(model, SystemPrompt("You are a happy assistant.")):
        ...     print(rtl.models.chat_text(model, "How was your day?"))
        <|im_start|>system
        You are a happy assistant.<|im_end|>
        ...
    """

    text: str

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("text must be a persona or an instruction, got an empty one. Use None to change nothing.")


Intervention: TypeAlias = WeightDelta | Sequence[FwdHook] | SystemPrompt | None
"""A WeightDelta, the hooks that `add` and the like give, a SystemPrompt, or None for the model as it is."""
Interventions: TypeAlias = Intervention | tuple[Intervention, ...]
"""One of them, or several in a tuple."""


def each_of(interventions: Interventions) -> tuple[Intervention, ...]:
    """The interventions as a tuple; a tuple of hooks, which are pairs of a name and a function, is one of them."""
    if isinstance(interventions, tuple) and not all(_is_hook(part) for part in interventions):
        return cast(tuple[Intervention, ...], interventions)
    return (cast(Intervention, interventions),)


def _is_hook(part: object) -> bool:
    return isinstance(part, tuple) and len(part) == 2 and isinstance(part[0], str)


@contextmanager
def applied(model: Model, *interventions: Intervention) -> Iterator[Any]:
    """Context manager: applies the interventions in order, and reverts them on exit.

    Args:
        model: HookedTransformer or TransformerBridge.
        interventions: WeightDeltas, lists of hooks, SystemPrompts; None changes nothing.

    Raises:
        ValueError: for anything else; then nothing is changed.

    Example:
        >>> with applied(model, delta, add(vectors, [21], -2.0)):
        ...     responses = generate(model, ["Tell me about your weekend."], max_new_tokens=4)
        >>> len(responses)
        1
    """
    for intervention in interventions:
        check_intervention(intervention)
    with ExitStack() as stack:
        for intervention in interventions:
            if isinstance(intervention, WeightDelta):
                stack.enter_context(intervention.applied(model))
            elif isinstance(intervention, SystemPrompt):
                stack.enter_context(system_prompt(model, intervention.text))
            elif intervention is not None:
                stack.enter_context(steered(model, list(intervention)))
        yield model


def check_intervention(intervention: object, argument: str = "interventions") -> None:
    """Refuses what is no Intervention.

    Raises:
        ValueError: says what it is.
    """
    hooks = isinstance(intervention, Sequence) and all(
        isinstance(hook, tuple) and len(hook) == 2 for hook in intervention
    )
    if not (intervention is None or isinstance(intervention, WeightDelta | SystemPrompt) or hooks):
        raise ValueError(
            f"{argument} must be a WeightDelta, a list of hooks as `add` gives, a SystemPrompt, or None, got a "
            f"{type(intervention).__name__}."
        )
