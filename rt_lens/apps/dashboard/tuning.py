"""Tuning: a direction is tuned into the weights, with live losses and its effect inside the model."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from dash import Dash, Input, Output, dcc, html, no_update
from dash.development.base_component import Component
from flask import Response, abort, send_file

from rt_lens import plots
from rt_lens.apps.dashboard.panel import Work, choice, field, graph, workplace
from rt_lens.apps.dashboard.panel import connect as connect_work
from rt_lens.apps.dashboard.session import Session, provenance_text
from rt_lens.apps.dashboard.work import Job
from rt_lens.arms.inspection import residual_shifts, weight_changes
from rt_lens.arms.intervention import Intervention
from rt_lens.arms.projections import projection_changes
from rt_lens.common.parsing import layers_of, whole_number
from rt_lens.common.progress import Step, watched
from rt_lens.data.builtin import neutral_prompts
from rt_lens.data.contrast_pairs import ContrastPairs
from rt_lens.experiment.protocols import protocol_of
from rt_lens.models.forward import check_layers
from rt_lens.models.generation import as_chat
from rt_lens.plots.layers import without_first
from rt_lens.plots.style import LOSS_PARTS, with_minus_sign
from rt_lens.results.schema import choices_of
from rt_lens.steering.binding import ablate, add
from rt_lens.steering.edits import FwdHook
from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.delta import WeightDelta
from rt_lens.tuning.direction_targets import resolve_targets
from rt_lens.tuning.loop import tune
from rt_lens.tuning.losses import Direction
from rt_lens.tuning.targets import TokenTarget
from rt_lens.vectors.steering_vectors import SteeringVectors

PAGE, WEIGHTS = "tuning", "tuning-weights"
SLOTS = ("kept", "losses", "weights", "projections", "shifts")
SETTINGS = ("behaviour", "direction", "layers", "steps", "rate", "cosine", "token", "kl", "seed")
OF_FILE = SETTINGS[2:]  # settings whose defaults are in the behaviour's file
DIRECTIONS = {
    "away": "away from the vector", "toward": "toward the vector", "suppress": "suppress: no component either way",
}  # fmt: skip
N_NEUTRAL = 24  # the most neutral prompts for the KL term
MOST_STEPS, LARGEST_SEED = 10_000, 2**31 - 1
N_PROMPTS = 12  # validation prompts on which projections and shifts are measured
_BETWEEN = 0.3  # seconds between two drawings of the losses


def layout(session: Session) -> Component:
    intro = html.P(
        "Tuning moves the weights along a direction, or away from it. The model itself is unchanged: the result is a "
        "weight change that you can apply."
    )
    return html.Div([html.H2("Tuning"), intro, *_of_run(session), *_live(session)])


def _of_run(session: Session) -> list[Component]:
    """The losses of the run's tuned arms, and the projections of one text before and after."""
    if session.run is None:
        return []
    below = [html.P(html.A("Tune an arm of your own below", href=f"#{PAGE}-live"))] if session.has_model else []
    history = session.run.content["history"]
    losses = graph(plots.losses(history), f"{PAGE}-run-losses") if history else html.P("The run tuned nothing.")
    shown: list[Component] = [*below, html.H3("Results of the run"), losses]
    try:
        return [*shown, *_projections(session.run.projections())]
    except (FileNotFoundError, ValueError) as refusal:
        return [*shown, html.P(str(refusal), className="error")]


def _projections(projections: Mapping[str, Any]) -> list[Component]:
    """The mean projection of all arms by layer, and a map of each tuned arm beside the first arm."""
    arms = {name: np.asarray(values, dtype=float) for name, values in projections["arms"].items()}
    tokens, layers = projections["tokens"], projections["layers"]
    averaged, rest = without_first(arms, tokens)
    lines = plots.projection_by_layer(averaged, tokens=rest, layers=layers)
    shown: list[Component] = [graph(lines, f"{PAGE}-run-lines")]
    first, *others = arms
    for index, name in enumerate(name for name in others if "tuned" in name):
        pair, title = {first: arms[first], name: arms[name]}, f"Projection before and after: {name}"
        shown.append(graph(plots.projection_heatmap(pair, tokens, layers, title=title), f"{PAGE}-run-map-{index}"))
    return shown


