"""Asks a model questions, with whatever hooks and weights it has, and keeps the pairs it answers as their personas ask.

How responses become numbers is up to the scorers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rt_lens.common.statistics.intervals import Interval, share_interval
from rt_lens.data.contrast_pairs import ContrastPairs
from rt_lens.data.questions import Answer, Question
from rt_lens.evaluation.choices import likelihoods, question_text
from rt_lens.evaluation.registry import ScorerLike, make_scorer
from rt_lens.evaluation.scorers import Scorer, option_shares
from rt_lens.models.generation import generate
from rt_lens.models.protocol import Model


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
    """The model's answer to each question. It measures only what the scorers read, and that once for all of them.

    Args:
        model: the model, measured with its current hooks and weights.
        questions: prompts with their personas, prefills and options.
        reads: any of `text` (the model generates a response), `completion` and `multiple_choice` (the likelihoods of
            the options in that form).
        max_new_tokens: length of a generated response.
        temperature: 0 for greedy.
        seed: seed for sampling.
        batch_size: texts per batch; for options, a quarter as many questions per batch.
        progress: show a progress bar.

    Example:
        >>> question = Question("Is ice cold?", right=("Yes",), wrong=("No",))
        >>> answer = ask(model, [question], {"text", "completion"}, max_new_tokens=4)[0]
        >>> isinstance(answer.text, str), list(answer.options)
        (True, ['completion'])
        >>> len(answer.options["completion"].totals)
        2
    """
    read = set(reads)
    texts = [""] * len(questions)
    if "text" in read:
        prompts = [question_text(model, question) for question in questions]
        texts = generate(
            model, prompts, chat=False, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
            batch_size=batch_size, progress=progress,
        )  # fmt: skip
    options = {
        form: likelihoods(model, questions, form=form, batch_size=max(1, batch_size // 4))
        for form in ("completion", "multiple_choice")
        if form in read
    }
    return [
        Answer(question, text, {form: by_question[row] for form, by_question in options.items()})
        for row, (question, text) in enumerate(zip(questions, texts, strict=True))
    ]


def response_text(answer: Answer, *scorers: Scorer) -> str:
    """An answer as a text: the generated response, or else the option that is likeliest to the first scorer."""
    if not answer.options or any(scorer.reads == "text" for scorer in scorers):
        return answer.text
    first = scorers[0] if scorers else None
    options = answer.options[first.reads] if first else next(iter(answer.options.values()))
    shares = option_shares(options, per_token=getattr(first, "per_token", False))
    return answer.question.options[shares.index(max(shares))]


@dataclass(frozen=True)
class FilteredPairs:
    """Contrast pairs on which the model itself behaves as the personas ask.

    Attributes:
        pairs: the pairs that pass.
        share: fraction of all pairs that pass, with a Wilson 95 % interval (pairs of one topic are not independent).
        scorer: name of the scorer.

    Example:
        >>> filtered = filter_pairs(model, train.sample(3), "vader", max_new_tokens=12)
        >>> filtered.share.mean == len(filtered.pairs) / 3
        True
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
    """Keeps the pairs whose greedy response scores above a threshold under the positive persona, and below it under the
    negative one.

    Args:
        model: HookedTransformer or TransformerBridge.
        pairs: pairs whose sides the model answers, with their personas and prefills.
        scorer: `vader`, a `[scorer]` table, or a function from a response to a number.
        threshold: score that separates the two sides.
        max_new_tokens: length of a response.
        batch_size: texts per batch.
        progress: show a progress bar.

    Raises:
        ValueError: if no pair passes; the message gives the mean score of each side.

    Example:
        >>> filtered = filter_pairs(model, train.sample(3), "vader", max_new_tokens=12)
        >>> 0 < len(filtered.pairs) < 3
        True
        >>> filtered.share.n, filtered.scorer
        (3, 'vader')
    """
    score = make_scorer(scorer)
    questions = [
        Question(user, system=persona, prefill=prefill)
        for side in zip(*(pair.sides for pair in pairs.pairs), strict=True)
        for persona, user, prefill in side
    ]
    answers = ask(
        model, questions, {score.reads}, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
    )  # fmt: skip
    scores = [float(value) for value in score(answers)]
    positive, negative = scores[: len(pairs)], scores[len(pairs) :]
    passes = [high > threshold > low for high, low in zip(positive, negative, strict=True)]
    if not any(passes):
        raise ValueError(
            "pairs must hold at least one that the model answers as both personas ask, got none of "
            f"{len(pairs)}: the mean {score.name} is {np.mean(positive):.2f} on the positive and "
            f"{np.mean(negative):.2f} on the negative side (threshold {threshold:g}). Change threshold, or use all "
            "pairs."
        )
    kept = tuple(pair for pair, right in zip(pairs.pairs, passes, strict=True) if right)
    return FilteredPairs(ContrastPairs(pairs.name, kept), share_interval(len(kept), len(pairs)), score.name)
