"""A run at equal damage as parts of a page: effect against KL, and every arm at one of the budgets that it measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dash import html
from dash.development.base_component import Component

from rt_lens.apps.dashboard.compared import responses_to
from rt_lens.apps.dashboard.panel import captioned, field, slider, table
from rt_lens.apps.report.labels import Row, brief, estimate, grouped, joined, number
from rt_lens.apps.report.verdict import first_rows, gap_sentences, no_picture, picture, without_strength

_UNTUNED = ("untuned", "none")


def budgets_of(content: Mapping[str, Any]) -> list[float]:
    """The budgets of a run, from small to large; none for an older run, which compared no arms at equal damage."""
    return sorted(set((content["at_kl"] or {"kl": []})["kl"]))


def budget_at(content: Mapping[str, Any], index: float | None = None) -> float:
    """The budget at a place of the slider; without one the stated budget, at which the slider begins."""
    return float(content["at_kl"]["stated"]) if index is None else budgets_of(content)[int(index)]


def budget_slider(content: Mapping[str, Any], name: str) -> list[Component]:
    """A slider over the budgets, which has the id `name`; none for a single budget, as there is no choice."""
    budgets, stated = budgets_of(content), content["at_kl"]["stated"]
    if len(budgets) == 1:
        return []
    marks = {index: f"{kl:g}{' (stated)' * (kl == stated)}" for index, kl in enumerate(budgets)}
    control = slider(name, 0, len(budgets) - 1, 1, budgets.index(budget_at(content)), marks)
    note = "KL from the untuned model, in nats per token; moves all arms at once"
    return [html.Div(field("Budget", control, note), className="budget")]


def at_budget(content: Mapping[str, Any], budget: float, name: str) -> list[Component]:
    """The picture with the budget marked, and below it the table of all arms there; `name` is the figure's id."""
    at_kl, figure = content["at_kl"], picture(content, budget)
    stated, which = at_kl["stated"], "Budget" if len(budgets_of(content)) > 1 else "The one budget of this run"
    about = ", stated before the run" if budget == stated else f"; {stated:g} was stated before the run"
    return [
        html.P(f"{which}: a KL of {budget:g} nats per token{about}.", className="note", role="status"),
        captioned(figure, name) if figure else html.P(no_picture(at_kl)),
        html.Div(table(arms_at(at_kl, budget), f"Every arm at KL {budget:g}"), className="wide"),
        html.P(_reading(at_kl), className="note"),
    ]


def arms_at(at_kl: Mapping[str, Any], budget: float) -> list[dict[str, Any]]:
    """A row for each arm at a budget: strength, score, KL and side effects. An arm that missed it has its reason."""
    first = first_rows(at_kl["table"])[0]
    rows = [row for row in at_kl["table"] if row["budget"] in (None, budget)]
    scored = {_label(row): row for row in rows if _kind(row) == _kind(first)}
    strengths = grouped((row for row in at_kl["strengths"] if row["budget"] in (None, budget)), "arm", "direction")
    side_effects = _side_effects(rows, first["set"])
    cells = []
    for label in dict.fromkeys([_UNTUNED, *strengths]):
        of_seeds, row = strengths.get(label, []), scored.get(label)
        measured = {**_measured(row, of_seeds), **side_effects[label]} if row else {"score [95 %]": _gap(of_seeds)}
        cells.append({"arm": label[0], "direction": label[1], **measured})
    return cells


def responses_at(
    content: Mapping[str, Any], responses: Sequence[Row], name: str, prompt: str | None, budget: float
) -> list[Component]:
    """Each arm's response to a prompt at a budget, as far as the run kept it, and a sentence on what it did not keep.

    Rows of other budgets than the stated one have a key `budget`; older runs kept none. Those of the untuned model, and
    of arms without a strength, are the same at every budget.
    """
    at_kl, notes = content["at_kl"], gap_sentences(content["at_kl"], budget)
    stated = [row for row in responses if "budget" not in row]
    if budget == at_kl["stated"]:
        return _answers(notes, stated, name, prompt)
    same = {_UNTUNED[0], *without_strength(at_kl)}
    here = [row for row in responses if row.get("budget") == budget]
    lost = [] if here else list(dict.fromkeys(row["arm"] for row in stated if row["arm"] not in same))
    if lost:
        notes = [
            f"The run kept no responses at {budget:g}. Set the budget to {at_kl['stated']:g} to read those of "
            f"{joined(lost)}. Those below do not depend on the budget."
        ]
    return _answers(notes, [*(row for row in stated if row["arm"] in same), *here], name, prompt)


def _answers(notes: Sequence[str], responses: Sequence[Row], name: str, prompt: str | None) -> list[Component]:
    answered = responses_to(responses, name, prompt)
    return [*(html.P(note, className="note") for note in notes), *([] if answered is None else [answered])]


def _label(row: Row) -> tuple[str, str]:
    return row["arm"], row["direction"]


def _kind(row: Row) -> tuple[str, str]:
    return row["set"], row["scorer"]


def _measured(row: Row, of_seeds: Sequence[Row]) -> dict[str, Any]:
    """The cells of an arm that reached the budget: of its row, pooled over seeds, and of the strength of each seed."""
    return {
        "strength": _over_seeds(of_seeds, "strength", 2), "score [95 %]": estimate(row),
        "n": str(row["n"]), "seeds": row["seeds"],  # a missing number would make floats of a column of integers
        "KL, held-out texts [95 %]": estimate(row, "kl", 4), "KL, own prompts [95 %]": _over_seeds(of_seeds, "own_kl"),
    }  # fmt: skip


def _gap(of_seeds: Sequence[Row]) -> str:
    return f"not reached: {' '.join(dict.fromkeys(row['reason'] for row in of_seeds if row['reason']))}"


def _side_effects(rows: Sequence[Row], name: str) -> dict[tuple[str, str], dict[str, str]]:
    """Arm and direction -> what was measured of it: repetition on the set `name`, or where responses are written."""
    writing = [row["set"] for row in rows if row["scorer"] == "repetition"]
    heads = {
        ("facts", "contains_answer"): "facts correct [95 %]",
        (name if name in writing else next(iter(writing), ""), "repetition"): "repetition [95 %]",
    }
    measured: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        of_arm = measured.setdefault(_label(row), {})
        if row.get("perplexity") is not None:
            of_arm["perplexity [95 %]"] = brief(row, "perplexity")
        if _kind(row) in heads:
            of_arm[heads[_kind(row)]] = brief(row)
    return measured


def _over_seeds(rows: Sequence[Row], key: str, digits: int = 3) -> str:
    """A number with its interval; of several seeds their mean and range."""
    measured = [row for row in rows if row[key] is not None]
    values = [row[key] for row in measured]
    if len(values) < 2:
        return estimate(measured[0], key, digits) if measured else "–"
    ends = " to ".join(number(value, digits) for value in (min(values), max(values)))
    return f"{number(sum(values) / len(values), digits)} (seeds {ends})"


def _reading(at_kl: Mapping[str, Any]) -> str:
    """What the columns of the table are."""
    first, alone = first_rows(at_kl["table"])[0], without_strength(at_kl)
    n_own = next((row["n_own"] for row in at_kl["strengths"] if row.get("n_own")), None)
    own = f", and on the untuned responses to {n_own} prompts of the behaviour" if n_own else ""
    rest = f" No strength can be set of {joined(sorted(alone))}, which stays at its own KL." if alone else ""
    return (
        f"Score: {first['scorer']} ({first['set']}). KL: on {first['n_texts']} texts that set no strength{own}.{rest}"
    )
