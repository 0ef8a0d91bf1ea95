"""Steering: the score by layer and multiplier, in a finished run and with your own settings."""

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
from rt_lens.apps.dashboard.session import Session, provenance_text
from rt_lens.apps.dashboard.work import Job
from rt_lens.arms.sweeping import DoseResponse, sweep
from rt_lens.common.parsing import layers_of, multipliers_of, whole_number
from rt_lens.common.progress import Bar
from rt_lens.experiment.validation import validation_task
from rt_lens.plots.style import row_estimate
from rt_lens.results.schema import Results, choices_of

PAGE = "steering"
SLOTS = ("summary", "heat", "dose", "table")
SETTINGS = ("behaviour", "layers", "multipliers", "prompts", "length")
MOST_PROMPTS, LONGEST = 200, 200
_DOSES = "-3,-1.5,0,1.5,3"


def layout(session: Session) -> Component:
    intro = html.P("The vector is added at a layer, times a multiplier. How does the score of the behaviour change?")
    return html.Div([html.H2("Steering"), intro, *_of_run(session.run), *_live(session)])


def _of_run(run: Results | None) -> list[Component]:
    if run is None:
        return []
    content, chosen_settings = run.content, choices_of(run.content)
    shown: list[Component] = [html.H3("Results of the run")]
    if content["dose_response"]:
        rows = [{"seed": content["seed"], **row} for row in content["dose_response"]]
        chosen = [(choice["layer"], choice["multiplier"]) for choice in chosen_settings.values()]
        shown.append(graph(plots.dose_response(rows, bound=content["bound"], chosen=chosen), "steering-run-dose"))
    choices = [
        html.Li([html.B(direction), f": layer {choice['layer']}, multiplier {choice['multiplier']:g}. {choice['why']}"])
        for direction, choice in chosen_settings.items()
    ]
    return [*shown, html.P([html.B("Rule. "), content["choices"]["rule"]]), html.Ul(choices)]


def _live(session: Session) -> list[Component]:
    head = [html.H3("Live")] if session.run is not None else []
    if not session.has_model:
        return [*head, html.P(f"{session.name} is not on this machine, so it cannot be steered here.")]
    known = [name for name in session.behaviours() if name in session.with_pairs()]
    controls = [
        field("Behaviour", choice("steering-behaviour", known)),
        field(
            "Layers", dcc.Input(id="steering-layers", type="text", value=_usual_layers(session)),
            f"blocks 0 to {session.n_layers - 1}, such as 14-22 or 14,18",
        ),
        field(
            "Multipliers", dcc.Input(id="steering-multipliers", type="text", value=_DOSES),
            "times the vector's own length; 0 is the unsteered model",
        ),
        field(
            "Prompts", dcc.Input(id="steering-prompts", value=6, type="number", step=1),
            "of validation topics; all of them, if there are fewer",
        ),
        field(
            "New tokens", dcc.Input(id="steering-length", value=20, type="number", step=1),
            "of each response; honesty compares options and generates nothing",
        ),
    ]  # fmt: skip
    return [*head, workplace(PAGE, "Steer and score", controls, SLOTS)]


def _usual_layers(session: Session) -> str:
    """Four layers in the second half, where steering tends to work."""
    return ",".join(dict.fromkeys(str(session.at_depth(share)) for share in (0.5, 0.6, 0.7, 0.8)))


def connect(app: Dash, session: Session) -> None:
    connect_work(app, session, PAGE, partial(plan, session), [f"{PAGE}-{name}" for name in SETTINGS], SLOTS)


def plan(
    session: Session,
    behaviour: str,
    layers: str | None,
    multipliers: str | None,
    prompts: float | None,
    length: float | None,
) -> tuple[str, Work]:
    """Checks the settings, and returns the name and the work of the job.

    Raises:
        ValueError: if a text cannot be parsed, a layer is not in the model, or a number is missing or out of range.
    """
    chosen, doses = list(dict.fromkeys(layers_of(layers or ""))), multipliers_of(multipliers or "")
    if max(chosen) >= session.n_layers:
        raise ValueError(f"layers contains {max(chosen)}, but this model has blocks 0..{session.n_layers - 1}.")
    if 0 not in doses or len(set(doses)) < 3:
        raise ValueError(
            "multipliers must be at least three different numbers, and 0, the unsteered model, must be one of them, "
            f"got {multipliers}. Try -2,0,2."
        )
    n_prompts = whole_number("prompts", prompts, 2, MOST_PROMPTS)
    n_tokens = whole_number("new tokens", length, 1, LONGEST)
    return "steering", partial(_steer, session, behaviour, chosen, doses, n_prompts, n_tokens)


def _steer(
    session: Session, behaviour: str, layers: list[int], doses: list[float], n_prompts: int, n_tokens: int, job: Job
) -> None:  # fmt: skip
    model, vectors, experiment = session.model, session.vectors(behaviour), session.experiment(behaviour)
    vectors.at_layers(layers, vectors.kind)  # refuses a layer without a vector before any work
    task = validation_task(experiment, model, n_tokens, n_prompts)
    responses: list[DoseResponse] = []
    with TemporaryDirectory() as folder:
        kept = Path(folder) / "sweep.json"  # so that multiplier 0, the same at every layer, runs once
        for layer in Bar(layers, desc="steering", unit="layer", disable=True):
            result = sweep(
                model, vectors, task, layers=[layer], multipliers=doses, hook=vectors.kind, path=kept, progress=False
            )  # fmt: skip
            responses.append(result.dose_response(layer))
            metric_name = result.metric if experiment.honesty is None else "likelihood share of the right options"
            _show(job, responses, result.prompts, metric_name, f"{behaviour}: {provenance_text(vectors)}")


def _show(job: Job, responses: list[DoseResponse], prompts: list[str], metric: str, vectors: str) -> None:
    """Shows the results so far; `vectors` is the text of their origin."""
    steepest = max(responses, key=lambda response: abs(response.slope.mean))
    summary = pd.concat([response.summary for response in responses])
    job.show("summary", _summary_text(responses, steepest))
    title = f"Steering: {metric} ({vectors})"
    job.show("heat", graph(plots.sweep(summary, title=title), "steering-heat-graph"))
    by_prompt = steepest.table.assign(prompt=steepest.table["prompt"].map(dict(enumerate(prompts))))
    title = f"Layer {steepest.layer}: {metric} ({vectors})"
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


def _summary_text(responses: list[DoseResponse], steepest: DoseResponse) -> Component:
    """A sentence for every layer, the steepest first."""
    caution = (
        f" It is the steepest of {len(responses)} layers on these same prompts, so its slope is optimistic."
        if len(responses) > 1
        else ""
    )
    first = html.P([html.B("Steepest. "), f"{steepest}.{caution}"])
    rest = [html.Li(f"{response}.") for response in responses if response is not steepest]
    return html.Div([first, *([html.P("The other layers:"), html.Ul(rest)] if rest else [])])
