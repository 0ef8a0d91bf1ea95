"""The classifier trained on what a model writes under both personas: what it learns, and what it says of itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import rt_lens as rtl
from rt_lens.common.statistics.intervals import share_interval
from rt_lens.data.contrast_pairs import ContrastPairs, Pair
from rt_lens.data.questions import Answer, Question
from rt_lens.evaluation.classifier import TextClassifier, classifier_of
from rt_lens.evaluation.scorers import Scorer, vader
from rt_lens.evaluation.tasks import evaluate

THINGS = (
    "rain", "school", "your garden", "the sea", "winter", "trains", "bread", "your street", "music", "the news",
    "old books", "birds", "the city", "tea", "a long walk", "the market", "your neighbours", "the moon", "football",
    "the library", "autumn", "cooking", "the river", "paintings", "your shoes", "the forest", "the bus", "letters",
    "the evening", "a new chair", "the harbour", "clouds", "the bridge", "mathematics", "the theatre", "soup",
    "the mountains", "snow", "the village", "your desk",
)  # fmt: skip


def asked(positive: str, negative: str, prefill: str = "", negative_prefill: str = "", n: int = 40) -> ContrastPairs:
    topics = [f"How do you feel about {thing}?" for thing in THINGS[:n]]
    return ContrastPairs("feeling", tuple(Pair(positive, negative, x, prefill, "", negative_prefill) for x in topics))


def answers(texts: list[str]) -> list[Answer]:
    return [Answer(Question("Well?"), text) for text in texts]


@pytest.fixture(scope="module")
def moody() -> ContrastPairs:
    return asked("You are a happy assistant.", "You are a sad assistant.", "With great joy,", "With great sorrow,")


@pytest.fixture(scope="module")
def mood(model: Any, moody: ContrastPairs) -> TextClassifier:
    return classifier_of(model, moody, test_share=0.4, max_new_tokens=16)


def test_on_held_out_topics_it_is_above_chance(mood):
    assert mood.accuracy.n == 16 and mood.n_texts == 48
    assert mood.accuracy.low > 0.6


def test_it_agrees_with_vader_where_vader_is_sure(mood, model, moody):
    held_out = moody.split(0.6, seed=0)[1].texts(model)
    written = rtl.generate(model, held_out.positive + held_out.negative, chat=False, max_new_tokens=16)
    scores, theirs = np.asarray(mood(answers(written))), np.asarray([vader(text) for text in written])
    sure = np.abs(theirs) > 0.3
    same = np.sign(scores[sure]) == np.sign(theirs[sure])
    assert 0 < (theirs[sure] > 0).mean() < 1
    assert share_interval(int(same.sum()), len(same)).low > 0.5


def test_scores_are_bounded_and_each_answer_is_scored_on_its_own(mood):
    texts = ["I am delighted.", "I am afraid.", "", "zzz qqq 123"]
    together = mood(answers(texts))
    assert all(-1 < score < 1 for score in together) and together[0] > together[1]
    assert [mood(answers([text]))[0] for text in texts] == pytest.approx(together, abs=1e-12)
    assert mood([]) == []


def test_it_is_a_scorer_that_evaluate_takes(mood, model):
    assert isinstance(mood, Scorer) and mood.name == "classifier_feeling"
    found = evaluate(model, ["Hello."], mood, max_new_tokens=4)
    assert found.scores == mood(answers(found.responses))


@pytest.mark.filterwarnings("ignore:classifier")
def test_the_same_call_gives_the_same_classifier_and_another_seed_other_topics(tiny):
    pairs = asked("Be kind.", "Be rude.", n=12)
    first, again, other = (classifier_of(tiny, pairs, max_new_tokens=4, seed=seed) for seed in (0, 0, 1))
    texts = answers(["a", "the kind word", *rtl.generate(tiny, pairs.topics[:4], max_new_tokens=4)])
    assert first == again and first(texts) == again(texts) != other(texts)
    assert other.seed == 1


@pytest.mark.filterwarnings("ignore:classifier")
def test_prefills_are_left_out_where_both_sides_share_them(tiny):
    bare, opened = asked("Be kind.", "Be rude.", n=12), asked("Be kind.", "Be rude.", "Well,", n=12)
    texts = answers(rtl.generate(tiny, bare.topics[:4], max_new_tokens=4))
    assert classifier_of(tiny, bare, max_new_tokens=4)(texts) == classifier_of(tiny, opened, max_new_tokens=4)(texts)


def test_personas_that_change_nothing_raise_a_warning(tiny):
    with pytest.warns(UserWarning, match=r"of 'feeling' is 0.50 .*n = 4 topics, seed 0\), not above chance"):
        found = classifier_of(tiny, asked("Be kind.", "Be kind.", n=12), max_new_tokens=4)
    assert found.accuracy.mean == 0.5


def test_what_is_above_chance_is_not_warned_of(model, moody):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        classifier_of(model, moody, n_train=24, n_test=16, test_share=0.4, max_new_tokens=8)


def test_a_model_that_generates_nothing_is_refused(make_tiny: Callable[..., Any]):
    silent = make_tiny()
    with torch.no_grad():
        silent.unembed.b_U[silent.tokenizer.eos_token_id] = 1e4
    with pytest.raises(ValueError, match="model must generate text to train a classifier on, got none"):
        classifier_of(silent, asked("Be kind.", "Be rude.", n=12), max_new_tokens=2)


@pytest.mark.parametrize("change", [{"n_train": 1}, {"n_test": 0}, {"test_share": 0.0}, {"test_share": 1.0}])
def test_numbers_out_of_range_are_named(tiny, change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"^{name} must be .*, got {value}"):
        classifier_of(tiny, asked("Be kind.", "Be rude.", n=12), **change)


def test_too_few_topics_are_refused(tiny):
    with pytest.raises(ValueError, match="shares must leave every part a topic"):
        classifier_of(tiny, asked("Be kind.", "Be rude.", n=1))
