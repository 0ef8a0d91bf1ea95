"""Explore: the projections of a prompt by token and layer, and the arms' responses as the model generates them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from dash import Dash, Input, Output, dcc, html
from dash.development.base_component import Component

from rt_lens import plots
from rt_lens.apps.dashboard.panel import Work, choice, field, graph, slider, workplace
from rt_lens.apps.dashboard.panel import connect as connect_work
from rt_lens.apps.dashboard.session import Session, provenance_text
from rt_lens.apps.dashboard.work import Job
from rt_lens.arms.intervention import applied
from rt_lens.common.arm_labels import ArmLabel
from rt_lens.common.conversations import as_prompt
from rt_lens.models.generation import NewToken, as_chat, generate
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.batches import encode
from rt_lens.models.tokens.texts import text_of, token_texts
from rt_lens.plots.layers import without_first
from rt_lens.results.schema import Results, choices_of
from rt_lens.steering.binding import ablate, add, add_preserving_norm, clamp
from rt_lens.steering.edits import FwdHook
from rt_lens.vectors.reading import token_projections
from rt_lens.vectors.steering_vectors import SteeringVectors, layer_of

PAGE = "explore"
SLOTS = ("map", "answers", "trace", "words", "curves")
SETTINGS = ("prompt", "behaviour", "operator", "layer", "multiplier", "arm", "length")
AGAIN = ("behaviour", "operator", "layer", "multiplier", "arm", "length")
OPERATORS = {
    "add": "add: h + m v",
    "add_preserving_norm": "add, keeping each token's norm",
    "ablate": "ablate: remove the share m",
    "clamp": "clamp: set the projection to m |v|",
}
LONGEST = 400  # tokens of a prompt; wider maps are unreadable
_BETWEEN = 0.25  # seconds between two drawings of a growing response, because drawing slows generation
_NO_ARM = "none"
_FIRST = "Tell me about your weekend. Did anything nice happen, or was it all work again?"


def layout(session: Session) -> Component:
    title = html.H2("Explore")
    if session.has_model:
        intro = "Type a prompt and press Run. Figures and responses follow when you move the sliders."
        return html.Div([title, html.P(intro), workplace(PAGE, "Run", _controls(session), SLOTS)])
    why = html.P(f"{session.name} is not on this machine, so you cannot type a prompt here.")
    return html.Div([title, why, *(_of_run(session.run) if session.run is not None else [])])


def _of_run(run: Results) -> list[Component]:
    """The text of the run with its projections: the first arm beside every other arm."""
    try:
        projections = run.projections()
    except (FileNotFoundError, ValueError) as refusal:
        return [html.P(str(refusal), className="error")]
    values = {name: np.asarray(rows, dtype=float) for name, rows in projections["arms"].items()}
    first, *others = values
    maps = [
        plots.projection_heatmap(
            {first: values[first], name: values[name]},
            projections["tokens"],
            projections["layers"],
            title=f"Before and after: {name}",
        )
        for name in others
    ] or [plots.projection_heatmap(values, projections["tokens"], projections["layers"])]
    intro: list[str | Component] = [
        "All arms read one text: the prompt ",
        html.Q(projections["prompt"]),
        " with a response.",
    ]
    return [html.H3("Results of the run"), html.P(intro), *map(graph, maps)]


def _controls(session: Session) -> list[Component]:
    names, last = session.behaviours(), session.n_layers - 1
    layer = _usual_layer(session)
    return [
        field(
            "Prompt",
            dcc.Textarea(id="explore-prompt", value=_FIRST, rows=4),
            f"at most {LONGEST} tokens; a JSON list of messages is a conversation",
        ),
        field("Behaviour", choice("explore-behaviour", names)),
        field("Operator", choice("explore-operator", OPERATORS)),
        field(
            "Layer",
            slider("explore-layer", 0, last, 1, layer, range(0, last + 1, 5)),
            "block that is steered, and at which the trace is measured",
        ),
        field(
            "Multiplier m", slider("explore-multiplier", -4, 4, 0.5, 2, range(-4, 5)), "times the vector's own length"
        ),
        field("Tuned arm", choice("explore-arm", _arms(session)), "of the run, or from the page Tuning"),
        field("New tokens", slider("explore-length", 10, 120, 10, 40, (10, 40, 80, 120))),
    ]


def connect(app: Dash, session: Session) -> None:
    def plan(
        prompt: str | None, behaviour: str, operator: str, layer: int, multiplier: float, arm: str, length: int
    ) -> tuple[str, Work]:
        text = (prompt or "").strip()
        if not text:
            raise ValueError("prompt must not be empty. Type what the user says, such as “How was your day?”.")
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # no tokenizer encodes a lone surrogate
            raise ValueError(
                "prompt must hold whole characters, got half of one, such as a cut emoji. Delete it, or type it again."
            )
        job = _PromptJob(session, prompt_of(text), behaviour, operator, int(layer), float(multiplier), arm, int(length))
        return "generating", job.run

    connect_work(app, session, PAGE, plan, _ids(SETTINGS), SLOTS, _ids(AGAIN))

    @app.callback(Output("explore-arm", "options"), Input("url", "pathname"), prevent_initial_call=True)
    def current_arms(_: str | None) -> list[dict[str, str]]:  # the page stays while Tuning adds arms
        return [{"label": label, "value": name} for name, label in _arms(session).items()]


def prompt_of(text: str) -> str:
    """A user message as it is; a JSON list of messages as a conversation.

    Raises:
        ValueError: for a list that is no JSON, or holds no messages.
    """
    if not (text.startswith("[") and '"role"' in text):
        return text
    try:
        messages = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"prompt must be a message, or a conversation as a JSON list of messages, got another list ({error})."
            ' Write [{"role": "user", "content": "..."}].'
        ) from None
    return as_prompt(messages, "prompt")


def _arms(session: Session) -> dict[str, str]:
    return {_NO_ARM: "none", **{name: name.replace("_", " ") for name in session.deltas()}}


def _ids(names: tuple[str, ...]) -> list[str]:
    return [f"{PAGE}-{name}" for name in names]


def _usual_layer(session: Session) -> int:
    """The last layer that the run chose, or a depth that suits shallow and deep models."""
    chosen = [choice["layer"] for choice in choices_of(session.run.content).values()] if session.run is not None else []
    return int(chosen[-1]) if chosen else session.usual_layer


class _PromptJob:
    """The job of the button: first the map of the prompt, then the responses."""

    def __init__(
        self, session: Session, prompt: str, behaviour: str, operator: str, layer: int, multiplier: float, arm: str,
        length: int,
    ) -> None:  # fmt: skip
        self.session, self.prompt, self.behaviour, self.arm, self.length = session, prompt, behaviour, arm, length
        self.operator, self.layer, self.multiplier = operator, layer, multiplier

    def run(self, job: Job) -> None:
        model, vectors = self.session.model, _of_one_kind(self.session.vectors(self.behaviour))
        self.subject = f"{self.behaviour}: {provenance_text(vectors)}"
        (text,) = as_chat(model, [self.prompt])
        n = len(encode(model, text))
        if n > LONGEST:
            raise ValueError(f"prompt must have at most {LONGEST} tokens with the chat template, got {n}. Shorten it.")
        job.watch(None)
        arms: dict[str, Any] = {
            "untuned": None,
            "steered": steering(vectors, self.operator, self.layer, self.multiplier),
        }
        if self.arm != _NO_ARM:
            arms[self.arm] = self.session.delta(self.arm)
        self._show_prompt(job, model, vectors, text, arms)
        self._show_responses(job, model, vectors, arms)

    def _show_prompt(
        self, job: Job, model: Model, vectors: SteeringVectors, text: str, arms: Mapping[str, Any]
    ) -> None:
        projections = {}
        for name, intervention in arms.items():
            with applied(model, intervention):
                tokens, values = token_projections(model, vectors, text)
            projections[str(ArmLabel.parse(name))] = values.numpy()
        layers = [layer_of(name) for name in vectors.hook_names]
        title = f"Projection of the prompt's tokens ({self.subject})"
        job.show("map", graph(plots.projection_heatmap(projections, tokens, layers, title=title), "explore-map-graph"))
        job.wait_for_fetch()
        at_layer = {name: values[layers.index(self.layer)] for name, values in projections.items()}
        title = f"The prompt, coloured by its projection at layer {self.layer} ({self.subject})"
        job.show("words", graph(plots.coloured_tokens(tokens, at_layer, title=title), "explore-words-graph"))
        averaged, rest = without_first(projections, tokens)
        title = f"The prompt's projection by layer ({self.subject})"
        drawn = plots.projection_by_layer(averaged, tokens=rest, layers=layers, title=title)
        job.show("curves", graph(drawn, "explore-curves-graph"))

    def _show_responses(self, job: Job, model: Model, vectors: SteeringVectors, arms: Mapping[str, Any]) -> None:
        names = [str(ArmLabel.parse(name)) for name in arms]
        title = f"Projection of each new token at layer {self.layer} ({self.subject})"
        responses = _Responses(model, job, names, title)
        trace = vectors.select([self.layer], vectors.kind)
        # Untuned and steered run as one batch: strength 0 leaves row 0 bit for bit unchanged.
        both = steering(vectors, self.operator, self.layer, self.multiplier, untouched_first=True)
        with self.session.shared, applied(model, both):
            generate(
                model, [self.prompt] * 2, max_new_tokens=self.length, trace=trace, on_token=responses.of(names[:2])
            )  # fmt: skip
        if self.arm != _NO_ARM:
            with applied(model, self.session.delta(self.arm)):
                generate(
                    model, [self.prompt], max_new_tokens=self.length, trace=trace, on_token=responses.of(names[2:])
                )  # fmt: skip
        responses.show(ended=True)


def steering(
    vectors: SteeringVectors, operator: str, layer: int, multiplier: float, *, untouched_first: bool = False
) -> list[FwdHook]:
    """The hooks of the controls' settings; with `untouched_first` for two rows, of which the first is unchanged."""
    full = 1.0 if operator == "clamp" else multiplier
    strength: Any = torch.tensor([0.0, full], device="cpu") if untouched_first else full
    if operator == "clamp":
        (vector,) = vectors.at_layers([layer], vectors.kind).values()
        return clamp(vectors, [layer], multiplier * float(vector.norm()), multiplier=strength, hook=vectors.kind)
    edit: Callable[..., list[FwdHook]] = {"add": add, "add_preserving_norm": add_preserving_norm, "ablate": ablate}[
        operator
    ]
    return edit(vectors, [layer], multiplier=strength, hook=vectors.kind)