def _live(session: Session) -> list[Component]:
    head = [html.H3("Live", id=f"{PAGE}-live")] if session.run is not None else []
    if not session.has_model:
        return [*head, html.P(f"{session.name} is not on this machine, so it cannot be tuned here.")]
    arms = field("Arm", choice(f"{WEIGHTS}-arm", session.deltas()))
    return [
        *head,
        workplace(PAGE, "Tune", _controls(session), SLOTS),
        html.H3("Changed weights of a tuned arm"),
        workplace(WEIGHTS, "Show", [arms], ("changes",)),
    ]


def connect(app: Dash, session: Session) -> None:
    connect_work(app, session, PAGE, partial(plan, session), [f"{PAGE}-{name}" for name in SETTINGS], SLOTS)
    connect_work(app, session, WEIGHTS, partial(plan_weights, session), [f"{WEIGHTS}-arm"], ("changes",))

    @app.callback(
        [Output(f"{PAGE}-{name}", "value") for name in OF_FILE],
        Input(f"{PAGE}-behaviour", "value"),
        prevent_initial_call=True,
    )
    def defaults(behaviour: str) -> list[Any]:
        return list(usual(session, behaviour).values())

    @app.callback(
        Output(f"{WEIGHTS}-arm", "options"), Output(f"{WEIGHTS}-arm", "value"), Input(f"{PAGE}-kept", "children"),
        prevent_initial_call=True,
    )  # fmt: skip
    def new_arm(note: Any) -> tuple[list[str], Any]:
        names = session.deltas()
        return names, names[-1] if note else no_update

    @app.server.route("/tuned/<path:name>.safetensors")
    def tuned(name: str) -> Response:
        # A link, because a callback of the page would hold a hundred megabytes as text, twice.
        if name not in session.deltas():
            abort(404)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "delta.safetensors"
            session.delta(name).save(file)
            content = io.BytesIO(file.read_bytes())
        return send_file(content, "application/octet-stream", as_attachment=True, download_name=f"{name}.safetensors")


def plan(
    session: Session, behaviour: str, direction: Direction, layers: str | None, steps: float | None, rate: float | None,
    cosine: float | None, token: float | None, kl: float | None, seed: float | None,
) -> tuple[str, Work]:  # fmt: skip
    """Checks the settings, which replace those of the behaviour's file, and returns the name and the work of the job.

    Raises:
        ValueError: names the control that is empty or out of range, or a layer for which there is no vector.
    """
    of_file = session.experiment(behaviour).tune
    weights = {"cosine weight": cosine, "token weight": token, "KL weight": kl}
    loss_weights = [_given(name, value) for name, value in weights.items()]
    learning_rate = _given("learning rate", rate)
    if not any(loss_weights[:2]):
        raise ValueError(
            "cosine weight or token weight must be above 0, got 0 for both, which leaves nothing to learn. Raise one."
        )
    n_steps = whole_number("steps", steps, 1, MOST_STEPS)
    config = replace(
        of_file, direction=direction, layers=layers_of(layers or ""), learning_rate=learning_rate,
        cosine_weight=loss_weights[0], token_weight=loss_weights[1], kl_weight=loss_weights[2],
        seed=whole_number("seed", seed, 0, LARGEST_SEED),
        max_steps=n_steps, epochs=max(of_file.epochs, n_steps),  # the steps alone set the length
    )  # fmt: skip
    check_layers(session.model, config.layers)
    check_layers(session.model, config.blocks)
    if session.has_vectors(behaviour):  # otherwise the job extracts vectors that fit
        _fitting(session, session.vectors(behaviour), config)
    return f"tuning {direction}", Tuning(session, behaviour, config).run


def plan_weights(session: Session, arm: str | None) -> tuple[str, Work]:
    """Returns the name and the work of the job that shows the changed weights of an arm.

    Raises:
        ValueError: if there is no arm yet.
    """
    if arm is None:
        raise ValueError("arm must name a tuned arm, and there is none yet. Tune one above first.")
    return f"comparing the weights of {arm}", lambda job: _show_weights(job, "changes", session, arm)


def _fitting(session: Session, vectors: SteeringVectors, config: TuneConfig) -> TuneConfig:
    """The config with the hook point of the vectors, which overrides that of the behaviour's file."""
    fitting = replace(config, hook=vectors.kind)
    resolve_targets(session.model, vectors, fitting)  # refuses a layer without a vector
    return fitting


def _given(name: str, value: float | None) -> float:
    if value is None:
        raise ValueError(f"{name} must be a number, got nothing. Type one.")
    return float(value)


