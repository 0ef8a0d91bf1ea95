"""What is asked of a model and how its answers are scored: the one way to measure, for comparisons and searches.

A measure is a function from a model to one number per prompt. An `EvalTask` is one, and so is a `LogitDifference`; a
function of your own works wherever they do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch

from rt_lens.common.inputs import text_list
from rt_lens.data.questions import Asked, Question, as_questions
from rt_lens.evaluation.answering import ask
from rt_lens.evaluation.registry import ScorerLike, make_scorer
from rt_lens.evaluation.scorers import Scorer
from rt_lens.models.context import token_context
from rt_lens.models.forward import logits_where
from rt_lens.models.generation import as_chat
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.batches import batches
from rt_lens.models.tokens.chats import tokenizer_of

Measure: TypeAlias = Callable[[Model], Sequence[float]]
"""A model goes in, with whatever hooks or changed weights it has; one number per prompt comes out, in order."""

_RESERVED = ("arm", "direction", "seed", "set", "prompt", "response")


@runtime_checkable
class Repeatable(Protocol):
    """A measure that can ask its prompts several times in one batch, so that each copy is steered its own way."""

    @property
    def prompts(self) -> list[str]: ...

    def repeated(self, times: int) -> Measure: ...


@dataclass(frozen=True)
class EvalTask:
    """Questions, and how their answers are scored. Called on a model, it gives the first scorer's numbers.

    Attributes:
        questions: prompts, questions, or pairs (each topic once).
        scorers: one scorer or a list of them: names, tables, functions or Scorers. Figures show the first.
        max_new_tokens: length of a response, where a scorer reads text.
        batch_size: texts per batch.

    Raises:
        ValueError: for no scorer, or two of one name.

    Example:
        >>> task = EvalTask(prompts, "vader", max_new_tokens=4)
        >>> scores = task(model)
        >>> len(scores) == len(prompts) and all(-1 <= score <= 1 for score in scores)
        True
        >>> EvalTask(load_questions("capitals"), ["contains_answer", {"kind": "likelihood"}]).name
        'contains_answer'
    """

    questions: Asked
    scorers: ScorerLike | Sequence[ScorerLike] = ("vader",)
    max_new_tokens: int = 24
    batch_size: int = 64

    def __post_init__(self) -> None:
        alone = isinstance(self.scorers, str | Mapping) or callable(self.scorers)
        scorers: tuple[Any, ...] = (self.scorers,) if alone else tuple(self.scorers)
        if not scorers:
            raise ValueError("scorers must be a list of at least one, got an empty one. Give scorers=['vader'], say.")
        object.__setattr__(self, "questions", tuple(as_questions(self.questions)))
        object.__setattr__(self, "scorers", tuple(make_scorer(scorer) for scorer in scorers))
        names = [scorer.name for scorer in self.made]
        if len({*names, *_RESERVED}) < len(names) + len(_RESERVED):
            raise ValueError(
                f"scorers must have different names, none of them {', '.join(_RESERVED)}, got {', '.join(names)}. "
                "Rename one."
            )

    def __call__(self, model: Model) -> list[float]:
        """The first scorer's number for each question, with greedy responses."""
        scorer = self.made[0]
        answers = ask(
            model, self.asked, {scorer.reads}, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size
        )  # fmt: skip
        return [float(score) for score in scorer(answers)]

    def repeated(self, times: int) -> EvalTask:
        """The same questions several times over, in one list."""
        return replace(self, questions=self.asked * times, scorers=self.made)

    @property
    def name(self) -> str:
        """Name of the first scorer."""
        return self.made[0].name

    @property
    def prompts(self) -> list[str]:
        """The questions' prompts."""
        return [question.prompt for question in self.asked]

    @property
    def made(self) -> tuple[Scorer, ...]:
        """The scorers, each a Scorer."""
        return self.scorers  # type: ignore[return-value]

    @property
    def asked(self) -> tuple[Question, ...]:
        """The questions, each a Question."""
        return self.questions  # type: ignore[return-value]


@dataclass(frozen=True)
class LogitDifference:
    """Logit of one next token minus that of another, after each prompt. Nothing is generated.

    Attributes:
        questions: prompts; they go through the chat template as `generate` does.
        positive: text whose first token counts for the behaviour, with its leading space.
        negative: text whose first token counts against it.
        batch_size: prompts per batch.

    Example:
        >>> difference = LogitDifference(prompts, " yes", " no")
        >>> len(difference(model))
        2
    """

    questions: Iterable[str]
    positive: str
    negative: str
    batch_size: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "questions", tuple(text_list(self.questions, "questions")))

    @torch.no_grad()
    def __call__(self, model: Model) -> list[float]:
        """The difference for each prompt.

        Raises:
            ValueError: if the two texts begin with the same token, or with none.
        """
        first, second = self._tokens(model)
        differences = [0.0] * len(self.prompts)
        for batch in batches(model, as_chat(model, self.prompts), self.batch_size):
            last = torch.zeros_like(batch.mask, dtype=torch.bool)
            last[:, -1] = True
            with token_context(batch.mask, rows=batch.rows, n_rows=len(self.prompts)):
                logits = torch.cat(list(logits_where(model, batch.tokens, batch.mask, last)))
            for row, difference in zip(batch.rows, (logits[:, first] - logits[:, second]).tolist(), strict=True):
                differences[row] = difference
        return differences

    def _tokens(self, model: Model) -> tuple[int, int]:
        tokenizer = tokenizer_of(model)
        encoded = [tokenizer.encode(text, add_special_tokens=False) for text in (self.positive, self.negative)]
        if [] in encoded or encoded[0][0] == encoded[1][0]:
            raise ValueError(
                "positive and negative must begin with two different tokens, got "
                f"{self.positive!r} and {self.negative!r}. Keep the leading spaces."
            )
        return encoded[0][0], encoded[1][0]

    def repeated(self, times: int) -> LogitDifference:
        """The same prompts several times over, in one list."""
        return replace(self, questions=self.prompts * times)

    @property
    def name(self) -> str:
        """What it measures, for tables."""
        return "LogitDifference"

    @property
    def prompts(self) -> list[str]:
        """The prompts."""
        return list(self.questions)


def measure_of(task: Measure | Asked) -> Measure:
    """A measure as it is; prompts or questions as an EvalTask with the scorer `vader`."""
    return task if callable(task) else EvalTask(task)