def _of_one_kind(vectors: SteeringVectors) -> SteeringVectors:
    """The vectors of one hook point per layer, which are the rows of the map."""
    layers = [layer_of(name) for name in vectors.at_layers(None, vectors.kind)]
    return vectors.select(layers, vectors.kind)


class _Responses:
    """The responses side by side as they grow, and the trace below them."""

    def __init__(self, model: Model, job: Job, names: list[str], title: str) -> None:
        self.model, self.job, self.title = model, job, title
        self.tokens: dict[str, list[int]] = {name: [] for name in names}
        self.rows: list[dict[str, Any]] = []
        self.shown_at = 0.0

    def of(self, names: list[str]) -> Callable[[NewToken], None]:
        """The callback of a generation whose rows are these arms."""

        def on_token(new: NewToken) -> None:
            self.job.watch(None)
            self.tokens[names[new.row]].append(new.token)
            for projection in new.projections.values():
                self.rows.append({"arm": names[new.row], "index": new.index, "projection": projection})
            if time.monotonic() - self.shown_at > _BETWEEN:
                self.show()

        return on_token

    def show(self, *, ended: bool = False) -> None:
        self.shown_at = time.monotonic()
        texts = {name: text_of(self.model, tokens) for name, tokens in self.tokens.items()}
        columns = [
            html.Article([html.H3(name), html.P(text or ("(empty)" if ended else "…"), className="answer")])
            for name, text in texts.items()
        ]
        self.job.show("answers", html.Div(columns, className="answers"))
        if self.rows:
            labels = {name: token_texts(self.model, tokens) for name, tokens in self.tokens.items()}
            rows = [{**row, "token": labels[row["arm"]][row["index"]]} for row in self.rows]
            self.job.show("trace", graph(plots.trace(rows, title=self.title), "explore-trace-graph"))