def usual(session: Session, behaviour: str) -> dict[str, Any]:
    """The settings of the behaviour's file by control; layers by depth, if the model has fewer than the file names."""
    of_file, last = session.experiment(behaviour).tune, session.n_layers - 1
    layers = of_file.layers if max(of_file.layers) <= last else range(session.usual_layer, session.at_depth(0.8) + 1)
    return {
        "layers": ", ".join(map(str, layers)), "steps": of_file.max_steps, "rate": of_file.learning_rate,
        "cosine": of_file.cosine_weight, "token": of_file.token_weight, "kl": of_file.kl_weight, "seed": of_file.seed,
    }  # fmt: skip


class Tuning:
    """One tuning run, from its targets to its effect inside the model.

    Args:
        session: the model and its vectors.
        behaviour: the behaviour whose pairs, or questions, it learns from.
        config: its settings.
    """

    def __init__(self, session: Session, behaviour: str, config: TuneConfig) -> None:
        self.session, self.behaviour, self.config = session, behaviour, config
        self.arm = "rep_tuned" if config.cosine_weight else "token_tuned"
        self.columns = {"arm": self.arm, "direction": config.direction, "seed": config.seed}
        self.subject = behaviour

    def run(self, job: Job) -> None:
        session = self.session
        vectors = session.vectors(self.behaviour)
        self.config = config = _fitting(session, vectors, self.config)
        self.subject = f"{self.behaviour}: {provenance_text(vectors)}"
        for slot in SLOTS:
            job.show(slot, None)
        train, validation = self._targets()
        neutral = neutral_prompts()[: min(N_NEUTRAL, config.max_steps * config.neutral_batch_size)]
        with watched(_Losses(job, self)):
            delta = tune(
                session.model, vectors, train, config, validation=validation,
                neutral=neutral if config.kl_weight else (), progress=False,
            )  # fmt: skip
        self.draw(job, [{**self.columns, **row} for row in delta.history])
        name = _new_name(session, self.behaviour, f"{self.arm}_{config.direction}")
        session.keep_delta(name, delta)
        job.show("kept", _kept_note(name, config))
        job.watch(None)
        _show_weights(job, "weights", session, name)
        self._show_inside(job, vectors, delta)

    def _targets(self) -> tuple[ContrastPairs | list[TokenTarget], ContrastPairs | list[TokenTarget]]:
        """The training and validation targets of the behaviour's experiment."""
        experiment = self.session.experiment(self.behaviour)
        if experiment.honesty is None:  # its protocol would require as many test topics as a full run
            return self.session.pairs(self.behaviour)
        return protocol_of(experiment, self.session.model).targets(self.config.direction, self.config.seed)

    def draw(self, job: Job, history: list[dict[str, Any]]) -> None:
        title = f"Losses while tuning {self.config.direction}, seed {self.config.seed} ({self.subject})"
        job.show("losses", graph(plots.losses(history, title=title), f"{PAGE}-losses-graph"))

    def _show_inside(self, job: Job, vectors: SteeringVectors, delta: WeightDelta) -> None:
        """Shows how far tuning moves prompts along the vector, and whether it shifts activations as steering does."""
        model, config = self.session.model, self.config
        prompts = self.session.pairs(self.behaviour)[1].topics[:N_PROMPTS]
        hooks, dose = self._steering(vectors)
        arms: dict[str, Intervention] = {"steered": hooks, self.arm: delta}
        moved = projection_changes(model, vectors, as_chat(model, prompts), arms, seed=config.seed)
        title = f"Change of projection ({dose}; {self.subject})"
        job.show("projections", graph(plots.projection_changes(moved, title=title), f"{PAGE}-projections-graph"))
        job.watch(None)
        shifts = residual_shifts(model, arms, prompts, vectors, hook=vectors.kind, seed=config.seed)
        title = f"Tuned beside steered ({dose}; {self.subject})"
        drawn = plots.residual_shifts(shifts.along, shifts.between, title=title)
        job.show("shifts", graph(drawn, f"{PAGE}-shifts-graph"))

    def _steering(self, vectors: SteeringVectors) -> tuple[list[FwdHook], str]:
        """The steering to compare with, and its description: the run's choice for this behaviour, else a usual dose."""
        direction, run = self.config.direction, self.session.run
        layer, multiplier = self.session.usual_layer, -2.0 if direction == "away" else 2.0
        choices = choices_of(run.content) if run is not None and run.content["behaviour"] == self.behaviour else {}
        if chosen := choices.get(direction):
            layer, multiplier = int(chosen["layer"]), float(chosen["multiplier"])
        if direction == "suppress":
            return ablate(vectors, [layer], hook=vectors.kind), f"steered: ablated at layer {layer}"
        hooks = add(vectors, [layer], multiplier, hook=vectors.kind)
        return hooks, with_minus_sign(f"steered: layer {layer}, m = {multiplier:g}")


