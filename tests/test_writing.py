"""How a text is written: hand cases of length, variety and loops, in several scripts."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rt_lens.evaluation.fluency import distinct, length, loops, repetition
from rt_lens.evaluation.registry import make_scorer
from rt_lens.evaluation.tasks import evaluate

RIVER = "Der Fluß trägt Sand ins Meer, und am Ufer wächst Schilf."


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        ("   \n", 0),
        ("Hello.", 1),
        ("two  words\n", 2),
        (RIVER, 11),
        ("Я очень рад!", 3),
        ("أنا سعيد جدا", 3),
        ("河の水は冷たい。", 7),  # scripts without spaces: a letter each, with what follows it
        ("ฉันดีใจ", 5),
        ("I like 寿司 a lot.", 6),
    ],
)
def test_length_counts_words(text, words):
    assert length(text) == words


@pytest.mark.parametrize(
    ("text", "n", "share"),
    [
        ("", 2, 1.0),
        ("one", 2, 1.0),
        ("one", 1, 1.0),
        ("a b c d", 2, 1.0),
        ("the cat saw the cat", 1, 3 / 5),
        ("the cat saw The CAT", 2, 3 / 4),
        ("the cat saw the cat", 3, 1.0),
        ("la la la la la", 2, 1 / 4),
        ("да нет да нет да", 2, 2 / 4),
        ("水火水火水", 2, 2 / 4),
    ],
)
def test_distinct_is_the_share_of_runs_that_are_new(text, n, share):
    assert distinct(text, n) == pytest.approx(share)


def test_distinct_of_pairs_is_the_default_and_no_words_are_refused():
    assert distinct("the cat saw the cat") == distinct("the cat saw the cat", 2) == 0.75
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        distinct("the cat", 0)


def test_repetition_tells_a_loop_from_prose():
    assert repetition("the cat saw the cat") == pytest.approx(1 / 4)
    assert repetition("and so on " * 30) > 0.95
    assert repetition(RIVER) == repetition("") == repetition("word") == 0.0


@given(st.lists(st.sampled_from(["a", "B", "b", "ß", "да", "c."]), max_size=12))
def test_repetition_is_what_is_not_distinct_among_pairs(words):
    pairs = list(itertools.pairwise(" ".join(words).lower().split()))
    seen = sum(pair in pairs[:place] for place, pair in enumerate(pairs))
    assert repetition(" ".join(words)) == pytest.approx(seen / len(pairs) if pairs else 0.0)


@pytest.mark.parametrize(
    "text",
    [
        "no no no",
        "No, no, NO!",
        "It was late. I am sad. I am sad. I am sad.",
        "It was late. I am sad. I am sad. I am sad. I am",  # a fourth run is cut short
        "It was late. I am sad. I am sad. I am sad. I am s",  # in the middle of a word
        "the end the end the end th",
        "Die Straße ist naß, die Straße ist naß, die Straße ist naß",
        "Он сказал: да, да, да",
        "我很高兴。我很高兴。我很高兴。",
        "ดีใจดีใจดีใจ",
        "ok 😀 😀 😀",
    ],
)
def test_a_text_that_ends_in_a_loop_is_found(text):
    assert loops(text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "word",
        "no no",
        "no no maybe no",
        "I am sad. I am sad. That is all.",
        "I am sad. I am sad. I am",  # two runs and a piece of a third
        "I am sad. I am sad. I am sad. But now I am not.",  # it found its way out
        "no no now",  # "now" is no "no" cut short
        "la la land",
        RIVER,
        "我很高兴。我很高兴。",
    ],
)
def test_a_text_that_does_not_end_in_a_loop_is_none(text):
    assert loops(text) == 0.0


@given(
    st.lists(st.sampled_from("abcd"), max_size=6),
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=5),
    st.integers(3, 5),
    st.integers(0, 4),
)
def test_three_runs_or_more_and_any_part_of_another_make_a_loop(before, run, times, more):
    assert loops(" ".join([*before, *(run * times), *run[:more]])) == 1.0


@pytest.mark.parametrize(
    ("kind", "function"), [("length", length), ("repetition", repetition), ("distinct_2", distinct), ("loop", loops)]
)
def test_each_is_a_scorer_by_name(tiny, kind, function):
    found = evaluate(tiny, ["Hello.", "How do you do?"], kind, max_new_tokens=6)
    assert found.scorer == make_scorer(kind).name == kind
    assert found.scores == [function(response) for response in found.responses]
