"""Questions together with their scorers: the one way to measure a model, for evaluations, comparisons and searches.

A measure is a function from a model to one number per prompt. An `EvalTask` is one, and so is a `LogitDifference`; a
function of your own works wherever they do. Nothing in this module knows how a model was steered or tuned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch

from rt_lens.common.inputs import text_list
from rt_lens.common.statistics.intervals import Interval, mean_interval, share_interval
from rt_lens.data.questions import Asked, Question, as_questions
from rt_lens.evaluation.answering import ask, response_text
from rt_lens.evaluation.registry import ScorerLike, make_scorer
from rt_lens.evaluation.scorers import Scorer, is_share
from rt_lens.models.generation import as_chat
from rt_lens.models.prompts import last_logits
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.batches import encoded_texts, in_batches
from rt_lens.models.tokens.chats import tokenizer_of


@runtime_checkable
class Measure(Protocol):
    """A function from a model, with its current hooks and weights, to one number per prompt, in order.

    An `EvalTask` and a `LogitDifference` are measures, and so is a function of your own.

    Example:
        >>> def lengths(model):
        ...     return [float(len(response)) for response in rtl.generate(model, prompts, max_new_tokens=4)]
        >>> isinstance(lengths, Measure), len(lengths(model)) == len(prompts)
        (True, True)
    """

    def __call__(self, model: Model, /) -> Sequence[float]: ...


_RESERVED = ("arm", "direction", "seed", "set", "prompt", "response")


@runtime_checkable
class Repeatable(Protocol):
    """A measure that can repeat its prompts within one batch, so that each copy can be steered differently."""

    @property
    def prompts(self) -> list[str]: ...

    def repeated(self, times: int) -> Measure: ...


@dataclass(frozen=True)
class EvalTask:
    """Questions and the scorers of their responses. Calling a task on a model returns the first scorer's scores.

    Attributes:
        questions: prompts, questions, or contrast pairs (each topic once, without a persona).
        scorers: one scorer or a list of them: names, `[scorer]` tables, functions or Scorers. Plots use the first.
        max_new_tokens: length of a response, where a scorer reads text.
        batch_size: texts per batch.

    Raises:
        ValueError: for an empty list of scorers, or two scorers of one name.

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
        given: Any = self.scorers
        scorers = (given,) if isinstance(given, str | Mapping) or callable(given) else tuple(given)
        if not scorers:
            raise ValueError("scorers must be a list of at least one scorer, got an empty list. Try scorers=['vader'].")
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
class Evaluation:
    """Responses to prompts, with their scores.

    Attributes:
        scorer: name of the scorer.
        prompts: the prompts.
        responses: the model's response to each prompt; for a scorer of options, the likeliest option.
        scores: one score for each response.
        interval: mean score with n and its 95 % interval over prompts: Wilson's for shares, else a bootstrap.
        seed: seed for generation and bootstrap.

    Example:
        >>> evaluation = evaluate(model, prompts, max_new_tokens=4)
        >>> evaluation.scorer, len(evaluation.responses), evaluation.interval.n
        ('vader', 2, 2)
    """

    scorer: str
    prompts: list[str] = field(repr=False)
    responses: list[str] = field(repr=False)
    scores: list[float] = field(repr=False)
    interval: Interval
    seed: int


