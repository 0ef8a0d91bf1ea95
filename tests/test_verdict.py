"""The first screen of a report at equal damage: the picture, the sentences, one prompt answered by every arm."""

from __future__ import annotations

from typing import Any

import pytest
from small_runs import make_at_kl, make_board, make_content, write_run

from rt_lens.apps.report.page import write_report
from rt_lens.apps.report.verdict import opening, picture, searched, spoken, sureness, verdict
from rt_lens.results.schema import checked, load_results

LABELS = [(("rep_tuned", way), ("untuned", "none")) for way in ("toward", "away")]


def made(shift: float, **changes: Any) -> dict[str, Any]:
    board = make_board(0, shift=shift)
    comparisons = board.comparisons(LABELS, [("test", "vader")]).to_dict("records")
    return checked(make_content(board, at_kl=make_at_kl(board, **changes), comparisons=comparisons))


def test_the_arm_that_moved_most_is_named_with_its_interval_and_what_it_cost():
    results = made(0.6)
    rows = {(row["arm"], row["direction"]): row for row in results["summary"] if row["scorer"] == "vader"}
    toward, cost, away, steered = verdict(results)
    best, untuned = rows["rep_tuned", "toward"], rows["untuned", "none"]
    assert toward.startswith(
        "Toward, at a KL of 0.01 nats per token: representation tuning moves the score most, from "
    )
    for row in (best, untuned):
        assert f"{row['mean']:.3f}".replace("-", "−") in toward or f"{row['mean']:.2f}".replace("-", "−") in toward
    assert "n = 24, seeds 0, 1, 2" in toward and " further than untuned (Holm-adjusted p" in toward
    assert cost.startswith("What else representation tuning (toward) changes there: repetition")
    assert "KL 0.020 on the behaviour's own prompts" in cost
    assert away == (
        "Away, at a KL of 0.01 nats per token: no arm moves the score that way; untuned "
        + toward.split("from ")[1].split(" (untuned)")[0]
        + " (n = 24, seed 0)."
    )
    assert steered.startswith("Steering (away) scores ") and "its own damage" in steered


def test_a_difference_that_is_not_shown_is_said_to_be_so():
    (toward, *_), sure = verdict(made(0.02)), sureness(made(0.02))
    assert "not shown to hold after that correction" in toward or "no arm moves the score that way" in toward
    assert sure.startswith("How sure: 0 of the 2 comparisons that were stated before the run hold after Holm")


def test_an_arm_that_does_not_reach_the_stated_kl_is_named_with_the_reason():
    results = made(0.6)
    assert not [sentence for sentence in verdict(results) if "does not reach" in sentence]  # 0.03 is not the stated one
    results = made(0.6, stated=0.03)
    missed = [sentence for sentence in verdict(results) if "does not reach that KL" in sentence]
    assert missed == [f"rep_tuned ({way}) does not reach that KL: KL is at most 0.02." for way in ("toward", "away")]


def test_the_page_opens_with_the_picture_and_the_sentences_and_folds_the_rest(tmp_path):
    board = make_board(0, shift=0.6)
    page = write_report(write_run(tmp_path / "run", board, at_kl=make_at_kl(board))).read_text(encoding="utf-8")
    order = [page.index(text) for text in (
        "Which arm moves the behaviour most?</h2>", "What was found</h2>", "Results</h2>",
        "How certain are these results?</h2>", "Scores by arm</h2>",
    )]  # fmt: skip
    assert order == sorted(order)
    assert "<b>rep_tuned</b>: Tuned along the vector" in page
    assert "Question 0, test?" in page[order[1] : order[2]]  # one prompt, answered by every arm


@pytest.mark.parametrize("missing", ["stated", "table", "strengths"])
def test_a_damaged_table_is_refused_by_name(missing):
    board = make_board(0)
    at_kl = {key: value for key, value in make_at_kl(board).items() if key != missing}
    with pytest.raises(ValueError, match=f"results.json: at_kl must have the key {missing}"):
        checked(make_content(board, at_kl=at_kl))


def test_a_run_without_it_has_no_such_screen_and_its_sentences_are_the_older_ones(tmp_path):
    content = load_results(write_run(tmp_path / "run", make_board(0))).content
    assert content["at_kl"] is None and opening(content, []) == []
    assert spoken(content)[0].startswith("The untuned tiny scores")
    assert spoken(made(0.6))[-1].startswith("How sure:")


