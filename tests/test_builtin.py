"""The shipped data are there, whole, and free of the behaviours they must not carry."""

from __future__ import annotations

import operator
import re
from itertools import combinations

import pytest

from rt_lens.data.builtin import (
    behaviour_file,
    behaviours,
    data_path,
    held_out_neutral_prompts,
    neutral_paragraphs,
    neutral_prompts,
    prompt_kinds,
)
from rt_lens.data.questions import Answer, Question, load_questions
from rt_lens.data.readers import read_toml
from rt_lens.evaluation.registry import make_scorer
from rt_lens.evaluation.scorers import vader

ASKED = [name for name in behaviours() if "pairs" in read_toml(behaviour_file(name))]
"""Behaviours with personas and topics of their own; those of honesty follow from its facts."""


def topics_of(name: str) -> list[str]:
    return read_toml(behaviour_file(name))["pairs"]["topics"]


def test_the_behaviours_are_listed_and_each_has_its_file():
    assert {"formality", "honesty", "language", "mood", "refusal"} <= set(behaviours())
    assert behaviours() == sorted(behaviours())
    assert all(behaviour_file(name).is_file() for name in behaviours())


def test_a_path_is_taken_as_it_is(tmp_path):
    own = tmp_path / "mood.toml"
    own.write_text("")
    assert behaviour_file(own) == own
    assert behaviour_file(str(own)) == own


def test_a_near_name_is_suggested_and_else_all_are_listed():
    with pytest.raises(ValueError, match=r"behaviour must be .*got 'moood'\. Did you mean 'mood'\?"):
        behaviour_file("moood")
    with pytest.raises(ValueError, match=r"behaviour must be .*got 'zzz'\. Built in: .*formality.*mood"):
        behaviour_file("zzz")


def test_a_missing_file_says_how_to_fix_it():
    with pytest.raises(
        FileNotFoundError, match=r"data must be a file of this installation .*got no/such\.txt.*Reinstall rt_lens"
    ):
        data_path("no/such.txt")


@pytest.mark.parametrize("name", ASKED)
def test_a_behaviours_lists_repeat_nothing_and_its_sides_align(name):
    table = read_toml(behaviour_file(name))["pairs"]
    for texts in table.values():
        assert len(set(texts)) == len(texts)
        assert all(text == text.strip() and text for text in texts)
    assert len(table["positive"]) == len(table["negative"])
    for positive, negative in zip(table["positive"], table["negative"], strict=True):
        assert len(positive.split()) == len(negative.split()), positive


def every_list() -> dict[str, list[str]]:
    """All shipped prompts by where they come from."""
    topics = {name: topics_of(name) for name in ASKED}
    return {**topics, "neutral": neutral_prompts(), "held out": held_out_neutral_prompts(), **prompt_kinds()}


def normalised(prompt: str) -> str:
    """Lower case, and only words, numbers and signs of arithmetic, so that punctuation makes no difference."""
    return " ".join(re.findall(r"[^\W_]+|[+-]", prompt.lower()))


def test_no_prompt_occurs_twice_in_whatever_lists():
    assert normalised("What is  a Tale?") == normalised("what is a tale") != normalised("What is a tail?")
    lists = {name: [normalised(prompt) for prompt in prompts] for name, prompts in every_list().items()}
    assert len(lists) == len(ASKED) + 6
    for name, prompts in lists.items():
        assert len(set(prompts)) == len(prompts), name
    for one, other in combinations(lists, 2):
        assert not set(lists[one]) & set(lists[other]), (one, other)


def test_no_topic_asks_for_a_capital():
    assert not [prompt for prompts in every_list().values() for prompt in prompts if "capital" in prompt.lower()]


