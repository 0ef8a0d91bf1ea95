"""A run at equal damage on the page Compare, without a browser: at each budget it shows what results.json holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pages import cells, figures, parts
from small_runs import make_at_kl, make_board, write_run

from rt_lens.apps.dashboard import compare
from rt_lens.apps.dashboard.app import make_app
from rt_lens.apps.dashboard.equal_damage import at_budget, budget_at, budgets_of, responses_at
from rt_lens.apps.dashboard.session import Session
from rt_lens.apps.report.labels import brief, estimate
from rt_lens.apps.report.verdict import verdict
from rt_lens.arms.comparison import ArmScores
from rt_lens.results.schema import Results, load_results

SLIDER = "compare-budget"
HEAD = (
    "arm", "direction", "strength", "score [95 %]", "n", "seeds", "KL, held-out texts [95 %]", "KL, own prompts [95 %]",
    "perplexity [95 %]", "repetition [95 %]", "facts correct [95 %]",
)  # fmt: skip


def two_budgets(board: ArmScores) -> dict[str, Any]:
    """The arms of `make_at_kl` at KL 0.01, and rep_tuned at 0.03 too; away it does not reach 0.03 with one seed."""
    at_kl = make_at_kl(board)
    own = {"own_kl": 0.07, "own_kl_low": 0.06, "own_kl_high": 0.08}
    for row in at_kl["strengths"]:
        if row["budget"] == 0.03 and (row["direction"], row["seed"]) != ("away", 1):
            row.update(strength=2.5 + row["seed"] / 10, kl=0.03, reason="", **own)
    further = [
        {**row, "budget": 0.03, "mean": row["mean"] + 0.1, "kl": 0.029, "kl_low": 0.028, "kl_high": 0.031}
        for row in at_kl["table"]
        if (row["arm"], row["direction"]) == ("rep_tuned", "toward") and row["set"] != "facts"
    ]
    return {**at_kl, "table": [*at_kl["table"], *further]}


def run_of(folder: Path, board: ArmScores, **changes: Any) -> Results:
    return load_results(write_run(folder / "run", board, **changes))


@pytest.fixture
def run(tmp_path: Path) -> Results:
    board = make_board(0, shift=0.6)
    return run_of(tmp_path, board, at_kl=two_budgets(board))


def said(content: Any) -> str:
    held = [getattr(part, "children", part) for part in parts(content)]
    each = [child for children in held for child in (children if isinstance(children, list) else [children])]
    return " ".join(child for child in each if isinstance(child, str))


def by_id(shown: Any) -> dict[str, Any]:
    return {part.id: part for part in parts(shown) if getattr(part, "id", None)}


def rows_at(run: Results, budget: float) -> dict[tuple[str, str], dict[str, str]]:
    """Arm and direction -> heading -> cell, as the page shows them at a budget."""
    head, *rows = cells(at_budget(run.content, budget, "figure"))
    assert tuple(head) == HEAD
    return {(row[0], row[1]): dict(zip(head, row, strict=True)) for row in rows}


@pytest.mark.parametrize("budget", [0.01, 0.03])
def test_the_table_at_a_budget_has_the_numbers_of_results_json(run, budget):
    table, shown = run.content["at_kl"]["table"], rows_at(run, budget)
    wanted = {
        (row["arm"], row["direction"], row["set"], row["scorer"]): row
        for row in table
        if row["budget"] in (None, budget)
    }
    scored = [row for key, row in wanted.items() if key[2:] == ("test", "vader")]
    assert len(scored) == (4 if budget == 0.01 else 3)
    for row in scored:
        cell = shown[row["arm"], row["direction"]]
        assert cell["score [95 %]"] == estimate(row) and cell["n"] == "24"
        assert cell["seeds"] == ", ".join(map(str, row["seeds"]))
        assert cell["KL, held-out texts [95 %]"] == estimate(row, "kl", 4)
        assert cell["perplexity [95 %]"] == brief(row, "perplexity")
        side_effects = {"repetition": ("test", "repetition"), "facts correct": ("facts", "contains_answer")}
        for name, kind in side_effects.items():
            measured = wanted.get((row["arm"], row["direction"], *kind))
            assert cell[f"{name} [95 %]"] == (brief(measured) if measured else "–")
    tuned = shown["rep_tuned", "toward"]
    assert tuned["strength"] == {0.01: "1.20 (seeds 1.20 to 1.20)", 0.03: "2.60 (seeds 2.50 to 2.70)"}[budget]
    assert tuned["KL, own prompts [95 %]"].startswith({0.01: "0.020", 0.03: "0.070"}[budget])
    assert shown["steered", "away"]["strength"] == "–"  # it has none, and is the same at both
    assert shown["steered", "away"]["KL, own prompts [95 %]"] == "0.020 [0.018, 0.022]"


def test_an_arm_that_one_seed_keeps_from_a_budget_has_the_reason_and_no_number(run):
    missed = rows_at(run, 0.03)["rep_tuned", "away"]
    assert missed["score [95 %]"] == "not reached: KL is at most 0.02."
    assert {missed[head] for head in HEAD if head not in ("arm", "direction", "score [95 %]")} == {"–"}
    assert "not reached" not in " ".join(rows_at(run, 0.01)["rep_tuned", "away"].values())


def test_the_picture_is_the_reports_with_a_line_at_the_budget(run):
    for budget in budgets_of(run.content):
        figure = figures(at_budget(run.content, budget, "figure"))["figure"]
        assert {shape.x0 for shape in figure.layout.shapes} == {shape.x1 for shape in figure.layout.shapes} == {budget}
        large = {
            (trace.name, y)
            for trace in figure.data
            if trace.name and trace.marker.size is not None
            for y, size in zip(trace.y, trace.marker.size, strict=True)
            if size > 10
        }
        first = [row for row in run.content["at_kl"]["table"] if (row["set"], row["scorer"]) == ("test", "vader")]
        assert large == {(row["arm"], row["mean"]) for row in first if row["budget"] == budget}
        assert list(figure.layout.xaxis.ticktext) == ["0.01", "0.03"]
    assert "Not reached: rep_tuned (away) 0.03." in said(at_budget(run.content, 0.01, "figure"))


def test_the_page_begins_at_the_stated_budget_with_the_verdict_of_the_report(run):
    shown = compare.layout(Session(None, {}, run))
    control = by_id(shown)[SLIDER]
    assert (control.marks, control.value, control.step) == ({0: "0.01 (stated)", 1: "0.03"}, 0, 1)
    assert [budget_at(run.content, index) for index in (None, 0, 1)] == [0.01, 0.01, 0.03]
    assert "Every arm at KL 0.01" in said(by_id(shown)["compare-at-budget"])
    told = said(shown)
    assert all(sentence in told for sentence in verdict(run.content))
    assert "compare-run-scores" in figures(shown)  # what older runs have stands below
    names = Counter(part.id for part in parts(shown) if getattr(part, "id", None))
    assert max(names.values()) == 1


def test_responses_are_those_of_the_budget_or_the_page_says_that_none_were_kept(run):
    rows, prompt = run.responses(), "Question 0, test?"
    stated = said(responses_at(run.content, rows, "test", prompt, 0.01))
    assert "rep_tuned, toward" in stated and "rep_tuned, away" in stated and "kept no" not in stated
    other = said(responses_at(run.content, rows, "test", prompt, 0.03))
    assert "kept no responses at 0.03. Set the budget to 0.01 to read those of rep_tuned." in other
    assert "untuned" in other and "steered, away" in other and "rep_tuned, toward" not in other


def test_responses_that_a_run_kept_at_other_budgets_are_shown_there_and_only_there(run):
    rows, prompt = run.responses(), "Question 0, test?"
    weaker = [{**row, "response": "At 0.03.", "budget": 0.03} for row in rows if row["arm"] == "rep_tuned"]
    other = said(responses_at(run.content, [*rows, *weaker], "test", prompt, 0.03))
    assert other.count("At 0.03.") == 2 and "kept no" not in other and "steered, away" in other
    assert "At 0.03." not in said(responses_at(run.content, [*rows, *weaker], "test", prompt, 0.01))


def test_an_arm_without_responses_at_the_stated_budget_has_its_reason_beside_them(tmp_path):
    board = make_board(0)
    run = run_of(tmp_path, board, at_kl=make_at_kl(board, stated=0.03))
    told = said(responses_at(run.content, run.responses(), "test", "Question 0, test?", 0.03))
    assert "rep_tuned (toward) does not reach that KL: KL is at most 0.02." in told


def inputs_of(run: Results) -> set[str]:
    return {each["id"] for made in make_app(Session(None, {}, run)).callback_map.values() for each in made["inputs"]}


def test_a_run_with_one_budget_has_no_slider_and_no_callback_that_needs_it(tmp_path):
    board = make_board(0)
    at_kl = make_at_kl(board, kl=[0.01])
    at_kl["strengths"] = [row for row in at_kl["strengths"] if not row["reason"]]
    run = run_of(tmp_path, board, at_kl=at_kl)
    shown = compare.layout(Session(None, {}, run))
    assert SLIDER not in by_id(shown) and SLIDER not in inputs_of(run)
    assert "The one budget of this run: a KL of 0.01 nats per token, stated before the run." in said(shown)
    assert "rep_tuned, away" in said(by_id(shown)["compare-answered"])


def test_a_run_before_equal_damage_keeps_the_page_it_had(tmp_path):
    run = run_of(tmp_path, make_board(0))
    shown = compare.layout(Session(None, {}, run))
    assert {"compare-at-budget", SLIDER}.isdisjoint(by_id(shown)) and SLIDER not in inputs_of(run)
    assert "rep_tuned, away" in said(by_id(shown)["compare-answered"])


@pytest.mark.parametrize("kept", ["toward", "untuned", "nothing reached"])
def test_a_run_without_some_arm_opens_at_every_budget(tmp_path, kept):
    board = make_board(0)
    at_kl = two_budgets(board)
    if kept == "toward":
        for key in ("table", "strengths"):
            at_kl[key] = [row for row in at_kl[key] if row["direction"] in ("toward", "none")]
    else:
        at_kl["table"] = [row for row in at_kl["table"] if row["arm"] == "untuned"]
        reason = {"strength": None, "reason": "It was not made.", "own_kl": None}
        gaps = [{**row, **reason} for row in at_kl["strengths"] if row["arm"] == "rep_tuned"]
        at_kl["strengths"] = gaps if kept == "nothing reached" else []
    run = run_of(tmp_path, board, at_kl=at_kl)
    assert SLIDER in by_id(compare.layout(Session(None, {}, run)))
    for budget in budgets_of(run.content):
        shown = at_budget(run.content, budget, "figure")
        assert bool(figures(shown)) is (kept == "toward") and cells(shown)[1][:2] == ["untuned", "none"]
        assert ("It was not made." in said(shown)) is (kept == "nothing reached")
        assert responses_at(run.content, run.responses(), "test", "Question 0, test?", budget)


def test_a_run_whose_responses_are_gone_has_no_callback_that_needs_them(run):
    (run.folder / "responses.jsonl").unlink()
    assert {"compare-prompt", "compare-search"}.isdisjoint(inputs_of(run)) and SLIDER in inputs_of(run)
    assert "responses.jsonl" in said(compare.layout(Session(None, {}, run)))
