"""A classifier of texts as scorer, trained on what a model writes under the two personas of contrast pairs."""

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
    """How much an answer reads like one of the positive persona: P(positive) - P(negative), from -1 to 1.

    Probabilities and not log-odds: these have no bound, so that a few emphatic answers would decide a mean. 0 is
    undecided, as with VADER. The level depends on how much text there was to train on; compare arms by it, and no more.

    Attributes:
        behaviour: of the pairs.
        accuracy: share of right sides on held-out topics (with held-out personas and prefills, where there are enough),
            averaged by topic, with n topics and a 95 % interval over them.
        n_texts: answers it was trained on.
        seed: of split, sample and interval.

    Example:
        >>> classifier = classifier_of(model, load_pairs("formality"))
        >>> print(classifier.accuracy)
        >>> evaluate(model, test, classifier)
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
    """Has a model write under both personas, and trains a classifier to tell the two apart.

    TF-IDF of words and word pairs, and of two to four characters within words; logistic regression. It learns whatever
    tells the personas' texts apart, be it the behaviour or not: `accuracy` says how well that carries over to other
    topics, and only other scorers say what it is. Where the model itself hardly follows its personas, there is little
    to learn: on the shipped `mood` pairs SmolLM2-135M-Instruct gives an accuracy of 0.64 (0.58 to 0.71, n = 47 topics,
    seed 0). There is no file of a classifier: the same call on the same model gives the same one.

    Args:
        model: the untuned model, mostly; whatever it carries is what writes.
        pairs: with personas. Prefills are left out, since the answers to be scored have none; only pairs whose sides
            differ in them keep theirs.
        n_train: pairs to train on, at most; each gives two answers.
        n_test: pairs to measure the accuracy on, at most.
        test_share: of the topics.
        max_new_tokens: length of an answer; as long as those it is to score.
        batch_size: texts per batch.
        seed: of split, sample and interval. Answers are greedy.
        progress: show a bar.

    Warns:
        UserWarning: if the accuracy is not above chance.

    Raises:
        ValueError: a number out of range, or too few topics to hold some out.
    """
    if n_train < 2 or n_test < 1 or not 0 < test_share < 1:
        raise ValueError(
            f"classifier: n_train {n_train}, n_test {n_test}, test_share {test_share} came; at least 2, at least 1, "
            "and a share between 0 and 1 are wanted."
        )
    parts = _without_prefills(pairs).split(1 - test_share, seed=seed)
    train, test = (part.sample(n, seed) for part, n in zip(parts, (n_train, n_test), strict=True))
    texts = [text for part in (train, test) for side in part.texts(model) for text in side]
    written = generate(
        model, texts, chat=False, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
    )
    learnt, held_out = written[: 2 * len(train)], written[2 * len(train) :]
    fitted = _fitted(learnt, [True] * len(train) + [False] * len(train), seed)
    accuracy = _accuracy(_scores(fitted, held_out), test, seed)
    if not accuracy.low > 0.5:
        warnings.warn(
            f"classifier: on held-out topics of {pairs.name!r} it is right in {accuracy.mean:.2f} ({accuracy.low:.2f} "
            f"to {accuracy.high:.2f}, n = {accuracy.n} topics, seed {seed}), not above chance (0.5). Its scores say "
            "nothing. Give more pairs or tokens, or a model that follows its personas.",
            stacklevel=2,
        )
    return TextClassifier(pairs.name, accuracy, len(learnt), seed, fitted)


def _without_prefills(pairs: ContrastPairs) -> ContrastPairs:
    bare = [pair if pair.negative_prefill else replace(pair, prefill="") for pair in pairs.pairs]
    return ContrastPairs(pairs.name, tuple(dict.fromkeys(bare)))


def _fitted(texts: Sequence[str], positive: Sequence[bool], seed: int) -> Pipeline:
    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\b\w+\b|[^\w\s]", sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True),
    )
    model = LogisticRegression(C=10.0, max_iter=1000, random_state=seed)
    try:
        return make_pipeline(features, model).fit(texts, positive)
    except ValueError as error:  # scikit-learn's, of an empty vocabulary
        raise ValueError(f"classifier: the model wrote nothing to learn from ({error}). Give more tokens.") from None


def _scores(fitted: Pipeline, texts: Sequence[str]) -> list[float]:
    return [2 * float(positive) - 1 for positive in fitted.predict_proba(texts)[:, 1]]


def _accuracy(scores: Sequence[float], test: ContrastPairs, seed: int) -> Interval:
    """By topic, since answers to one topic are not independent."""
    right = np.asarray(scores).reshape(2, -1) * [[1.0], [-1.0]]
    by_topic: dict[str, list[float]] = {}
    for pair, sides in zip(test.pairs, right.T, strict=True):
        by_topic.setdefault(pair.user, []).extend((np.sign(sides) + 1) / 2)
    shares = [float(np.mean(each)) for each in by_topic.values()]
    if set(shares) <= {0.0, 1.0}:  # without spread a bootstrap claims certainty
        return share_interval(int(sum(shares)), len(shares))
    return mean_interval(shares, seed)