ANSWERS = {
    "formality": (
        ["Furthermore, one must obtain prior permission.", "I am writing to you regarding the invoice."],
        ["Yeah, it's gonna be awesome, guys!", "No worries, mate, that's totally cool."],
    ),
    "language": (
        ["The cat is asleep on the table.", "It’s warm, and they don’t mind.", "We had dinner in Paris with them."],
        ["Le chat est sur la table.", "C’est très simple : il faut attendre.", "Qu’est-ce qu’il veut ? Je suis là."],
    ),
    "refusal": (
        ["I’m sorry, but I can’t help with that.", "Unfortunately, I am unable to answer.", "I must decline."],
        ["Sure, here is a simple recipe.", "First, you can warm the pot; then add the tea.", "Of course, let's begin."],
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_lexicon_tells_the_two_sides_apart(name):
    scorer = make_scorer(read_toml(behaviour_file(name))["scorer"])

    def score(answer: str) -> float:
        return scorer([Answer(Question("?"), answer)])[0]

    positive, negative = ANSWERS[name]
    assert [score(answer) > 0 for answer in positive] == [True] * len(positive)
    assert [score(answer) < 0 for answer in negative] == [True] * len(negative)
    assert score("") == 0


@pytest.mark.parametrize("name", ANSWERS)
def test_a_lexicons_lists_repeat_nothing_and_share_nothing(name):
    table = read_toml(behaviour_file(name))["scorer"]
    words = [*table["positive"], *table["negative"]]
    assert len(set(words)) == len(words)
    assert all(word == word.strip().lower() and word for word in words)


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_the_lexicons_of_languages_do_not_name_words_of_both(side):
    both = {"a", "an", "as", "but", "car", "comment", "des", "do", "fin", "if", "me", "on", "or", "plus", "pour", "son"}
    assert not both & set(read_toml(behaviour_file("language"))["scorer"][side])


def test_neutral_texts_are_many_distinct_and_stripped():
    for texts, least in ((neutral_paragraphs(), 10), (neutral_prompts(), 20), (held_out_neutral_prompts(), 48)):
        assert len(texts) >= least
        assert len(set(texts)) == len(texts)
        assert all(text == text.strip() and text for text in texts)


def test_neutral_texts_name_no_mood():
    words = re.compile(r"\b(happy|sad|joy\w*|gloom\w*|cheer\w*|miserabl\w*|delight\w*)\b", re.IGNORECASE)
    assert words.search("a joyful, gloomy day")
    assert not [text for text in [*neutral_paragraphs(), *neutral_prompts()] if words.search(text)]


def test_there_are_forty_prompts_of_each_kind():
    kinds = prompt_kinds()
    assert list(kinds) == ["stories", "instructions", "opinions", "arithmetic"]
    for prompts in kinds.values():
        assert len(prompts) == 40
        assert all(prompt == prompt.strip() and prompt for prompt in prompts)


@pytest.mark.parametrize("relative", ["neutral/held_out.txt", *(f"kinds/{k}.txt" for k in list(prompt_kinds())[:3])])
def test_the_files_of_prompts_have_no_empty_lines(relative):
    text = data_path(relative).read_text()
    assert text.endswith("\n")
    assert all(line == line.strip() and line for line in text.removesuffix("\n").split("\n"))


@pytest.mark.parametrize("name", ["held out", *prompt_kinds()])
def test_no_prompt_for_measuring_carries_a_mood_of_its_own(name):
    assert vader("Write a happy story.") > 0 > vader("Write a sad story.")
    assert {prompt: vader(prompt) for prompt in every_list()[name] if vader(prompt)} == {}


def test_the_kinds_differ_in_their_form():
    forms = {
        "stories": r"(Write a (short )?story|Tell the tale of) ",
        "instructions": r"(Explain how to|List the|Write an?) (?!short story|story)",
        "opinions": r"(Judge this claim: |.*\? (Give your (view|reasons)|State your position)\.$)",
        "arithmetic": r"What is \d+ [-+x] \d+\?$",
    }
    for kind, prompts in prompt_kinds().items():
        for other, form in forms.items():
            assert [bool(re.match(form, prompt)) for prompt in prompts] == [kind == other] * 40, (kind, other)


def test_the_answers_of_the_arithmetic_are_right_and_cannot_be_had_by_repeating_the_question():
    signs = {"+": operator.add, "-": operator.sub, "x": operator.mul}
    facts = load_questions("arithmetic")
    for fact in facts:
        left, sign, right = fact.prompt.removeprefix("What is ").removesuffix("?").split()
        assert fact.right == (str(signs[sign](int(left), int(right))),)
        assert len(fact.right[0]) >= 2
        assert fact.right[0] not in fact.prompt
        assert fact.wrong == ()
        assert vader(fact.right[0]) == 0  # its lexicon has a few numbers, 143 for "I love you"
    assert len({fact.right[0] for fact in facts}) == len(facts)
    assert {sign: sum(f" {sign} " in fact.prompt for fact in facts) for sign in signs} == {"+": 16, "-": 10, "x": 14}


@pytest.mark.parametrize("name", ["capitals", "honesty", "misconceptions"])
def test_no_question_counts_a_wrong_answer_as_right(name):
    for asked in load_questions(name):
        assert asked.right and len(asked.wrong) >= 2
        assert not {text.lower() for text in asked.right} & {text.lower() for text in asked.wrong}
