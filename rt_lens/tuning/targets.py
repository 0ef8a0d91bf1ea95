"""What a model is to learn: prompts with answers or shares of next tokens, given or in the model's own words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from rt_lens.common.inputs import as_text, listed, text_list
from rt_lens.data.contrast_pairs import ContrastPairs
from rt_lens.models.generation import as_chat, generate
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.chats import chat_text
from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.losses import Direction, check_direction


@dataclass(frozen=True)
class Target:
    """A prompt and the answer that the model is to learn, as texts.

    Attributes:
        prompt: through the chat template already (`chat_text`); may be empty for plain text.
        answer: what follows it.
        ended: whether the answer is whole: then its end is learnt too, so that the tuned model stops there. False for
            an answer that was cut off.

    Example:
        >>> target = Target(chat_text(model, "How was your day?"), "It was a long one.")
        >>> "How was your day?" in target.prompt, target.ended
        (True, True)
    """

    prompt: str
    answer: str
    ended: bool = True


@dataclass(frozen=True)
class Choice:
    """A prompt and the probabilities that the next token's candidates are to have (Ackerman 2024).

    Attributes:
        prompt: through the chat template already.
        options: candidates, each one token with its leading space if it has one.
        shares: target probability of each, summing to 1: (1, 0) is a hard choice, (0.5, 0.5) a soft one that only
            holds the output's form.

    Example:
        >>> soft = Choice("Is water wet? (A) yes (B) no. Answer:", (" A", " B"), (0.5, 0.5))
        >>> soft.options
        (' A', ' B')
    """

    prompt: str
    options: tuple[str, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if (
            isinstance(self.options, str)
            or not self.prompt
            or len(self.options) < 2
            or len(self.options) != len(self.shares)
        ):
            raise ValueError(
                "options and shares must be two or more of each, with a prompt, got "
                f"{self.options} and {self.shares} for prompt {self.prompt[:60]!r}."
            )
        if not (min(self.shares) >= 0 and abs(sum(self.shares) - 1) <= 1e-6):
            raise ValueError(f"shares must be non-negative and sum to 1, got {self.shares}.")


TokenTarget: TypeAlias = Target | Choice


def write_targets(
    model: Model, pairs: ContrastPairs, direction: Direction, config: TuneConfig, *, progress: bool = False
) -> list[Target]:
    """Targets in the model's own words: answers that it writes under a persona, to be learnt without the persona.

    Answers that the model ends within `target_tokens` keep their end.

    Args:
        model: the untuned model.
        pairs: personas and topics.
        direction: `toward` takes the positive personas, `away` the negative; `suppress` takes none, so that the answers
            are what the model writes anyway: texts to read activations in, and to which a token loss holds the model.
        config: number, length and seed of the targets.
        progress: show a bar.

    Example:
        >>> targets = write_targets(model, train, "toward", TuneConfig(n_targets=2, target_tokens=4))
        >>> len(targets), train.pairs[0].positive in targets[0].prompt  # learnt without the persona
        (2, False)
    """
    check_direction(direction)
    chosen = pairs.sample(config.n_targets, seed=config.seed).pairs
    persona = {"toward": lambda p: p.positive, "away": lambda p: p.negative, "suppress": lambda p: ""}[direction]
    with_persona = [chat_text(model, pair.user, system=persona(pair)) for pair in chosen]
    plain = [chat_text(model, pair.user) for pair in chosen]
    return _written(model, with_persona, plain, config, progress)


def neutral_list(neutral: Iterable[Any]) -> list[Any]:
    """Neutral prompts and Targets as a list; anything else, such as an empty cell of a table, is refused."""
    items = enumerate(listed(neutral, "neutral", none=True))
    return [item if isinstance(item, Target) else as_text(item, "neutral", number) for number, item in items]


def write_neutral(
    model: Model, prompts: Iterable[str], config: TuneConfig | None = None, *, progress: bool = False
) -> list[Target]:
    """The untuned model's answers to neutral prompts, on which the KL term keeps the tuned model close to it.

    Example:
        >>> targets = write_neutral(model, neutral, TuneConfig(target_tokens=4))
        >>> len(targets), all(target.answer for target in targets)
        (2, True)
    """
    chats = as_chat(model, text_list(prompts, "prompts", none=True))
    return _written(model, chats, chats, config or TuneConfig(), progress)


def _written(
    model: Model, chats: Sequence[str], prompts: Sequence[str], config: TuneConfig, progress: bool
) -> list[Target]:
    """The model's answers to some chats, to be learnt as answers to the prompts."""
    lengths: Counter[int] = Counter()
    answers = generate(
        model, chats, chat=False, max_new_tokens=config.target_tokens, temperature=config.target_temperature,
        seed=config.seed, progress=progress, on_token=lambda token: lengths.update([token.row]),
    )  # fmt: skip
    return [
        Target(prompt, answer, ended=lengths[row] < config.target_tokens)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        if answer.strip()
    ]
