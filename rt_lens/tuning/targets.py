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
from rt_lens.tuning.losses import Direction


@dataclass(frozen=True)
class Target:
    """A prompt and the answer that the model is to learn, as texts.

    Attributes:
        prompt: through the chat template already (`chat_text`); may be empty for plain text.
        answer: what follows it.
        ended: whether the answer is whole: then its end is learnt too, so that the tuned model stops there. False for
            an answer that was cut off.
    """

    prompt: str
    answer: str
    ended: bool = True


@dataclass(frozen=True)
class Choice:
    """A prompt and the shares that the next token's candidates are to have (Ackerman 2024).

    Attributes:
        prompt: through the chat template already.
        options: candidates, each one token with its leading space if it has one.
        shares: of each, with sum 1: (1, 0) is a hard choice, (0.5, 0.5) a soft one that only holds the output's form.

    Example:
        >>> Choice("Is water wet? (A) yes (B) no. Answer:", (" A", " B"), (0.5, 0.5))
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
                f"options, shares: {self.options} and {self.shares} came; two or more of each are wanted, and a prompt."
            )
        if not (min(self.shares) >= 0 and abs(sum(self.shares) - 1) <= 1e-6):
            raise ValueError(f"shares: {self.shares} came; numbers from 0 with sum 1 are wanted.")


TokenTarget: TypeAlias = Target | Choice


def write_targets(
    model: Model, pairs: ContrastPairs, direction: Direction, config: TuneConfig, *, progress: bool = False
) -> list[Target]:
    """Targets in the model's own words: answers it writes under a persona, to be learnt without the persona.

    Those that it ended by itself within `target_tokens` keep their end.

    Args:
        model: the untuned model.
        pairs: personas and topics.
        direction: `toward` takes the positive personas, `away` the negative; `suppress` takes none, so that the answers are
            the model's own: places to read activations, and what a token loss holds the model to.
        config: number, length and seed of the targets.
        progress: show a bar.
    """
    chosen = pairs.sample(config.n_targets, seed=config.seed).pairs
    persona = {"toward": lambda p: p.positive, "away": lambda p: p.negative, "suppress": lambda p: ""}[direction]
    asked = [chat_text(model, pair.user, system=persona(pair)) for pair in chosen]
    plain = [chat_text(model, pair.user) for pair in chosen]
    return _written(model, asked, plain, config, progress)


def neutral_list(neutral: Iterable[Any]) -> list[Any]:
    """Neutral prompts and Targets as a list; anything else, such as an empty cell of a table, is refused."""
    items = enumerate(listed(neutral, "neutral", none=True))
    return [item if isinstance(item, Target) else as_text(item, "neutral", number) for number, item in items]


def write_neutral(
    model: Model, prompts: Iterable[str], config: TuneConfig | None = None, *, progress: bool = False
) -> list[Target]:
    """The untuned model's answers to neutral prompts: where the KL term holds the tuned model to it."""
    asked = as_chat(model, text_list(prompts, "prompts", none=True))
    return _written(model, asked, asked, config or TuneConfig(), progress)


def _written(
    model: Model, asked: Sequence[str], prompts: Sequence[str], config: TuneConfig, progress: bool
) -> list[Target]:
    """What the model answers to the texts asked, to be learnt as answers to the prompts."""
    lengths: Counter[int] = Counter()
    answers = generate(
        model, asked, chat=False, max_new_tokens=config.target_tokens, temperature=config.target_temperature,
        seed=config.seed, progress=progress, on_token=lambda token: lengths.update([token.row]),
    )  # fmt: skip
    return [
        Target(prompt, answer, ended=lengths[row] < config.target_tokens)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        if answer.strip()
    ]
