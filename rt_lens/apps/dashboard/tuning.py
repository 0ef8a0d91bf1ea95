"""Tuning: a direction tuned into the weights while one watches, and what it did inside, here and in a finished run."""

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
from rt_lens.apps.dashboard.session import Session, made
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
OF_FILE = SETTINGS[2:]  # those that the behaviour's file has a say in
DIRECTIONS = {
    "away": "away from the vector", "toward": "toward the vector", "suppress": "out: no component left, either way",
}  # fmt: skip
N_NEUTRAL = 24  # prompts that the KL term may read
MOST_STEPS, LARGEST_SEED = 10_000, 2**31 - 1
N_PROMPTS = 12  # validation prompts on which the change inside is measured
_BETWEEN = 0.3  # seconds between two drawings of the losses


def layout(bench: Session) -> Component:
    intro = html.P(
        "A direction is trained into the weights, or out of them. The model stays as it was: what comes out is a "
        "change to put on."
    )
    return html.Div([html.H2("Tuning"), intro, *_of_run(bench), *_live(bench)])


def _of_run(bench: Session) -> list[Component]:
    """The losses of the run's tuned arms, and one text's projections before and after."""
    if bench.run is None:
        return []
    below = [html.P(html.A("Tune an arm of your own, below", href=f"#{PAGE}-live"))] if bench.has_model else []
    history = bench.run.content["history"]
    losses = graph(plots.losses(history), f"{PAGE}-run-losses") if history else html.P("The run tuned nothing.")
    shown: list[Component] = [*below, html.H3("What the run found"), losses]
    try:
        return [*shown, *_projections(bench.run.projections())]
    except (FileNotFoundError, ValueError) as refusal:
        return [*shown, html.P(str(refusal), className="error")]


def _projections(found: Mapping[str, Any]) -> list[Component]:
    """The lines of all arms, and a map of each tuned arm against the first."""
    arms = {name: np.asarray(values, dtype=float) for name, values in found["arms"].items()}
    tokens, layers = found["tokens"], found["layers"]
    averaged, rest = without_first(arms, tokens)
    lines = plots.projection_by_layer(averaged, tokens=rest, layers=layers)
    shown: list[Component] = [graph(lines, f"{PAGE}-run-lines")]
    first, *others = arms
    for place, name in enumerate(name for name in others if "tuned" in name):
        pair, title = {first: arms[first], name: arms[name]}, f"Projection before and after: {name}"
        shown.append(graph(plots.projection_heatmap(pair, tokens, layers, title=title), f"{PAGE}-run-map-{place}"))
    return shown


def _live(bench: Session) -> list[Component]:
    head = [html.H3("Live", id=f"{PAGE}-live")] if bench.run is not None else []
    if not bench.has_model:
        return [*head, html.P(f"{bench.name} is not on this machine, so nothing can be tuned here.")]
    arms = field("Arm", choice(f"{WEIGHTS}-arm", bench.deltas()))
    return [
        *head,
        workplace(PAGE, "Tune", _controls(bench), SLOTS),
        html.H3("Weights of a tuned arm"),
        workplace(WEIGHTS, "Show them", [arms], ("found",)),
    ]


def connect(app: Dash, bench: Session) -> None:
    connect_work(app, bench, PAGE, partial(plan, bench), [f"{PAGE}-{name}" for name in SETTINGS], SLOTS)
    connect_work(app, bench, WEIGHTS, partial(plan_weights, bench), [f"{WEIGHTS}-arm"], ("found",))

    @app.callback(
        [Output(f"{PAGE}-{name}", "value") for name in OF_FILE],
        Input(f"{PAGE}-behaviour", "value"),
        prevent_initial_call=True,
    )
    def its_own(behaviour: str) -> list[Any]:
        return list(usual(bench, behaviour).values())

    @app.callback(
        Output(f"{WEIGHTS}-arm", "options"), Output(f"{WEIGHTS}-arm", "value"), Input(f"{PAGE}-kept", "children"),
        prevent_initial_call=True,
    )  # fmt: skip
    def kept(told: Any) -> tuple[list[str], Any]:
        names = bench.deltas()
        return names, names[-1] if told else no_update

    @app.server.route("/tuned/<path:name>.safetensors")
    def tuned(name: str) -> Response:
        # By a link of its own: through the page's callbacks a hundred megabytes would be held as text, twice.
        if name not in bench.deltas():
            abort(404)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "delta.safetensors"
            bench.delta(name).save(file)
            content = io.BytesIO(file.read_bytes())
        return send_file(content, "application/octet-stream", as_attachment=True, download_name=f"{name}.safetensors")


