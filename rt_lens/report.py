"""A finished run's folder -> one HTML page that opens anywhere, offline. This room reads files; it never meets a model.

What the page says comes from results.json, responses.jsonl and projections.json alone. Text in them was written by a
model or a user, so it is escaped on every road into the page: `html.escape` for markup, and the same for figures, whose
labels Plotly would otherwise read as HTML.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from rt_lens import plots

_KEYS = (
    *("schema", "behaviour", "description", "model", "versions", "seed", "choices", "arms", "summary", "comparisons"),
    *("separability", "dose_response", "bound", "history", "logit_lens", "seconds"),
)
_SCORED = (
    "arm",
    "direction",
    "set",
    "scorer",
    "n",
    "mean",
    "low",
    "high",
    "perplexity",
    "kl",
    "facts",
    "repetition",
    "n_texts",
    "n_facts",
)
_COLUMNS = {
    "arms": (*_SCORED, "seed"),
    "summary": (*_SCORED, "seeds"),
    "comparisons": ("direction", "a", "b", "n", "difference", "low", "high", "p", "test", "seeds"),
}
_PROMPTS_SHOWN = 12
# Plotly's toolbar can send a chart to its maker's cloud; a report keeps to itself.
_FIGURE = {"displaylogo": False, "showSendToCloud": False, "typesetMath": False}
# The page needs nothing from outside, and this makes the browser hold it to that.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_STYLE = """
body { font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #222; background: #fff;
  max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: .2rem; } h2 { margin: 2.5rem 0 .5rem; border-bottom: 1px solid #ddd; }
nav a { margin-right: .9rem; white-space: nowrap; color: #0072b2; }
.summary { background: #f6f6f2; border-left: 4px solid #009e73; padding: .8rem 1.1rem; }
.summary span { display: block; }
.scroll { max-height: 75vh; overflow: auto; border: 1px solid #ddd; margin: 1rem 0; }
table { border-collapse: separate; border-spacing: 0; font-size: 14px; width: 100%; }
th { position: sticky; top: 0; background: #eee; text-align: left; z-index: 1; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #e4e4e4; vertical-align: top; }
.responses td { min-width: 14rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.responses td:first-child { position: sticky; left: 0; background: #fff; font-weight: 600; min-width: 10rem; }
.score { display: block; color: #555; font-weight: 600; margin-top: .4rem; }
"""


def write_report(run_dir: Path) -> Path:
    """Writes `run_dir/report.html` from the run's three files; an older report stays until the new one is whole.

    Args:
        run_dir: folder with results.json, responses.jsonl and projections.json.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: if one of the three files is not there.
        ValueError: if a file is not valid JSON, lacks a key or column, or has a schema other than 1.
    """
    run_dir = Path(run_dir)
    results = _checked(_json(run_dir / "results.json", _text(run_dir / "results.json")))
    lines = _text(run_dir / "responses.jsonl").splitlines()
    responses = [_json(run_dir / "responses.jsonl", line) for line in lines if line.strip()]
    projections = _json(run_dir / "projections.json", _text(run_dir / "projections.json"))
    for row in responses:
        _need("responses.jsonl", row, ("arm", "direction", "seed", "prompt", "response", "score"))
    _need("projections.json", projections, ("prompt", "tokens", "layers", "arms"))
    page = run_dir / "report.html"
    unfinished = run_dir / f".report.{os.getpid()}.tmp"
    try:
        # A model may emit half a surrogate pair, which UTF-8 cannot hold.
        unfinished.write_text(_page(results, responses, projections), encoding="utf-8", errors="replace")
        os.replace(unfinished, page)
    finally:
        unfinished.unlink(missing_ok=True)
    return page


def summary_sentences(results: Mapping[str, Any]) -> list[str]:
    """What the run found, in plain text: scores, paired differences, damage; each with n, 95 % interval and seeds.

    Args:
        results: the content of results.json.

    Raises:
        ValueError: if a key is missing.
    """
    results = _checked(results)
    sentences = []
    for (prompts, scorer), rows in _by(results["summary"], "set", "scorer").items():
        untuned = [row for row in rows if row["arm"] == "untuned"]
        where = f"{results['behaviour']}, {prompts} prompts, scored by {scorer}"
        sentences += [f"Untuned, {results['model']} scores {_brief(row)} ({where}; {_sample(row)})." for row in untuned]
        for (direction,), moved in _by([row for row in rows if row["arm"] != "untuned"], "direction").items():
            means = _listed(moved, lambda row: f"{row['arm']} {_brief(row)}")
            sentences.append(f"{direction.capitalize()}, {prompts} prompts: {means}.")
    for (direction, test), rows in _by(results["comparisons"], "direction", "test").items():
        differences = _listed(
            rows, lambda row: f"{row['a']} minus {row['b']} {_estimate(row, 'difference')}, p {_p_value(row['p'])}"
        )
        sentences.append(f"{direction.capitalize()}, {test}: {differences}.")
    return [*sentences, *_damage_sentences(results), "Brackets hold 95 % intervals."]


def _damage_sentences(results: Mapping[str, Any]) -> list[str]:
    """The worst perplexity and the fewest facts kept, each against the untuned model's."""
    untuned = next((row for row in results["summary"] if row["arm"] == "untuned"), None)
    moved = [row for row in results["summary"] if row["arm"] != "untuned"]
    sentences = []
    priced = [row for row in moved if row["perplexity"] is not None]
    if untuned and untuned["perplexity"] and priced:
        worst = max(priced, key=lambda row: row["perplexity"])
        ratio, bound = worst["perplexity"] / untuned["perplexity"], results["bound"]
        verdict = "" if bound is None else f", {'within' if ratio <= bound else 'over'} the bound of {bound:g}"
        measured = f"{worst['arm']} {worst['direction']} {_brief(worst, 'perplexity')}, {ratio:.2f} times the untuned"
        against = f"{_brief(untuned, 'perplexity')}{verdict}"
        texts = f"n = {worst['n_texts']} texts, {_seeds(worst)}"
        sentences.append(f"Highest perplexity: {measured} {against} ({texts}).")
    asked = [row for row in moved if row["facts"] is not None]
    if untuned and untuned["facts"] is not None and asked:
        least = min(asked, key=lambda row: row["facts"])
        measured = f"{least['arm']} {least['direction']} {_brief(least, 'facts')}"
        sentences.append(
            f"Fewest facts kept: {measured}, untuned {_brief(untuned, 'facts')} "
            f"(n = {least['n_facts']}, {_seeds(least)})."
        )
    if untuned and moved:
        most = max(moved, key=lambda row: row["repetition"])
        measured = f"{most['arm']} {most['direction']} {_brief(most, 'repetition')}"
        sentences.append(f"Most repetition: {measured}, untuned {_brief(untuned, 'repetition')} ({_sample(most)}).")
    return sentences


def _page(results: Mapping[str, Any], responses: Sequence[Mapping], projections: Mapping[str, Any]) -> str:
    sections = {
        "Arms": _arms(results),
        "Comparisons": _comparisons(results),
        "Dose-response": _dose_response(results),
        "Separability": _figure("separability", plots.separability, _drawn(_seeded(results, "separability"))),
        "Projections": _projections(_drawn(projections)),
        "Losses": _figure("losses", plots.losses, _drawn(results["history"])),
        "Side effects": _per_set("side-effects", plots.side_effects, results),
        "Logit lens": _figure("logit-lens", plots.logit_lens, _drawn(results["logit_lens"])),
        "Same prompt, every arm": _responses(responses),
        "Provenance": _provenance(results),
    }
    title = f"{results['behaviour']} on {results['model']}"
    links = "".join(f'<a href="#{_slug(name)}">{escape(name)}</a>' for name in sections)
    body = "\n".join(
        f'<section id="{_slug(name)}">\n<h2>{escape(name)}</h2>\n{content}\n</section>'
        for name, content in sections.items()
    )
    sentences = "\n".join(f"<span>{escape(sentence)}</span>" for sentence in summary_sentences(results))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n<script>{get_plotlyjs()}</script>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(results['description'])}</p>\n"
        f'<p class="summary">{sentences}</p>\n'
        f"<nav>{links}</nav>\n{body}\n</body>\n</html>\n"
    )


def _arms(results: Mapping[str, Any]) -> str:
    header = (
        "arm",
        "direction",
        "set",
        "scorer",
        "n",
        "score [95 %]",
        "perplexity [95 %]",
        "KL [95 %]",
        "facts kept [95 %]",
        "repetition [95 %]",
        "seeds",
    )
    pooled = [_arm_cells(row, row["seeds"]) for row in results["summary"]]
    single = [_arm_cells(row, [row["seed"]]) for row in results["arms"]]
    note = (
        f"<p>Perplexity, and KL from the untuned model in nats per token, on {_ns(results, 'n_texts')} neutral texts; "
        f"facts kept is the share of {_ns(results, 'n_facts')} plain questions still answered; "
        "repetition is the share of an answer's word pairs that it said before.</p>"
    )
    seeds = f"<details><summary>Each seed by itself</summary>{_table(header, single)}</details>"
    return _per_set("arms", plots.arms, results) + note + _table(header, pooled) + seeds


def _arm_cells(row: Mapping[str, Any], seeds: Sequence[int]) -> list[str]:
    names = [row[key] for key in ("arm", "direction", "set", "scorer", "n")]
    measures = [_estimate(row), _estimate(row, "perplexity"), _estimate(row, "kl"), _estimate(row, "facts")]
    measures.append(_estimate(row, "repetition", 2))
    return [str(cell) for cell in (*names, *measures, ", ".join(map(str, seeds)))]


def _comparisons(results: Mapping[str, Any]) -> str:
    header = ("direction", "a", "b", "a minus b [95 %]", "p", "test", "n", "seeds")
    rows = [
        [
            *(
                row["direction"],
                row["a"],
                row["b"],
                _estimate(row, "difference"),
                _p_value(row["p"]).removeprefix("= "),
            ),
            *(row["test"], str(row["n"]), ", ".join(map(str, row["seeds"]))),
        ]
        for row in results["comparisons"]
    ]
    note = "<p>Paired by prompt; an interval that leaves out zero shows a difference.</p>"
    return note + _table(header, rows)


def _dose_response(results: Mapping[str, Any]) -> str:
    made = _choices(results)
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
    for number, name in enumerate(later):
        pair = {first: arms[first], name: arms[name]}
        title = f"Projection before and after: {name}"
        parts.append(_div(f"projection-{number}", plots.projection_heatmap(pair, tokens, layers, title=title)))
    return "\n".join(parts)


def _responses(responses: Sequence[Mapping[str, Any]]) -> str:
    """A row per prompt, a column per arm and direction; of each column its first seed."""
    answers: dict[tuple[str, str], dict[str, str]] = {}
    for (arm, direction), rows in _by(responses, "arm", "direction").items():
        first = rows[0]["seed"]
        answers[arm, direction] = {
            row["prompt"]: f'{escape(row["response"])}<span class="score">score {_number(row["score"])}</span>'
            for row in rows
            if row["seed"] == first
        }
    prompts = list(dict.fromkeys(row["prompt"] for row in responses))[:_PROMPTS_SHOWN]
    heads = "".join(
        f"<th>{escape(arm if direction == 'none' else f'{arm}, {direction}')}</th>" for arm, direction in answers
    )
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
        ["seed", str(results["seed"])],
        ["seeds of the arms", ", ".join(map(str, seeds))],
    ]
    rows += [[f"version of {name}", str(version)] for name, version in results["versions"].items()]
    rows += [[f"seconds for {stage}", f"{seconds:.1f}"] for stage, seconds in results["seconds"].items()]
    return _table(("what", "value"), rows)


def _per_set(name: str, draw: Any, results: Mapping[str, Any]) -> str:
    """One figure for every set of prompts and scorer, since scores of two scorers share no axis."""
    figures = []
    for number, ((prompts, scorer), rows) in enumerate(_by(results["summary"], "set", "scorer").items()):
        heading = f"<h3>{escape(f'{prompts} prompts, scored by {scorer}')}</h3>"
        figures.append(heading + _figure(f"{name}-{number}", draw, _drawn(rows)))
    return "\n".join(figures)


def _figure(name: str, draw: Any, rows: Sequence[Mapping[str, Any]], **options: Any) -> str:
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


def _by(rows: Iterable[Mapping[str, Any]], *keys: str) -> dict[tuple, list[Mapping[str, Any]]]:
    """The rows grouped by these keys, groups and rows in order of appearance."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _listed(rows: Sequence[Mapping[str, Any]], say: Any) -> str:
    """The rows told one after the other, with n and seeds once at the end where all share them."""
    samples = {_sample(row) for row in rows}
    if len(samples) == 1:
        return f"{'; '.join(say(row) for row in rows)} ({'each ' if len(rows) > 1 else ''}{samples.pop()})"
    return "; ".join(f"{say(row)} ({_sample(row)})" for row in rows)


def _sample(row: Mapping[str, Any]) -> str:
    return f"n = {row['n']}, {_seeds(row)}"


def _ns(results: Mapping[str, Any], key: str) -> str:
    return ", ".join(sorted({str(row[key]) for row in results["summary"]}))


def _seeds(row: Mapping[str, Any]) -> str:
    return f"{'seed' if len(row['seeds']) == 1 else 'seeds'} {', '.join(map(str, row['seeds']))}"


def _estimate(row: Mapping[str, Any], key: str = "mean", digits: int = 3) -> str:
    """`0.512 [0.430, 0.594]`; the interval of another measure than the score is in its own columns, if at all."""
    low, high = ("low", "high") if key in ("mean", "difference") else (f"{key}_low", f"{key}_high")
    interval = "" if row.get(low) is None else f" [{_number(row[low], digits)}, {_number(row[high], digits)}]"
    return _number(row[key], digits) + interval


def _brief(row: Mapping[str, Any], key: str = "mean") -> str:
    return _estimate(row, key, digits=2)


def _number(value: float | int | None, digits: int = 3) -> str:
    # Adding zero turns a rounded -0.0 into 0.0.
    return "–" if value is None or math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}"


def _p_value(p: float | int | None) -> str:
    return "–" if p is None else "< 0.001" if p < 0.001 else f"= {p:.3f}"


def _slug(name: str) -> str:
    return name.lower().replace(",", "").replace(" ", "-")


def _checked(results: Mapping[str, Any]) -> Mapping[str, Any]:
    _need("results.json", results, _KEYS)
    if results["schema"] != 1:
        raise ValueError(
            f"results.json: schema {results['schema']!r} came, 1 is wanted. Use the rt_lens that wrote it."
        )
    _need("results.json: choices", results["choices"], ("rule",))
    for direction, choice in _choices(results).items():
        _need(f"results.json: choices: {direction}", choice, ("layer", "multiplier", "why"))
    for key, columns in _COLUMNS.items():
        for row in results[key]:
            _need(f"results.json: {key}", row, columns)
    if not results["summary"]:
        raise ValueError("results.json: summary is empty, at least one arm is wanted.")
    return results


def _need(where: str, came: Mapping[str, Any], wanted: Sequence[str]) -> None:
    missing = [key for key in wanted if key not in came]
    if missing:
        raise ValueError(
            f"{where}: no key {', '.join(missing)} (came: {', '.join(came)}). Run the experiment again, to its end."
        )


def _choices(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {direction: choice for direction, choice in results["choices"].items() if direction != "rule"}


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"run_dir: {path} is not there. Run the experiment first, to its end.")
    return path.read_text(encoding="utf-8")


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as refusal:
        raise ValueError(f"{path}: not valid JSON ({refusal}).") from refusal
