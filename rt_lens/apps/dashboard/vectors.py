"""Vectors: how far directions may be trusted, in a finished run and for pairs, method and seed of one's own choice."""

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
from rt_lens.apps.dashboard.session import N_PAIRS, SEED, Session, made
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
SLOTS = ("told", "trust", "map", "norms", "cosines", "table", "lens")
SETTINGS = ("behaviour", "method", "pairs", "seed")
MOST_PAIRS, LARGEST_SEED = 2000, 2**31 - 1
SAID = {
    "mean_diff": "difference of means",
    "pca": "principal component of the differences",
    "logistic": "logistic regression",
    "mass_mean": "mass mean",
    "leace": "LEACE, least-squares concept erasure",
    "random": "random directions, as a control",
}
_SHOWN = 60  # pairs on the map, and prompts whose lengths are measured; more only hide each other


def layout(bench: Session) -> Component:
    intro = html.P(
        "A direction is worth using if it tells pairs apart that it was not made from, and halves of the data agree."
    )
    below = html.P(html.A("Find vectors of your own, below", href="#vectors-live"))
    link = [below] if bench.run is not None and bench.has_model else []
    return html.Div([html.H2("Vectors"), intro, *link, *_of_run(bench.run), *_live(bench)])


def _of_run(run: Results | None) -> list[Component]:
    if run is None:
        return []
    content = run.content
    separable = [{"seed": content["seed"], **row} for row in content["separability"]]
    shown: list[Component] = [html.H3("What the run found")]
    if separable:
        shown.append(graph(plots.separability(separable), "vectors-run-separability"))
    if (run.folder / "vectors.safetensors").is_file():
        shown.append(_cosines(run))
    if content["logit_lens"]:
        lens = graph(plots.logit_lens(content["logit_lens"]), "vectors-run-lens")
        shown.append(html.Details([html.Summary("What the vectors say in words (logit lens)"), lens]))
    return shown


def _cosines(run: Results) -> Component:
    name = str(run.content["behaviour"])
    try:
        between = cosines({name: SteeringVectors.load(run.file("vectors.safetensors"))})
    except ValueError as refusal:  # another run has taken the place of this one since
        return html.P(str(refusal), className="error")
    title = f"{name}: do the layers' vectors agree?"
    return graph(plots.cosines(between, title=title), "vectors-run-cosines")


def _live(bench: Session) -> list[Component]:
    head = [html.H3("Live", id="vectors-live")] if bench.run is not None else []
    if not bench.has_model:
        return [*head, html.P(f"{bench.name} is not on this machine, so no vectors can be found here.")]
    known = [name for name in bench.behaviours() if name in bench.with_pairs()]
    controls = [
        field("Behaviour", choice("vectors-behaviour", known)),
        field("Method", choice("vectors-method", {name: SAID.get(name, name) for name in METHODS})),
        field(
            "Pairs", dcc.Input(id="vectors-pairs", value=N_PAIRS, type="number", step=1),
            "of training topics; as many as there are, if fewer",
        ),
        field(
            "Seed", dcc.Input(id="vectors-seed", value=SEED, type="number", step=1),
            "of the choice of pairs and of every interval",
        ),
    ]  # fmt: skip
    return [*head, workplace(PAGE, "Find and judge", controls, SLOTS), dcc.Download(id="vectors-download")]


