"""Arms at the strengths of one KL, their scores there, and the figure of both."""

from __future__ import annotations

import math

import pytest
import torch
from drawn import HOSTILE, check_drawn_as_it_is

from rt_lens import plots
from rt_lens.arms import KLMeter, SystemPrompt, compare_arms, compare_at_kl, scaled
from rt_lens.evaluation import EvalTask
from rt_lens.steering import add
from rt_lens.tuning import WeightDelta

CALIBRATION = ["The river bends twice before the mill.", "A prime number has two divisors."]
TEXTS = ["Rice grows in flooded fields.", "The train leaves at noon from the second platform."]
BUDGETS = [0.003, 0.03]


def letters(response: str) -> float:
    """A number that tells any two responses apart."""
    return float(sum(map(ord, response)) % 997)


TASK = EvalTask(["How are you?", "What is rain?", "Name a metal."], letters, max_new_tokens=4)


@pytest.fixture
def deltas(tiny):
    def made(seed: int) -> WeightDelta:
        noise = torch.Generator().manual_seed(seed)
        names = [name for name, weight in tiny.named_parameters() if ".mlp." in name and weight.ndim == 2][:2]
        changes = {name: 0.05 * torch.randn(tiny.get_parameter(name).shape, generator=noise) for name in names}
        return WeightDelta(changes, tiny.cfg.model_name, {}, [])

    return {0: made(0), 1: made(1)}


@pytest.fixture
def arms(tiny_vectors, deltas):
    return {
        "steered, toward": add(tiny_vectors, [1], 1.0),
        "steered, away": add(tiny_vectors, [1], -1.0),
        "rep_tuned, away": deltas,
    }


@pytest.fixture
def curves(tiny, arms):
    return compare_at_kl(tiny, arms, TASK, BUDGETS, calibration=CALIBRATION, texts=TEXTS, progress=False)


def test_every_arm_stands_at_every_budget_and_the_untuned_model_once(curves):
    table = curves.table()
    found = list(table[["arm", "direction", "budget"]].itertuples(index=False, name=None))
    assert found[0][:2] == ("untuned", "none") and math.isnan(found[0][2])
    assert found[1:] == [
        (arm, way, budget)
        for arm, way in (("steered", "toward"), ("steered", "away"), ("rep_tuned", "away"))
        for budget in BUDGETS
    ]
    assert table["n"].tolist() == [3] * len(table) and curves.gaps.empty
    assert curves.strengths["kl"].tolist() == pytest.approx(curves.strengths["budget"].tolist(), rel=0.03)
    assert table.query("arm == 'rep_tuned'")["seeds"].tolist() == [[0, 1]] * 2


def test_scores_and_kl_are_those_of_the_arm_scaled_by_hand(tiny, arms, curves):
    row = curves.strengths.query("direction == 'toward' and budget == 0.03").iloc[0]
    acting = scaled(arms["steered, toward"], row["strength"])
    by_hand = compare_arms(tiny, {"untuned": None, "steered": acting}, TASK, texts=TEXTS, progress=False).summary()
    at_kl = curves.table().query("direction == 'toward' and budget == 0.03").iloc[0]
    for column in ("mean", "low", "high", "kl", "kl_low", "perplexity"):
        assert at_kl[column] == pytest.approx(by_hand.iloc[1][column], nan_ok=True), column  # NaN: all the same
    assert KLMeter(tiny, CALIBRATION)(acting).mean == pytest.approx(0.03, rel=0.03)


def test_a_budget_that_one_seed_does_not_reach_is_a_gap_of_the_arm_alone(tiny, tiny_vectors, deltas):
    arms = {"steered, away": add(tiny_vectors, [1], -1.0), "rep_tuned, away": {0: deltas[0], 1: 0.0 * deltas[1]}}
    curves = compare_at_kl(tiny, arms, TASK, BUDGETS, calibration=CALIBRATION, texts=TEXTS, progress=False)
    assert set(curves.table()["arm"]) == {"untuned", "steered"}
    assert set(curves.gaps["seed"]) == {1} and len(curves.gaps) == len(BUDGETS)
    assert curves.gaps["reason"].str.contains("up to 64 times").all() and curves.gaps["strength"].isna().all()
    figure = plots.effect_at_kl(curves.table(), curves.gaps)
    assert "Not reached: rep_tuned (away) 0.003, 0.03." in figure.layout.title.subtitle.text.replace("<br>", " ")
    assert curves.comparisons(0.03, ["untuned"])[["a", "b"]].values.tolist() == [["steered", "untuned"]]


