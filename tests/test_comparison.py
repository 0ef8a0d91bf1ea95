"""The arms table: every number against the answers it was made from, and nothing left on the model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import rt_lens as rtl
from rt_lens.arms.comparison import ArmEvaluator, compare_arms
from rt_lens.common.statistics.comparisons import paired_comparison
from rt_lens.common.statistics.intervals import crossed_interval, share_interval
from rt_lens.data.questions import Question
from rt_lens.evaluation.choices import likelihoods
from rt_lens.evaluation.tasks import EvalTask, evaluate
from rt_lens.evaluation.texts import perplexity
from rt_lens.tuning.delta import WeightDelta

PROMPTS = ["Tell me about rivers.", "How is the weather?", "Describe a chair.", "Hello.", "What is in your bag?"]
TEXTS = ["The lock lets a boat climb a hill.", "Bread rises.", "A map scale tells how far apart two places are."]
CHOICES = [Question(f"Is {thing} cold?", ("yes",), ("no",), thing) for thing in ("ice", "fire", "snow", "steam")]


@pytest.fixture
def delta(tiny):
    def changed(seed: int) -> WeightDelta:
        noise = torch.Generator().manual_seed(seed)
        weight = tiny.blocks[1].mlp.W_out
        return WeightDelta({"blocks.1.mlp.W_out": 0.5 * torch.randn(weight.shape, generator=noise)}, "tiny", {}, [])

    return changed


@pytest.fixture
def tasks():
    return {
        "talk": EvalTask(PROMPTS, [len, "repetition"], 5),
        "choices": EvalTask(CHOICES, [{"kind": "likelihood", "measure": "accuracy"}, {"kind": "likelihood"}]),
    }


@pytest.fixture
def board(tiny, tiny_vectors, delta, tasks):
    steering = rtl.add(tiny_vectors, [0], 4.0)
    arms = {
        "untuned": None,
        "steered": steering,
        "tuned": {0: delta(0), 1: delta(1), 2: delta(2)},
        "both": (delta(0), steering),
    }
    return compare_arms(tiny, arms, tasks, texts=TEXTS, progress=False)


def test_each_score_is_that_of_the_arm_asked_alone(tiny, tiny_vectors, delta, tasks, board):
    steering = rtl.add(tiny_vectors, [0], 4.0)
    alone = {
        ("untuned", 0): (),
        ("steered", 0): (steering,),
        ("tuned", 2): (delta(2),),
        ("both", 0): (delta(0), steering),
    }
    seen = []
    for (arm, seed), worn in alone.items():
        mine = board.scores[(board.scores["arm"] == arm) & (board.scores["seed"] == seed)]
        with rtl.applied(tiny, *worn):
            lengths = evaluate(tiny, PROMPTS, len, max_new_tokens=5).scores
            shares = evaluate(tiny, CHOICES, {"kind": "likelihood"}).scores
            fit = perplexity(tiny, TEXTS)
        assert mine[(mine["scorer"] == "len")]["score"].tolist() == lengths
        assert mine[(mine["scorer"] == "likelihood_share")]["score"].tolist() == pytest.approx(shares, abs=1e-5)
        nll = board.texts[(board.texts["arm"] == arm) & (board.texts["seed"] == seed)]["nll"]
        assert nll.tolist() == pytest.approx(fit.nll.tolist(), rel=1e-5)
        seen.append(tuple(shares))
    assert len(set(seen)) == 4  # so the arms do differ


def test_the_summary_follows_from_the_scores(board):
    table = board.summary()
    assert len(table) == 4 * 4
    for row in table.itertuples():
        cell = board.scores[
            (board.scores["arm"] == row.arm) & (board.scores["set"] == row.set) & (board.scores["scorer"] == row.scorer)
        ]
        assert row.mean == pytest.approx(cell["score"].mean())
        assert row.n == (len(PROMPTS) if row.set == "talk" else len(CHOICES))
        # Answers that all repeat nothing have no spread, and so no interval.
        assert row.low <= row.mean <= row.high or (np.isnan(row.low) and cell["score"].nunique() == 1)
        assert row.seeds == ([0, 1, 2] if row.arm == "tuned" else [0])
    untuned = table[table["arm"] == "untuned"]
    assert (untuned["kl"] == 0).all() and (table[table["arm"] != "untuned"]["kl"] > 1e-4).all()
    assert (table["perplexity_low"] <= table["perplexity"]).all()


def test_shares_get_wilson_and_seeds_the_crossed_interval(board):
    table = board.summary().set_index(["arm", "scorer"])
    hits = board.scores.query("arm == 'steered' and scorer == 'likelihood_accuracy'")["score"]
    assert set(hits) <= {0.0, 1.0}
    wanted = share_interval(int(hits.sum()), len(hits))
    assert table.loc[("steered", "likelihood_accuracy"), ["low", "high"]].tolist() == [wanted.low, wanted.high]
    cell = board.scores.query("arm == 'tuned' and scorer == 'likelihood_share'")
    grid = cell.pivot(index="seed", columns="item", values="score").to_numpy()
    wanted = crossed_interval(grid, 0)
    assert table.loc[("tuned", "likelihood_share"), ["low", "high"]].tolist() == [wanted.low, wanted.high]


def test_shares_over_several_seeds_stay_between_0_and_1(board):
    grid = np.ones((3, 60))
    grid[0, 0] = grid[2, :3] = 0.0
    assert crossed_interval(grid).high > 1
    found = board.interval(grid, share=True)
    assert found.high == 1.0 and found.low == crossed_interval(grid).low
    same = np.tile(grid[2], (3, 1))
    assert board.interval(same, share=True) == share_interval(57, 60)


def test_a_comparisons_seeds_are_those_that_were_compared(board):
    table = board.comparisons([(("untuned", "none"), ("tuned", "none"))])
    assert all(seeds == [0, 1, 2] for seeds in table["seeds"])


def test_summaries_by_category_hold_that_categorys_items(board):
    table = board.summary(by=["category"]).query("set == 'choices'")
    assert set(table["category"]) == {"ice", "fire", "snow", "steam"} and (table["n"] == 1).all()


def test_comparisons_are_paired_and_corrected(board):
    table = board.comparisons()
    assert len(table) == 3 * 4
    assert set(table["b"]) == {"untuned"}
    row = table.query("a == 'steered' and scorer == 'likelihood_share'").iloc[0]
    a, b = (
        board.scores.query(f"arm == '{arm}' and scorer == 'likelihood_share'")["score"].to_numpy()
        for arm in ("steered", "untuned")
    )
    wanted = paired_comparison(a, b, 0)
    assert (row["difference"], row["low"], row["p"]) == (wanted.difference, wanted.low, wanted.p)
    assert (table["p_holm"] >= table["p"]).all() and (table["p_holm"] > table["p"]).any()
    named = board.comparisons([(("both", "none"), ("steered", "none")), (("both", "none"), ("nobody", "none"))])
    assert len(named) == 4 and set(named["b"]) == {"steered"}


def test_an_efficient_arm_is_one_that_no_other_beats_on_both(board):
    for higher in (True, False):
        table = board.pareto("choices", "likelihood_share", higher=higher)
        sign = 1 if higher else -1
        for (i, one), other in itertools.product(table.iterrows(), table.to_dict("records")):
            beats = sign * other["mean"] >= sign * one["mean"] and other["kl"] <= one["kl"]
            strictly = sign * other["mean"] > sign * one["mean"] or other["kl"] < one["kl"]
            assert not (one["efficient"] and beats and strictly), i
        assert table["efficient"].any()
        assert table.set_index("arm").loc["untuned", "efficient"]  # nothing has a smaller KL than none


def test_a_scorer_runs_when_the_arm_is_off_and_sees_the_first_arms_words(tiny, tiny_vectors):
    seen = []

    class Judge:
        name, reads = "judge", "text"

        def __call__(self, answers):
            seen.append(
                (likelihoods(tiny, CHOICES[:1])[0].totals, [a.baseline for a in answers], [a.text for a in answers])
            )
            return [0.0] * len(answers)

    arms = {"untuned": None, "steered": rtl.add(tiny_vectors, [0], 4.0)}
    compare_arms(tiny, arms, {"talk": EvalTask(PROMPTS, [Judge()], 4)}, progress=False)
    (first, own, words), (second, baseline, others) = seen
    assert first == second  # the judge's own model is untouched both times
    assert own == words and baseline == words and others != words


def test_nothing_stays_on_the_model_also_when_a_scorer_fails(tiny, tiny_vectors, delta, hooks_on):
    before = {name: weight.clone() for name, weight in tiny.state_dict().items()}

    def fails(answer: str) -> float:
        raise RuntimeError("no score today")

    with pytest.raises(RuntimeError, match="no score today"):
        compare_arms(tiny, {"both": (delta(0), rtl.add(tiny_vectors, [0], 1.0))},
                     {"talk": EvalTask(PROMPTS, [fails], 2)},
                     progress=False)  # fmt: skip
    assert not hooks_on(tiny)
    assert all(torch.equal(weight, before[name]) for name, weight in tiny.state_dict().items())


def test_order_of_questions_and_batch_size_change_no_score(tiny, delta, tasks):
    def scores(questions, batch_size):
        exam = {"choices": EvalTask(questions, [{"kind": "likelihood"}])}
        board = ArmEvaluator(tiny, exam, TEXTS[::-1] if questions != CHOICES else TEXTS, batch_size=batch_size)
        board.measure("tuned", delta(0))
        found = board.scores()
        return dict(zip([q.category for q in questions], found.scores["score"], strict=True)), found.summary()

    (one, table), (other, again) = scores(CHOICES, 64), scores(CHOICES[::-1], 1)
    assert one == pytest.approx(other, abs=1e-5)
    assert table["perplexity"].iloc[0] == pytest.approx(again["perplexity"].iloc[0], rel=1e-6)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: compare_arms(m, {}, {"a": EvalTask(PROMPTS)}), "arms must map at least one name to an intervention"),
        (
            lambda m: compare_arms(m, {"x": 3}, {"a": EvalTask(PROMPTS)}, progress=False),
            "interventions must be a WeightDelta, a list of hooks as `add` gives, a SystemPrompt, or None, got a int",
        ),
        (lambda m: compare_arms(m, {"x": None}, {}), "tasks must map at least one name to an EvalTask"),
        (lambda m: ArmEvaluator(m, {"a": EvalTask(PROMPTS)}).scores(), "scores needs at least one measured arm"),
        (lambda m: EvalTask(PROMPTS, []), "scorers must be a list of at least one"),
        (lambda m: EvalTask(PROMPTS, ["vader", "vader"]), "scorers must have different names"),
        (lambda m: EvalTask(PROMPTS, [rtl.evaluation.scorers.OfText("prompt", len)]), "none of them arm, direction"),
        (lambda m: EvalTask([]), "prompts must be a list of at least one"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_bad_input_is_named(tiny, call, says):
    with pytest.raises(ValueError, match="interventions|arms|tasks|scorers|scores|prompts") as caught:
        call(tiny)
    assert says in str(caught.value)


def test_an_arm_is_measured_once_and_a_table_without_texts_has_no_damage(tiny):
    board = ArmEvaluator(tiny, {"choices": EvalTask(CHOICES, ["likelihood"])})
    board.measure("untuned")
    with pytest.raises(ValueError, match=r"arm 'untuned' \(none, seed 0\) was already measured"):
        board.measure("untuned")
    found = board.scores()
    assert "kl" not in found.summary()
    assert np.isfinite(found.summary()["mean"]).all()
    with pytest.raises(ValueError, match="pareto needs the KL of each arm"):
        found.pareto("choices", "likelihood_share")
    with pytest.raises(ValueError, match=r"name and scorer must be one of .*, got \('talk', 'len'\)"):
        found.pareto("talk", "len")
