"""Compare: the arms side by side, their effects and side effects, and their responses to the same prompts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from dash import Dash, Input, Output, State, dcc, html, no_update
from dash.development.base_component import Component

from rt_lens.apps.dashboard.compared import (
    arms_figure,
    differences,
    effect_against_side_effect,
    of_set,
    other_sets,
    prompts_of,
    responses_table,
    responses_to,
    side_effects_table,
)
from rt_lens.apps.dashboard.equal_damage import at_budget, budget_at, budget_slider, budgets_of, responses_at
from rt_lens.apps.dashboard.panel import Work, choice, field, named, slider, workplace
from rt_lens.apps.dashboard.panel import connect as connect_work
from rt_lens.apps.dashboard.session import Session, provenance_text, tuned_label
from rt_lens.apps.dashboard.work import Job
from rt_lens.apps.report.labels import of_first_scorer
from rt_lens.apps.report.verdict import searched, sureness, verdict
from rt_lens.arms.comparison import ArmEvaluator, EvalTask
from rt_lens.arms.intervention import Intervention
from rt_lens.common.parsing import whole_number
from rt_lens.common.progress import Bar
from rt_lens.data.builtin import neutral_paragraphs
from rt_lens.experiment.protocols import protocol_of
from rt_lens.plots.style import with_minus_sign
from rt_lens.results.schema import choices_of
from rt_lens.results.writing import plain, tables_of
from rt_lens.steering.binding import add
from rt_lens.vectors.steering_vectors import SteeringVectors

PAGE = "compare"
SLOTS = ("scores", "differences", "side-effects", "pareto", "answers")
SETTINGS = ("behaviour", "arms", "layer", "multiplier", "prompts", "length", "neutral")
SET, STEERED, MEASURED = "validation", "steered", "measured"
MOST_TOKENS = 200
FEWEST, MOST_PROMPTS = 4, 2000  # prompts; with fewer no interval means anything
_BESIDE = {"display": "grid", "gridTemplateColumns": "repeat(auto-fit, minmax(240px, 1fr))", "gap": "0 1.6rem"}


def layout(session: Session) -> Component:
    intro = html.P("A good arm moves the score and has few side effects. All arms respond to the same prompts.")
    return html.Div([html.H2("Compare"), intro, *_of_run(session), *_live(session)])


def _live(session: Session) -> list[Component]:
    head = [html.H3("Live", id=f"{PAGE}-live")] if session.run is not None else []
    if not session.has_model:
        return [*head, html.P(f"{session.name} is not on this machine, so arms cannot be compared live.")]
    return [*head, workplace(PAGE, "Compare", _controls(session), SLOTS)]


def connect(app: Dash, session: Session) -> None:
    connect_work(app, session, PAGE, partial(plan, session), [f"{PAGE}-{name}" for name in SETTINGS], SLOTS)

    @app.callback(Output(f"{PAGE}-arms", "options"), Input("url", "pathname"), prevent_initial_call=True)
    def current_arms(_: str | None) -> Any:
        return _arm_options(session)

    if session.run is not None:
        _connect_run(app, session)


def plan(
    session: Session, behaviour: str, arms: list[str] | None, layer: float | None, multiplier: float | None,
    prompts: float | None, length: float | None, side_effects: str,
) -> tuple[str, Work]:  # fmt: skip
    """Checks the settings, and returns the name and the work of the job.

    Raises:
        ValueError: names the control that is empty or out of range.
    """
    if multiplier is None:
        raise ValueError("multiplier must be a number, got nothing. Type one.")
    compared = Comparing(
        session, behaviour, arms or [], whole_number("layer", layer, 0, session.n_layers - 1), float(multiplier),
        prompts, whole_number("new tokens", length, 1, MOST_TOKENS), side_effects == MEASURED,
    )  # fmt: skip
    return "comparing", compared.run


class Comparing:
    """A comparison of arms on validation prompts of one behaviour.

    Args:
        session: the model, its vectors and tuned arms.
        behaviour: the behaviour with its prompts and scorer.
        arms: `steered`, and names of tuned arms; the untuned model is always included.
        layer: block at which the arm `steered` is steered.
        multiplier: times the vector's own length.
        prompts: number of validation prompts.
        length: new tokens of a response.
        side_effects: whether to measure perplexity and KL on neutral paragraphs.

    Raises:
        ValueError: names the setting that is wrong.
    """

    def __init__(
        self, session: Session, behaviour: str, arms: Sequence[str], layer: int, multiplier: float,
        prompts: float | None, length: int, side_effects: bool,
    ) -> None:  # fmt: skip
        experiment = session.experiment(behaviour)
        if not arms:
            raise ValueError("arms must name at least one arm besides the untuned model, got none. Choose one.")
        if unknown := [name for name in arms if name not in (STEERED, *session.deltas())]:
            raise ValueError(
                f"arms must be among {', '.join((STEERED, *session.deltas()))}, got {', '.join(unknown)}. Tune it "
                "again on the page Tuning."
            )
        if STEERED in arms and multiplier == 0:
            raise ValueError(
                "multiplier must not be 0, which steers nothing, got 0. Move the slider, or remove the arm steered."
            )
        self.session, self.behaviour, self.layer = session, behaviour, layer
        self.multiplier, self.side_effects = multiplier, side_effects
        self.names, self.experiment, self.length = list(dict.fromkeys(arms)), experiment, length
        self.n_prompts = whole_number("prompts", prompts, FEWEST, MOST_PROMPTS)
        self.vectors: SteeringVectors | None = None

    def run(self, job: Job) -> None:
        model, seed = self.session.model, self.experiment.test.seed
        task = self._task()
        if STEERED in self.names:  # once, because another tab may change the vectors in use
            self.vectors = self.session.vectors(self.behaviour)
            self.vectors.at_layers([self.layer], self.vectors.kind)
        for slot in SLOTS:
            job.show(slot, None)
        texts = neutral_paragraphs()[: self.experiment.choose.n_paragraphs] if self.side_effects else ()
        evaluator = ArmEvaluator(model, {SET: task}, texts, seed=seed)
        with Bar(["untuned", *self.names], desc="arms", unit="arm", disable=True) as bar:
            for name in bar:
                label, direction, tuning_seed, intervention = self._arm(name)
                evaluator.measure(label, intervention, direction=direction, seed=tuning_seed)
                self._show_scores(job, evaluator, [])
        compared = evaluator.scores().comparisons(_pairs(evaluator), [(SET, task.made[0].name)])
        rows = plain(compared.to_dict("records"))
        self._show_scores(job, evaluator, [_without_seed(row, row["a"], row["b"]) for row in rows])

    def _task(self) -> EvalTask:
        """Validation prompts with the behaviour's scorer, as a run uses them for its choices."""
        experiment = self.experiment
        if experiment.honesty is None:  # its protocol would require as many test topics as a full run
            topics = self.session.pairs(self.behaviour)[1].topics[: self.n_prompts]
            if len(topics) < FEWEST:
                raise ValueError(
                    f"{self.behaviour} must have at least {FEWEST} validation topics, got {len(topics)}. Add topics to "
                    "its file."
                )
            return _with_repetition(EvalTask(topics, (experiment.made_scorer,), self.length))
        choose = replace(experiment.choose, n_prompts=self.n_prompts, max_new_tokens=self.length)
        return _with_repetition(protocol_of(replace(experiment, choose=choose), self.session.model).choosing)

    def _arm(self, name: str) -> tuple[str, str, int, Intervention]:
        """The label of an arm, its direction for this behaviour, its tuning seed, and its intervention."""
        if name == "untuned":
            return name, "none", 0, None
        if name == STEERED:
            vectors = self.vectors if self.vectors is not None else self.session.vectors(self.behaviour)
            hooks = add(vectors, [self.layer], self.multiplier, hook=vectors.kind)
            return STEERED, "toward" if self.multiplier > 0 else "away", 0, hooks
        delta = self.session.delta(name)
        seed = delta.config.get("seed", 0)
        behaviours = {vectors.get("behaviour") for vectors in delta.config.get("vectors", ())}
        label = tuned_label(name)
        if label.direction == "none" or (behaviours and self.behaviour not in behaviours):  # of another behaviour
            return name, "none", seed, delta
        return label.arm, label.direction, seed, delta

    def _show_scores(self, job: Job, evaluator: ArmEvaluator, compared: list[dict[str, Any]]) -> None:
        scores = evaluator.scores()
        rows = [_without_seed(row, row["arm"]) for row in plain(tables_of(scores, tasks=[SET], writing=SET)["summary"])]
        title, steering = f"{self.behaviour}: {rows[0]['n']} validation prompts, bootstrap seed {scores.seed}", ""
        if self.vectors is not None:
            dose = f"steered at layer {self.layer} by {with_minus_sign(f'{self.multiplier:g}')}"
            steering = f" ({dose}; {provenance_text(self.vectors)})"
        job.show("scores", arms_figure(rows, compared, title + steering, f"{PAGE}-scores-graph"))
        if compared:
            job.show("differences", differences(list(map(_dashed, compared)), len(compared), live=True))
            job.show("side-effects", side_effects_table(list(map(_dashed, rows)), rows[0]["n"]))
            job.show("pareto", effect_against_side_effect(rows, self.behaviour + steering, f"{PAGE}-pareto-graph"))
        scorer = rows[0]["scorer"]
        responses = [{**response, "score": response[scorer]} for response in scores.answers]
        job.show("answers", responses_table(responses, scores.seed))


