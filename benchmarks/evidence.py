"""Keeps what a run found as small JSON, and draws every table and picture of the documentation from what was kept.

    python benchmarks/evidence.py keep runs/mood_full   # writes benchmarks/results/mood_full.json
    python benchmarks/evidence.py draw                  # README.md, benchmarks/README.md, benchmarks/pictures

Other scripts here write their results there themselves, with tables of rows under the key `tables`.

A document marks the place of a table with the comments `<!-- evidence: mood_full scores away -->` and `<!-- end -->`;
what stands between them is written anew. The tables: `TABLES` below.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import unescape
from pathlib import Path
from typing import Any

import typer

import rt_lens as rtl
from rt_lens.apps.report.labels import Row, brief, estimate, grouped, of_first_scorer, p_value
from rt_lens.apps.report.labels import number as said
from rt_lens.apps.report.verdict import first_rows, gap_sentences, picture, searched, sureness, verdict
from rt_lens.common.files import write_atomically
from rt_lens.results.persona_effect import persona_warnings

HERE = Path(__file__).parent
RESULTS, PICTURES = HERE / "results", HERE / "pictures"
DOCUMENTS = (HERE.parent / "README.md", HERE / "README.md")
KEPT = (
    "schema", "behaviour", "description", "model", "versions", "seed", "seed_draws", "reproducibility", "protocol",
    "choices", "summary", "side_effects", "comparisons", "persona_effect", "at_kl", "inside", "search", "seconds",
)  # fmt: skip
_PLACE = re.compile(r"(?P<open><!-- evidence: (?P<what>[^>]+?) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def keep(run: Path) -> None:
    """Writes the results of a finished run, without its responses, as benchmarks/results/NAME.json."""
    path = RESULTS / f"{run.resolve().name}.json"
    write_atomically(path, kept(rtl.load_results(run).content).encode())
    typer.echo(f"Saved {path} ({path.stat().st_size / 1000:.0f} kB).")


@app.command()
def draw() -> None:
    """Draws the pictures of all kept results, and writes the tables into the documents."""
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    PICTURES.mkdir(exist_ok=True)
    for name, content in results.items():
        if "at_kl" in content and (figure := picture(content, content["at_kl"]["stated"])) is not None:
            rtl.save_figure(figure, PICTURES / f"{name}.png", scale=1.5)
    for document in DOCUMENTS:
        write_atomically(document, filled(document.read_text(encoding="utf-8"), results).encode())


def kept(content: Mapping[str, Any]) -> str:
    """What is kept of results.json: a row to a line, six digits, settings texts left to the file that they name."""
    about = {name: content.get(name) for name in KEPT}  # files of before lack seed_draws
    told = ("command", "call", "file", "sha256")
    about["reproducibility"] = {name: (content.get("reproducibility") or {}).get(name) for name in told}
    return _lines(_rounded(about)) + "\n"


def filled(text: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """A document with its tables written anew."""

    def table(place: re.Match[str]) -> str:
        name, kind, *options = place["what"].split()
        own = results.get(name, {}).get("tables", {})
        if name not in results or kind not in (own or TABLES):
            raise ValueError(
                f"a place must name kept results ({', '.join(results)}) and a table ({', '.join(own or TABLES)}), got "
                f"{place['what']!r}. Correct the comment."
            )
        drawn = rows_as_table(own[kind]) if own else TABLES[kind](results[name], *options)
        return f"{place['open']}\n{drawn}\n\n{place['end']}"

    return _PLACE.sub(table, text)


def rows_as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as they are: a column for each key, a number beside its interval where NAME_low and NAME_high are there."""
    ends = {f"{name}{end}" for name in rows[0] for end in ("_low", "_high")}
    heads = [name for name in rows[0] if name not in ends]

    def cell(row: Mapping[str, Any], name: str) -> str:
        value = row[name]
        if f"{name}_low" in row:
            return estimate(row, name)
        if isinstance(value, float):
            return said(value, 0 if value.is_integer() else 3)
        return "–" if value is None else str(value)

    return _table([head.replace("_", " ") for head in heads], ([cell(row, name) for name in heads] for row in rows))


