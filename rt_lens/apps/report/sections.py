"""The parts of the page: one for each question, and in it one for each set of prompts, with a chart and a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from rt_lens import plots
from rt_lens.apps.report.labels import (
    Row,
    arm,
    estimate,
    grouped,
    number,
    of_first_scorer,
    p_value,
    said,
    side_effect_of,
)
from rt_lens.apps.report.markup import Part, boxed, chart, folded, items, table
from rt_lens.apps.report.verdict import first_rows
from rt_lens.plots.inside_arms import RESPONSES
from rt_lens.plots.layers import without_first
from rt_lens.results.schema import choices_of
from rt_lens.results.tables import efficient

_PROMPTS_SHOWN = 12
_SIDE_EFFECTS = {"perplexity": "perplexity", "kl": "KL", "facts": "facts correct", "repetition": "repetition"}
_NONE = "<p>None in this run.</p>"


def sections(results: Mapping[str, Any], responses: Sequence[Row], projections: Mapping[str, Any]) -> list[Part]:
    """The parts in the order of the page. Results are checked; responses and projections come from their files."""
    protocol = [Part("Protocol", _protocol(results["protocol"]))] if results["protocol"]["why"] else []
    search = [Part("Search", _search(results["search"]))] if results["search"] else []
    return [
        *protocol,
        *search,
        _arms(results),
        _comparisons(results),
        _side_effects(results),
        Part("Dose-response", _dose_response(results)),
        Part("Separability", _figure("separability", plots.separability, _seeded(results, "separability"))),
        *([Part("Inside the arms", _inside(results))] if (results["inside"] or {}).get("likelihoods") else []),
        _projections(projections, results),
        Part("Losses", _figure("losses", plots.losses, results["history"])),
        Part("Logit lens", _figure("logit-lens", plots.logit_lens, results["logit_lens"])),
        _responses(responses),
    ]


def _protocol(protocol: Mapping[str, Any]) -> str:
    """Why this protocol was chosen, and what the model is able to do."""
    header = ("task", "share [95 %]", "chance", "n", "seed")
    rows = [
        [row["task"], estimate(row), number(row["chance"]), str(row["n"]), str(row["seed"])]
        for row in protocol["calibration"]
    ]
    text = f"<p>{escape(protocol['name'])}: {escape(protocol['why'])}</p>"
    settings = "; ".join(f"{key} = {value}" for key, value in protocol.get("settings", {}).items())
    text += f"<p>Settings: {escape(settings)}.</p>" if settings else ""
    return text + (table("what the model can do", header, rows) if rows else "")


def _search(search: Mapping[str, Any]) -> str:
    """What was tried for each arm before the test, what was chosen, and the settings to paste into a file."""
    rows = search["table"]
    done = [row for row in rows if row["effect"] is not None]
    tried = (
        f"<p>Each arm had {search['trials']} trials, on validation prompts alone; the first is the file's own "
        f"settings. {escape(search['rule'])}</p>"
    )
    figure = (
        chart("search", plots.trials(rows, budget=search["budget"], seed=search["seed"]))
        if done
        else "<p>No trial could be measured.</p>"
    )
    header = ("arm", "trials", "failed", "the file's [95 %]", "chosen [95 %]", "settings", "trained tokens", "minutes")
    body = [_searched(name, of_arm) for (name,), of_arm in grouped(rows, "arm").items()]
    found = folded("The settings, to paste into a behaviour's file", f"<pre>{escape(search['toml'])}</pre>")
    return tried + figure + table("what the search chose", header, body) + found


def _searched(name: str, rows: Sequence[Row]) -> list[str]:
    chosen = next((row for row in rows if row["chosen"]), None)
    settings = ", ".join(f"{key} = {value}" for key, value in chosen["settings"].items()) if chosen else ""
    return [
        escape(name), str(len(rows)), str(sum(bool(row["reason"]) for row in rows)), _effect(rows[0]),
        _effect(chosen) if chosen else "–", escape(settings) or "as in the file",
        f"{sum(row['trained_tokens'] for row in rows):,}", number(sum(row["seconds"] for row in rows) / 60, 1),
    ]  # fmt: skip


def _effect(trial: Row) -> str:
    return estimate({**trial, "mean": trial["effect"]})


def _arms(results: Mapping[str, Any]) -> Part:
    """For each set a chart of its first scorer and a table of all its scorers; below them the seeds separately."""
    first, parts, chance = of_first_scorer(results["summary"]), [], results["protocol"].get("chance", {})
    pairs = results["comparisons"]
    for index, ((name,), rows) in enumerate(grouped(results["summary"], "set").items()):
        title = f"Score of every arm: {name}"
        figure = plots.arms(first[name], comparisons=pairs, title=title)
        random = f"<p>A random choice among the options scores {number(chance[name])}.</p>" if name in chance else ""
        n = ", ".join(sorted({str(row["n"]) for row in rows}))
        html = random + chart(f"arms-{index}", figure) + _scored(f"scores, {name}", rows)
        parts.append(Part(f"{name} (n = {n})", html))
    header = ("arm", "set", "scorer", "n", "score [95 %]", *_side_effect_heads(), "seed")
    single = [
        [arm(row), row["set"], row["scorer"], str(row["n"]), estimate(row), *_side_effect_cells(row), str(row["seed"])]
        for row in results["arms"]
    ]
    seeds = folded("Scores of each seed", table("scores of each seed", header, single))
    return Part("Scores by arm", seeds, tuple(parts))


def _scored(label: str, rows: Sequence[Row]) -> str:
    """A row per arm and a column per scorer; n has a column, or stands beside each score where it differs."""
    scorers = list(dict.fromkeys(row["scorer"] for row in rows))
    same_n = len({row["n"] for row in rows}) == 1
    body = []
    for arm_rows in grouped(rows, "arm", "direction").values():
        by_scorer = {row["scorer"]: estimate(row) + ("" if same_n else f", n = {row['n']}") for row in arm_rows}
        cells, first = [by_scorer.get(scorer, "–") for scorer in scorers], arm_rows[0]
        body.append([arm(first), *cells, *([str(first["n"])] * same_n), ", ".join(map(str, first["seeds"]))])
    return table(label, ("arm", *(f"{scorer} [95 %]" for scorer in scorers), *(["n"] * same_n), "seeds"), body)


def _comparisons(results: Mapping[str, Any]) -> Part:
    if not results["comparisons"]:
        return Part("Comparisons", _NONE)
    n, parts = len(results["comparisons"]), []
    header = ("a", "b", "scorer", "a minus b [95 %]", "p", "Holm-adjusted p", "test", "n", "seeds")
    for (name,), rows in grouped(results["comparisons"], "set").items():
        body = [
            [
                *(arm(row, "a"), arm(row, "b"), row["scorer"], estimate(row, "difference")),
                *(p_value(row["p"]).removeprefix("= "), p_value(row["p_holm"]).removeprefix("= ")),
                *(row["test"], str(row["n"]), ", ".join(map(str, row["seeds"]))),
            ]
            for row in rows
        ]
        parts.append(Part(name, table(f"comparisons, {name}", header, body)))
    note = (
        "<p>Comparisons are paired by prompt. An interval that excludes zero shows a difference before any "
        f"correction. If no arms truly differed, about 1 in 20 of {n} comparisons would show one; Holm-adjusted "
        "p-values account for that.</p>"
    )
    return Part("Comparisons", note, tuple(parts))


def _side_effects(results: Mapping[str, Any]) -> Part:
    """Perplexity, KL, facts and repetition of each arm, its score against them, and the other sets and scorers."""
    summary = results["summary"]
    n_facts = _ns(results, "n_facts")
    facts = f"Facts correct is the share of {n_facts} plain questions that the model gets right. " if n_facts else ""
    note = (
        f"<p>Perplexity and KL to the untuned model (nats per token) are measured on {_ns(results, 'n_texts') or 'no'} "
        f"neutral texts. {facts}Repetition is the share of word pairs in a response that occur earlier in it.</p>"
    )
    rows = [
        [arm(arm_rows[0]), *_side_effect_cells(arm_rows[0]), ", ".join(map(str, arm_rows[0]["seeds"]))]
        for arm_rows in grouped(summary, "arm", "direction").values()
    ]
    measures = table("side effects of each arm", ("arm", *_side_effect_heads(), "seeds"), rows)
    return Part("Side effects", note + measures, (*_on_own_prompts(results), *_paretos(summary), *_others(results)))


def _on_own_prompts(results: Mapping[str, Any]) -> Iterator[Part]:
    """The opening picture against the KL that no budget holds; older runs have it in no table."""
    rows = first_rows(results["at_kl"]["table"]) if results["at_kl"] else []
    measured = [row for row in rows if row.get("own_kl") is not None and row["budget"] is not None]
    if measured:
        figure = plots.effect_at_kl(rows, on="own", title="Effect against KL on the behaviour’s own prompts")
        yield Part("The same against KL on the behaviour’s own prompts", chart("own-kl", figure))


def _paretos(summary: Sequence[Row]) -> Iterator[Part]:
    for index, (name, rows) in enumerate(of_first_scorer(summary).items()):
        side_effect = side_effect_of(rows)
        if side_effect is not None:
            marked, title = efficient(rows, side_effect=side_effect), f"{name}: effect against side effect"
            figure = plots.pareto(marked, against=side_effect, title=title)
            yield Part(f"{name}: effect and side effect", chart(f"pareto-{index}", figure))


def _others(results: Mapping[str, Any]) -> Iterator[Part]:
    for (name,), rows in grouped(results["side_effects"], "set").items():
        yield Part(name, _scored(f"side effects, {name}", rows))


def _side_effect_heads() -> tuple[str, ...]:
    return tuple(f"{name} [95 %]" for name in _SIDE_EFFECTS.values())


def _side_effect_cells(row: Row) -> list[str]:
    return [estimate(row, key) for key in _SIDE_EFFECTS]


def _dose_response(results: Mapping[str, Any]) -> str:
    choices = choices_of(results)
    rule = f"<p><b>Rule.</b> {escape(results['choices']['rule'])}</p>"
    reasons = items(
        f"{direction}: layer {choice['layer']:d}, multiplier {choice['multiplier']:g}. {choice['why']}"
        for direction, choice in choices.items()
    )
    chosen = [(choice["layer"], choice["multiplier"]) for choice in choices.values()]
    rows = _seeded(results, "dose_response")
    figure = _figure("dose-response", plots.dose_response, rows, bound=results["bound"], chosen=chosen)
    return rule + reasons + figure


def _inside(results: Mapping[str, Any]) -> str:
    """What happens inside under each arm at the stated budget, side by side; the likelihoods as a table too."""
    inside, at_kl = results["inside"], results["at_kl"]
    title = f"What happens inside at KL {at_kl['stated']:g}" if at_kl else "What happens inside"
    figure = plots.inside_arms(inside["shifts"], inside["likelihoods"], inside["weights"], title=title)
    header = ("arm", "responses", "n", "NLL before", "after", "change [95 %]", "seed")
    body = [
        [arm(row), RESPONSES.get(row["set"], row["set"]), str(row["n"]), number(row["before"]), number(row["after"]),
         estimate({**row, "mean": row["change"]}), str(row["seed"])]
        for row in inside["likelihoods"]
    ]  # fmt: skip
    text = (
        "<p>Of the first seed of each arm, on responses to validation prompts: those that the untuned model writes, "
        "and those that it writes under the personas of each side. NLL is in nats per token; where it falls, the arm "
        "makes these texts likelier.</p>"
    )
    return text + chart("inside", figure) + folded("Likelihoods", table("likelihoods of responses", header, body))


def _projections(projections: Mapping[str, Any], results: Mapping[str, Any]) -> Part:
    """The coloured text, a line per arm over the layers, and a heat map of each arm beside the first."""
    arms = {name: np.asarray(values, dtype=float) for name, values in projections["arms"].items()}
    tokens, layers = projections["tokens"], projections["layers"]
    prompt = f"<p>All arms read the same text, the prompt <q>{escape(projections['prompt'])}</q> with a response.</p>"
    averaged, rest = without_first(arms, tokens)
    chosen = [choice["layer"] for choice in choices_of(results).values() if choice["layer"] in layers]
    layer = chosen[-1] if chosen else layers[-1]
    title = f"Projection of each token on the vector at layer {layer}"
    text = plots.coloured_tokens(
        tokens, {name: values[layers.index(layer)] for name, values in arms.items()}, title=title
    )
    lines = plots.projection_by_layer(averaged, tokens=rest, layers=layers)
    parts = [
        Part("Token by token", chart("projection-tokens", text)),
        Part("Layer by layer", chart("projection-lines", lines)),
    ]
    first, *later = arms
    for index, name in enumerate(later):
        pair = {first: arms[first], name: arms[name]}
        figure = plots.projection_heatmap(pair, tokens, layers, title=f"Projection before and after: {name}")
        parts.append(Part(f"{name}, every layer", chart(f"projection-{index}", figure)))
    return Part("Projections", prompt, tuple(parts))


def _responses(responses: Sequence[Row]) -> Part:
    """The first prompts of each set. Older runs have one set without a name."""
    sets = grouped([{"set": "", **row} for row in responses], "set")
    shown = max(3, _PROMPTS_SHOWN // max(len(sets), 1))
    parts = [Part(name, _answered(name, rows, shown)) for (name,), rows in sets.items()]
    note = "<p>The first prompts of each set, with the responses of each arm’s first seed.</p>"
    if len(parts) > 1:
        return Part("Responses of every arm", note, tuple(parts))
    return Part("Responses of every arm", note + "".join(part.html for part in parts))


def _answered(name: str, responses: Sequence[Row], n_shown: int) -> str:
    """A row per prompt, and a column per arm and direction with the responses of its first seed."""
    columns: dict[str, dict[str, str]] = {}
    for rows in grouped(responses, "arm", "direction").values():
        first = rows[0]["seed"]
        columns[arm(rows[0])] = {
            row["prompt"]: f'{said(row["response"])}<span class="score">score {number(row["score"])}</span>'
            for row in rows
            if row["seed"] == first
        }
    prompts = list(dict.fromkeys(row["prompt"] for row in responses))[:n_shown]
    body = [[escape(prompt), *(column.get(prompt, "–") for column in columns.values())] for prompt in prompts]
    return boxed(f"responses{', ' * bool(name)}{name}", ("prompt", *columns), body, kind="responses")


def _figure(name: str, draw: Callable[..., go.Figure], rows: Sequence[Row], **options: Any) -> str:
    """The chart of these rows, or a sentence if the run has none: a run without tuning has no losses."""
    return chart(name, draw(rows, **options)) if rows else _NONE


def _seeded(results: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    return [{"seed": results["seed"], **row} for row in results[key]]


def _ns(results: Mapping[str, Any], key: str) -> str:
    return ", ".join(sorted({str(row[key]) for row in results["summary"] if row[key] is not None}))