def test_where_arms_miss_the_kl_only_those_that_reach_it_are_said_not_to_move_the_score():
    """With the shift down, nothing moves it up: the claim is about the arms that were measured."""
    board = make_board(0, shift=-0.6)
    at_kl = make_at_kl(board)
    missed = [
        {**row, "arm": "random", "budget": 0.01, "reason": "KL is at most 0.001."}
        for row in at_kl["strengths"]
        if (row["arm"], row["direction"], row["seed"], row["budget"]) == ("rep_tuned", "toward", 0, 0.03)
    ]
    comparisons = board.comparisons(LABELS, [("test", "vader")]).to_dict("records")
    results = checked(make_content(board, at_kl=at_kl, comparisons=comparisons))
    assert "per token: no arm moves the score that way" in verdict(results)[0]
    assert "arms that miss" not in sureness(results)
    at_kl["strengths"] += missed
    results = checked(make_content(board, at_kl=at_kl, comparisons=comparisons))
    assert "per token: none of the arms that reach it (rep_tuned) moves the score that way" in verdict(results)[0]
    assert "random (toward) does not reach that KL: KL is at most 0.001." in verdict(results)
    held = "(toward: rep_tuned against untuned; away: rep_tuned against untuned)"
    assert f"correction {held}; arms that miss the KL are in none of them. " in sureness(results)


@pytest.mark.parametrize(("n", "seeds", "said"), [(6, (0,), True), (7, (0,), False), (6, (0, 1, 2), False)])
def test_too_few_prompts_to_show_anything_are_said(n, seeds, said):
    """The smallest p of a sign-flip test over n prompts is 2 in 2^n: with two comparisons 0.06 at 6, and 0.03 at 7."""
    board = make_board(0, prompts=tuple(range(n)), seeds=seeds)
    comparisons = board.comparisons(LABELS, [("test", "vader")]).to_dict("records")
    results = checked(make_content(board, at_kl=make_at_kl(board), comparisons=comparisons))
    assert (f"With so few prompts (n = {n}) none of them could." in sureness(results)) == said


def test_a_score_without_an_interval_has_a_dash_in_its_brackets():
    results = made(0.6)
    assert "[–]" not in sureness(results)
    for row in results["summary"]:
        row |= {"mean": 0.0, "low": None, "high": None}
    assert "untuned 0.00 [–] (n = 24" in verdict(results)[0]
    assert sureness(results).endswith("Brackets are 95 % confidence intervals; [–] where all values are the same.")
    assert "[-]" in spoken(results)[0] and "–" not in "".join(spoken(results))


def test_a_run_without_an_arm_that_has_a_strength_does_not_speak_of_budgets():
    board = make_board(0)
    at_kl = make_at_kl(board)
    alone = [{**row, "budget": None, "reason": ""} for row in at_kl["strengths"] if row["budget"] != 0.03]
    table = [{**row, "budget": None} for row in at_kl["table"]]
    results = checked(make_content(board, at_kl={**at_kl, "strengths": alone, "table": table}))
    assert "No arm has a strength to set; each stands at its own KL." in opening(results, [])[0].html
    gaps = [{**row, "reason": "KL is at most 0.001."} for row in at_kl["strengths"]]
    results = checked(make_content(board, at_kl={**at_kl, "strengths": gaps, "table": table}))
    assert "No arm reached a budget." in opening(results, [])[0].html


def test_more_arms_than_curves_can_show_are_drawn_as_rows_with_the_curves_folded_below():
    few = made(0.6)
    many = {**few, "at_kl": {**few["at_kl"], "arms": {f"arm_{n}": "One." for n in range(9)}}}
    titles = [[part.name for part in opening(results, [])] for results in (few, many)]
    assert titles[1] == [*titles[0], "Effect against KL, as curves"]
    curves, rows = picture(few), picture(many)
    assert curves.layout.xaxis.type == "log" and rows.layout.xaxis.type is None
    assert set(rows.layout.yaxis2.categoryarray) == {"steered", "rep_tuned"}
    assert picture(many, 0.03).layout.xaxis.type == "log"  # nothing stands at that budget


def test_arms_with_settings_of_their_own_are_named():
    """They may come from a search of before, as those of mood do."""
    results = made(0.6)
    assert sorted(results["at_kl"]["arms"]) == ["rep_tuned", "steered"]
    assert searched(results) == "Settings: those of the experiment; no search in this run."
    own = {"settings": {"steered": {"layer": 20}, "rep_tuned": {}, "elsewhere": {"layer": 3}}}
    results["reproducibility"] = {"file": "mood.toml", "settings": own}
    expected = (
        "Settings: those of mood.toml, where rep_tuned and steered have [settings] of their own; no search in this run."
    )
    assert searched(results) == expected