def connect(app: Dash, bench: Session) -> None:
    connect_work(app, bench, PAGE, partial(plan, bench), [f"{PAGE}-{name}" for name in SETTINGS], SLOTS)

    @app.callback(
        output={
            "file": Output("vectors-download", "data"),
            "error": Output("vectors-error", "children", allow_duplicate=True),
        },
        inputs={"pressed": Input("vectors-save", "n_clicks"), "found": State("vectors-found", "data")},
        prevent_initial_call=True,
    )
    def download(pressed: int | None, found: Mapping[str, str] | None) -> dict[str, Any]:
        if not pressed or found is None:  # the button has just been laid out
            return {"file": no_update, "error": no_update}
        try:
            return {"file": as_download(bench, found["key"]), "error": ""}
        except ValueError as refusal:
            return {"file": no_update, "error": str(refusal)}

    _connect_use(app, bench, Input("vectors-use", "n_clicks"), use)
    _connect_use(
        app, bench, Input("vectors-back", "n_clicks"), lambda bench, found: bench.forget_kept(found["behaviour"])
    )
    # Another tab, or another search, may have put others in use by the next visit.
    _connect_use(app, bench, Input("url", "pathname"), lambda bench, found: None)


def _connect_use(app: Dash, bench: Session, pressed: Input, act: Callable[[Session, Mapping[str, str]], None]) -> None:
    """What is done with the vectors that stand on the page, and the line that says which are in use after it."""

    @app.callback(
        output={
            "in_use": Output("vectors-in-use", "children", allow_duplicate=True),
            "back_off": Output("vectors-back", "disabled", allow_duplicate=True),
            "error": Output("vectors-error", "children", allow_duplicate=True),
        },
        inputs={"pressed": pressed, "found": State("vectors-found", "data")},
        prevent_initial_call=True,
    )
    def press(pressed: int | str | None, found: Mapping[str, str] | None) -> dict[str, Any]:
        if not pressed or found is None:  # the button has just been laid out
            return {"in_use": no_update, "back_off": no_update, "error": no_update}
        try:
            act(bench, found)
        except ValueError as refusal:
            return {"in_use": no_update, "back_off": no_update, "error": str(refusal)}
        return {"in_use": in_use(bench, found), "back_off": not bench.has_kept(found["behaviour"]), "error": ""}


def plan(bench: Session, behaviour: str, method: str, pairs: float | None, seed: float | None) -> tuple[str, Work]:
    """The settings checked, and the work that they ask for.

    Raises:
        ValueError: if a number is missing or out of range, or there is no such method.
    """
    n_pairs = whole_number("pairs", pairs, 4, MOST_PAIRS)
    drawn = whole_number("seed", seed, 0, LARGEST_SEED)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    return "finding vectors", partial(_find, bench, behaviour, method, n_pairs, drawn)


def as_download(bench: Session, key: str) -> Mapping[str, Any]:
    """The file that `save` writes of vectors that were set aside, as a browser takes it.

    Raises:
        ValueError: if they are gone, as after a restart.
    """
    behaviour, vectors = bench.aside(key)
    with TemporaryDirectory() as folder:
        content = vectors.save(Path(folder) / "vectors.safetensors").read_bytes()
    return dcc.send_bytes(content, f"{behaviour}_{vectors.provenance.method}.safetensors")


def use(bench: Session, found: Mapping[str, str]) -> None:
    """Puts the vectors that stand on the page in use on all pages.

    Args:
        bench: where they were set aside.
        found: what the page remembers of them: key and behaviour.

    Raises:
        ValueError: if they are gone.
    """
    bench.keep_vectors(*bench.aside(found["key"]))


def in_use(bench: Session, found: Mapping[str, str]) -> str:
    """Which vectors all pages use, seen from those that stand on the page."""
    behaviour = found["behaviour"]
    if not bench.has_kept(behaviour):
        said = made(bench.vectors(behaviour)) if bench.has_vectors(behaviour) else "made when first needed"
        return f"All pages use {bench.origin(behaviour)} for {behaviour} ({said}), not these."
    kept = bench.vectors(behaviour)
    try:
        these = bench.aside(found["key"])[1] is kept
    except ValueError:  # which the reader need not know before asking for them
        these = False
    if these:
        return f"All pages use these for {behaviour} from now on ({made(kept)})."
    return f"All pages use others for {behaviour}, found on this page ({made(kept)}), not these."


