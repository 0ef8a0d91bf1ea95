"""Asking a model, under whatever it carries, and scoring what it says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rt_lens.common.statistics.intervals import Interval, mean_interval, share_interval
from rt_lens.data.contrast_pairs import ContrastPairs
from rt_lens.data.questions import Answer, Asked, Question, as_questions
from rt_lens.evaluation.choices import likelihoods, question_text
from rt_lens.evaluation.registry import ScorerLike, make_scorer
from rt_lens.evaluation.scorers import Reads, Scorer, is_share, option_shares
from rt_lens.models.generation import generate
from rt_lens.models.protocol import Model


@dataclass(frozen=True)
class Evaluation:
    """Scored answers.

    Attributes:
        scorer: its name.
        prompts: what was asked.
        responses: what the model answered.
        scores: one for each answer.
        interval: mean with n and its 95 % interval over prompts: Wilson's for shares, else a bootstrap.
        seed: of generation and bootstrap.
    """

    scorer: str
    prompts: list[str] = field(repr=False)
    responses: list[str] = field(repr=False)
    scores: list[float] = field(repr=False)
    interval: Interval
    seed: int


def ask(
    model: Model,
    questions: Sequence[Question],
    reads: Iterable[Reads] = ("text",),
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> list[Answer]:
    """What a model says to each question: only what scorers read is measured, once for all of them.

    Args:
        model: whatever it carries (hooks, a delta) is what is measured.
        questions: prompts with their personas, prefills and options.
        reads: `text` has it write, `answers` and `letters` measure the options' likelihoods.
        max_new_tokens: length of what it writes.
        temperature: 0 for greedy.
        seed: of sampling.
        batch_size: texts per batch; options run a quarter as many questions at once.
        progress: show a bar.
    """
    wanted, texts = set(reads), [""] * len(questions)
    if "text" in wanted:
        asked = [question_text(model, question) for question in questions]
        texts = generate(
            model, asked, chat=False, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
            batch_size=batch_size, progress=progress,
        )  # fmt: skip
    found = {
        form: likelihoods(model, questions, form=form, batch_size=max(1, batch_size // 4))
        for form in ("answers", "letters")
        if form in wanted
    }
    return [
        Answer(question, text, {form: measured[row] for form, measured in found.items()})
        for row, (question, text) in enumerate(zip(questions, texts, strict=True))
    ]


def evaluate(
    model: Model,
    test: Asked,
    scorer: ScorerLike = "vader",
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> Evaluation:
    """Answers to prompts, scored.

    Args:
        model: whatever it carries (hooks, a delta) is what is measured. A scorer that asks a model itself should be
            given another one, or used in `compare_arms`, which scores when the arm is off again.
        test: prompts or questions, or pairs, of which each topic is asked once with no persona.
        scorer: `vader`, a `[scorer]` table, a function from answer to number, or a Scorer.
        max_new_tokens: length of an answer.
        temperature: 0 for greedy.
        seed: of sampling and bootstrap.
        batch_size: prompts per batch.
        progress: show a bar.

    Raises:
        ValueError: unknown scorer, no prompt, or a question without what its scorer reads.

    Example:
        >>> with delta.applied(model):
        ...     print(evaluate(model, test).interval)
    """
    score, questions = make_scorer(scorer), as_questions(test)
    answers = ask(
        model, questions, {score.reads}, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        batch_size=batch_size, progress=progress,
    )  # fmt: skip
    scores = [float(value) for value in score(answers)]
    return Evaluation(
        score.name, [each.prompt for each in questions], [response_text(answer, score) for answer in answers], scores,
        _interval(score, scores, seed), seed,
    )  # fmt: skip


def _interval(scorer: Scorer, scores: Sequence[float], seed: int) -> Interval:
    if is_share(scorer) and set(scores) <= {0.0, 1.0}:
        return share_interval(int(sum(scores)), len(scores))
    return mean_interval(scores, seed)


def response_text(answer: Answer, *scorers: Scorer) -> str:
    """An answer in words: what was written, or else the option that was likeliest to the first scorer."""
    if not answer.options or any(scorer.reads == "text" for scorer in scorers):
        return answer.text
    first = scorers[0] if scorers else None
    found = answer.options[first.reads] if first else next(iter(answer.options.values()))
    shares = option_shares(found, per_token=getattr(first, "per_token", False))
    return answer.question.options[shares.index(max(shares))]


@dataclass(frozen=True)
class FilteredPairs:
    """Pairs in which the model itself behaves as its personas ask.

    Attributes:
        pairs: those kept.
        share: kept of those asked, with a Wilson 95 % interval (pairs of one topic are not independent).
        scorer: its name.
    """

    pairs: ContrastPairs
    share: Interval
    scorer: str


def filter_pairs(
    model: Model,
    pairs: ContrastPairs,
    scorer: ScorerLike = "vader",
    *,
    threshold: float = 0.0,
    max_new_tokens: int = 24,
    batch_size: int = 64,
    progress: bool = False,
) -> FilteredPairs:
    """Keeps the pairs whose greedy answer scores above a threshold under the positive persona, below under the other.

    Args:
        model: HookedTransformer or TransformerBridge.
        pairs: asked with their personas and prefills.
        scorer: `vader`, a `[scorer]` table, or a function from answer to number.
        threshold: between the two sides.
        max_new_tokens: length of an answer.
        batch_size: texts per batch.
        progress: show a bar.

    Raises:
        ValueError: if no pair is left; the message says how the sides scored.

    Example:
        >>> kept = filter_pairs(model, train.sample(128), "vader")
        >>> vectors = extract_vectors(model, kept.pairs)
    """
    score = make_scorer(scorer)
    asked = [
        Question(user, system=persona, prefill=prefill)
        for side in zip(*(pair.sides for pair in pairs.pairs), strict=True)
        for persona, user, prefill in side
    ]
    answers = ask(
        model, asked, {score.reads}, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
    )  # fmt: skip
    scores = [float(value) for value in score(answers)]
    positive, negative = scores[: len(pairs)], scores[len(pairs) :]
    correct = [high > threshold > low for high, low in zip(positive, negative, strict=True)]
    if not any(correct):
        raise ValueError(
            f"pairs: of {len(pairs)} none is answered as both personas ask ({score.name} {np.mean(positive):.2f} and "
            f"{np.mean(negative):.2f} in the mean, threshold {threshold:g}). Use another threshold, or all pairs."
        )
    kept = tuple(pair for pair, right in zip(pairs.pairs, correct, strict=True) if right)
    return FilteredPairs(ContrastPairs(pairs.name, kept), share_interval(len(kept), len(pairs)), score.name)
