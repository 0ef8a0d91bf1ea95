"""Vectors: the evidence for the directions of a finished run, and of your own pairs, method and seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dash import Dash, Input, Output, State, dcc, html, no_update
from dash.development.base_component import Component

from rt_lens import plots
from rt_lens.apps.dashboard.panel import Work, choice, field, graph, table, workplace
from rt_lens.apps.dashboard.panel import connect as connect_work
from rt_lens.apps.dashboard.session import N_PAIRS, SEED, Session, provenance_text
from rt_lens.apps.dashboard.work import Job
from rt_lens.common.parsing import whole_number
from rt_lens.data.contrast_pairs import ContrastPairs
from rt_lens.plots.style import row_estimate
from rt_lens.results.schema import Results
from rt_lens.vectors.geometry import activation_map, cosines, norms
from rt_lens.vectors.methods import METHODS
from rt_lens.vectors.reading import logit_lens
from rt_lens.vectors.steering_vectors import SteeringVectors, hook_names
from rt_lens.vectors.validation import VectorValidation, validate_vectors

PAGE = "vectors"
SLOTS = ("summary", "validation", "map", "norms", "cosines", "table", "lens")
SETTINGS = ("behaviour", "method", "pairs", "seed")
MOST_PAIRS, LARGEST_SEED = 2000, 2**31 - 1
METHOD_LABELS = {
    "mean_diff": "difference of means",
    "pca": "principal component of the differences",
    "logistic": "logistic regression",
    "mass_mean": "mass mean",
    "leace": "LEACE, least-squares concept erasure",
    "random": "random directions, as a control",
}
_SHOWN = 60  # pairs on the map, and prompts whose norms are measured; more would overlap


def layout(session: Session) -> Component:
    intro = html.P(
        "A good direction separates held-out pairs, and two halves of the training data give the same direction."
    )
    below = html.P(html.A("Extract vectors of your own below", href="#vectors-live"))
    link = [below] if session.run is not None and session.has_model else []
    return html.Div([html.H2("Vectors"), intro, *link, *_of_run(session.run), *_live(session)])


def _of_run(run: Results | None) -> list[Component]:
    if run is None:
        return []
    content = run.content
    separable = [{"seed": content["seed"], **row} for row in content["separability"]]
    shown: list[Component] = [html.H3("Results of the run")]
    if separable:
        shown.append(graph(plots.separability(separable), "vectors-run-separability"))
    if (run.folder / "vectors.safetensors").is_file():
        shown.append(_cosines(run))
    if content["logit_lens"]:
        lens = graph(plots.logit_lens(content["logit_lens"]), "vectors-run-lens")
        shown.append(html.Details([html.Summary("Logit lens of the vectors"), lens]))
    return shown


def _cosines(run: Results) -> Component:
    name = str(run.content["behaviour"])
    try:
        between = cosines({name: SteeringVectors.load(run.file("vectors.safetensors"))})
    except ValueError as refusal:  # another run may have replaced the files
        return html.P(str(refusal), className="error")
    title = f"{name}: do the layers' vectors agree?"
    return graph(plots.cosines(between, title=title), "vectors-run-cosines")


def _live(session: Session) -> list[Component]:
    head = [html.H3("Live", id="vectors-live")] if session.run is not None else []
    if not session.has_model:
        return [*head, html.P(f"{session.name} is not on this machine, so vectors cannot be extracted here.")]
    known = [name for name in session.behaviours() if name in session.with_pairs()]
    controls = [
        field("Behaviour", choice("vectors-behaviour", known)),
        field("Method", choice("vectors-method", {name: METHOD_LABELS.get(name, name) for name in METHODS})),
        field(
            "Pairs", dcc.Input(id="vectors-pairs", value=N_PAIRS, type="number", step=1),
            "of training topics; all of them, if there are fewer",
        ),
        field(
            "Seed", dcc.Input(id="vectors-seed", value=SEED, type="number", step=1),
            "of the sample of pairs and of every interval",
        ),
    ]  # fmt: skip
    return [*head, workplace(PAGE, "Extract and validate", controls, SLOTS), dcc.Download(id="vectors-download")]


def connect(app: Dash, session: Session) -> None:
    connect_work(app, session, PAGE, partial(plan, session), [f"{PAGE}-{name}" for name in SETTINGS], SLOTS)

    @app.callback(
        output={
            "file": Output("vectors-download", "data"),
            "error": Output("vectors-error", "children", allow_duplicate=True),
        },
        inputs={"pressed": Input("vectors-save", "n_clicks"), "current": State("vectors-current", "data")},
        prevent_initial_call=True,
    )
    def download(pressed: int | None, current: Mapping[str, str] | None) -> dict[str, Any]:
        if not pressed or current is None:  # the button is new on the page
            return {"file": no_update, "error": no_update}
        try:
            return {"file": as_download(session, current["key"]), "error": ""}
        except ValueError as refusal:
            return {"file": no_update, "error": str(refusal)}

    _connect_use(app, session, Input("vectors-use", "n_clicks"), use)
    _connect_use(
        app,
        session,
        Input("vectors-back", "n_clicks"),
        lambda session, current: session.forget_kept(current["behaviour"]),
    )
    # Another tab or job may have changed the vectors in use by the next visit.
    _connect_use(app, session, Input("url", "pathname"), lambda session, current: None)


def _connect_use(
    app: Dash, session: Session, pressed: Input, act: Callable[[Session, Mapping[str, str]], None]
) -> None:
    """Connects a button to an action on the vectors on the page, and updates the line that says which are in use."""

    @app.callback(
        output={
            "in_use": Output("vectors-in-use", "children", allow_duplicate=True),
            "back_off": Output("vectors-back", "disabled", allow_duplicate=True),
            "error": Output("vectors-error", "children", allow_duplicate=True),
        },
        inputs={"pressed": pressed, "current": State("vectors-current", "data")},
        prevent_initial_call=True,
    )
    def press(pressed: int | str | None, current: Mapping[str, str] | None) -> dict[str, Any]:
        if not pressed or current is None:  # the button is new on the page
            return {"in_use": no_update, "back_off": no_update, "error": no_update}
        try:
            act(session, current)
        except ValueError as refusal:
            return {"in_use": no_update, "back_off": no_update, "error": str(refusal)}
        return {"in_use": in_use(session, current), "back_off": not session.has_kept(current["behaviour"]), "error": ""}


def plan(session: Session, behaviour: str, method: str, pairs: float | None, seed: float | None) -> tuple[str, Work]:
    """Checks the settings, and returns the name and the work of the job.

    Raises:
        ValueError: if a number is missing or out of range, or there is no such method.
    """
    n_pairs = whole_number("pairs", pairs, 4, MOST_PAIRS)
    drawn = whole_number("seed", seed, 0, LARGEST_SEED)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    return "extracting vectors", partial(_extract, session, behaviour, method, n_pairs, drawn)


def as_download(session: Session, key: str) -> Mapping[str, Any]:
    """The safetensors file of vectors from `set_aside`, as a download.

    Raises:
        ValueError: if they are no longer kept, as after a restart.
    """
    behaviour, vectors = session.aside(key)
    with TemporaryDirectory() as folder:
        content = vectors.save(Path(folder) / "vectors.safetensors").read_bytes()
    return dcc.send_bytes(content, f"{behaviour}_{vectors.provenance.method}.safetensors")


def use(session: Session, current: Mapping[str, str]) -> None:
    """Makes all pages use the vectors on this page.

    Args:
        session: the session that keeps them.
        current: their key and behaviour.

    Raises:
        ValueError: if they are no longer kept.
    """
    session.keep_vectors(*session.aside(current["key"]))


def in_use(session: Session, current: Mapping[str, str]) -> str:
    """Says which vectors all pages use: those on this page, or others."""
    behaviour = current["behaviour"]
    if not session.has_kept(behaviour):
        origin = (
            provenance_text(session.vectors(behaviour))
            if session.has_vectors(behaviour)
            else "extracted when first needed"
        )
        return f"All pages use {session.origin(behaviour)} for {behaviour} ({origin}), not these."
    kept = session.vectors(behaviour)
    try:
        these = session.aside(current["key"])[1] is kept
    except ValueError:  # no message until the user asks for them
        these = False
    if these:
        return f"All pages use these for {behaviour} from now on ({provenance_text(kept)})."
    return f"All pages use others for {behaviour}, extracted on this page ({provenance_text(kept)}), not these."


def _extract(session: Session, behaviour: str, method: str, n_pairs: int, seed: int, job: Job) -> None:
    model, (train, held_out) = session.model, session.pairs(behaviour)
    result = validate_vectors(model, train.sample(n_pairs, seed), held_out, method=method, seed=seed)
    key = session.set_aside(behaviour, result.vectors)
    job.show("summary", _summary_part(session, {"key": key, "behaviour": behaviour}, result, held_out))
    title = f"{behaviour}, {METHOD_LABELS.get(method, method)}: can these vectors be trusted?"
    figure = plots.validation(
        result.layers, result.learning, result.cosines, recommended=result.recommended, title=title
    )
    job.show("validation", graph(figure, "vectors-validation-graph"))
    job.show("table", _layers(result))
    layers = _map_layers(session, result.best)
    mapped = activation_map(model, held_out.sample(_SHOWN, seed), layers=layers, seed=seed)
    job.show("map", graph(plots.activation_map(mapped), "vectors-map-graph"))
    job.watch(None)
    lengths = norms(model, result.vectors, held_out.topics[:_SHOWN], seed=seed)
    job.show("norms", graph(plots.norms(lengths), "vectors-norms-graph"))
    job.show("cosines", _beside_others(session, behaviour, result))
    job.show("lens", graph(plots.logit_lens(logit_lens(model, result.vectors)), "vectors-lens-graph"))


def _summary_part(
    session: Session, remembered: Mapping[str, str], result: VectorValidation, held_out: ContrastPairs
) -> Component:
    """The recommendation in a sentence, and buttons for the vectors."""
    behaviour = remembered["behaviour"]
    buttons = [
        html.Button("Download the vectors", id="vectors-save"),
        html.Button("Use these on all pages", id="vectors-use"),
        html.Button(
            f"Use {session.origin(behaviour)} again", id="vectors-back", disabled=not session.has_kept(behaviour)
        ),
    ]  # fmt: skip
    return html.Div(
        [
            html.P([html.B("Recommended. "), result.reason]),
            html.P(
                f"Extracted from {result.vectors.provenance.n_pairs} training pairs, tested on pairs of "
                f"{len(held_out.topics)} validation topics; seed {result.seed}."
            ),
            html.Div(buttons, className="buttons"),
            html.P(in_use(session, remembered), id="vectors-in-use", className="note", role="status"),
            dcc.Store(id="vectors-current", data=dict(remembered)),
        ]
    )


def _layers(result: VectorValidation) -> Component:
    measured: Any = result.layers.to_dict("records")
    rows = [
        {
            "layer": row["layer"],
            "pair accuracy [95 %]": row_estimate(row, "accuracy"),
            "AUC [95 %]": row_estimate(row, "auc"),
            "cosine of two halves [95 %]": row_estimate(row, "stability"),
            "n": row["n"],
        }
        for row in measured
    ]
    return table(rows, f"Each layer on held-out pairs, one per topic; seed {result.seed}")


def _beside_others(session: Session, behaviour: str, result: VectorValidation) -> Component | None:
    """Cosines with the vectors of other behaviours at the best layer; None if there are no others."""
    layer = result.best if result.best is not None else int(result.layers["layer"].iloc[-1])
    (name,) = hook_names([layer], "resid_post")
    others = [other for other in session.behaviours() if other != behaviour and session.has_vectors(other)]
    by_behaviour = {behaviour: result.vectors, **{other: session.vectors(other) for other in others}}
    fitting = {other: vectors for other, vectors in by_behaviour.items() if name in vectors.hook_names}
    if len(fitting) < 2:
        return None
    title = f"Do behaviours share a direction? Layer {layer}"
    return graph(plots.cosines(cosines(fitting, layers=[layer]), title=title), "vectors-cosines-graph")


def _map_layers(session: Session, best: int | None) -> list[int]:
    """The layers of the maps: an early one, the best or a middle one, and the last."""
    return sorted({session.at_depth(0.25), session.at_depth(0.5) if best is None else best, session.at_depth(1)})
