"""Likelihoods of options: against plain forward passes, whatever the batch, and under edits."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

import rt_lens as rtl
from rt_lens.data.questions import Answer, Likelihoods, Question, lettered, load_questions
from rt_lens.evaluation.choices import _asks, _whole, likelihoods
from rt_lens.evaluation.scorers import Likelihood, option_shares
from rt_lens.models.tokens.chats import chat_text

ASKED = [
    Question("What is the capital of France?", ("Paris",), ("Lyon", "Madrid")),
    Question("Why is the sky blue?", ("Because air scatters blue light most.",), ("The sea.", "It is painted.")),
    Question("Is ice cold?", ("Yes",), ("No",), system="You answer in one word.", prefill="Answer:"),
]


def directly(model, text: str, option: str) -> float:
    """Sum of log-probabilities of an option's tokens, from one pass of one text."""
    start = len(model.tokenizer.encode(text, add_special_tokens=False))
    tokens = torch.tensor([model.tokenizer.encode(text + option, add_special_tokens=False)])
    with torch.no_grad():
        found = model(tokens)[0].double().log_softmax(-1)
    return sum(float(found[place - 1, tokens[0, place]]) for place in range(start, tokens.shape[1]))


def test_totals_are_those_of_plain_passes(model):
    for question, found in zip(ASKED, likelihoods(model, ASKED), strict=True):
        text = chat_text(model, question.prompt, system=question.system, prefill=question.prefill)
        gap = " " if question.prefill else ""
        for option, total, size in zip(question.options, found.totals, found.sizes, strict=True):
            assert total == pytest.approx(directly(model, text, gap + option), abs=2e-4)
            assert size == len(model.tokenizer.encode(gap + option, add_special_tokens=False))
        assert found.off_options == pytest.approx(1 - sum(math.exp(total) for total in found.totals), abs=1e-4)


def test_multiple_choice_asks_in_every_rotation_and_averages(model):
    question = ASKED[0]
    totals = [[0.0] * 3 for _ in range(3)]
    for turn in range(3):
        listed = [question.options[(place - turn) % 3] for place in range(3)]
        text = chat_text(model, lettered(question.prompt, listed), prefill="The answer is")
        for option in range(3):
            totals[turn][option] = directly(model, text, " " + "ABC"[listed.index(question.options[option])])
    (found,) = likelihoods(model, [question], form="multiple_choice")
    assert list(found.totals) == pytest.approx([sum(column) / 3 for column in zip(*totals, strict=True)], abs=2e-4)
    spread = max(abs(a - b) for row in zip(*totals, strict=True) for a, b in itertools.combinations(row, 2))
    assert spread > 0.05  # so there was a liking for letters or places to average out


def test_swapping_the_options_swaps_their_totals_in_multiple_choice(model):
    one = likelihoods(model, [Question("Is ice cold or hot?", ("cold",), ("hot",))], form="multiple_choice")[0]
    two = likelihoods(model, [Question("Is ice cold or hot?", ("hot",), ("cold",))], form="multiple_choice")[0]
    assert one.totals == pytest.approx(two.totals[::-1], abs=1e-4)


@pytest.mark.parametrize("form", ["completion", "multiple_choice"])
def test_batch_size_order_and_company_change_no_score(model, form):
    asked = load_questions("honesty")[:: 24 if form == "completion" else 50]
    scorers = [Likelihood(measure, form) for measure in ("accuracy", "share", "margin")]

    def scores(questions, batch_size):
        found = likelihoods(model, questions, form=form, batch_size=batch_size)
        answers = [Answer(q, "", {form: each}) for q, each in zip(questions, found, strict=True)]
        return [dict(zip([q.prompt for q in questions], scorer(answers), strict=True)) for scorer in scorers]

    shuffled = random.Random(0).sample(asked, len(asked))
    first, alone, mixed = scores(asked, 4), scores(asked, 1), scores(shuffled, 3)
    for a, b, c in zip(first, alone, mixed, strict=True):
        for prompt, score in a.items():
            assert score == pytest.approx(b[prompt], abs=1e-5)
            assert score == pytest.approx(c[prompt], abs=1e-5)


def test_a_branched_cache_gives_what_whole_texts_give(tiny):
    asks = [ask for number, question in enumerate(ASKED) for ask in _asks(tiny, number, question, "completion")]
    whole = _whole(tiny, asks, len(ASKED))
    for found, totals in zip(likelihoods(tiny, ASKED), whole, strict=True):
        assert list(found.totals) == pytest.approx(totals, abs=1e-4)