def test_comparisons_are_of_one_budget_and_corrected_over_it_alone(curves):
    table = curves.comparisons(0.003, ["rep_tuned", "untuned"])
    assert table[["a", "a_direction", "b"]].values.tolist() == [
        ["steered", "away", "rep_tuned"],
        ["steered", "toward", "untuned"],
        ["steered", "away", "untuned"],
    ]
    assert (table["budget"] == 0.003).all() and (table["p_holm"] >= table["p"] - 1e-12).all()
    means = curves.table().set_index(["arm", "direction", "budget"])["mean"]
    expected = means["steered", "away", 0.003] - means["rep_tuned", "away", 0.003]
    assert table["difference"].iloc[0] == pytest.approx(expected)


@pytest.mark.usefixtures("as_a_user")
def test_wrong_requests_say_what_is_allowed(tiny, tiny_vectors, curves):
    some = {"steered": add(tiny_vectors, [1])}
    for arms, texts, message in (
        ({}, TEXTS, "arms must map at least one name to an intervention, got none"),
        (
            {"steered, away": some["steered"], "steered_away": some["steered"]},
            TEXTS,
            "arms must have different names and",
        ),
        ({"untuned": None}, TEXTS, "arms must not be named 'untuned'"),
        (some, [*TEXTS, CALIBRATION[0]], "texts must be other texts than those of calibration, got 'The river"),
        ({"own": [("blocks.1.hook_resid_post", lambda h, hook: h)]}, TEXTS, "intervention must consist of edits"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_at_kl(tiny, arms, TASK, calibration=CALIBRATION, texts=texts, progress=False)
    with pytest.raises(ValueError, match="kl must be at least one budget, got none"):
        compare_at_kl(tiny, some, TASK, [], calibration=CALIBRATION, texts=TEXTS, progress=False)
    with pytest.raises(ValueError, match=r"budget must be one of 0.003, 0.03, got 0.01"):
        curves.comparisons(0.01, ["untuned"])
    with pytest.raises(ValueError, match="against must name arms of untuned, steered, rep_tuned, got 'other'"):
        curves.comparisons(0.003, ["other"])
    with pytest.raises(ValueError, match="name and scorer must be one of"):
        curves.table("no such set")


def test_the_figure_shows_the_tables_numbers_in_a_panel_for_each_direction(curves, only_returned):
    table = curves.table()
    figure = plots.effect_at_kl(table, curves.gaps)
    drawn = {(trace.name, trace.xaxis): trace for trace in figure.data if trace.name}
    assert set(drawn) == {("untuned", "x"), ("untuned", "x2"), ("steered", "x"), ("steered", "x2"), ("rep_tuned", "x2")}
    rows = table.query("arm == 'rep_tuned'")
    assert list(drawn["rep_tuned", "x2"].x) == rows["kl"].tolist()
    assert list(drawn["rep_tuned", "x2"].y) == rows["mean"].tolist()
    assert list(drawn["untuned", "x"].y) == [table["mean"][0]] * 2
    assert [trace.name for trace in figure.data if trace.showlegend] == ["untuned", "steered", "rep_tuned"]
    assert figure.layout.xaxis.type == "log" and list(figure.layout.xaxis.ticktext) == ["0.003", "0.03"]


def test_the_same_figure_stands_on_the_kl_of_the_behaviours_own_prompts(curves):
    table = curves.table()
    rows = table.query("arm == 'rep_tuned'")
    by_seed = curves.strengths.query("arm == 'rep_tuned'").groupby("budget")["own_kl"]
    assert rows["own_kl"].tolist() == pytest.approx(by_seed.mean().tolist()) and (by_seed.nunique() == 2).all()
    assert math.isnan(table["own_kl"][0])  # the untuned model's own, which is no arm's
    figure = plots.effect_at_kl(table, on="own")
    (drawn,) = (trace for trace in figure.data if trace.name == "rep_tuned")
    assert list(drawn.x) == rows["own_kl"].tolist() != rows["kl"].tolist()
    assert [note.text for note in figure.layout.annotations if "own prompts" in note.text]
    with pytest.raises(ValueError, match="own_kl"):
        plots.effect_at_kl(table.drop(columns="own_kl"), on="own")


def test_a_marked_budget_has_a_line_and_large_markers_where_an_arm_reached_it(curves):
    figure = plots.effect_at_kl(curves.table(), curves.gaps, budget=0.03)
    assert [(shape.x0, shape.x1) for shape in figure.layout.shapes] == [(0.03, 0.03)] * 2
    plain = plots.effect_at_kl(curves.table(), curves.gaps)
    assert not plain.layout.shapes and plain.layout.xaxis.range == figure.layout.xaxis.range
    arms = [trace for trace in figure.data if trace.name and trace.name != "untuned"]
    large = sorted(x for trace in arms for x, size in zip(trace.x, trace.marker.size, strict=True) if size == 15)
    assert large == sorted(curves.table().query("budget == 0.03")["kl"])
    assert {size for trace in plain.data if trace.marker.size is not None for size in trace.marker.size} == {10}


def test_the_figure_draws_names_as_they_are_and_refuses_what_it_cannot_draw(curves):
    table = curves.table().replace({"arm": {"steered": HOSTILE}})
    check_drawn_as_it_is(plots.effect_at_kl(table, table.tail(1).assign(arm=HOSTILE)), least=3)
    for wrong in (table.tail(2), table.head(1)):
        with pytest.raises(ValueError, match="table must have one row without budget and direction"):
            plots.effect_at_kl(wrong)


def test_a_budget_of_many_digits_is_found_again_and_one_given_twice_is_measured_once(tiny, tiny_vectors):
    budget, hooks = 0.01234567891, tuple(add(tiny_vectors, [0, 1]))  # a tuple of hooks is one intervention
    curves = compare_at_kl(
        tiny, {"steered": hooks}, TASK, [budget, budget], calibration=CALIBRATION, texts=TEXTS, progress=False
    )
    assert curves.table()["budget"].tolist()[1:] == [budget] == curves.strengths["budget"].tolist()
    assert len(curves.comparisons(budget, ["untuned"])) == 1
    assert (curves.strengths["kl_low"] <= curves.strengths["kl"]).all()


def test_arms_without_a_strength_stand_at_any_budget_as_they_are(tiny):
    """There is no budget to miss: a run of prompts alone has its table all the same."""
    arms = {"prompted, away": SystemPrompt("Be brief."), "prompted, toward": SystemPrompt("Be long.")}
    curves = compare_at_kl(tiny, arms, TASK, [0.01], calibration=CALIBRATION, texts=TEXTS, progress=False)
    scores = curves.at(0.01)
    assert scores.scores["arm"].tolist() == curves.scores.scores["arm"].tolist()
    assert set(scores.scores["arm"]) == {"untuned", "prompted"} and curves.comparisons(0.01, ["untuned"]).empty


def test_scores_that_are_all_alike_have_a_range_on_the_axis(curves):
    """Without an interval anywhere, the axis still has numbers for its ends, with the one score between them."""
    table = curves.table().assign(mean=0.5, low=math.nan, high=math.nan)
    low, high = plots.effect_at_kl(table).layout.yaxis.range
    assert low < 0.5 < high
    wide = curves.table().assign(mean=0.5, low=math.nan, high=math.nan)
    wide.loc[0, ["low", "high"]] = 0.3, 0.9
    low, high = plots.effect_at_kl(wide).layout.yaxis.range
    assert low < 0.3 and high > 0.9
