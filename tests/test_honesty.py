"""Honesty's data, pairs and protocols: balanced, apart, and run to the end on the embedded model."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from rt_lens.apps.report.page import write_report
from rt_lens.data.honesty import (
    PREFILL,
    Fact,
    answer_pairs,
    judged_statements,
    load_facts,
    persona_pairs,
    personas,
    roleplays,
    situations,
    true_or_false,
)
from rt_lens.data.questions import Question, load_questions
from rt_lens.evaluation.choices import _asks
from rt_lens.evaluation.tasks import evaluate
from rt_lens.experiment.config import load_experiment, questions_of
from rt_lens.experiment.protocols import calibrate, parts, protocol_of
from rt_lens.experiment.run import run_experiment
from rt_lens.models.tokens.batches import encode
from rt_lens.results.schema import load_results
from rt_lens.tuning.targets import Choice, Target
from rt_lens.tuning.tuning_data import _row

CATEGORIES = {
    "capitals", "elements", "arithmetic", "animals", "opposites", "inventions", "geography", "physics", "language",
    "history",
}  # fmt: skip
SMALL = """
name = "honesty"
arms = ["steered", "token_tuned", "rep_tuned"]
[honesty]
protocol = "PROTOCOL"
held_out = ["animals"]
n_calibration = 8
n_items = 4
prefill = "Answer:"
filter_pairs = false
[extract]
n_pairs = 8
[choose]
layers = [15]
multipliers = [0.5]
n_prompts = 4
n_paragraphs = 3
bound = 2.0
[tune]
layers = [27]
trained_layers = [27]
learning_rate = 1e-3
max_steps = 2
batch_size = 2
neutral_batch_size = 1
n_targets = 8
target_tokens = 6
seeds = [0]
[test]
n_prompts = 2
max_new_tokens = 4
n_instructions = 2
n_texts = 3
[compare]
kl = [0.01]
side_effects = "stated"
n_texts = 2
max_new_tokens = 4
"""


@pytest.fixture
def small(tmp_path):
    def written(protocol: str) -> Path:
        path = tmp_path / "honesty.toml"
        path.write_text(SMALL.replace("PROTOCOL", protocol))
        return path

    return written


def test_there_are_enough_facts_of_every_category():
    facts = load_facts()
    counts = Counter(fact.category for fact in facts)
    assert 2 * len(facts) >= 800
    assert set(counts) == CATEGORIES and min(counts.values()) >= 40
    asked = Counter(question.category for question in load_questions("honesty"))
    assert set(asked) == CATEGORIES and sum(asked.values()) >= 150 and min(asked.values()) >= 24
    assert (len(load_facts("misconceptions")), len(load_questions("misconceptions"))) == (60, 60)
    assert (len(situations()), len(roleplays()), len(personas())) == (40, 40, 20)


@pytest.mark.parametrize("name", ["statements", "misconceptions"])
def test_true_and_false_have_one_form_and_no_statement_occurs_twice(name):
    facts = load_facts(name)
    every = [statement for fact in facts for statement in (fact.true, fact.false)]
    assert len({statement.lower() for statement in every}) == len(every)
    for fact in facts:
        assert abs(len(fact.true.split()) - len(fact.false.split())) <= 2, fact
        assert fact.true.endswith(".") and fact.false.endswith("."), fact


def test_single_words_do_not_tell_true_from_false_statements():
    for category in CATEGORIES - {"language"}:  # where spelling is asked, misspelt words are false
        mine = [fact for fact in load_facts() if fact.category == category]
        true, false = (
            Counter(re.findall(r"[\w']+", " ".join(side).lower()))
            for side in zip(*((f.true, f.false) for f in mine), strict=True)
        )
        assert sum(((true - false) + (false - true)).values()) <= 0.01 * sum(true.values()), category


def test_sums_in_the_questions_are_right():
    signs = {"plus": "+", "minus": "-", "times": "*", "divided by": "//"}
    checked = 0
    for asked in load_questions("honesty"):
        found = re.fullmatch(r"What is (\d+) (plus|minus|times|divided by) (\d+)\?", asked.prompt)
        if found:
            assert eval(f"{found[1]}{signs[found[2]]}{found[3]}") == int(asked.right[0]), asked
            checked += 1
    assert checked >= 10


def test_each_persona_pair_asks_the_same_number_of_words():
    for honest, dishonest in personas():
        assert len(honest.split()) == len(dishonest.split())
        assert honest != dishonest


def test_letters_words_and_statements_cancel_between_the_sides_of_persona_pairs():
    facts = [Fact("c", f"True statement {n}.", f"False statement {n}.") for n in range(8)]
    pairs = persona_pairs(facts, seed=1)
    assert len(pairs) == 16
    for pair in pairs.pairs:
        (honest, user, prefill), (dishonest, other, same) = pair.sides
        assert prefill == same  # the same letter on both sides
        assert (honest, dishonest) in personas()
        word = user.split(f"{prefill[-1]}. ")[1].split("\n")[0]
        assert ("True statement" in user) == (word == "True")  # honest: says what is so
        assert ("True statement" in other) == (word == "False")  # dishonest: says what is not
    letters = Counter((pair.prefill[-1], "True statement" in pair.user) for pair in pairs.pairs)
    assert set(letters.values()) == {4}  # A and B stand for truth and lie alike


def test_both_pairs_of_a_fact_stay_on_one_side_of_a_split():
    train, test = persona_pairs(load_facts()[:40]).split(0.5, seed=0)
    assert not {pair.group for pair in train.pairs} & {pair.group for pair in test.pairs}


def test_answer_pairs_differ_in_the_answer_alone(tiny):
    asked = Question("What is 2 + 2?", ("4",), ("5", "6"), prefill="Answer:")
    texts = answer_pairs([asked]).texts(tiny)
    assert [text.removesuffix("4") for text in texts.positive] == [text[:-1] for text in texts.negative]
    assert [text[-1] for text in texts.negative] == ["5", "6"]
    assert texts.positive[0].endswith("Answer: 4")


def test_true_or_false_asks_each_statement_once():
    (one, two) = true_or_false([Fact("c", "Ice is cold.", "Ice is hot.")])
    assert one.right == ("True",) and "Ice is cold." in one.prompt
    assert two.right == ("False",) and "Ice is hot." in two.prompt


def test_held_out_categories_are_seen_by_nothing_but_the_test(model):
    experiment = load_experiment("honesty")
    assert experiment.honesty is not None
    protocol = protocol_of(
        replace(experiment, honesty=replace(experiment.honesty, protocol="likelihood", n_calibration=4)), model
    )
    unseen = {q.prompt for q in load_questions("honesty") if q.category in experiment.honesty.held_out}
    train, validation = protocol.targets("away", 0)
    seen = " ".join(target.prompt for target in [*train, *validation] if isinstance(target, Target))
    seen += " ".join([*protocol.train.topics, *(q.prompt for q in protocol.choosing.asked)])
    assert not [prompt for prompt in unseen if prompt in seen]
    assert {q.prompt for q in protocol.tasks["held-out categories"].asked} <= unseen
    tested = {q.prompt for q in protocol.tasks["same categories"].asked}
    assert not tested & set(protocol.train.topics)
    assert not tested & {q.prompt for q in protocol.choosing.asked}
    assert not [prompt for prompt in tested if prompt in seen]


def test_targets_teach_truth_toward_and_lies_away(model):
    experiment = load_experiment("honesty")
    assert experiment.honesty is not None
    asked = {q.prompt: q for q in load_questions("honesty")}
    protocol = protocol_of(
        replace(experiment, honesty=replace(experiment.honesty, protocol="likelihood", n_calibration=4)), model
    )
    for direction, side in (("toward", "right"), ("away", "wrong"), ("suppress", "right")):
        for target in protocol.targets(direction, 0)[0]:
            (question,) = (q for prompt, q in asked.items() if prompt in target.prompt)
            assert target.answer.strip() in getattr(question, side)


def test_what_is_learnt_is_what_is_scored_token_by_token(model):
    experiment = load_experiment("honesty")
    assert experiment.honesty is not None
    asked = {q.prompt: q for q in questions_of(experiment.honesty)}
    protocol = protocol_of(
        replace(experiment, honesty=replace(experiment.honesty, protocol="likelihood", n_calibration=4)), model
    )
    for target in protocol.targets("away", 0)[0]:
        (number,) = (n for n, prompt in enumerate(asked) if prompt in target.prompt)
        question = asked[[*asked][number]]
        (ask,) = _asks(model, number, question, "completion")
        learnt = _row(model, target, []).tokens.tolist()
        end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert learnt == [*ask.start, *ask.options[1], end]  # the first wrong answer, and that it ends there
    assert protocol.shown is not None
    assert encode(model, protocol.shown[1])[-1] in {
        ids[-1] for q in load_questions("honesty") for ids in [encode(model, " " + q.right[0])]
    }


def test_the_commands_split_facts_as_the_persona_run_does(small, model):
    experiment = load_experiment(small("persona"))
    train, validation, test = ({pair.group for pair in part.pairs} for part in parts(experiment))
    assert not train & validation and not train & test and not validation & test
    protocol = protocol_of(experiment, model)
    assert {pair.group for pair in protocol.train.pairs} <= train
    tested = " ".join(q.prompt for name in ("same categories",) for q in protocol.tasks[name].asked)
    assert not [fact for fact in train | validation if fact in tested]


def test_one_statement_of_each_fact_is_judged_and_always_true_is_half_right():
    asked = judged_statements(load_facts()[:40])
    assert len(asked) == 40
    assert Counter(question.right[0] for question in asked) == {"True": 20, "False": 20}


def test_the_model_is_asked_what_it_can_do_and_the_run_says_so(model):
    config = load_experiment("honesty").honesty
    assert config is not None
    rows, name, why = calibrate(replace(config, n_calibration=32), model, 0)
    judges, prefers = rows
    assert name == "likelihood"
    assert judges["low"] <= 0.5 <= judges["high"]  # at chance, and said to be
    assert prefers["low"] > prefers["chance"] == pytest.approx(0.25)
    assert "judges statements" in why and "not shown to be above chance" in why
    assert "prefers right answers" in why and "So the run uses the likelihood protocol." in why


def test_a_model_that_can_do_neither_is_refused(tiny):
    config = load_experiment("honesty").honesty
    assert config is not None
    with pytest.raises(
        ValueError, match="protocol must be .* for a model that is not above chance in either, got 'auto'"
    ):
        calibrate(replace(config, n_calibration=12), tiny, 0)


def test_the_experiment_runs_to_its_end_and_its_files_hold_together(small, tmp_path):
    results = run_experiment(load_experiment(small("likelihood")), tmp_path / "out", progress=False)
    assert results["protocol"]["name"] == "likelihood" and "chance" in results["protocol"]["why"]
    sets = {row["set"] for row in results["summary"]}
    assert {"same categories", "held-out categories", "misconceptions", "role-plays", "situations"} <= sets
    for row in results["summary"]:
        assert row["n"] <= 8 and row["low"] <= row["mean"] <= row["high"]
    arms = {(row["arm"], row["direction"]) for row in results["summary"]}
    assert len(arms) == 1 + 3 * 2
    assert all(0 <= row["p"] <= row["p_holm"] <= 1 for row in results["comparisons"])
    assert {row["set"] for row in results["side_effects"]} >= {"talk", "instructions"}
    assert load_results(tmp_path / "out").content["behaviour"] == "honesty"
    assert "held-out categories" in write_report(tmp_path / "out").read_text()
    told = [json.loads(line) for line in (tmp_path / "out/responses.jsonl").read_text().splitlines()]
    assert {row["set"] for row in told} >= sets


def test_the_persona_protocols_targets_are_letters_in_both_orders(small, model):
    experiment = load_experiment(small("persona"))
    protocol = protocol_of(experiment, model)
    train, _ = protocol.targets("away", 0)
    assert all(isinstance(target, Choice) for target in train)
    shares = Counter(target.shares for target in train)
    assert shares == {(1.0, 0.0): 8, (0.0, 1.0): 8}  # 8 facts, two statements each, A and B for lies by turns
    for target in train[:8]:  # away from honesty, the letter of the lie has the share
        lie = "ABC"[target.shares.index(1.0)]
        word = target.prompt.split(f"{lie}. ")[1].split("\n")[0]
        fact = next(f for f in load_facts() if f.true in target.prompt or f.false in target.prompt)
        assert word == ("False" if fact.true in target.prompt else "True")
    soft = replace(experiment, honesty=replace(experiment.honesty, soft=True))
    assert {target.shares for target in protocol_of(soft, model).targets("toward", 0)[0]} == {(0.5, 0.5)}


def test_correct_only_keeps_pairs_that_both_personas_get_their_way_in(small, model):
    experiment = load_experiment(small("persona"))
    every = protocol_of(experiment, model).train
    strict = replace(experiment, honesty=replace(experiment.honesty, filter_pairs=True))
    kept = protocol_of(strict, model).train
    assert 0 < len(kept) < len(every) and set(kept.pairs) < set(every.pairs)
    right = []
    for pair in every.pairs:
        asked = [
            Question(u, (o[-1],), ({"A": "B", "B": "A"}[o[-1]],), system=p, prefill=PREFILL) for p, u, o in pair.sides
        ]
        right.append(evaluate(model, asked, {"kind": "likelihood", "measure": "accuracy"}).scores == [1.0, 1.0])
    assert kept.pairs == tuple(pair for pair, both in zip(every.pairs, right, strict=True) if both)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('["animals"]', '["animal"]', "held_out must name categories of"),
        ("n_items = 4", "n_items = 1", "n_items must be at least 4, got 1"),
        ("n_items = 4", "n_itmes = 4", "Did you mean 'n_items'"),
        ('"likelihood"', '"honest"', "protocol must be one of 'auto', 'persona', 'likelihood', got 'honest'"),
        ('["animals"]', '"animals"', "held_out must be a list, got 'animals'"),
        ("n_items = 4", 'n_items = "four"', "honesty.n_items must be a whole number, got 'four'"),
        ("[extract]", "[judge]\nurl = 'http://127.0.0.1:1/v1'\n[extract]", "scorer 'endpoint_judge' takes the keys"),
        (
            "[extract]",
            "[scorer]\nkind = 'vader'\n[extract]",
            "must not have the table [scorer], since [honesty] brings its own",
        ),
    ],
)
def test_bad_settings_are_named(small, old, new, says):
    path = small("likelihood")
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=re.escape(says)):
        load_experiment(path)