def test_a_bridge_gives_the_same(model, bridge):
    for one, other in zip(likelihoods(model, ASKED), likelihoods(bridge, ASKED), strict=True):
        assert one.totals == pytest.approx(other.totals, abs=1e-3)
        assert one.sizes == other.sizes


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
def test_edits_by_position_and_by_row_mean_the_same_tokens_in_both_ways(tiny, tiny_vectors, positions):
    each = torch.tensor([0.5, -1.0, 2.0])
    asks = [ask for number, question in enumerate(ASKED) for ask in _asks(tiny, number, question, "completion")]
    with tiny.hooks(fwd_hooks=rtl.add(tiny_vectors, [0], each, positions=positions)):
        branched = likelihoods(tiny, ASKED, batch_size=2)
        whole = _whole(tiny, asks, len(ASKED))
    plain = likelihoods(tiny, ASKED)
    for found, totals in zip(branched, whole, strict=True):
        assert list(found.totals) == pytest.approx(totals, abs=1e-4)
    moved = [
        max(abs(a - b) for a, b in zip(x.totals, y.totals, strict=True)) for x, y in zip(branched, plain, strict=True)
    ]
    # An option's first token is read off the question, so no edit of generated tokens reaches options of one token.
    reached = [positions != "generated" or max(each.sizes) > 1 for each in plain]
    assert [size > 1e-4 for size in moved] == reached
    assert positions != "generated" or set(reached) == {True, False}


def test_a_condition_read_at_the_question_holds_for_its_options(tiny, tiny_vectors):
    condition = rtl.steering.fit_condition(
        tiny, [f"Is {it} cold?" for it in ("ice", "snow", "rain", "hail")], [f"{n} + {n}" for n in range(4)], layer=0
    )
    hooks = rtl.conditional(rtl.add(tiny_vectors, [1], 3.0), condition)
    asks = [ask for number, question in enumerate(ASKED) for ask in _asks(tiny, number, question, "completion")]
    with tiny.hooks(fwd_hooks=hooks):
        found = likelihoods(tiny, ASKED)
        alone = [likelihoods(tiny, [question])[0] for question in ASKED]
        whole = _whole(tiny, asks, len(ASKED))
    for one, other, totals in zip(found, alone, whole, strict=True):
        assert one.totals == pytest.approx(other.totals, abs=1e-4)
        assert list(one.totals) == pytest.approx(totals, abs=1e-4)


def test_tokens_that_reach_over_the_edge_are_counted(tiny):
    # "Answer:" and " Yes" share no token, but an option may join the prefill's last one ("micro" + "scope").
    question = Question("Name a tool.", ("scope",), ("wave",), prefill="A micro")
    (ask,) = _asks(tiny, 0, question, "completion")
    joined = tiny.tokenizer.decode([*ask.start, *ask.options[0]])
    assert joined.endswith("A micro scope")
    assert all(len(option) >= 1 for option in ask.options)


@pytest.mark.parametrize(
    ("question", "form", "says"),
    [
        (Question("Hi."), "completion", "at least 2 options each, got 0 for 'Hi.'"),
        (Question("Hi.", ("a",)), "multiple_choice", "at least 2 and at most 10 options each, got 1 for 'Hi.'"),
        (Question("Hi.", ("a",), tuple("bcdefghijkl")), "multiple_choice", "got 12 for 'Hi.'"),
    ],
)
def test_questions_without_enough_options_are_named(tiny, question, form, says):
    with pytest.raises(ValueError, match="^questions must have ") as caught:
        likelihoods(tiny, [ASKED[0], question], form=form)
    assert says in str(caught.value)


@pytest.mark.usefixtures("as_a_user")
def test_unknown_forms_and_batch_sizes_are_refused(tiny):
    with pytest.raises(ValueError, match="form must be 'completion' or 'multiple_choice', got 'words'"):
        likelihoods(tiny, ASKED, form="words")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        likelihoods(tiny, ASKED, batch_size=0)


def test_shares_add_up_and_length_can_be_taken_out():
    found = Likelihoods((-2.0, -4.0), (1, 4), 0.5)
    assert option_shares(found) == pytest.approx([0.8808, 0.1192], abs=1e-4)  # 1 / (1 + e^-2)
    assert option_shares(found, per_token=True) == pytest.approx([0.2689, 0.7311], abs=1e-4)  # -2 against -1


def test_the_likelihood_scorer_by_hand():
    asked = Question("?", ("a", "b"), ("c", "d"))
    totals = tuple(float(x) for x in torch.tensor([0.1, 0.3, 0.2, 0.4]).log())
    answer = Answer(asked, "", {"completion": Likelihoods(totals, (1, 1, 1, 1), 0.0)})
    score = {measure: Likelihood(measure)([answer])[0] for measure in ("accuracy", "share", "margin", "log_odds")}
    assert score == pytest.approx({"accuracy": 0.0, "share": 0.4, "margin": 0.0, "log_odds": -0.405465}, abs=1e-6)
    far = Answer(asked, "", {"completion": Likelihoods((-900.0, -900.0, -1.0, -1.0), (9, 9, 1, 1), 0.0)})
    assert Likelihood("log_odds")([far]) == [pytest.approx(-899.0)]  # where a share would be 0
    assert Likelihood("log_odds", per_token=True)([far]) == [pytest.approx(-99.0)]
    tie = Answer(asked, "", {"completion": Likelihoods((-1.0,) * 4, (1,) * 4, 0.0)})
    assert Likelihood("accuracy")([tie]) == [0.5]


def test_the_bundled_model_knows_facts_by_likelihood(model):
    capitals = [q for q in load_questions("capitals") if q.wrong][:20]
    found = likelihoods(model, [Question(q.prompt, q.right[:1], q.wrong, prefill="Answer:") for q in capitals])
    right = [each.totals[0] == max(each.totals) for each in found]
    assert sum(right) >= 15
