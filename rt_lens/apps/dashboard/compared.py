"""Scores, side effects and responses of arms as parts of a page, the same for a finished run and a live comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dash import html
from dash.development.base_component import Component

from rt_lens import plots
from rt_lens.apps.dashboard.panel import graph, table
from rt_lens.apps.report.labels import Row, arm, grouped, of_first_scorer, sample, side_effect_of
from rt_lens.common.formatting import number, p_value
from rt_lens.plots.style import row_estimate, with_minus_sign
from rt_lens.results.tables import efficient

# Repeated comparisons find something by chance, and sooner on topics on which settings were chosen.
_CAUTION = (
    "Layer, multiplier and the end of tuning may have been chosen on these same validation topics, which makes these "
    "numbers optimistic; the test set of a run is a better estimate."
)
_LONGEST = 80  # characters of a prompt in a drop-down
_ROWS = {"gridAutoFlow": "row", "gridTemplateColumns": "repeat(auto-fill, minmax(240px, 1fr))"}


def of_set(content: Mapping[str, Any], name: str) -> list[Component]:
    """The results of a run on one set by its first scorer: scores, comparisons, and effect against side effect."""
    rows = of_first_scorer(content["summary"])[name]
    compared = [row for row in content["comparisons"] if row["set"] == name]
    title = f"{content['behaviour']}, {name}: score of every arm"
    comparison_part = (
        differences(compared, len(content["comparisons"])) if compared else html.P("No arms were compared.")
    )
    figure = arms_figure(rows, compared, title, "compare-run-scores")
    return [figure, comparison_part, effect_against_side_effect(rows, name, "compare-run-pareto")]


def prompts_of(responses: Sequence[Row], name: str, search: str) -> dict[str, str]:
    """Prompts of a set which, or one of whose responses, contain the text, and their labels in a drop-down."""
    needle = search.strip().casefold()
    prompts = dict.fromkeys(
        row["prompt"]
        for row in responses
        if row["set"] == name and needle in f"{row['prompt']}\n{row['response']}".casefold()
    )
    return {prompt: prompt if len(prompt) <= _LONGEST else f"{prompt[: _LONGEST - 1]}…" for prompt in prompts}


def responses_to(responses: Sequence[Row], name: str, prompt: str | None) -> Component | None:
    """Each arm's response to a prompt with its score; with several seeds, that of the first seed."""
    rows = [row for row in responses if row["set"] == name and row["prompt"] == prompt]
    if not rows:
        return None
    columns = [
        html.Article(
            [
                html.H4(arm(of_arm[0]), style={"margin": "0 0 .3rem"}),
                html.P(of_arm[0]["response"], className="answer"),
                html.P(
                    f"score {with_minus_sign(number(of_arm[0]['score']))}, seed {of_arm[0]['seed']}", className="note"
                ),
            ]
        )
        for of_arm in grouped(rows, "arm", "direction").values()
    ]
    return html.Div([html.P(html.Q(prompt)), html.Div(columns, className="answers", style=_ROWS)])


def arms_figure(rows: Sequence[Row], compared: Sequence[Row], title: str, name: str) -> Component:
    """Scores of one set and scorer, with brackets; `name` is the id of the figure."""
    return graph(plots.arms(rows, comparisons=compared, title=title), name)


def differences(rows: Sequence[Row], n_compared: int, *, live: bool = False) -> Component:
    """A table of comparisons with p and with p after Holm's correction; `live` adds what the correction leaves out."""
    cells = [
        {
            "a": arm(row, "a"), "b": arm(row, "b"), "scorer": row["scorer"],
            "a minus b [95 %]": with_minus_sign(row_estimate(row, "difference")),
            "p": _p(row["p"]), "p, Holm": _p(row["p_holm"]),
            "n": row["n"], "seeds": row["seeds"],
        }
        for row in rows
    ]  # fmt: skip
    caption = f"Paired differences over prompts. p-values are Holm-adjusted for all {n_compared} comparisons"
    return table(cells, f"{caption} of this job, and no others. {_CAUTION}" if live else f"{caption}.")


def side_effects_table(rows: Sequence[Row], n_responses: int | None) -> Component:
    """A table of the measured side effects of each arm; `n_responses` were scored for repetition."""
    heads = {
        "perplexity": "perplexity",
        "kl": "KL (nats per token)",
        "facts": "facts correct",
        "repetition": "repetition",
    }
    shown = {key: head for key, head in heads.items() if any(row[key] is not None for row in rows)}
    if not shown:
        return html.P("No side effect was measured.")
    cells = [
        {
            "arm": arm(of_arm[0]),
            **{f"{head} [95 %]": row_estimate(of_arm[0], key) for key, head in shown.items()},
            "seeds": of_arm[0]["seeds"],
        }
        for of_arm in grouped(rows, "arm", "direction").values()
    ]
    measured = {"n_texts": "perplexity and KL on {} neutral texts", "n_facts": "facts correct of {}"}
    ns = [text.format(rows[0][key]) for key, text in measured.items() if rows[0][key] is not None]
    ns += [f"repetition in {n_responses} responses"] if "repetition" in shown and n_responses else []
    return table(cells, f"Side effects of each arm{': ' if ns else ''}{', '.join(ns)}.")


def other_sets(rows: Sequence[Row]) -> list[Component]:
    """Scores on the sets and by the scorers that an intervention should not change."""
    if not rows:
        return []
    tables = []
    for (name, scorer), of_scorer in grouped(rows, "set", "scorer").items():
        cells = [
            {"arm": arm(row), "score [95 %]": with_minus_sign(row_estimate(row)), "n and seeds": sample(row)}
            for row in of_scorer
        ]
        tables.append(table(cells, f"{name}, {scorer}"))
    return [html.Details([html.Summary("Other sets and scorers"), *tables])]


def effect_against_side_effect(rows: Sequence[Row], subject: str, name: str) -> Component:
    """Scores against KL, or perplexity where KL was not measured; `name` is the id of the figure."""
    side_effect = side_effect_of(rows)
    if side_effect is None:
        return html.P("No side effect was measured, so there is no figure of effect against side effect.")
    title = f"{subject}: effect against side effect"
    return graph(plots.pareto(efficient(rows, side_effect=side_effect), against=side_effect, title=title), name)


def responses_table(responses: Sequence[Row], seed: int) -> Component:
    """A table with a row per prompt and a column per arm, every response with its score."""
    labels = list(dict.fromkeys(arm(row) for row in responses))
    cells = [
        {"prompt": prompt, **dict.fromkeys(labels, "–"),
         **{arm(row): f"{row['response']} ({with_minus_sign(number(row['score'], 2))})" for row in rows}}
        for (prompt,), rows in grouped(responses, "prompt").items()
    ]  # fmt: skip
    return table(cells, f"Responses with their scores: {len(cells)} prompts, bootstrap seed {seed}.")


def _p(value: float | None) -> str:
    return p_value(value).removeprefix("= ")
