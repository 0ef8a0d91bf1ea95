"""A text classifier as scorer, trained on a model's own responses under the two personas of contrast pairs.

It learns from text alone, and knows of no activations.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline, make_union

from rt_lens.common.statistics.intervals import Interval, mean_interval, share_interval
from rt_lens.data.contrast_pairs import ContrastPairs
from rt_lens.data.questions import Answer
from rt_lens.evaluation.scorers import Reads
from rt_lens.models.generation import generate
from rt_lens.models.protocol import Model


@dataclass(frozen=True)
class TextClassifier:
    """How much a response reads like one of the positive persona: P(positive) - P(negative), from -1 to 1.

    The score uses probabilities and not log-odds, since log-odds have no bound and a few emphatic responses would
    decide a mean. 0 is undecided, as with VADER. The level depends on how much text the classifier was trained on, so
    use it to compare arms and for nothing else.

    Attributes:
        behaviour: name of the pairs' behaviour.
        accuracy: fraction of sides classified correctly on held-out topics (with held-out personas and prefills, where
            there are enough), averaged by topic, with n topics and a 95 % interval over them.
        n_texts: number of responses the classifier was trained on.
        seed: seed for split, sample and interval.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(action="ignore"):  # 2 pairs are far too few
        ...     classifier = classifier_of(model, pairs, n_train=2, n_test=1, max_new_tokens=4)
        >>> classifier.name, classifier.n_texts, classifier.reads
        ('classifier_mood', 4, 'text')
        >>> scores = classifier([Answer(Question("How are you?"), text) for text in ("I am glad.", "I am sad.")])
        >>> all(-1 <= score <= 1 for score in scores)
        True
    """

    behaviour: str
    accuracy: Interval
    n_texts: int
    seed: int
    _fitted: Pipeline = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        return f"classifier_{self.behaviour}"

    @property
    def reads(self) -> Reads:
        return "text"

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        if not answers:
            return []
        return _scores(self._fitted, [answer.text for answer in answers])


def classifier_of(
    model: Model,
    pairs: ContrastPairs,
    *,
    n_train: int = 200,
    n_test: int = 80,
    test_share: float = 0.3,
    max_new_tokens: int = 24,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> TextClassifier:
    """Trains a classifier to tell apart a model's greedy responses under the two personas.

    Features are the TF-IDF of words and word pairs, and of two to four characters within words; the classifier is a
    logistic regression. It learns whatever tells the personas' texts apart, be it the behaviour or not. `accuracy` says
    how well that carries over to other topics; only other scorers can say what it is. A model that hardly follows its
    personas leaves little to learn: on the built-in `mood` pairs SmolLM2-135M-Instruct gives an accuracy of 0.64 (0.58
    to 0.71, n = 47 topics, seed 0). A classifier is not saved: the same call on the same model gives the same one.

    Args:
        model: mostly the untuned model; it generates with its current hooks and weights.
        pairs: contrast pairs with personas. Prefills are left out, since the responses to score have none; only pairs
            whose sides differ in their prefills keep them.
        n_train: maximum number of pairs to train on; each gives two responses.
        n_test: maximum number of pairs to measure the accuracy on.
        test_share: fraction of the topics to hold out.
        max_new_tokens: length of a response; use the length of the responses to score.
        batch_size: texts per batch.
        seed: seed for split, sample and interval.
        progress: show a progress bar.

    Warns:
        UserWarning: if the accuracy is not above chance.

    Raises:
        ValueError: for a number out of range, or too few topics to hold some out.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(action="ignore"):  # 2 pairs are far too few
        ...     classifier = classifier_of(model, pairs, n_train=2, n_test=1, max_new_tokens=4)
        >>> 0 <= classifier.accuracy.mean <= 1
        True
        >>> evaluate(model, prompts, classifier, max_new_tokens=4).scorer
        'classifier_mood'
    """
    _check_numbers(n_train, n_test, test_share)
    parts = _without_prefills(pairs).split(1 - test_share, seed=seed)
    train, test = (part.sample(n, seed) for part, n in zip(parts, (n_train, n_test), strict=True))
    texts = [text for part in (train, test) for side in part.texts(model) for text in side]
    responses = generate(
        model, texts, chat=False, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
    )
    train_texts, held_out = responses[: 2 * len(train)], responses[2 * len(train) :]
    fitted = _fitted(train_texts, [True] * len(train) + [False] * len(train), seed)
    accuracy = _accuracy(_scores(fitted, held_out), test, seed)
    if not accuracy.low > 0.5:
        warnings.warn(
            f"classifier: its accuracy on held-out topics of {pairs.name!r} is {accuracy.mean:.2f} ({accuracy.low:.2f} "
            f"to {accuracy.high:.2f}, n = {accuracy.n} topics, seed {seed}), not above chance (0.5), so its scores "
            "mean nothing. Give more pairs or tokens, or a model that follows its personas.",
            stacklevel=2,
        )
    return TextClassifier(pairs.name, accuracy, len(train_texts), seed, fitted)


def _check_numbers(n_train: int, n_test: int, test_share: float) -> None:
    for name, number, least in (("n_train", n_train, 2), ("n_test", n_test, 1)):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}.")
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must be between 0 and 1, both excluded, got {test_share}.")


def _without_prefills(pairs: ContrastPairs) -> ContrastPairs:
    without = [pair if pair.negative_prefill else replace(pair, prefill="") for pair in pairs.pairs]
    return ContrastPairs(pairs.name, tuple(dict.fromkeys(without)))


def _fitted(texts: Sequence[str], positive: Sequence[bool], seed: int) -> Pipeline:
    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\b\w+\b|[^\w\s]", sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True),
    )
    model = LogisticRegression(C=10.0, max_iter=1000, random_state=seed)
    try:
        return make_pipeline(features, model).fit(texts, positive)
    except ValueError as error:  # scikit-learn's error for an empty vocabulary
        raise ValueError(
            f"model must generate text to train a classifier on, got none ({error}). Increase max_new_tokens."
        ) from None


def _scores(fitted: Pipeline, texts: Sequence[str]) -> list[float]:
    return [2 * float(positive) - 1 for positive in fitted.predict_proba(texts)[:, 1]]


def _accuracy(scores: Sequence[float], test: ContrastPairs, seed: int) -> Interval:
    """The accuracy averaged by topic, since responses to one topic are not independent."""
    right = np.asarray(scores).reshape(2, -1) * [[1.0], [-1.0]]
    by_topic: dict[str, list[float]] = {}
    for pair, sides in zip(test.pairs, right.T, strict=True):
        by_topic.setdefault(pair.topic, []).extend((np.sign(sides) + 1) / 2)
    shares = [float(np.mean(correct)) for correct in by_topic.values()]
    if set(shares) <= {0.0, 1.0}:  # a bootstrap of values without spread would claim certainty
        return share_interval(int(sum(shares)), len(shares))
    return mean_interval(shares, seed)