def _with_repetition(task: EvalTask) -> EvalTask:
    """The task with a further scorer for generated text: how far it repeats itself, which is a side effect."""
    if task.made[0].reads != "text" or task.made[0].name == "repetition":
        return task
    return EvalTask(task.asked, (*task.made, "repetition"), task.max_new_tokens)


def _without_seed(row: dict[str, Any], *arms: str) -> dict[str, Any]:
    """The row, without a tuning seed where no arm was tuned."""
    return row if set(arms) - {"untuned", STEERED} else {**row, "seeds": []}


def _dashed(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row for a table, which shows a dash where there is no seed."""
    return {**row, "seeds": row["seeds"] or None}


def _pairs(evaluator: ArmEvaluator) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """The pairs to compare: every arm with the untuned model, and the arms of one direction with each other."""
    labels = evaluator.scores().scores[["arm", "direction"]].drop_duplicates().itertuples(index=False, name=None)
    untuned, *others = labels
    same_direction = [(b, a) for a, b in itertools.combinations(others, 2) if a[1] == b[1]]
    return [*same_direction, *((other, untuned) for other in others)]


def _controls(session: Session) -> list[Component]:
    names = [name for name in session.behaviours() if name in session.with_pairs()]
    last = session.n_layers - 1
    choices: Mapping[str, Any] = choices_of(session.run.content) if session.run is not None else {}
    usual = choices.get("away", {"layer": session.usual_layer, "multiplier": -2})
    # Dash's check lists have no name for screen readers, its drop-downs do.
    arms = dcc.Dropdown(
        id=f"{PAGE}-arms",
        options=_arm_options(session),
        value=[STEERED, *session.deltas()[:1]],
        multi=True,
        clearable=False,
    )
    side_effects = choice(f"{PAGE}-neutral", {MEASURED: "perplexity and KL", "none": "not measured"}, MEASURED)
    prompts = dcc.Input(id=f"{PAGE}-prompts", type="number", min=FEWEST, step=1, value=8)
    layer = slider(f"{PAGE}-layer", 0, last, 1, int(usual["layer"]), range(0, last + 1, 5))
    multiplier = slider(f"{PAGE}-multiplier", -4, 4, 0.25, float(usual["multiplier"]), range(-4, 5))
    length = slider(f"{PAGE}-length", 10, 60, 10, 20, (10, 20, 40, 60))
    return [
        field("Behaviour", choice(f"{PAGE}-behaviour", names)),
        field("Arms", arms, "besides the untuned model; the page Tuning adds arms"),
        field("Layer", layer, "block at which the arm steered is steered"),
        field("Multiplier m", multiplier, "times the vector's own length; below 0: away"),
        field("Prompts", prompts, "of validation topics; all of them, if there are fewer"),
        field("New tokens", length, "of each response, if the scorer reads text"),
        field("Side effects", side_effects, "on a few neutral paragraphs"),
    ]


def _arm_options(session: Session) -> list[dict[str, str]]:
    return [{"label": name.replace("_", " "), "value": name} for name in (STEERED, *session.deltas())]


def _of_run(session: Session) -> list[Component]:
    """The run's results. One at equal damage opens as its report does, with effect against KL and a slider of budgets.

    What the slider moves stands together, so that the slider stays in sight beside all of it.
    """
    if session.run is None:
        return []
    below = [html.P(html.A("Compare arms of your own choice below", href=f"#{PAGE}-live"))] if session.has_model else []
    head, content = [*below, html.H3("Results of the run")], session.run.content
    if not budgets_of(content):
        return [*head, *_scores_of_run(content), *_answered(session)]
    moved = html.Div(at_budget(content, budget_at(content), f"{PAGE}-at-kl"), id=f"{PAGE}-at-budget")
    return [
        *head,
        html.Section([*budget_slider(content, f"{PAGE}-budget"), moved, *_answered(session)], **named("By budget")),
        html.H3(f"Results at the stated budget, KL {content['at_kl']['stated']:g}"),
        html.Ul([html.Li(sentence) for sentence in [*verdict(content), searched(content), sureness(content)]]),
        *_scores_of_run(content),
    ]


def _scores_of_run(content: Mapping[str, Any]) -> list[Component]:
    """The run's scores on a chosen set, and the side effects of its arms."""
    sets = list(of_first_scorer(content["summary"]))
    return [
        field("Set", choice(f"{PAGE}-set", sets), "prompts on which the arms were tested"),
        html.Div(of_set(content, sets[0]), id=f"{PAGE}-of-set"),
        html.H4("Side effects"),
        side_effects_table(content["summary"], _n_responses(content["side_effects"])),
        *other_sets(content["side_effects"]),
    ]


def _answered(session: Session) -> list[Component]:
    """The run's responses to a chosen prompt."""
    assert session.run is not None
    head = html.H4("The same prompt, every arm")
    try:
        rows = _responses(session)
    except (FileNotFoundError, ValueError) as refusal:
        return [head, html.P(str(refusal), className="error")]
    names = list(dict.fromkeys(row["set"] for row in rows))
    prompts = prompts_of(rows, names[0], "")
    search = dcc.Input(id=f"{PAGE}-search", type="text", debounce=0.4, value="")
    return [
        head,
        html.Div(
            [
                field("Set", choice(f"{PAGE}-asked", names)),
                field("Search", search, "only prompts whose text or a response contains this"),
                field("Prompt", choice(f"{PAGE}-prompt", prompts)),
            ],
            style=_BESIDE,
        ),
        html.P(f"{len(prompts)} prompts.", id=f"{PAGE}-matches", className="note", role="status"),
        html.Div(_responses_to(session.run.content, rows, names[0], next(iter(prompts), None)), id=f"{PAGE}-answered"),
    ]


def _responses_to(
    content: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], name: str, prompt: str | None,
    index: float | None = None,
) -> Any:  # fmt: skip
    """Each arm's response to a prompt; in a run at equal damage, at the budget of this place of the slider."""
    if not budgets_of(content):
        return responses_to(rows, name, prompt)
    return responses_at(content, rows, name, prompt, budget_at(content, index))


