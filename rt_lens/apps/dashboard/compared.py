"""What arms scored, cost and answered, as parts of a page: of a finished run and of arms compared live, in one way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dash import html
from dash.development.base_component import Component

from rt_lens import plots
from rt_lens.apps.dashboard.panel import graph, table
from rt_lens.apps.report.labels import Row, arm, grouped, harm_of, of_first_scorer, sample
from rt_lens.common.formatting import number, p_value
from rt_lens.plots.style import row_estimate, with_minus_sign
from rt_lens.results.tables import efficient

# Who looks often enough finds something, and who chose on these topics finds it sooner.
_CAUTION = (
    "Layer, multiplier and when tuning stopped may have been chosen on these same validation topics, which flatters "
    "the arms; a run’s test says more."
)
_LONGEST = 80  # letters of a prompt in a drop-down
_ROWS = {"gridAutoFlow": "row", "gridTemplateColumns": "repeat(auto-fill, minmax(240px, 1fr))"}


def of_set(content: Mapping[str, Any], name: str) -> list[Component]:
    """What a run found on one set, by its first scorer: the arms, their comparisons, and effect against side effect."""
    rows = of_first_scorer(content["summary"])[name]
    compared = [row for row in content["comparisons"] if row["set"] == name]
    title = f"{content['behaviour']}, {name}: score of every arm"
    told = differences(compared, len(content["comparisons"])) if compared else html.P("Nothing was compared here.")
    figure = arms_figure(rows, compared, title, "compare-run-scores")
    return [figure, told, effect_against_cost(rows, name, "compare-run-pareto")]


def prompts_of(responses: Sequence[Row], name: str, words: str) -> dict[str, str]:
    """Prompts of a set, whose question or some answer holds the words, and how a drop-down shows them."""
    wanted = words.strip().casefold()
    found = dict.fromkeys(
        row["prompt"]
        for row in responses
        if row["set"] == name and wanted in f"{row['prompt']}\n{row['response']}".casefold()
    )
    return {prompt: prompt if len(prompt) <= _LONGEST else f"{prompt[: _LONGEST - 1]}…" for prompt in found}


def answers_to(responses: Sequence[Row], name: str, prompt: str | None) -> Component | None:
    """Each arm's answer to a prompt with its score; of an arm with several seeds the first seed's."""
    asked = [row for row in responses if row["set"] == name and row["prompt"] == prompt]
    if not asked:
        return None
    columns = [
        html.Article(
            [
                html.H4(arm(own[0]), style={"margin": "0 0 .3rem"}),
                html.P(own[0]["response"], className="answer"),
                html.P(f"score {with_minus_sign(number(own[0]['score']))}, seed {own[0]['seed']}", className="note"),
            ]
        )
        for own in grouped(asked, "arm", "direction").values()
    ]
    return html.Div([html.P(html.Q(prompt)), html.Div(columns, className="answers", style=_ROWS)])


def arms_figure(rows: Sequence[Row], compared: Sequence[Row], title: str, name: str) -> Component:
    """Scores of one set and scorer, with brackets; `name` is the figure's id."""
    drawn = plots.arms(rows, comparisons=compared, title=title)
    return graph(drawn, name)


def differences(rows: Sequence[Row], n_compared: int, *, live: bool = False) -> Component:
    """Comparisons, with p as it is and as Holm corrected it for all of them; `live` says what that leaves out."""
    told = [
        {
            "a": arm(row, "a"), "b": arm(row, "b"), "scorer": row["scorer"],
            "a minus b [95 %]": with_minus_sign(row_estimate(row, "difference")),
            "p": _p(row["p"]), "p, Holm": _p(row["p_holm"]),
            "n": row["n"], "seeds": row["seeds"],
        }
        for row in rows
    ]  # fmt: skip
    corrected = f"Differences, prompt by prompt. Holm’s p is corrected for all {n_compared} comparisons"
    return table(told, f"{corrected} of this press of the button, no others. {_CAUTION}" if live else f"{corrected}.")


def costs(rows: Sequence[Row], n_written: int | None) -> Component:
    """Perplexity and the like of each arm, as far as they were measured; repetition on so many answers."""
    heads = {"perplexity": "perplexity", "kl": "KL (nats per token)", "facts": "facts kept", "repetition": "repetition"}
    shown = {key: head for key, head in heads.items() if any(row[key] is not None for row in rows)}
    if not shown:
        return html.P("No side effect was measured.")
    told = [
        {
            "arm": arm(own[0]),
            **{f"{head} [95 %]": row_estimate(own[0], key) for key, head in shown.items()},
            "seeds": own[0]["seeds"],
        }
        for own in grouped(rows, "arm", "direction").values()
    ]
    measured = {"n_texts": "perplexity and KL on {} neutral texts", "n_facts": "facts kept of {}"}
    ns = [words.format(rows[0][key]) for key, words in measured.items() if rows[0][key] is not None]
    ns += [f"repetition in {n_written} answers"] if "repetition" in shown and n_written else []
    return table(told, f"What each arm costs{': ' if ns else ''}{', '.join(ns)}.")


def other_sets(rows: Sequence[Row]) -> list[Component]:
    """Scores on sets and by scorers that the behaviour should leave alone."""
    if not rows:
        return []
    tables = []
    for (name, scorer), own in grouped(rows, "set", "scorer").items():
        told = [
            {"arm": arm(row), "score [95 %]": with_minus_sign(row_estimate(row)), "n and seeds": sample(row)}
            for row in own
        ]
        tables.append(table(told, f"{name}, {scorer}"))
    return [html.Details([html.Summary("Other sets and scorers"), *tables])]


def effect_against_cost(rows: Sequence[Row], about: str, name: str) -> Component:
    """Scores over KL, or perplexity where KL was not measured; `name` is the figure's id."""
    harm = harm_of(rows)
    if harm is None:
        return html.P("No side effect to set the scores against was measured.")
    title = f"{about}: effect against side effect"
    return graph(plots.pareto(efficient(rows, harm=harm), against=harm, title=title), name)


def answers_table(answers: Sequence[Row], seed: int) -> Component:
    """A row per prompt, a column per arm, each answer with its score."""
    labels = list(dict.fromkeys(arm(row) for row in answers))
    told = [
        {"prompt": prompt, **dict.fromkeys(labels, "–"),
         **{arm(row): f"{row['response']} ({with_minus_sign(number(row['score'], 2))})" for row in own}}
        for (prompt,), own in grouped(answers, "prompt").items()
    ]  # fmt: skip
    return table(told, f"Answers and their scores: {len(told)} prompts, bootstrap seed {seed}.")


def _p(value: float | None) -> str:
    return p_value(value).removeprefix("= ")
