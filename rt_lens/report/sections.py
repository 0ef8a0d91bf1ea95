"""The sections of the page: headings for each set, one figure each, and tables for the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from rt_lens import plots
from rt_lens.report.words import Row, arm, estimate, grouped, number, of_first_scorer, p_value
from rt_lens.results import efficient
from rt_lens.results.schema import choices_of

_PROMPTS_SHOWN = 12
# Plotly's toolbar can send a chart to its maker's cloud; a report keeps to itself.
_FIGURE = {"displaylogo": False, "showSendToCloud": False, "typesetMath": False}
_KEPT = ("perplexity", "kl", "facts", "repetition")


def sections(results: Mapping[str, Any], responses: Sequence[Row], projections: Mapping[str, Any]) -> dict[str, str]:
    """Heading -> HTML, in the order of the page; results are checked, all else is as the files have it."""
    protocol = {"Protocol": _protocol(results["protocol"])} if results["protocol"]["why"] else {}
    return {
        **protocol,
        "Arms": _arms(results),
        "Comparisons": _comparisons(results),
        "Side effects": _side_effects(results),
        "Dose-response": _dose_response(results),
        "Separability": _figure("separability", plots.separability, _drawn(_seeded(results, "separability"))),
        "Projections": _projections(_drawn(projections)),
        "Losses": _figure("losses", plots.losses, _drawn(results["history"])),
        "Logit lens": _figure("logit-lens", plots.logit_lens, _drawn(results["logit_lens"])),
        "Same prompt, every arm": _responses(responses),
        "Provenance": _provenance(results),
    }


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
    return told + (_table(header, rows) if rows else "")


def _arms(results: Mapping[str, Any]) -> str:
    """For each set a figure of its first scorer and a table of all its scorers; at the end each seed by itself."""
    first, parts, chance = of_first_scorer(results["summary"]), [], results.get("protocol", {}).get("chance", {})
    for number_, ((name,), rows) in enumerate(grouped(results["summary"], "set").items()):
        figure = _figure(f"arms-{number_}", plots.arms, _drawn(first[name]))
        blind = f"<p>Blind choice among the options scores {number(chance[name])}.</p>" if name in chance else ""
        parts += [_heading(name, f"arms-{number_}", rows), blind, figure, _scored(rows)]
    header = ("arm", "set", "scorer", "n", "score [95 %]", *_kept_heads(), "seed")
    single = [
        [arm(row), row["set"], row["scorer"], str(row["n"]), estimate(row), *_kept(row), str(row["seed"])]
        for row in results["arms"]
    ]
    seeds = f"<details><summary>Each seed by itself</summary>{_table(header, single)}</details>"
    return _links("arms", results["summary"]) + "\n".join([*parts, seeds])


def _scored(rows: Sequence[Row]) -> str:
    """Arms down, scorers across."""
    scorers = list(dict.fromkeys(row["scorer"] for row in rows))
    body = []
    for own in grouped(rows, "arm", "direction").values():
        by_scorer = {row["scorer"]: estimate(row) for row in own}
        cells = [by_scorer.get(scorer, "–") for scorer in scorers]
        body.append([arm(own[0]), *cells, str(own[0]["n"]), ", ".join(map(str, own[0]["seeds"]))])
    return _table(("arm", *(f"{scorer} [95 %]" for scorer in scorers), "n", "seeds"), body)


def _comparisons(results: Mapping[str, Any]) -> str:
    if not results["comparisons"]:
        return "<p>None in this run.</p>"
    n, parts = len(results["comparisons"]), []
    header = ("scorer", "a", "b", "a minus b [95 %]", "p", "p, Holm", "test", "n", "seeds")
    for (name,), rows in grouped(results["comparisons"], "set").items():
        body = [
            [
                *(row["scorer"], arm(row, "a"), arm(row, "b"), estimate(row, "difference")),
                *(p_value(row["p"]).removeprefix("= "), p_value(row["p_holm"]).removeprefix("= ")),
                *(row["test"], str(row["n"]), ", ".join(map(str, row["seeds"]))),
            ]
            for row in rows
        ]
        parts.append(f"<h3>{escape(name)}</h3>{_table(header, body)}")
    note = (
        "<p>Paired by prompt; an interval that leaves out zero shows a difference, taken by itself. "
        f"Of {n} comparisons some would by chance: Holm’s p is corrected for that.</p>"
    )
    return note + "\n".join(parts)


def _side_effects(results: Mapping[str, Any]) -> str:
    """What each arm cost: perplexity and the like, other sets and scorers, and the score gained against it."""
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
    parts = [note, _table(("arm", *_kept_heads(), "seeds"), rows)]
    for (name,), others in grouped(results["side_effects"], "set").items():
        parts.append(f"<h3>{escape(name)}</h3>{_scored(others)}")
    for number_, (name, own) in enumerate(of_first_scorer(summary).items()):
        title = _drawn(f"{name}: effect against side effect")
        harm = next((key for key in ("kl", "perplexity") if any(row[key] is not None for row in own)), None)
        drawn = [] if harm is None else _drawn(efficient(own, harm=harm))
        parts.append(_figure(f"pareto-{number_}", plots.pareto, drawn, against=harm, title=title))
    return "\n".join(parts)


def _kept_heads() -> tuple[str, ...]:
    return tuple(f"{name} [95 %]" for name in ("perplexity", "KL", "facts kept", "repetition"))


def _kept(row: Row) -> list[str]:
    return [estimate(row, key) for key in _KEPT]


def _dose_response(results: Mapping[str, Any]) -> str:
    made = choices_of(results)
    rule = f"<p><b>Rule.</b> {escape(results['choices']['rule'])}</p>"
    items = "".join(
        f"<li><b>{escape(direction)}</b>: layer {choice['layer']:d}, multiplier {choice['multiplier']:g}. "
        f"{escape(choice['why'])}</li>"
        for direction, choice in made.items()
    )
    chosen = [(choice["layer"], choice["multiplier"]) for choice in made.values()]
    rows = _drawn(_seeded(results, "dose_response"))
    figure = _figure("dose-response", plots.dose_response, rows, bound=results["bound"], chosen=chosen)
    return f"{rule}<ul>{items}</ul>{figure}"


def _projections(projections: Mapping[str, Any]) -> str:
    """The lines of all arms, then one heat map for each arm against the first (`projections` is safe to draw)."""
    arms = {name: np.asarray(values, dtype=float) for name, values in projections["arms"].items()}
    tokens, layers = projections["tokens"], projections["layers"]
    prompt = f"<p>Measured on: <q>{projections['prompt']}</q></p>"
    # The first token is an attention sink: its huge activations would drown the average of the others.
    rest = slice(1, None) if len(tokens) > 1 else slice(None)
    averaged = {name: values[:, rest] for name, values in arms.items()}
    parts = [prompt, _div("projection-lines", plots.projection_by_layer(averaged, tokens=tokens[rest], layers=layers))]
    first, *later = arms
    for number_, name in enumerate(later):
        pair = {first: arms[first], name: arms[name]}
        title = f"Projection before and after: {name}"
        parts.append(_div(f"projection-{number_}", plots.projection_heatmap(pair, tokens, layers, title=title)))
    return "\n".join(parts)


def _responses(responses: Sequence[Row]) -> str:
    """Some prompts of each set; older runs have one set without a name."""
    sets = grouped([{"set": "", **row} for row in responses], "set")
    shown = max(3, _PROMPTS_SHOWN // max(len(sets), 1))
    parts = []
    for (name,), rows in sets.items():
        parts.append((f"<h3>{escape(name)}</h3>" if len(sets) > 1 else "") + _answered(rows, shown))
    return "\n".join(parts)


def _answered(responses: Sequence[Row], n_shown: int) -> str:
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
    heads = "".join(f"<th>{escape(name)}</th>" for name in answers)
    body = "\n".join(
        f"<tr><td>{escape(prompt)}</td>"
        + "".join(f"<td>{column.get(prompt, '–')}</td>" for column in answers.values())
        + "</tr>"
        for prompt in prompts
    )
    return f'<div class="scroll"><table class="responses"><tr><th>prompt</th>{heads}</tr>\n{body}</table></div>'


def _provenance(results: Mapping[str, Any]) -> str:
    seeds = sorted({seed for row in results["summary"] for seed in row["seeds"]})
    rows = [
        ["model", results["model"]],
        ["protocol", results["protocol"]["name"]],
        ["seed", str(results["seed"])],
        ["seeds of the arms", ", ".join(map(str, seeds))],
    ]
    rows += [[f"version of {name}", str(version)] for name, version in results["versions"].items()]
    rows += [[f"seconds for {stage}", f"{seconds:.1f}"] for stage, seconds in results["seconds"].items()]
    return _table(("what", "value"), rows)


def _heading(name: str, place: str, rows: Sequence[Row]) -> str:
    n = ", ".join(sorted({str(row["n"]) for row in rows}))
    return f'<h3 id="{place}-set">{escape(name)} (n = {n})</h3>'


def _links(section: str, rows: Iterable[Row]) -> str:
    """To the headings of the sets, where there are several."""
    names = list(dict.fromkeys(row["set"] for row in rows))
    links = [f'<a href="#{section}-{place}-set">{escape(name)}</a>' for place, name in enumerate(names)]
    return f"<nav>{' '.join(links)}</nav>" if len(links) > 1 else ""


def _figure(name: str, draw: Any, rows: Sequence[Row], **options: Any) -> str:
    """The figure of these rows, or a plain word that this run has none (a run without tuning has no losses)."""
    return _div(name, draw(rows, **options)) if rows else "<p>None in this run.</p>"


def _div(name: str, figure: go.Figure) -> str:
    # A fixed id keeps the page the same, byte for byte, for the same run, and must not be a section's.
    # Plotly writes < > / as \u003c \u003e \u002f in its JSON, so no label can close the script element.
    return figure.to_html(full_html=False, include_plotlyjs=False, config=_FIGURE, div_id=f"figure-{name}")


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{heads}</tr>\n{body}</table></div>'


def _drawn(value: Any) -> Any:
    """A copy whose every string is safe inside a figure. Plotly knows &lt; &gt; &amp; but not &quot;."""
    if isinstance(value, str):
        return escape(value, quote=False)
    if isinstance(value, Mapping):
        return {_drawn(key): _drawn(inner) for key, inner in value.items()}
    return [_drawn(inner) for inner in value] if isinstance(value, list) else value


def _seeded(results: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    return [{"seed": results["seed"], **row} for row in results[key]]


def _ns(results: Mapping[str, Any], key: str) -> str:
    return ", ".join(sorted({str(row[key]) for row in results["summary"] if row[key] is not None}))
