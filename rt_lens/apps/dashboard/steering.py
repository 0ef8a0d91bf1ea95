"""Steering: which layer and multiplier move the behaviour's score, in a finished run and on settings of one's own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
from dash import Dash, dcc, html
from dash.development.base_component import Component

from rt_lens import plots
from rt_lens.apps.dashboard.panel import Work, choice, field, graph, table, workplace
from rt_lens.apps.dashboard.panel import connect as connect_work
from rt_lens.apps.dashboard.session import Session, made
from rt_lens.apps.dashboard.work import Job
from rt_lens.arms.sweeping import DoseResponse, sweep
from rt_lens.common.parsing import layers_of, multipliers_of, whole_number
from rt_lens.common.progress import Bar
from rt_lens.experiment.validation import validation_task
from rt_lens.plots.style import row_estimate
from rt_lens.results.schema import Results, choices_of

PAGE = "steering"
SLOTS = ("told", "heat", "dose", "table")
SETTINGS = ("behaviour", "layers", "multipliers", "prompts", "length")
MOST_PROMPTS, LONGEST = 200, 200
_DOSES = "-3,-1.5,0,1.5,3"


def layout(bench: Session) -> Component:
    intro = html.P(
        "The vector is added at a layer, times a multiplier; what does the behaviour's score do, and how surely?"
    )
    return html.Div([html.H2("Steering"), intro, *_of_run(bench.run), *_live(bench)])


def _of_run(run: Results | None) -> list[Component]:
    if run is None:
        return []
    content, made = run.content, choices_of(run.content)
    shown: list[Component] = [html.H3("What the run found")]
    if content["dose_response"]:
        rows = [{"seed": content["seed"], **row} for row in content["dose_response"]]
        chosen = [(choice["layer"], choice["multiplier"]) for choice in made.values()]
        shown.append(graph(plots.dose_response(rows, bound=content["bound"], chosen=chosen), "steering-run-dose"))
    choices = [
        html.Li([html.B(direction), f": layer {own['layer']}, multiplier {own['multiplier']:g}. {own['why']}"])
        for direction, own in made.items()
    ]
    return [*shown, html.P([html.B("Rule. "), content["choices"]["rule"]]), html.Ul(choices)]


def _live(bench: Session) -> list[Component]:
    head = [html.H3("Live")] if bench.run is not None else []
    if not bench.has_model:
        return [*head, html.P(f"{bench.name} is not on this machine, so nothing can be steered here.")]
    known = [name for name in bench.behaviours() if name in bench.with_pairs()]
    controls = [
        field("Behaviour", choice("steering-behaviour", known)),
        field(
            "Layers", dcc.Input(id="steering-layers", type="text", value=_usual_layers(bench)),
            f"blocks 0 to {bench.n_layers - 1}, such as 14-22 or 14,18",
        ),
        field(
            "Multipliers", dcc.Input(id="steering-multipliers", type="text", value=_DOSES),
            "times the vector's own length; 0 is the unsteered model",
        ),
        field(
            "Prompts", dcc.Input(id="steering-prompts", value=6, type="number", step=1),
            "of validation topics; as many as there are, if fewer",
        ),
        field(
            "New tokens", dcc.Input(id="steering-length", value=20, type="number", step=1),
            "of each answer; honesty weighs options and writes none",
        ),
    ]  # fmt: skip
    return [*head, workplace(PAGE, "Steer and score", controls, SLOTS)]


def _usual_layers(bench: Session) -> str:
    """Four in the second half, where steering tends to work."""
    return ",".join(dict.fromkeys(str(bench.at_depth(share)) for share in (0.5, 0.6, 0.7, 0.8)))


def connect(app: Dash, bench: Session) -> None:
    connect_work(app, bench, PAGE, partial(plan, bench), [f"{PAGE}-{name}" for name in SETTINGS], SLOTS)


def plan(
    bench: Session,
    behaviour: str,
    layers: str | None,
    multipliers: str | None,
    prompts: float | None,
    length: float | None,
) -> tuple[str, Work]:
    """The settings checked, and the work that they ask for.

    Raises:
        ValueError: if a text cannot be read, a layer is not in the model, or a number is missing or out of range.
    """
    chosen, doses = list(dict.fromkeys(layers_of(layers or ""))), multipliers_of(multipliers or "")
    if max(chosen) >= bench.n_layers:
        raise ValueError(f"layers contains {max(chosen)}, but this model has blocks 0..{bench.n_layers - 1}.")
    if 0 not in doses or len(set(doses)) < 3:
        raise ValueError(
            "multipliers must be at least three different numbers, and 0, the unsteered model, must be one of them, "
            f"got {multipliers}. Try -2,0,2."
        )
    n_prompts = whole_number("prompts", prompts, 2, MOST_PROMPTS)
    n_tokens = whole_number("new tokens", length, 1, LONGEST)
    return "steering", partial(_steer, bench, behaviour, chosen, doses, n_prompts, n_tokens)


def _steer(
    bench: Session, behaviour: str, layers: list[int], doses: list[float], n_prompts: int, n_tokens: int, job: Job
) -> None:  # fmt: skip
    model, vectors, experiment = bench.model, bench.vectors(behaviour), bench.experiment(behaviour)
    vectors.at_layers(layers, vectors.kind)  # refuses a layer without a vector before any of the work is done
    task = validation_task(experiment, model, n_tokens, n_prompts)
    responses: list[DoseResponse] = []
    with TemporaryDirectory() as folder:
        kept = Path(folder) / "sweep.json"  # so that multiplier 0, which is the same at every layer, runs once
        for layer in Bar(layers, desc="steering", unit="layer", disable=True):
            found = sweep(
                model, vectors, task, layers=[layer], multipliers=doses, hook=vectors.kind, path=kept,
                progress=False,
            )  # fmt: skip
            responses.append(found.dose_response(layer))
            scored = found.metric if experiment.honesty is None else "likelihood share of the right options"
            _show(job, responses, found.prompts, scored, f"{behaviour}: {made(vectors)}")


def _show(job: Job, responses: list[DoseResponse], prompts: list[str], scored: str, said: str) -> None:
    """What is known after some layers; `scored` and `said`, of the vectors, are safe to draw."""
    steepest = max(responses, key=lambda response: abs(response.slope.mean))
    summary = pd.concat([response.summary for response in responses])
    job.show("told", _told(responses, steepest))
    title = f"Steering: {scored} ({said})"
    job.show("heat", graph(plots.sweep(summary, title=title), "steering-heat-graph"))
    words = dict(enumerate(prompts))
    by_prompt = steepest.table.assign(prompt=steepest.table["prompt"].map(words))
    title = f"Layer {steepest.layer}: {scored} ({said})"
    job.show("dose", graph(plots.steerability(by_prompt, steepest.summary, title=title), "steering-dose-graph"))
    job.show("table", _table(summary))


def _table(summary: pd.DataFrame) -> Component:
    cells: Any = summary.to_dict("records")
    rows = [
        {
            "layer": cell["layer"],
            "multiplier": f"{cell['multiplier']:g}",
            "mean score [95 %]": row_estimate(cell),
            "n": cell["n"],
        }
        for cell in cells
    ]
    seeds = ", ".join(map(str, summary["seed"].unique()))
    return table(rows, f"Mean score of the validation prompts, bootstrap interval over prompts; seed {seeds}")


def _told(responses: list[DoseResponse], steepest: DoseResponse) -> Component:
    """Each layer in a sentence, the steepest first."""
    caution = (
        f" It was picked as the steepest of {len(responses)} on these very prompts, which flatters it."
        if len(responses) > 1
        else ""
    )
    first = html.P([html.B("Steepest. "), f"{steepest}.{caution}"])
    rest = [html.Li(f"{response}.") for response in responses if response is not steepest]
    return html.Div([first, *([html.P("The other layers:"), html.Ul(rest)] if rest else [])])