def write(name: str, about: Mapping[str, Any], tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Keeps tables of another script: benchmarks/results/NAME.json."""
    path = RESULTS / f"{name}.json"
    write_atomically(path, (_lines(_rounded({**about, "tables": tables})) + "\n").encode())
    return path


def scores(content: Mapping[str, Any], direction: str) -> str:
    """Score of each arm at each budget, with what else it does at the stated one."""
    at_kl = content["at_kl"]
    budgets = at_kl["kl"]
    rows = [row for row in first_rows(at_kl["table"]) if row["direction"] in (direction, "none")]
    own = f"KL on own prompts at {at_kl['stated']:g}"
    heads = ["arm", "as it is", *(f"KL {budget:g}" for budget in budgets), own, "seeds"]
    lines = []
    for (arm,), of_arm in grouped(rows, "arm").items():
        by_budget = {row["budget"]: row for row in of_arm}
        cells = [brief(by_budget[budget]) if budget in by_budget else "–" for budget in budgets]
        alone = by_budget.get(None)  # the untuned model, or an arm without a strength
        as_it_is = "–" if alone is None else f"{brief(alone)} (KL {said(alone['kl'])})"
        lines.append([arm, as_it_is, *cells, _own_kl(content, arm, direction), _seeds(of_arm[0]["seeds"])])
    return _table(heads, lines)


def costs(content: Mapping[str, Any], direction: str) -> str:
    """KL reached on other texts, repetition, and the first scorer of each side set, at the stated budget."""
    rows = [row for row in [*content["summary"], *content["side_effects"]] if row["direction"] in (direction, "none")]
    test = rows[0]["set"]
    columns = {"repetition": {row["arm"]: row for row in rows if (row["set"], row["scorer"]) == (test, "repetition")}}
    for name, of_set in of_first_scorer(rows).items():
        if name != test:
            columns[f"{name} ({of_set[0]['scorer']})"] = {row["arm"]: row for row in of_set}
    lines = [
        [
            row["arm"],
            estimate(row, "kl", 4),
            *(brief(of[row["arm"]]) if row["arm"] in of else "–" for of in columns.values()),
        ]
        for row in of_first_scorer(rows)[test]
    ]
    return _table(["arm", "KL reached on other texts", *columns], lines)


def reached(content: Mapping[str, Any]) -> str:
    """KL on texts that set no strength, as a ratio to the budget: mean over seeds, toward and away."""
    budgets, rows = content["at_kl"]["kl"], first_rows(content["at_kl"]["table"])
    lines = []
    for (arm,), of_arm in grouped((row for row in rows if row["budget"] is not None), "arm").items():
        cells = ([said(row["kl"] / budget, 2) for row in of_arm if row["budget"] == budget] for budget in budgets)
        lines.append([arm, *("; ".join(cell) or "–" for cell in cells)])
    return _table(["arm", *(f"KL {budget:g}" for budget in budgets)], lines)


def comparisons(content: Mapping[str, Any]) -> str:
    """The comparisons stated before the run."""
    return _table(
        ["difference", "direction", "of scores", "p", "p after Holm", "n", "seeds"],
        [
            [f"{row['a']} − {row['b']}", row["a_direction"], brief(row, "difference"), p_value(row["p"]).strip("= "),
             p_value(row["p_holm"]).strip("= "), row["n"], _seeds(row["seeds"])]
            for row in content["comparisons"]
        ],
    )  # fmt: skip


def search(content: Mapping[str, Any]) -> str:
    """For each arm the file's settings beside the best trial of the search."""
    lines = []
    for (arm,), trials in grouped(content["search"]["table"], "arm").items():
        first, best = trials[0], next((row for row in trials if row["chosen"]), None)
        if best is None:
            lines.append([arm, first["reason"], "–", "–", "–"])
            continue
        settings = ", ".join(f"{name} {_setting(value)}" for name, value in best["settings"].items())
        same = best["number"] == first["number"]
        told = ["–" if first["effect"] is None else _effect(first), "the same" if same else _effect(best)]
        lines.append([arm, *told, "–" if same else settings, said(best["own_kl"])])
    heads = ["arm", "file's settings", f"best of {content['search']['trials']}", "settings found", "KL on own prompts"]
    return _table(heads, lines)


def inside(content: Mapping[str, Any], direction: str) -> str:
    """Inside each arm at the stated KL: the shift after the last block, likelihoods, rank of the weight change."""
    found, lines = content["inside"], []
    layer = max(row["layer"] for row in found["shifts"])
    mine = {name: [row for row in rows if row["direction"] == direction] for name, rows in found.items()}
    for row in (row for row in mine["shifts"] if row["layer"] == layer):
        changes = [{**of, "mean": of["change"]} for of in mine["likelihoods"] if of["arm"] == row["arm"]]
        likelihoods = {of["set"]: brief(of) for of in changes}
        ranks = sorted(
            of["effective_rank"]
            for of in mine["weights"]
            if of["arm"] == row["arm"] and of["effective_rank"] is not None
        )
        lines.append(
            [row["arm"], estimate(row, "along", 2), estimate(row, "share", 2),
             *(likelihoods.get(name, "–") for name in ("own", "toward", "away")),
             f"{said(ranks[0], 0)} to {said(ranks[-1], 0)}" if ranks else "–"]
        )  # fmt: skip
    heads = ["arm", f"shift along the vector, block {layer}", "its share of the shift", "own responses", "toward's",
             "away's", "effective rank of the weight change, by block"]  # fmt: skip
    return _table(heads, lines)


def sentences(content: Mapping[str, Any]) -> str:
    """What the report's first screen says, a sentence to a line."""
    found = [*persona_warnings(content["persona_effect"]), *verdict(content), searched(content), sureness(content)]
    return "\n".join(f"- {unescape(sentence)}" for sentence in found)


def gaps(content: Mapping[str, Any]) -> str:
    """The arms that miss a budget, with the reason."""
    found = [line for budget in content["at_kl"]["kl"] for line in gap_sentences(content["at_kl"], budget)]
    return "\n".join(f"- {line}" for line in found) or "Every arm with a strength reaches every budget."


TABLES: dict[str, Callable[..., str]] = {
    table.__name__: table for table in (scores, costs, reached, comparisons, search, inside, sentences, gaps)
}


def _own_kl(content: Mapping[str, Any], arm: str, direction: str) -> str:
    """KL on the untuned responses to the test prompts: with its interval, or over seeds with their range."""
    of_arm = [row for row in content["at_kl"]["strengths"] if (row["arm"], row["direction"]) == (arm, direction)]
    rows = [row for row in of_arm if row["budget"] in (None, content["at_kl"]["stated"]) and row["own_kl"] is not None]
    values = sorted(row["own_kl"] for row in rows)
    if len(values) < 2:
        return estimate(rows[0], "own_kl") if rows else "–"
    return f"{said(sum(values) / len(values))} (seeds {said(values[0])} to {said(values[-1])})"


def _effect(trial: Row) -> str:
    return brief({"mean": trial["effect"], **trial})


def _seeds(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _setting(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(part, int) for part in value):
        return f"{value[0]} to {value[-1]}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value


def _lines(value: Any, indent: str = "") -> str:
    """JSON with a line for each key of the outer tables and each row of a list of rows."""
    deeper = indent + " "
    if isinstance(value, dict) and any(isinstance(part, dict | list) for part in value.values()):
        parts = [f"{json.dumps(key)}: {_lines(part, deeper)}" for key, part in value.items()]
        return "{\n" + ",\n".join(deeper + part for part in parts) + "\n" + indent + "}"
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return "[\n" + ",\n".join(deeper + json.dumps(part) for part in value) + "\n" + indent + "]"
    return json.dumps(value)


if __name__ == "__main__":
    app()
