"""The parts of the page: one for each question, within it one for each set of prompts, with a chart and a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from rt_lens import plots
from rt_lens.apps.report.labels import Row, arm, estimate, grouped, harm_of, number, of_first_scorer, p_value
from rt_lens.apps.report.markup import Part, boxed, chart, folded, items, table
from rt_lens.plots.layers import without_first
from rt_lens.results.schema import choices_of
from rt_lens.results.tables import efficient

_PROMPTS_SHOWN = 12
_KEPT = ("perplexity", "kl", "facts", "repetition")
_NONE = "<p>None in this run.</p>"


def sections(results: Mapping[str, Any], responses: Sequence[Row], projections: Mapping[str, Any]) -> list[Part]:
    """The parts in the order of the page; results are checked, all else is as the files have it."""
    protocol = [Part("Protocol", _protocol(results["protocol"]))] if results["protocol"]["why"] else []
    return [
        *protocol,
        _arms(results),
        _comparisons(results),
        _side_effects(results),
        Part("Dose-response", _dose_response(results)),
        Part("Separability", _figure("separability", plots.separability, _seeded(results, "separability"))),
        _projections(projections, results),
        Part("Losses", _figure("losses", plots.losses, results["history"])),
        Part("Logit lens", _figure("logit-lens", plots.logit_lens, results["logit_lens"])),
        _responses(responses),
    ]


def _protocol(protocol: Mapping[str, Any]) -> str:
    """Why this protocol, and what the model was shown to be able to do."""
    header = ("what the model can do", "share [95 %]", "chance", "n", "seed")
    rows = [
        [row["task"], estimate(row), number(row["chance"]), str(row["n"]), str(row["seed"])]
        for row in protocol["calibration"]
    ]
    told = f"<p>{escape(protocol['name'])}: {escape(protocol['why'])}</p>"
    settings = "; ".join(f"{key} = {value}" for key, value in protocol.get("settings", {}).items())
    told += f"<p>Settings: {escape(settings)}.</p>" if settings else ""
    return told + (table("what the model can do", header, rows) if rows else "")


def _arms(results: Mapping[str, Any]) -> Part:
    """For each set a chart of its first scorer and a table of all its scorers; at the end each seed by itself."""
    first, parts, chance = of_first_scorer(results["summary"]), [], results["protocol"].get("chance", {})
    pairs = results["comparisons"]
    for place, ((name,), rows) in enumerate(grouped(results["summary"], "set").items()):
        title = f"Score of every arm: {name}"
        drawn = plots.arms(first[name], comparisons=pairs, title=title)
        blind = f"<p>Blind choice among the options scores {number(chance[name])}.</p>" if name in chance else ""
        n = ", ".join(sorted({str(row["n"]) for row in rows}))
        html = blind + chart(f"arms-{place}", drawn) + _scored(f"scores, {name}", rows)
        parts.append(Part(f"{name} (n = {n})", html))
    header = ("arm", "set", "scorer", "n", "score [95 %]", *_kept_heads(), "seed")
    single = [
        [arm(row), row["set"], row["scorer"], str(row["n"]), estimate(row), *_kept(row), str(row["seed"])]
        for row in results["arms"]
    ]
    seeds = folded("Each seed by itself", table("each seed by itself", header, single))
    return Part("Arms", seeds, tuple(parts))


def _scored(label: str, rows: Sequence[Row]) -> str:
    """Arms down, scorers across; n in a column, or beside each score where they differ."""
    scorers = list(dict.fromkeys(row["scorer"] for row in rows))
    alike = len({row["n"] for row in rows}) == 1
    body = []
    for own in grouped(rows, "arm", "direction").values():
        by_scorer = {row["scorer"]: estimate(row) + ("" if alike else f", n = {row['n']}") for row in own}
        cells = [by_scorer.get(scorer, "–") for scorer in scorers]
        body.append([arm(own[0]), *cells, *([str(own[0]["n"])] * alike), ", ".join(map(str, own[0]["seeds"]))])
    return table(label, ("arm", *(f"{scorer} [95 %]" for scorer in scorers), *(["n"] * alike), "seeds"), body)


def _comparisons(results: Mapping[str, Any]) -> Part:
    if not results["comparisons"]:
        return Part("Comparisons", _NONE)
    n, parts = len(results["comparisons"]), []
    header = ("a", "b", "scorer", "a minus b [95 %]", "p", "p, Holm", "test", "n", "seeds")
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
        "<p>Paired by prompt; an interval that leaves out zero shows a difference, taken by itself. If nothing "
        f"differed, about one in twenty of {n} comparisons would show one: Holm’s p is corrected for that.</p>"
    )
    return Part("Comparisons", note, tuple(parts))


def _side_effects(results: Mapping[str, Any]) -> Part:
    """What each arm cost: perplexity and the like, the score gained against it, other sets and scorers."""
    summary = results["summary"]
    asked = _ns(results, "n_facts")
    facts = f"facts kept is the share of {asked} plain questions still answered; " if asked else ""
    note = (
        f"<p>Perplexity, and KL from the untuned model in nats per token, on {_ns(results, 'n_texts') or 'no'} neutral "
        f"texts; {facts}repetition is the share of an answer’s word pairs that it said before.</p>"
    )
    rows = [
        [arm(own[0]), *_kept(own[0]), ", ".join(map(str, own[0]["seeds"]))]
        for own in grouped(summary, "arm", "direction").values()
    ]
    kept = table("what each arm kept", ("arm", *_kept_heads(), "seeds"), rows)
    return Part("Side effects", note + kept, (*_paretos(summary), *_others(results)))


def _paretos(summary: Sequence[Row]) -> Iterator[Part]:
    for place, (name, own) in enumerate(of_first_scorer(summary).items()):
        heading = f"{name}: effect against side effect"
        harm = harm_of(own)
        if harm is not None:
            drawn = plots.pareto(efficient(own, harm=harm), against=harm, title=heading)
            yield Part(f"{name}, against its cost", chart(f"pareto-{place}", drawn))


def _others(results: Mapping[str, Any]) -> Iterator[Part]:
    for (name,), rows in grouped(results["side_effects"], "set").items():
        yield Part(name, _scored(f"side effects, {name}", rows))


def _kept_heads() -> tuple[str, ...]:
    return tuple(f"{name} [95 %]" for name in ("perplexity", "KL", "facts kept", "repetition"))


def _kept(row: Row) -> list[str]:
    return [estimate(row, key) for key in _KEPT]


def _dose_response(results: Mapping[str, Any]) -> str:
    made = choices_of(results)
    rule = f"<p><b>Rule.</b> {escape(results['choices']['rule'])}</p>"
    told = items(
        f"{direction}: layer {choice['layer']:d}, multiplier {choice['multiplier']:g}. {choice['why']}"
        for direction, choice in made.items()
    )
    chosen = [(choice["layer"], choice["multiplier"]) for choice in made.values()]
    rows = _seeded(results, "dose_response")
    figure = _figure("dose-response", plots.dose_response, rows, bound=results["bound"], chosen=chosen)
    return rule + told + figure


def _projections(projections: Mapping[str, Any], results: Mapping[str, Any]) -> Part:
    """The text in colours, the lines of all arms, and a heat map for each arm against the first."""
    arms = {name: np.asarray(values, dtype=float) for name, values in projections["arms"].items()}
    tokens, layers = projections["tokens"], projections["layers"]
    prompt = f"<p>All arms read one text, the prompt <q>{escape(projections['prompt'])}</q> with an answer.</p>"
    averaged, rest = without_first(arms, tokens)
    chosen = [choice["layer"] for choice in choices_of(results).values() if choice["layer"] in layers]
    layer = chosen[-1] if chosen else layers[-1]
    title = f"Where the text lies on the vector at layer {layer}"
    coloured = plots.coloured_tokens(
        tokens, {name: values[layers.index(layer)] for name, values in arms.items()}, title=title
    )
    lines = plots.projection_by_layer(averaged, tokens=rest, layers=layers)
    parts = [
        Part("Token by token", chart("projection-tokens", coloured)),
        Part("Layer by layer", chart("projection-lines", lines)),
    ]
    first, *later = arms
    for place, name in enumerate(later):
        pair = {first: arms[first], name: arms[name]}
        drawn = plots.projection_heatmap(pair, tokens, layers, title=f"Projection before and after: {name}")
        parts.append(Part(f"{name}, every layer", chart(f"projection-{place}", drawn)))
    return Part("Projections", prompt, tuple(parts))


def _responses(responses: Sequence[Row]) -> Part:
    """Some prompts of each set; older runs have one set without a name."""
    sets = grouped([{"set": "", **row} for row in responses], "set")
    shown = max(3, _PROMPTS_SHOWN // max(len(sets), 1))
    parts = [Part(name, _answered(name, rows, shown)) for (name,), rows in sets.items()]
    note = "<p>The first prompts of each set, and of each arm the first seed.</p>"
    if len(parts) > 1:
        return Part("Same prompt, every arm", note, tuple(parts))
    return Part("Same prompt, every arm", note + "".join(part.html for part in parts))


def _answered(name: str, responses: Sequence[Row], n_shown: int) -> str:
    """A row per prompt, a column per arm and direction; of each column its first seed."""
    answers: dict[str, dict[str, str]] = {}
    for rows in grouped(responses, "arm", "direction").values():
        first = rows[0]["seed"]
        answers[arm(rows[0])] = {
            row["prompt"]: f'{escape(row["response"])}<span class="score">score {number(row["score"])}</span>'
            for row in rows
            if row["seed"] == first
        }
    prompts = list(dict.fromkeys(row["prompt"] for row in responses))[:n_shown]
    body = [[escape(prompt), *(column.get(prompt, "–") for column in answers.values())] for prompt in prompts]
    return boxed(f"answers{', ' * bool(name)}{name}", ("prompt", *answers), body, kind="responses")


def _figure(name: str, draw: Callable[..., go.Figure], rows: Sequence[Row], **options: Any) -> str:
    """The chart of these rows, or a plain word that this run has none (a run without tuning has no losses)."""
    return chart(name, draw(rows, **options)) if rows else _NONE


def _seeded(results: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    return [{"seed": results["seed"], **row} for row in results[key]]


def _ns(results: Mapping[str, Any], key: str) -> str:
    return ", ".join(sorted({str(row[key]) for row in results["summary"] if row[key] is not None}))
