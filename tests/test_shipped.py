"""The shipped data are there, whole, and free of the behaviours they must not carry."""

from __future__ import annotations

import re

import pytest

from rt_lens.shipped import (
    behaviour_file,
    behaviours,
    capital_facts,
    data_path,
    neutral_paragraphs,
    neutral_prompts,
)


def test_the_behaviours_are_listed_and_each_has_its_file():
    assert {"formality", "mood"} <= set(behaviours())
    assert behaviours() == sorted(behaviours())
    assert all(behaviour_file(name).is_file() for name in behaviours())


def test_a_path_is_taken_as_it_is(tmp_path):
    own = tmp_path / "mood.toml"
    own.write_text("")
    assert behaviour_file(own) == own
    assert behaviour_file(str(own)) == own


def test_a_near_name_is_suggested_and_else_all_are_listed():
    with pytest.raises(ValueError, match=r"behaviour: 'moood' is neither .* Did you mean 'mood'\?"):
        behaviour_file("moood")
    with pytest.raises(ValueError, match=r"behaviour: 'zzz' is neither .* Shipped: .*formality.*mood"):
        behaviour_file("zzz")


def test_a_missing_file_says_how_to_mend_it():
    with pytest.raises(FileNotFoundError, match=r"data: no/such\.txt is not in this installation.*Reinstall rt_lens"):
        data_path("no/such.txt")


def test_neutral_texts_are_many_distinct_and_stripped():
    for texts, least in ((neutral_paragraphs(), 10), (neutral_prompts(), 20)):
        assert len(texts) >= least
        assert len(set(texts)) == len(texts)
        assert all(text == text.strip() and text for text in texts)


def test_neutral_texts_name_no_mood():
    words = re.compile(r"\b(happy|sad|joy\w*|gloom\w*|cheer\w*|miserabl\w*|delight\w*)\b", re.IGNORECASE)
    assert words.search("a joyful, gloomy day")
    assert not [text for text in [*neutral_paragraphs(), *neutral_prompts()] if words.search(text)]


def test_no_fact_counts_a_wrong_answer_as_right():
    facts = capital_facts()
    assert len(facts) >= 20
    assert len({fact["question"] for fact in facts}) == len(facts)
    for fact in facts:
        assert fact["question"].strip()
        assert fact["answers"]
        assert fact["wrong"]
        wrong = [fact["wrong"]] if isinstance(fact["wrong"], str) else fact["wrong"]
        assert not {text.lower() for text in fact["answers"]} & {text.lower() for text in wrong}
