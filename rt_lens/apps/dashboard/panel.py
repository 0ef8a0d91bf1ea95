"""The parts of every page: labelled controls, a figure, a table, and a button that starts a job."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import unescape
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from dash import Dash, Input, Output, State, dcc, html, no_update
from dash.development.base_component import Component
from dash.exceptions import PreventUpdate

from rt_lens.apps.dashboard.session import Session
from rt_lens.apps.dashboard.work import Job, progress_text
from rt_lens.common.formatting import number
from rt_lens.plots.style import take_title, with_minus_sign

TICK = 100  # milliseconds between two requests for the state of a job
# A new request cancels one that is still pending, so a busy server needs a long interval; a server that is gone needs
# a request now and then.
_PATIENCE = 5000
# Plotly's toolbar could send a chart to the company's cloud; the pages send nothing away.
_CONFIG: Any = {"displaylogo": False, "showSendToCloud": False, "typesetMath": False, "responsive": True}
_RESTARTED = "The dashboard was restarted, which ended this job. Press the button again."

Work = Callable[[Job], Any]


def named(label: str) -> dict[str, Any]:
    """The name of a part for screen readers."""
    return {"aria-label": label}


def field(label: str, control: Component, note: str = "") -> html.Div:
    """A control below its label, which screen readers read out; `note` gives units or limits."""
    name = str(getattr(control, "id", ""))
    notes = [html.Span(note, className="note")] if note else []
    return html.Div([html.Label(label, htmlFor=name, id=f"{name}-label"), control, *notes], className="field")


def choice(name: str, options: Sequence[str] | Mapping[str, str], value: str | None = None) -> dcc.Dropdown:
    """A drop-down; `options` are values, or value -> label."""
    labels = options if isinstance(options, Mapping) else {option: option for option in options}
    entries = [{"label": label, "value": option} for option, label in labels.items()]
    return dcc.Dropdown(id=name, options=entries, value=value or next(iter(labels), None), clearable=False)


def slider(
    name: str, low: float, high: float, step: float, value: float, marks: Iterable[float] | Mapping[int, str]
) -> dcc.Slider:
    """A slider with marks at some values; its value changes when the user lets go.

    Marks that map value -> label stand for things without a number of their own, so no number can be typed.
    """
    typed = not isinstance(marks, Mapping)
    labels: Any = dict(marks) if isinstance(marks, Mapping) else {mark: f"{mark:g}" for mark in marks}
    return dcc.Slider(
        id=name, min=low, max=high, step=step, value=value, marks=labels, updatemode="mouseup", included=typed,
        allow_direct_input=typed,
    )  # fmt: skip


def graph(figure: go.Figure, name: str | None = None) -> html.Figure:
    """A figure on the page; with a name it stays in place while its content changes."""
    title = unescape(figure.layout.title.text or "figure")
    content = dcc.Graph(id=name, figure=figure, config=_CONFIG) if name else dcc.Graph(figure=figure, config=_CONFIG)
    return html.Figure(content, role="figure", **named(title))


def captioned(figure: go.Figure, name: str) -> html.Figure:
    """The same with its title as text of the page, which wraps in a narrow window; `figure` loses the title."""
    heading, subtitle = take_title(figure)
    caption = html.Figcaption([html.B(heading), f" {subtitle}"], className="note")
    content = dcc.Graph(id=name, figure=figure, config=_CONFIG)
    return html.Figure([caption, content], role="figure", **named(heading))


def table(rows: pd.DataFrame | Sequence[Mapping[str, Any]], caption: str, digits: int = 3) -> html.Div:
    """A table with a caption; numbers are rounded, and a missing value is a dash."""
    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
    head = html.Tr([html.Th(str(column), scope="col") for column in frame.columns])
    body = [html.Tr([html.Td(_cell(value, digits)) for value in row]) for row in frame.itertuples(index=False)]
    content = html.Table([html.Caption(caption), html.Thead(head), html.Tbody(body)])
    return html.Div(content, className="scroll", tabIndex=0, role="region", **named(caption))


def _cell(value: Any, digits: int) -> str:
    if isinstance(value, float):
        return with_minus_sign(number(value, digits))
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "–" if value is None else str(value)


def workplace(page: str, button: str, controls: Sequence[Component], slots: Sequence[str]) -> html.Div:
    """Controls with a button that starts a job, its progress, and the slots that it fills with results.

    Args:
        page: the prefix of all ids.
        button: the label of the button.
        controls: parts from `field`.
        slots: names of the parts of the page that the job fills, from top to bottom.
    """
    return html.Div(
        [
            html.Div(
                [
                    *controls,
                    html.Div(
                        [
                            html.Button(button, id=f"{page}-start", className="start"),
                            html.Button("Stop", id=f"{page}-stop", disabled=True),
                        ],
                        className="buttons",
                    ),
                    html.Progress(id=f"{page}-bar", value="0", max="1", **named("progress")),
                    html.P(id=f"{page}-status", className="note", role="status"),
                    html.P(id=f"{page}-error", className="error", role="alert"),
                ],
                className="controls",
            ),
            html.Div([html.Div(id=f"{page}-{slot}") for slot in slots], className="results"),
            dcc.Store(id=f"{page}-job"),
            dcc.Store(id=f"{page}-seen", data={}),
            dcc.Interval(id=f"{page}-tick", interval=TICK, disabled=True),
        ],
        className="workplace",
    )


def connect(
    app: Dash, session: Session, page: str, plan: Callable[..., tuple[str, Work]], settings: Sequence[str],
    slots: Sequence[str], again: Sequence[str] = (),
) -> None:  # fmt: skip
    """Callbacks of a `workplace`.

    Args:
        app: the Dash app.
        session: the model, vectors and arms of the pages.
        page: as for `workplace`.
        plan: takes the values of the settings and returns the name of the job and its work, a function of the Job that
            fills slots with `job.show`. The page shows the message of a ValueError in either.
        settings: ids of the controls, in the order of `plan`'s arguments.
        slots: as for `workplace`.
        again: settings whose change restarts the job, once the button has been pressed.
    """

    def out(part: str, attribute: str, *, shared: bool = False) -> Output:
        return Output(f"{page}-{part}", attribute, allow_duplicate=shared)

    @app.callback(
        output={"job": out("job", "data"), "error": out("error", "children")},
        inputs={
            "pressed": Input(f"{page}-start", "n_clicks"),
            "changed": [Input(name, "value") for name in again],
            "values": [State(name, "value") for name in settings],
            "before": State(f"{page}-job", "data"),
        },
        prevent_initial_call=True,
    )
    def start(pressed: int | None, changed: Any, values: Sequence[Any], before: str | None) -> dict[str, Any]:
        if not pressed:  # the controls are new on the page, or change before the first press
            return {"job": no_update, "error": no_update}
        empty = [name.removeprefix(f"{page}-") for name, value in zip(again, changed, strict=True) if value is None]
        if empty:  # the user is typing a new number beside a slider
            return {"job": no_update, "error": f"{empty[0]} must be a number, got nothing. Type one."}
        try:
            name, work = plan(*values)
        except ValueError as refusal:
            return {"job": no_update, "error": str(refusal)}
        session.jobs.stop(before)
        return {"job": session.jobs.start(name, work), "error": ""}

    @app.callback(
        output={
            "status": out("status", "children"), "error": out("error", "children", shared=True),
            "done": out("bar", "value"), "total": out("bar", "max"), "stop_off": out("stop", "disabled"),
            "off": out("tick", "disabled"), "seen": out("seen", "data"),
            "slots": [out(slot, "children") for slot in slots],
        },
        inputs={
            "_": Input(f"{page}-tick", "n_intervals"),
            "key": Input(f"{page}-job", "data"),
            "seen": State(f"{page}-seen", "data"),
        },
        running=[(out("tick", "interval"), _PATIENCE, TICK)],
        prevent_initial_call=True,
    )  # fmt: skip
    def tick(_: int | None, key: str | None, seen: Mapping[str, int]) -> dict[str, Any]:
        if key is None:  # the page is new
            raise PreventUpdate
        job = session.jobs.get(key)
        if job is None:
            stopped = {"status": "", "error": _RESTARTED, "done": "0", "total": "1", "stop_off": True, "off": True}
            return {**stopped, "seen": {}, "slots": [no_update] * len(slots)}
        ended = job.ended  # read before the slots, or the last content could be missed
        now = {f"{key} {slot}": version for slot, version in list(job.versions.items())}
        new = [
            job.shown[slot] if now.get(f"{key} {slot}", 0) > seen.get(f"{key} {slot}", 0) else no_update
            for slot in slots
        ]
        if any(content is not no_update for content in new):
            job.fetched.set()
        if ended:  # content of an earlier job would look like a result of this one
            new = [content if slot in job.shown else None for slot, content in zip(slots, new, strict=True)]
        step = next(iter(job.unfinished), None)
        done, total = (str(step.done), str(step.total or 1)) if step and not ended else (str(int(ended)), "1")
        return {
            "status": progress_text(job, session.jobs.before(job)), "error": job.error or no_update,
            "done": done, "total": total, "stop_off": ended, "off": ended, "seen": now, "slots": new,
        }  # fmt: skip

    @app.callback(Input(f"{page}-stop", "n_clicks"), State(f"{page}-job", "data"), prevent_initial_call=True)
    def stop(_: int | None, key: str | None) -> None:
        session.jobs.stop(key)
