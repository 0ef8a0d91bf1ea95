"""Scorers by hand: what each reads of an answer, and what it makes of it."""

from __future__ import annotations

import warnings

import pytest

import rt_lens as rtl
from rt_lens.data.questions import Answer, Likelihoods, Question, load_questions
from rt_lens.evaluation.answering import ask, response_text
from rt_lens.evaluation.registry import _KINDS, _OLD_NAMES, make_scorer, unmade_scorer
from rt_lens.evaluation.scorers import (
    ContainsAnswer,
    FollowsInstruction,
    Lexicon,
    Likelihood,
    OffOptionMass,
    OfText,
    Scorer,
    vader,
)
from rt_lens.evaluation.tasks import EvalTask, evaluate


def test_vader_orders_moods():
    assert vader("I am so happy, this is wonderful!") > 0.5 > -0.5 > vader("I am miserable, this is terrible.")


def test_lexicon_counts_whole_words_and_phrases():
    score = Lexicon(("therefore", "I am"), ("i'm", "kind of", "yeah"))
    assert score("Therefore I am here.") == 1.0
    assert score("Yeah, I’m kind of tired.") == -1.0
    assert score("Therefore, yeah.") == 0.0
    assert score("Yeahs and thereforeness") == 0.0


@pytest.mark.parametrize(
    ("scorer", "says"),
    [
        ("vadr", "scorer must be a Scorer, a function, or one of 'vader', 'repetition'"),
        ("letters", "got 'letters'"),
        ({"kind": "lexicon", "positive": ["a"]}, "must have words in both lists, got positive=['a'] and negative=[]"),
        ({}, "got None"),
        ({"kind": "vader", "lang": "de"}, "scorer 'vader' takes no key, got 'lang'"),
        ({"kind": "likelihood", "measure": "odds"}, "'accuracy', 'share', 'margin', 'log_odds', got 'odds'"),
        ({"kind": "pattern", "pattern": "("}, "must have a valid regular expression, got '('"),
        ({"kind": "pattern"}, "scorer 'pattern' takes the key 'pattern', got no key: missing"),
        ({"kind": "pattern", "regex": "x"}, "scorer 'pattern' takes the key 'pattern', got 'regex'"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_bad_scorers_are_named(scorer, says):
    with pytest.raises(ValueError, match="^scorer ") as caught:
        make_scorer(scorer)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "given",
    ["vader", "repetition", {"kind": "lexicon", "positive": ["a"], "negative": ["b"]}, len, ContainsAnswer(),
     "likelihood",
     {"kind": "pattern", "pattern": "^sorry"}, "follows_instruction"],
)  # fmt: skip
def test_whatever_is_given_becomes_one_callable_type(given):
    scorer = make_scorer(given)
    assert isinstance(scorer, Scorer)
    assert make_scorer(scorer) is scorer
    assert scorer.name
    assert scorer.reads in ("text", "completion", "multiple_choice")


def test_a_pattern_is_found_anywhere_in_any_case():
    score = make_scorer({"kind": "pattern", "pattern": r"\bsorry\b"})
    answers = [Answer(Question("?"), text) for text in ("I am SORRY.", "sorrynot")]
    assert score(answers) == [1.0, 0.0]


def test_contains_answer_takes_whole_words_and_refuses_wrong_ones():
    question = Question("What is 20 + 18?", ("38",), ("40",))
    answers = [Answer(question, text) for text in ("It is 38.", "It is 138.", "38 or 40", "None.")]
    assert ContainsAnswer()(answers) == [1.0, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"scorer 'contains_answer' must .* right options, got none for 'Hi\.'"):
        ContainsAnswer()([Answer(Question("Hi."), "x")])


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        ({"kind": "one_word"}, "Green.", "It is green."),
        ({"kind": "max_words", "n": 3}, "one two three", "one two three four"),
        ({"kind": "contains", "words": ["Oak", "ash"]}, "An ash, an oak.", "An oak."),
        ({"kind": "starts_with", "text": "Dear"}, "dear Sir", "My dear"),
        ({"kind": "ends_with", "text": "the end."}, "And so, The End.", "The end of it all"),
        ({"kind": "upper"}, "LOUD, 3!", "Loud"),
        ({"kind": "upper"}, "A", "123"),
        ({"kind": "list", "n": 2}, "Here:\n1. a\n2. b", "1. a\n2. b\n3. c"),
        ({"kind": "list", "n": 2}, "- a\n- b", "a, b"),
        ({"kind": "no_letter", "letter": "e"}, "A cat sat.", "The cat"),
    ],
)
def test_follows_instruction_by_hand(check, good, bad):
    asked = Question("Do it.", check=check)
    assert FollowsInstruction()([Answer(asked, good), Answer(asked, bad), Answer(asked, "")])[:2] == [1.0, 0.0]


def test_every_built_in_instruction_has_a_check_that_an_answer_can_fail():
    asked = load_questions("instructions")
    assert {question.check["kind"] for question in asked} == {
        "one_word", "max_words", "contains", "starts_with", "upper", "list", "ends_with", "no_letter",
    }  # fmt: skip
    assert sum(FollowsInstruction()([Answer(question, "") for question in asked])) == 0


def test_an_instruction_without_a_check_is_named():
    with pytest.raises(ValueError, match=r"scorer 'follows_instruction' must .* got None for 'Hi\.'"):
        FollowsInstruction()([Answer(Question("Hi."), "x")])


