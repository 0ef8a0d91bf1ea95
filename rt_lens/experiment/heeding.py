"""Do the personas move the score at all? Measured on the untuned model, with topics outside the test.

A vector is the difference between the personas, and tuning learns from responses to them: where the personas change
nothing that the scorer counts, a run has nothing to show. `rt-lens check --measure` and every run measure the same.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from rt_lens.common.statistics.comparisons import Comparison, mcnemar, paired_comparison
from rt_lens.data.contrast_pairs import ContrastPairs, Pair
from rt_lens.data.questions import Answer, Question
from rt_lens.evaluation.answering import ask, response_text
from rt_lens.evaluation.scorers import Scorer, is_share
from rt_lens.evaluation.tasks import EvalTask, Evaluation, interval_of
from rt_lens.experiment.config import Experiment
from rt_lens.experiment.protocols import family_of
from rt_lens.models.protocol import Model

Side: TypeAlias = Literal["untuned", "positive", "negative"]

N_TOPICS = 60  # with 24, the personas of mood were not shown to work that 60 show (p = 0.17 and 0.002)
BATCH_SIZE = 128  # rows
_AT_AN_END = 0.9  # share of the responses at one end of the range that leaves no room there
_RANGES = {"vader": (-1.0, 1.0), "lexicon": (-1.0, 1.0), "pattern": (0.0, 1.0)}


@dataclass(frozen=True)
class PersonaEffect:
    """The untuned model's scores on some topics without a persona, with positive and with negative ones.

    Attributes:
        untuned: without a persona.
        positive: with a positive persona for each topic, the same topics in the same order.
        negative: with the negative persona beside it.
        scorer: of the behaviour.
        max_new_tokens: length of a response.

    Example:
        >>> effect = measure_personas(load_experiment("mood"), model, n_topics=3)
        >>> effect.untuned.prompts == effect.positive.prompts, effect.between.n
        (True, 3)
    """

    untuned: Evaluation
    positive: Evaluation
    negative: Evaluation
    scorer: Scorer = field(repr=False)
    max_new_tokens: int

    @property
    def between(self) -> Comparison:
        """Positive minus negative, topic by topic."""
        return self.compared(self.positive, self.negative)

    def compared(self, first: Evaluation, second: Evaluation) -> Comparison:
        """First minus second, topic by topic; by McNemar's test where all scores are 0 or 1."""
        if is_share(self.scorer) and {*first.scores, *second.scores} <= {0.0, 1.0}:
            return mcnemar(first.scores, second.scores)
        return paired_comparison(first.scores, second.scores, seed=first.seed)

    @property
    def alike(self) -> bool:
        """Whether all responses have the same score, whatever the persona."""
        return len({*self.untuned.scores, *self.positive.scores, *self.negative.scores}) == 1

    @property
    def range(self) -> tuple[float, float] | None:
        """The lowest and the highest score that the scorer can give; None where that is not known."""
        return (0.0, 1.0) if is_share(self.scorer) else _RANGES.get(self.scorer.name)

    @property
    def end(self) -> Literal["", "low", "high"]:
        """The end of the range at which nearly all untuned responses stand, if they do."""
        for name, score in zip(("low", "high"), self.range or (), strict=False):
            if self.untuned.scores.count(score) >= _AT_AN_END * len(self.untuned.scores):
                return "low" if name == "low" else "high"
        return ""

    @property
    def n_at_end(self) -> int:
        """How many untuned responses stand at that end; 0 without one."""
        if not self.end or self.range is None:
            return 0
        return self.untuned.scores.count(self.range[0 if self.end == "low" else 1])

    def row(self) -> dict[str, Any]:
        """The entry `persona_effect` of results.json (see `rt_lens.results.schema`)."""
        sides: dict[Side, Evaluation] = {
            "untuned": self.untuned, "positive": self.positive, "negative": self.negative,
        }  # fmt: skip
        return {
            "scorer": self.untuned.scorer, "seed": self.untuned.seed, "max_new_tokens": self.max_new_tokens,
            "sides": [{"side": side, **evaluation.interval._asdict()} for side, evaluation in sides.items()],
            **self.between._asdict(), "moves": direction_of(self.between), "alike": self.alike,
            "range": self.range, "end": self.end, "n_at_end": self.n_at_end,
        }  # fmt: skip


def measure_personas(experiment: Experiment, model: Model, n_topics: int = N_TOPICS) -> PersonaEffect:
    """Asks each topic without a persona, with a positive and with a negative one, all in one list, and scores them.

    Args:
        experiment: of a behaviour; honesty has no such scorer, and is measured by `protocols.calibrate`.
        model: the untuned model.
        n_topics: the largest number of topics. They are of the validation part, and of the training part where these
            are too few; never of the test.

    Example:
        >>> effect = measure_personas(load_experiment("mood"), model, n_topics=3)
        >>> effect.row()["n"], effect.row()["sides"][0]["side"]
        (3, 'untuned')
    """
    scorer, seed = experiment.made_scorer, experiment.split.seed
    task = persona_task(experiment, scorer, n_topics)
    answers = ask(
        model, task.asked, {scorer.reads}, max_new_tokens=task.max_new_tokens, seed=seed, batch_size=task.batch_size
    )  # fmt: skip
    n = len(answers) // 3
    untuned, positive, negative = (
        _scored(scorer, answers[start : start + n], seed) for start in range(0, len(answers), n)
    )
    return PersonaEffect(untuned, positive, negative, scorer, task.max_new_tokens)


def _scored(scorer: Scorer, answers: Sequence[Answer], seed: int) -> Evaluation:
    scores = [float(score) for score in scorer(answers)]
    prompts, responses = zip(*((a.question.prompt, response_text(a, scorer)) for a in answers), strict=True)
    return Evaluation(
        scorer.name, list(prompts), list(responses), scores, interval_of(scorer, scores, seed), seed
    )  # fmt: skip


def persona_task(experiment: Experiment, scorer: Scorer, n_topics: int = N_TOPICS) -> EvalTask:
    """All that is asked: the topics without a persona, then with the positive ones, then with the negative ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the split's, which `check_behaviour` and the protocol report
        train, validation, _ = family_of(experiment).parts()
    pairs = _of_each_topic(validation, train, n_topics, experiment.split.seed)
    questions = [
        *(Question(pair.user) for pair in pairs), *(_asked(pair, 0) for pair in pairs),
        *(_asked(pair, 1) for pair in pairs),
    ]  # fmt: skip
    return EvalTask(questions, [scorer], experiment.test.max_new_tokens, BATCH_SIZE)


def direction_of(comparison: Comparison) -> int:
    """1 or -1 if both the test and the interval show a difference, else 0.

    The interval alone does not decide: of few responses that score at all, the bootstrap's is too narrow.
    """
    _, difference, low, high, p, _ = comparison
    if math.isnan(p) or p >= 0.05 or low <= 0 <= high:
        return 0
    return (difference > 0) - (difference < 0)


def _asked(pair: Pair, side: int) -> Question:
    """A topic under the persona of one side; pairs whose sides differ in more are asked with all of it."""
    persona, user, prefill = pair.sides[side]
    whole = pair.negative_user or pair.negative_prefill
    return Question(user, system=persona, prefill=prefill if whole else "")


def _of_each_topic(first: ContrastPairs, second: ContrastPairs, n: int, seed: int) -> Sequence[Pair]:
    """At most n pairs, of one topic each: of the first part, and where these are too few of the second."""
    pairs = list(first.sample(min(n, len(first.topics)), seed).pairs)
    if more := min(n - len(pairs), len(second.topics)):
        pairs += second.sample(more, seed).pairs
    return pairs