def _find(bench: Session, behaviour: str, method: str, n_pairs: int, seed: int, job: Job) -> None:
    model, (train, held_out) = bench.model, bench.pairs(behaviour)
    chosen = train.sample(n_pairs, seed)
    found = validate_vectors(model, chosen, held_out, method=method, seed=seed)
    key = bench.set_aside(behaviour, found.vectors)
    job.show("told", _told(bench, {"key": key, "behaviour": behaviour}, found, held_out))
    title = f"{behaviour}, {SAID.get(method, method)}: are the vectors to be trusted?"
    figure = plots.validation(found.layers, found.learning, found.cosines, recommended=found.recommended, title=title)
    job.show("trust", graph(figure, "vectors-trust-graph"))
    job.show("table", _layers(found))
    layers = _few(bench, found.best)
    mapped = activation_map(model, held_out.sample(_SHOWN, seed), layers=layers, seed=seed)
    job.show("map", graph(plots.activation_map(mapped), "vectors-map-graph"))
    job.watch(None)
    lengths = norms(model, found.vectors, held_out.topics[:_SHOWN], seed=seed)
    job.show("norms", graph(plots.norms(lengths), "vectors-norms-graph"))
    job.show("cosines", _beside_others(bench, behaviour, found))
    job.show("lens", graph(plots.logit_lens(logit_lens(model, found.vectors)), "vectors-lens-graph"))


def _told(bench: Session, remembered: Mapping[str, str], found: VectorValidation, held_out: ContrastPairs) -> Component:
    """What was found in a sentence, and what may be done with it."""
    behaviour = remembered["behaviour"]
    buttons = [
        html.Button("Download the vectors", id="vectors-save"),
        html.Button("Use these on all pages", id="vectors-use"),
        html.Button(
            f"Use {bench.origin(behaviour)} again", id="vectors-back", disabled=not bench.has_kept(behaviour)
        ),
    ]  # fmt: skip
    return html.Div(
        [
            html.P([html.B("Recommended. "), found.reason]),
            html.P(
                f"From {found.vectors.provenance.n_pairs} training pairs, tried on pairs of {len(held_out.topics)} "
                f"validation topics; seed {found.seed}."
            ),
            html.Div(buttons, className="buttons"),
            html.P(in_use(bench, remembered), id="vectors-in-use", className="note", role="status"),
            dcc.Store(id="vectors-found", data=dict(remembered)),
        ]
    )


def _layers(found: VectorValidation) -> Component:
    measured: Any = found.layers.to_dict("records")
    rows = [
        {
            "layer": row["layer"],
            "pair accuracy [95 %]": row_estimate(row, "accuracy"),
            "AUC [95 %]": row_estimate(row, "auc"),
            "halves agree, cosine [95 %]": row_estimate(row, "stability"),
            "n": row["n"],
        }
        for row in measured
    ]
    return table(rows, f"Each layer on held-out pairs, one of each topic; seed {found.seed}")


def _beside_others(bench: Session, behaviour: str, found: VectorValidation) -> Component | None:
    """Cosines with the other behaviours whose vectors are here, at the best layer; nothing where it stands alone."""
    layer = found.best if found.best is not None else int(found.layers["layer"].iloc[-1])
    (name,) = hook_names([layer], "resid_post")
    others = [each for each in bench.behaviours() if each != behaviour and bench.has_vectors(each)]
    here = {behaviour: found.vectors, **{each: bench.vectors(each) for each in others}}
    fitting = {each: own for each, own in here.items() if name in own.hook_names}
    if len(fitting) < 2:
        return None
    title = f"Do behaviours share a direction? Layer {layer}"
    return graph(plots.cosines(cosines(fitting, layers=[layer]), title=title), "vectors-cosines-graph")


def _few(bench: Session, best: int | None) -> list[int]:
    """The layers to draw a map of: an early one, the best or a middle one, and the last."""
    return sorted({bench.at_depth(0.25), bench.at_depth(0.5) if best is None else best, bench.at_depth(1)})
