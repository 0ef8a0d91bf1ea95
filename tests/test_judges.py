"""A model as judge by logits: order, symmetry and batches; and what the bundled model is worth as one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import rt_lens as rtl
from rt_lens.common.statistics.comparisons import cliffs_delta
from rt_lens.data.questions import Answer, Question
from rt_lens.evaluation.choices import likelihoods
from rt_lens.evaluation.judges import LogitJudge
from rt_lens.evaluation.scorers import Scorer
from rt_lens.evaluation.tasks import evaluate

TOLD = {
    "How did the exam go?": (
        [
            "I passed with top marks and danced home.",
            "Better than I dared to dream, I am thrilled!",
            "Wonderful, all my work paid off.",
        ],
        [
            "I failed again and feel worthless.",
            "Terribly, I wept on the way home.",
            "It was hopeless, all my work was for nothing.",
        ],
    ),
    "How is the new flat?": (
        [
            "I love it, sunlight pours in each morning.",
            "It is cosy and bright, and I wake up smiling.",
            "Perfect, we are so happy here.",
        ],
        [
            "I hate it, it is dark and lonely.",
            "It is cold and damp, and I cry at night.",
            "Dreadful, we regret it bitterly.",
        ],
    ),
    "Tell me about your trip.": (
        [
            "It was a dream, we laughed the whole way.",
            "The sea was glorious and I felt so alive.",
            "Best holiday ever, I cannot stop grinning.",
        ],
        [
            "It was a nightmare, we fought the whole way.",
            "It rained, and I have never felt so alone.",
            "Worst holiday ever, I only wanted to go home.",
        ],
    ),
    "How is your grandmother?": (
        [
            "She is well again, and we are all overjoyed.",
            "Merry as ever, she sang for us.",
            "She turned ninety and beamed all evening.",
        ],
        [
            "She died on Sunday, and we are all in tears.",
            "Worse each day, it breaks my heart.",
            "She no longer knows me, and I grieve.",
        ],
    ),
    "How was the concert?": (
        ["Fantastic, the crowd cheered and so did I.", "It filled me with joy.", "Pure delight from the first note."],
        ["Awful, I left early and miserable.", "It filled me with sorrow.", "Painful from the first note."],
    ),
    "What is new at work?": (
        [
            "I got the promotion, hooray!",
            "My team is great fun and I enjoy every day.",
            "They loved my idea, and I am proud and glad.",
        ],
        [
            "I lost my job, and I am desperate.",
            "My team ignores me and I dread every day.",
            "They mocked my idea, and I am ashamed and hurt.",
        ],
    ),
    "How is the dog?": (
        [
            "He is healthy and playful, and makes us laugh.",
            "She won a prize, what a happy dog!",
            "He greets me with such joy.",
        ],
        [
            "He is dying, and the house is silent.",
            "She ran away, we are heartbroken.",
            "He limps and whimpers, poor thing.",
        ],
    ),
    "How do you feel about winter?": (
        [
            "I adore the snow, it makes me cheerful.",
            "Cosy evenings with friends, lovely!",
            "I am excited, skiing is a thrill.",
        ],
        [
            "I dread it, it makes me depressed.",
            "Long dark evenings alone, awful.",
            "I am afraid of it, it brings only grief.",
        ],
    ),
}
"""Question -> happy answers, sad answers."""


def answered(side: int) -> list[Answer]:
    return [Answer(Question(prompt), text) for prompt, sides in TOLD.items() for text in sides[side]]


def against(mine: list[Answer], theirs: list[Answer]) -> list[Answer]:
    return [Answer(a.question, a.text, {}, b.text) for a, b in zip(mine, theirs, strict=True)]


def test_the_bundled_model_puts_happy_answers_above_sad_ones(model):
    happy, sad = answered(0), answered(1)
    judge = LogitJudge(model, "sounds happy", "sounds sad")
    scores = judge(happy + sad)
    assert all(0 < score < 1 for score in scores)
    told = cliffs_delta(scores[: len(happy)], scores[len(happy) :])
    assert told.low > 0.5  # 0 is chance
    turned = LogitJudge(model, "sounds sad", "sounds happy")(happy[:4])  # the two shares of the same question
    assert turned == pytest.approx([1 - score for score in scores[:4]], abs=1e-5)


def test_by_yes_and_no_the_score_is_the_share_of_yes(tiny):
    [score] = LogitJudge(tiny, "is kind")([Answer(Question("Hello?"), "Hello, friend.")])
    prompt = "Question: Hello?\nAnswer: Hello, friend.\n\nIs it true of this answer that it is kind? Say yes or no."
    yes, no = np.exp(likelihoods(tiny, [Question(prompt, ("Yes",), ("No",))])[0].totals)
    assert score == pytest.approx(yes / (yes + no))


@pytest.mark.parametrize("form", ["completion", "multiple_choice"])
def test_batches_and_order_change_no_score(model, form):
    answers = [*answered(0)[:3], *answered(1)[3:6], Answer(Question("Hm?"), "")]
    judge = LogitJudge(model, "sounds happy", "sounds sad", form=form)
    together = judge(answers)
    assert np.ptp(together) > (0.1 if form == "completion" else 0.001)
    one_by_one = LogitJudge(model, "sounds happy", "sounds sad", form=form, batch_size=1)
    assert one_by_one(answers[::-1])[::-1] == pytest.approx(together, abs=1e-5)


def test_pairs_are_antisymmetric_and_the_same_text_is_a_tie(model):
    happy, sad = answered(0)[:4], answered(1)[:4]
    judge = LogitJudge(model, "sounds happy", pairs=True)
    there, back = judge(against(happy, sad)), judge(against(sad, happy))
    assert there == pytest.approx([-score for score in back], abs=1e-6)
    assert max(map(abs, there)) > 0.001
    assert judge(against(happy[:1], happy[:1])) == [0.0]
    assert judge([]) == []


def test_a_prefill_is_part_of_what_is_judged(tiny):
    judge = LogitJudge(tiny, "is kind")
    opened, whole = Answer(Question("Hi?", prefill="Well,"), " yes."), Answer(Question("Hi?"), "Well, yes.")
    assert judge([opened]) == judge([whole]) != judge([Answer(Question("Hi?"), "yes.")])


def test_it_is_a_scorer_that_evaluate_takes(tiny):
    judge = LogitJudge(tiny, "sounds happy", "sounds sad")
    assert isinstance(judge, Scorer) and judge.name == "logit_judge_sounds_happy"
    found = evaluate(tiny, ["How are you?", "Hello."], judge, max_new_tokens=3)
    asked = [Answer(Question(prompt), said) for prompt, said in zip(found.prompts, found.responses, strict=True)]
    assert found.scores == pytest.approx(judge(asked), abs=1e-6)


def test_a_name_loads_the_judge(model):
    answers = answered(0)[:2]
    named = LogitJudge(rtl.models.registry.DEFAULT_MODEL, "sounds happy", "sounds sad")
    assert named(answers) == pytest.approx(LogitJudge(model, "sounds happy", "sounds sad")(answers), abs=1e-6)


def test_names_tell_judges_apart(tiny):
    judges = [LogitJudge(tiny, "is kind", pairs=pairs) for pairs in (False, True)] + [LogitJudge(tiny, "is true")]
    assert all(a.name != b.name for a, b in itertools.combinations(judges, 2))
    assert LogitJudge(tiny, "is kind", name="small").name == "small"


def test_what_cannot_be_judged_is_refused(tiny):
    for settings, argument in (
        ({"criterion": " "}, "criterion must complete .*got ' '"),
        ({"criterion": "is kind", "opposite": "is rude", "pairs": True}, "opposite must be empty .*, got 'is rude'"),
    ):
        with pytest.raises(ValueError, match=argument):
            LogitJudge(tiny, **settings)
    with pytest.raises(ValueError, match="answers must each have a baseline .*, got none for 'Hi.'"):
        LogitJudge(tiny, "is kind", pairs=True)([Answer(Question("Hi?"), "Hi.")])


@pytest.mark.usefixtures("as_a_user")
def test_an_unknown_form_is_named(tiny):
    with pytest.raises(ValueError, match="form must be 'completion' or 'multiple_choice', got 'words'"):
        LogitJudge(tiny, "is kind", form="words")