def evaluate(
    model: Model,
    test: EvalTask | Asked,
    scorer: ScorerLike | None = None,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """The model's responses to prompts, scored.

    Args:
        model: the model, measured with its current hooks and weights. If the scorer itself queries a model, pass it a
            different model object, or use `compare_arms`, which scores after reverting the intervention.
        test: an `EvalTask`; or prompts, questions, or contrast pairs (each topic once, without a persona).
        scorer: `vader`, a `[scorer]` table, a function from a response to a number, or a Scorer. Defaults to
            `vader`. A task has its scorers; `evaluate` uses the first.
        max_new_tokens: length of a response. Defaults to 40. A task has its own.
        temperature: 0 for greedy.
        seed: seed for sampling and bootstrap.
        batch_size: prompts per batch; it affects speed and memory only. Defaults to 64, or the task's.
        progress: show a progress bar.

    Raises:
        ValueError: for an unknown scorer, no prompt, a question without what its scorer reads, or a scorer or
            max_new_tokens beside a task.

    Example:
        >>> evaluation = evaluate(model, test, "vader", max_new_tokens=4)
        >>> len(evaluation.scores) == len(test.topics)
        True
        >>> with applied(model, delta):
        ...     tuned = evaluate(model, EvalTask(test, "vader", max_new_tokens=4))
        >>> tuned.prompts == evaluation.prompts
        True
    """
    if isinstance(test, EvalTask):
        _refuse_beside_a_task(scorer=scorer, max_new_tokens=max_new_tokens)
        score, questions = test.made[0], list(test.asked)
        n_tokens, default_batch = test.max_new_tokens, test.batch_size
    else:
        score, questions = make_scorer("vader" if scorer is None else scorer), as_questions(test)
        n_tokens, default_batch = 40 if max_new_tokens is None else max_new_tokens, 64
    answers = ask(
        model, questions, {score.reads}, max_new_tokens=n_tokens, temperature=temperature, seed=seed,
        batch_size=default_batch if batch_size is None else batch_size, progress=progress,
    )  # fmt: skip
    scores = [float(value) for value in score(answers)]
    return Evaluation(
        score.name, [question.prompt for question in questions],
        [response_text(answer, score) for answer in answers], scores, interval_of(score, scores, seed), seed,
    )  # fmt: skip


def _refuse_beside_a_task(**settings: Any) -> None:
    """Raises ValueError for a setting that the task has already."""
    for name, value in settings.items():
        if value is not None:
            keyword = "scorers" if name == "scorer" else name
            raise ValueError(
                f"{name} must be left out if test is an EvalTask, got {value!r}. Set it in the task, as in "
                f"EvalTask(questions, {keyword}=...)."
            )


def interval_of(scorer: Scorer, scores: Sequence[float], seed: int) -> Interval:
    """The mean of a scorer's scores: Wilson's interval for shares, else a bootstrap over prompts."""
    if is_share(scorer) and set(scores) <= {0.0, 1.0}:
        return share_interval(int(sum(scores)), len(scores))
    return mean_interval(scores, seed)


@dataclass(frozen=True)
class LogitDifference:
    """Logit of one next token minus the logit of another, after each prompt. Nothing is generated.

    Attributes:
        questions: prompts; they get the chat template, as in `generate`.
        positive: text whose first token counts for the behaviour, with its leading space.
        negative: text whose first token counts against it.
        batch_size: prompts per batch.

    Example:
        >>> difference = LogitDifference(prompts, " yes", " no")
        >>> len(difference(model)) == len(prompts)
        True
    """

    questions: Iterable[str]
    positive: str
    negative: str
    batch_size: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "questions", tuple(text_list(self.questions, "questions", chats=True)))

    @torch.no_grad()
    def __call__(self, model: Model) -> list[float]:
        """The logit difference after each prompt.

        Raises:
            ValueError: if the two texts begin with the same token, or one is empty.
        """
        first, second = self._tokens(model)
        differences = [0.0] * len(self.prompts)
        encoded = encoded_texts(model, as_chat(model, self.prompts), self.batch_size)
        for rows in in_batches([len(ids) for ids in encoded], self.batch_size):
            logits = last_logits(model, [encoded[row] for row in rows], rows=rows, n_rows=len(encoded))
            for row, difference in zip(rows, (logits[:, first] - logits[:, second]).tolist(), strict=True):
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
        """Name of the measure, for tables."""
        return "LogitDifference"

    @property
    def prompts(self) -> list[str]:
        """The prompts."""
        return list(self.questions)


def measure_of(task: Measure | Asked) -> Measure:
    """The measure itself; for prompts or questions, an EvalTask with the scorer `vader`."""
    return task if callable(task) else EvalTask(task)