def plan(
    bench: Session, behaviour: str, direction: Direction, layers: str | None, steps: float | None, rate: float | None,
    cosine: float | None, token: float | None, kl: float | None, seed: float | None,
) -> tuple[str, Work]:  # fmt: skip
    """The work of the button Tune: the behaviour's own settings, with those of the controls in their place.

    Raises:
        ValueError: names the control that is empty or out of range, or a layer for which there is no vector.
    """
    own = bench.experiment(behaviour).tune
    weights = {"cosine weight": cosine, "token weight": token, "KL weight": kl}
    each, learning_rate = [_given(name, value) for name, value in weights.items()], _given("learning rate", rate)
    if not any(each[:2]):
        raise ValueError(
            "cosine weight or token weight must be above 0, got 0 for both, which leaves nothing to learn. Raise one."
        )
    n_steps = whole_number("steps", steps, 1, MOST_STEPS)
    config = replace(
        own, direction=direction, layers=layers_of(layers or ""), learning_rate=learning_rate,
        cosine_weight=each[0], token_weight=each[1], kl_weight=each[2],
        seed=whole_number("seed", seed, 0, LARGEST_SEED),
        max_steps=n_steps, epochs=max(own.epochs, n_steps),  # the steps alone say how long
    )  # fmt: skip
    check_layers(bench.model, config.layers)
    check_layers(bench.model, config.blocks)
    if bench.has_vectors(behaviour):  # else they will be made, and fit
        _fitting(bench, bench.vectors(behaviour), config)
    return f"tuning {direction}", Tuning(bench, behaviour, config).run


def plan_weights(bench: Session, arm: str | None) -> tuple[str, Work]:
    """The work of the button under a tuned arm's name.

    Raises:
        ValueError: if there is no arm yet.
    """
    if arm is None:
        raise ValueError("arm must name a tuned arm, and there is none yet. Tune one above first.")
    return f"looking at {arm}", lambda job: _show_weights(job, "found", bench, arm)


def _fitting(bench: Session, vectors: SteeringVectors, config: TuneConfig) -> TuneConfig:
    """The config with the vectors' own kind of hook point, whatever the behaviour's file says."""
    found = replace(config, hook=vectors.kind)
    resolve_targets(bench.model, vectors, found)  # refuses what cannot be tuned along
    return found


def _given(name: str, value: float | None) -> float:
    if value is None:
        raise ValueError(f"{name} must be a number, got nothing. Type one.")
    return float(value)


def usual(bench: Session, behaviour: str) -> dict[str, Any]:
    """The settings that the behaviour's file asks for, by control; layers by depth, where the file's are too deep."""
    own, last = bench.experiment(behaviour).tune, bench.n_layers - 1
    layers = own.layers if max(own.layers) <= last else range(bench.usual_layer, bench.at_depth(0.8) + 1)
    return {
        "layers": ", ".join(map(str, layers)), "steps": own.max_steps, "rate": own.learning_rate,
        "cosine": own.cosine_weight, "token": own.token_weight, "kl": own.kl_weight, "seed": own.seed,
    }  # fmt: skip


