"""What a model is to learn: prompts with answers or shares of next tokens, given or in the model's own words."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from rt_lens.common.inputs import as_text, listed, text_list
from rt_lens.data.contrast_pairs import ContrastPairs, Pair
from rt_lens.data.formats import OWN, read_source
from rt_lens.data.readers import Row, Table, refuse_misspelt
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
        rejected: an answer not to give, for the preference loss; whole or cut off like the other.
        contrast: the prompt with a positive and with a negative persona, for the loss `lorra`.

    Example:
        >>> target = Target(chat_text(model, "How was your day?"), "It was a long one.")
        >>> "How was your day?" in target.prompt, target.ended
        (True, True)
    """

    prompt: str
    answer: str
    ended: bool = True
    rejected: str | None = None
    contrast: tuple[str, str] | None = None


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
    if not pairs.topics:
        raise ValueError(
            f"pairs must have user messages to answer, got the whole texts of {pairs.name!r}. Give pairs with "
            "personas, or targets (`load_targets`)."
        )
    chosen = pairs.sample(config.n_targets, seed=config.seed).pairs
    persona = {"toward": lambda p: p.positive, "away": lambda p: p.negative, "suppress": lambda p: ""}[direction]

    def asked(pair: Pair, system: str = "") -> str:
        return chat_text(model, pair.user, system=system)

    with_persona = [asked(pair, persona(pair)) for pair in chosen]
    plain = [
        Target(asked(pair), "", contrast=(asked(pair, pair.positive), asked(pair, pair.negative))) for pair in chosen
    ]
    return _written(model, with_persona, plain, config, progress)


def load_targets(source: str | Path | Table, model: Model) -> list[Target]:
    """Targets of one's own: prompts and answers from a file or a table, in the model's chat template.

    Rows have the fields `prompt`, `answer` and optionally `rejected`, or the columns of another tool: chats
    (`messages`, of which the assistant's last turn is learnt), preferences (`prompt`, `chosen`, `rejected`), prompts
    and completions, instructions (Alpaca), model-written evaluations, TruthfulQA.

    Args:
        source: a .jsonl, .json, .csv or .tsv file, a pandas frame, a `datasets.Dataset`, or a list of objects.
        model: for its chat template.

    Raises:
        ValueError: a row without a prompt or an answer, or one that cannot be read; the message names the line.

    Example:
        >>> rows = [{"prompt": "Say hello.", "chosen": "Hello!", "rejected": "Go away."}]
        >>> (target,) = rtl.tuning.load_targets(rows, model)
        >>> "Say hello." in target.prompt, target.answer, target.rejected
        (True, 'Hello!', 'Go away.')
    """
    rows, foreign = read_source(source, "targets")
    if foreign is None:
        unused = dict.fromkeys(name for row in rows for name in refuse_misspelt(row, "targets", OWN["targets"]))
        if unused:
            warnings.warn(
                f"targets: fields that are not used: {', '.join(map(str, unused))}. The fields used are "
                f"{', '.join(OWN['targets'])}; a system text goes into a conversation as the prompt.",
                stacklevel=2,
            )
    return [_target(row, model) for row in rows]


def _target(row: Row, model: Model) -> Target:
    for name in ("prompt", "answer"):
        if not isinstance(row.cells.get(name), str) or not row.cells[name].strip():
            raise ValueError(
                f"targets: {row.where} must have a text as {name}, got {str(row.cells.get(name))[:40]!r}. Fill it in."
            )
    return Target(chat_text(model, row.cells["prompt"]), row.cells["answer"], rejected=row.cells.get("rejected"))


def rewrite_targets(
    model: Model, targets: Sequence[TokenTarget], config: TuneConfig, *, progress: bool = False
) -> list[Target]:
    """Targets with the model's own answers to their prompts: apply an intervention first, and they show it.

    Args:
        model: with whatever is applied to it.
        targets: whose prompts are answered. A Choice has no answer, and is left out.
        config: length, temperature and seed of the answers.
        progress: show a bar.

    Example:
        >>> few = write_targets(model, train, "toward", TuneConfig(n_targets=2, target_tokens=4))
        >>> with rtl.applied(model, add(vectors, [21], 2.0)):
        ...     steered = rtl.tuning.rewrite_targets(model, few, TuneConfig(target_tokens=4))
        >>> [target.prompt for target in steered] == [target.prompt for target in few]
        True
    """
    answered = [target for target in targets if isinstance(target, Target)]
    if not answered:
        return []
    return _written(model, [target.prompt for target in answered], answered, config, progress)


def preferences(given: Sequence[TokenTarget], rejected: Sequence[TokenTarget]) -> list[Target]:
    """Targets with the answers not to give, from two lists of targets for the same prompts.

    Args:
        given: answers to give.
        rejected: answers not to give. A prompt that has none of them, or the same one, is left out.

    Example:
        >>> happy, sad = rtl.tuning.Target("How was it?", "Great."), rtl.tuning.Target("How was it?", "Bleak.")
        >>> rtl.tuning.preferences([happy], [sad])[0].rejected
        'Bleak.'
    """
    others = {target.prompt: target.answer for target in rejected if isinstance(target, Target)}
    return [
        replace(target, rejected=others[target.prompt])
        for target in given
        if isinstance(target, Target) and others.get(target.prompt, target.answer) != target.answer
    ]


def neutral_list(neutral: Iterable[Any]) -> list[Any]:
    """Neutral prompts and Targets as a list; anything else, such as an empty cell of a table, is refused."""
    items = enumerate(listed(neutral, "neutral", none=True))
    return [
        item if isinstance(item, Target) else as_text(item, "neutral", number, chats=True) for number, item in items
    ]


def write_neutral(
    model: Model, prompts: Iterable[str], config: TuneConfig | None = None, *, progress: bool = False
) -> list[Target]:
    """The untuned model's answers to neutral prompts, on which the KL term keeps the tuned model close to it.

    Example:
        >>> targets = write_neutral(model, neutral, TuneConfig(target_tokens=4))
        >>> len(targets), all(target.answer for target in targets)
        (2, True)
    """
    chats = as_chat(model, text_list(prompts, "prompts", none=True, chats=True))
    return _written(model, chats, [Target(chat, "") for chat in chats], config or TuneConfig(), progress)


def _written(
    model: Model, chats: Sequence[str], targets: Sequence[Target], config: TuneConfig, progress: bool
) -> list[Target]:
    """The targets with the model's answers to some chats."""
    lengths: Counter[int] = Counter()
    answers = generate(
        model, chats, chat=False, max_new_tokens=config.target_tokens, temperature=config.target_temperature,
        seed=config.seed, progress=progress, on_token=lambda token: lengths.update([token.row]),
    )  # fmt: skip
    return [
        replace(target, answer=answer, ended=lengths[row] < config.target_tokens)
        for row, (target, answer) in enumerate(zip(targets, answers, strict=True))
        if answer.strip()
    ]