def _n_responses(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The number of responses on which repetition was measured."""
    return next((row["n"] for row in rows if row["scorer"] == "repetition"), None)


def _responses(session: Session) -> list[dict[str, Any]]:
    """The run's responses at every budget; older runs have one set without a name."""
    assert session.run is not None
    first = session.run.content["summary"][0]["set"]
    return [{"set": first, **row} for row in [*session.run.responses(), *session.run.responses_at_kl()]]


def _connect_run(app: Dash, session: Session) -> None:
    assert session.run is not None
    content = session.run.content
    # With one budget there is no slider, and a callback may name only what is on the page.
    slider_moved = [Input(f"{PAGE}-budget", "value")] if len(budgets_of(content)) > 1 else []
    if slider_moved:

        @app.callback(Output(f"{PAGE}-at-budget", "children"), *slider_moved, prevent_initial_call=True)
        def other_budget(index: float) -> Any:
            return at_budget(content, budget_at(content, index), f"{PAGE}-at-kl")

    @app.callback(Output(f"{PAGE}-of-set", "children"), Input(f"{PAGE}-set", "value"), prevent_initial_call=True)
    def other_set(name: str) -> Any:
        return of_set(content, name)

    try:
        responses = _responses(session)
    except (FileNotFoundError, ValueError):  # the page says so where the prompts would be
        return

    @app.callback(
        Output(f"{PAGE}-prompt", "options"), Output(f"{PAGE}-prompt", "value"), Output(f"{PAGE}-matches", "children"),
        Input(f"{PAGE}-asked", "value"), Input(f"{PAGE}-search", "value"), State(f"{PAGE}-prompt", "value"),
        prevent_initial_call=True,
    )  # fmt: skip
    def other_prompts(name: str, search: str | None, current: str | None) -> tuple[Any, Any, str]:
        prompts = prompts_of(responses, name, search or "")
        options = [{"label": label, "value": prompt} for prompt, label in prompts.items()]
        count = f"{len(prompts)} prompts." if prompts else "No prompt or response contains this."
        return options, no_update if current in prompts else next(iter(prompts), None), count

    @app.callback(
        Output(f"{PAGE}-answered", "children"), Input(f"{PAGE}-prompt", "value"), State(f"{PAGE}-asked", "value"),
        *slider_moved, prevent_initial_call=True,
    )  # fmt: skip
    def other_answers(prompt: str | None, name: str, index: float | None = None) -> Any:
        return _responses_to(content, responses, name, prompt, index)