class Tuning:
    """One tuning run, from its targets to what it did inside.

    Args:
        bench: the model and its vectors.
        behaviour: whose pairs, or questions, it learns from.
        config: how.
    """

    def __init__(self, bench: Session, behaviour: str, config: TuneConfig) -> None:
        self.bench, self.behaviour, self.config = bench, behaviour, config
        self.arm = "rep_tuned" if config.cosine_weight else "token_tuned"
        self.about = {"arm": self.arm, "direction": config.direction, "seed": config.seed}
        self.said = behaviour

    def run(self, job: Job) -> None:
        bench = self.bench
        vectors = bench.vectors(self.behaviour)
        self.config = config = _fitting(bench, vectors, self.config)
        self.said = f"{self.behaviour}: {made(vectors)}"
        for slot in SLOTS:
            job.show(slot, None)
        train, validation = self._targets()
        neutral = neutral_prompts()[: min(N_NEUTRAL, config.max_steps * config.neutral_batch_size)]
        with watched(_Losses(job, self)):
            delta = tune(
                bench.model, vectors, train, config, validation=validation, neutral=neutral if config.kl_weight else (),
                progress=False,
            )  # fmt: skip
        self.draw(job, [{**self.about, **row} for row in delta.history])
        name = _free(bench, self.behaviour, f"{self.arm}_{config.direction}")
        bench.keep_delta(name, delta)
        job.show("kept", _kept(name, config))
        job.watch(None)
        _show_weights(job, "weights", bench, name)
        self._show_inside(job, vectors, delta)

    def _targets(self) -> tuple[ContrastPairs | list[TokenTarget], ContrastPairs | list[TokenTarget]]:
        """What the experiment would train and validate on."""
        experiment = self.bench.experiment(self.behaviour)
        if experiment.honesty is None:  # its protocol would ask for as many test topics as a whole run needs
            return self.bench.pairs(self.behaviour)
        return protocol_of(experiment, self.bench.model).targets(self.config.direction, self.config.seed)

    def draw(self, job: Job, history: list[dict[str, Any]]) -> None:
        title = f"Losses while tuning {self.config.direction}, seed {self.config.seed} ({self.said})"
        job.show("losses", graph(plots.losses(history, title=title), f"{PAGE}-losses-graph"))

    def _show_inside(self, job: Job, vectors: SteeringVectors, delta: WeightDelta) -> None:
        """How far it moves validation prompts along the vector, and whether it does there what steering does."""
        model, config = self.bench.model, self.config
        prompts = self.bench.pairs(self.behaviour)[1].topics[:N_PROMPTS]
        hooks, told = self._steering(vectors)
        arms: dict[str, Intervention] = {"steered": hooks, self.arm: delta}
        moved = projection_changes(model, vectors, as_chat(model, prompts), arms, seed=config.seed)
        title = f"Change of projection ({told}; {self.said})"
        job.show("projections", graph(plots.projection_changes(moved, title=title), f"{PAGE}-projections-graph"))
        job.watch(None)
        shifts = residual_shifts(model, arms, prompts, vectors, hook=vectors.kind, seed=config.seed)
        title = f"Tuned beside steered ({told}; {self.said})"
        drawn = plots.residual_shifts(shifts.along, shifts.between, title=title)
        job.show("shifts", graph(drawn, f"{PAGE}-shifts-graph"))

    def _steering(self, vectors: SteeringVectors) -> tuple[list[FwdHook], str]:
        """What to set the tuning beside: the run's choice for this behaviour, else a usual dose."""
        direction, run = self.config.direction, self.bench.run
        layer, multiplier = self.bench.usual_layer, -2.0 if direction == "away" else 2.0
        if run is not None and run.content["behaviour"] == self.behaviour:
            own = choices_of(run.content).get(direction)
            layer, multiplier = (int(own["layer"]), float(own["multiplier"])) if own else (layer, multiplier)
        if direction == "suppress":
            return ablate(vectors, [layer], hook=vectors.kind), f"steered: ablated at layer {layer}"
        hooks = add(vectors, [layer], multiplier, hook=vectors.kind)
        return hooks, with_minus_sign(f"steered: layer {layer}, m = {multiplier:g}")