def test_evaluate_scores_what_the_model_says_and_batches_do_not_matter(model):
    prompts = ["How do you take your tea?", "Hello.", "What do you think of trains, and of long journeys by train?"]
    found = evaluate(model, prompts, max_new_tokens=8)
    assert found.responses == rtl.generate(model, prompts, max_new_tokens=8, batch_size=1)
    assert found.scores == [vader(response) for response in found.responses]
    assert found.interval.n == 3
    assert evaluate(model, prompts, len, max_new_tokens=8).scores == [len(r) for r in found.responses]


def test_questions_are_asked_with_their_persona_and_prefill(tiny):
    asked = [Question("Hi.", system="Be brief.", prefill="Well,"), Question("Hi.")]
    found = ask(tiny, asked, {"text"}, max_new_tokens=4)
    texts = [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nWell,",
        "Hi.",
    ]
    assert [answer.text for answer in found] == rtl.generate(tiny, texts, max_new_tokens=4)
    assert found[0].text != found[1].text


def test_only_what_is_read_is_measured_and_an_option_is_said_in_words(tiny):
    asked = [Question("Is ice cold?", ("Yes",), ("No",))]
    (answer,) = ask(tiny, asked, {"completion"})
    assert answer.text == "" and set(answer.options) == {"completion"}
    best = max(range(2), key=lambda i: answer.options["completion"].totals[i])
    assert response_text(answer) == asked[0].options[best]
    (written,) = ask(tiny, asked, {"text"}, max_new_tokens=2)
    assert written.options == {}


def test_evaluate_by_likelihood_gives_shares_and_the_options_preferred(model):
    asked = [Question("What is the capital of France?", ("Paris",), ("Lyon",), prefill="Answer:")]
    found = evaluate(model, asked, {"kind": "likelihood", "measure": "share"})
    assert found.responses == ["Paris"]
    assert 0.5 < found.scores[0] < 1


def test_a_scorer_of_ones_own_sees_the_whole_answer(tiny):
    class Longest:
        name, reads = "longest", "completion"

        def __call__(self, answers):
            return [float(max(answer.options["completion"].sizes)) for answer in answers]

    asked = [Question("Is ice cold?", ("Yes, it is very cold indeed",), ("No",))]
    assert evaluate(tiny, asked, Longest()).scores[0] >= 5
    assert isinstance(make_scorer(Longest()), Longest)
    assert OfText("len", len)([Answer(asked[0], "abc")]) == [3.0]
    assert Likelihoods((0.0,), (1,), 0.0).off_options == 0


@pytest.mark.parametrize(
    "given",
    [
        "vader",
        "contains_answer",
        {"kind": "likelihood", "form": "multiple_choice"},
        {"kind": "off_option_mass"},
        len,
        ContainsAnswer(),
    ],
)
def test_a_scorer_that_is_not_made_says_what_it_would_read(given):
    assert unmade_scorer(given).reads == make_scorer(given).reads


@pytest.mark.parametrize(
    ("table", "name", "old"),
    [
        ("names_right", "contains_answer", "names_right"),
        ("obeys", "follows_instruction", "obeys"),
        ("other", "off_option_mass", "other"),
        ({"kind": "other", "form": "multiple_choice"}, "off_option_mass_multiple_choice", "other"),
        ({"kind": "likelihood", "form": "letters"}, "likelihood_share_multiple_choice", "letters"),
        ({"kind": "off_option_mass", "form": "answers"}, "off_option_mass", "answers"),
    ],
)
@pytest.mark.parametrize("make", [make_scorer, unmade_scorer])
def test_the_words_of_older_files_still_work_and_name_their_new_word(table, name, old, make):
    says = rf"^'{old}' is now '{_OLD_NAMES[old]}'; the old name still works\.$"
    with pytest.warns(UserWarning, match=says) as warned:
        scorer = make(table)
    assert len(warned) == 1
    assert scorer.reads in ("text", "completion", "multiple_choice")
    if make is make_scorer:
        assert scorer.name == name


def test_the_words_of_today_are_not_warned_of():
    assert not set(_OLD_NAMES) & set(_KINDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_scorer("contains_answer") == ContainsAnswer()
        assert make_scorer("follows_instruction") == FollowsInstruction()
        assert make_scorer("off_option_mass") == OffOptionMass()
    assert Likelihood("accuracy", "multiple_choice").name == "likelihood_accuracy_multiple_choice"


def test_unknown_forms_are_refused_where_a_scorer_is_made(as_a_user):
    for kind in (Likelihood, OffOptionMass):
        with pytest.raises(ValueError, match="form must be 'completion' or 'multiple_choice', got 'words'"):
            kind(form="words")


# Tasks


PROMPTS = ["How do you take your tea?", "Hello."]


def test_evaluate_takes_the_scorer_and_the_length_from_a_task(tiny):
    task = EvalTask(PROMPTS, [len, "vader"], max_new_tokens=3, batch_size=1)
    evaluation = evaluate(tiny, task)
    assert evaluation == evaluate(tiny, PROMPTS, len, max_new_tokens=3)
    assert evaluation.scores == task(tiny) and evaluation.scorer == "len"
    assert evaluation.responses != evaluate(tiny, PROMPTS, len, max_new_tokens=6).responses  # so the length did matter


@pytest.mark.parametrize("given", [{"scorer": "vader"}, {"max_new_tokens": 5}])
def test_a_task_beside_a_scorer_or_a_length_is_refused(tiny, given):
    name = next(iter(given))
    with pytest.raises(ValueError, match=f"^{name} must be left out if test is an EvalTask, got {given[name]!r}"):
        evaluate(tiny, EvalTask(PROMPTS), **given)