class _Losses:
    """Watches the progress bar of the tuning loop, and draws its losses."""

    def __init__(self, job: Job, tuning: Tuning) -> None:
        self.job, self.tuning = job, tuning
        self.rows: dict[int, dict[str, Any]] = {}
        self.values: Any = None
        self.drawn_at = 0.0

    def __call__(self, step: Step | None) -> None:
        self.job.watch(step)
        # The bar advances before it gets its numbers: until they change, they are those of the step before.
        if step is None or not step.values or step.values is self.values:
            return
        self.values = step.values
        parts = {part: float(step.values[part]) if part in step.values else None for part in LOSS_PARTS}
        self.rows[step.done] = {**self.tuning.columns, "step": step.done, "split": "train", **parts}
        if time.monotonic() - self.drawn_at > _BETWEEN:
            self.drawn_at = time.monotonic()
            self.tuning.draw(self.job, list(self.rows.values()))


def _show_weights(job: Job, slot: str, session: Session, arm: str) -> None:
    delta = session.delta(arm)
    behaviour = next((vectors.get("behaviour") for vectors in delta.config.get("vectors", ())), None)
    vectors = session.vectors(behaviour) if behaviour is not None and session.has_vectors(behaviour) else None
    kind, along = (
        (vectors.kind, f" (along {behaviour}: {provenance_text(vectors)})")
        if vectors is not None
        else ("resid_post", "")
    )
    title = f"Changed weights: {arm}{along}"
    drawn = plots.weight_changes(weight_changes(session.model, delta, vectors, hook=kind, progress=False), title=title)
    job.show(slot, graph(drawn, f"{PAGE}-{slot}-weights-graph"))


def _new_name(session: Session, behaviour: str, arm: str) -> str:
    """A name that no arm has yet; it includes the behaviour where that is not the run's."""
    of_run = session.run is not None and session.run.content["behaviour"] == behaviour
    first = arm if of_run else f"{arm} ({behaviour})"
    taken, number = session.deltas(), 1
    while (name := first if number == 1 else f"{first} {number}") in taken:
        number += 1
    return name


def _kept_note(name: str, config: TuneConfig) -> Component:
    note = (
        f"Kept as {name} (seed {config.seed}). The pages Explore and Compare offer it until this dashboard stops. The "
        "model itself is unchanged. "
    )
    link = html.A(
        "Download the weight change (.safetensors)",
        href=f"/tuned/{quote(name)}.safetensors",
        download=f"{name}.safetensors",
    )
    return html.P([note, link], role="status")


def _controls(session: Session) -> list[Component]:
    names = [name for name in session.behaviours() if name in session.with_pairs()]
    defaults, last = usual(session, names[0]), session.n_layers - 1

    def number(name: str, low: float = 0, step: float | str = "any") -> dcc.Input:
        return dcc.Input(id=f"{PAGE}-{name}", type="number", min=low, step=step, value=defaults[name])

    layers = dcc.Input(id=f"{PAGE}-layers", type="text", value=defaults["layers"])
    return [
        field("Behaviour", choice(f"{PAGE}-behaviour", names)),
        field("Direction", choice(f"{PAGE}-direction", DIRECTIONS, "away")),
        field("Layers", layers, f"of 0 to {last}, such as 20-24, at which the cosine loss reads activations"),
        field("Steps", number("steps", 1, 1), "fewer if the validation loss rises"),
        field("Learning rate", number("rate")),
        field("Cosine weight", number("cosine"), "0: a token-tuned arm, which learns from responses alone"),
        field("Token weight", number("token")),
        field("KL weight", number("kl"), f"keeps it close to the untuned model on up to {N_NEUTRAL} neutral prompts"),
        field("Seed", number("seed", 0, 1), "of the targets, their order, and the intervals"),
    ]