class _Losses:
    """Watches the bar of the loop, and draws its numbers as they come."""

    def __init__(self, job: Job, tuning: Tuning) -> None:
        self.job, self.tuning = job, tuning
        self.rows: dict[int, dict[str, Any]] = {}
        self.values: Any = None
        self.drawn_at = 0.0

    def __call__(self, step: Step | None) -> None:
        self.job.watch(step)
        # The bar moves first and tells its numbers then: until they are new ones, they are those of the step before.
        if step is None or not step.values or step.values is self.values:
            return
        self.values = step.values
        parts = {part: float(step.values[part]) if part in step.values else None for part in LOSS_PARTS}
        self.rows[step.done] = {**self.tuning.about, "step": step.done, "split": "train", **parts}
        if time.monotonic() - self.drawn_at > _BETWEEN:
            self.drawn_at = time.monotonic()
            self.tuning.draw(self.job, list(self.rows.values()))


def _show_weights(job: Job, slot: str, bench: Session, arm: str) -> None:
    delta = bench.delta(arm)
    behaviour = next((own.get("behaviour") for own in delta.config.get("vectors", ())), None)
    own = bench.vectors(behaviour) if behaviour is not None and bench.has_vectors(behaviour) else None
    kind, along = (own.kind, f" (along {behaviour}: {made(own)})") if own is not None else ("resid_post", "")
    title = f"Changed weights: {arm}{along}"
    drawn = plots.weight_changes(weight_changes(bench.model, delta, own, hook=kind, progress=False), title=title)
    job.show(slot, graph(drawn, f"{PAGE}-{slot}-weights-graph"))


def _free(bench: Session, behaviour: str, arm: str) -> str:
    """A name that no arm has yet; it tells the behaviour where that is not the run's."""
    of_run = bench.run is not None and bench.run.content["behaviour"] == behaviour
    first = arm if of_run else f"{arm} ({behaviour})"
    taken, number = bench.deltas(), 1
    while (name := first if number == 1 else f"{first} {number}") in taken:
        number += 1
    return name


def _kept(name: str, config: TuneConfig) -> Component:
    told = (
        f"Kept as {name} (seed {config.seed}): the pages Explore and Compare offer it from now on, as long as this "
        "dashboard runs. The model itself is as it was. "
    )
    link = html.A(
        "Download the change (.safetensors)", href=f"/tuned/{quote(name)}.safetensors", download=f"{name}.safetensors"
    )
    return html.P([told, link], role="status")


def _controls(bench: Session) -> list[Component]:
    names = [name for name in bench.behaviours() if name in bench.with_pairs()]
    own, last = usual(bench, names[0]), bench.n_layers - 1

    def number(name: str, low: float = 0, step: float | str = "any") -> dcc.Input:
        return dcc.Input(id=f"{PAGE}-{name}", type="number", min=low, step=step, value=own[name])

    layers = dcc.Input(id=f"{PAGE}-layers", type="text", value=own["layers"])
    return [
        field("Behaviour", choice(f"{PAGE}-behaviour", names)),
        field("Direction", choice(f"{PAGE}-direction", DIRECTIONS, "away")),
        field("Layers", layers, f"of 0 to {last}, such as 20-24: where the cosine is read"),
        field("Steps", number("steps", 1, 1), "fewer where the validation loss rises"),
        field("Learning rate", number("rate")),
        field("Cosine weight", number("cosine"), "0: a token-tuned arm, by answers alone"),
        field("Token weight", number("token")),
        field("KL weight", number("kl"), f"holds it to itself on up to {N_NEUTRAL} neutral prompts"),
        field("Seed", number("seed", 0, 1), "of the targets, their order, and the intervals"),
    ]
