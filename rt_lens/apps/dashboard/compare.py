"""Compare: arms side by side, what each does and what it costs, and their answers to the same prompts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

from dash import Dash, Input, Output, State, dcc, html, no_update
from dash.development.base_component import Component

from rt_lens.apps.dashboard.compared import (
    answers_table,
    answers_to,
    arms_figure,
    costs,
    differences,
    effect_against_cost,
    of_set,
    other_sets,
    prompts_of,
)
from rt_lens.apps.dashboard.panel import Work, choice, field, slider, workplace
from rt_lens.apps.dashboard.panel import connect as connect_work
from rt_lens.apps.dashboard.session import Session, made, tuned_label
from rt_lens.apps.dashboard.work import Job
from rt_lens.apps.report.labels import of_first_scorer
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
SLOTS = ("scores", "differences", "cost", "pareto", "answers")
SETTINGS = ("behaviour", "arms", "layer", "multiplier", "prompts", "length", "harm")
SET, STEERED, HARM = "validation", "steered", "measured"
MOST_TOKENS = 200
FEWEST, MOST_PROMPTS = 4, 2000  # prompts; with fewer no interval means anything
_BESIDE = {"display": "grid", "gridTemplateColumns": "repeat(auto-fit, minmax(240px, 1fr))", "gap": "0 1.6rem"}


def layout(bench: Session) -> Component:
    intro = html.P("An arm is worth having if it moves the score and little else. All arms answer the same prompts.")
    return html.Div([html.H2("Compare"), intro, *_of_run(bench), *_live(bench)])


def _live(bench: Session) -> list[Component]:
    head = [html.H3("Live", id=f"{PAGE}-live")] if bench.run is not None else []
    if not bench.has_model:
        return [*head, html.P(f"{bench.name} is not on this machine, so no arm can be asked anything here.")]
    return [*head, workplace(PAGE, "Compare", _controls(bench), SLOTS)]


def connect(app: Dash, bench: Session) -> None:
    connect_work(app, bench, PAGE, partial(plan, bench), [f"{PAGE}-{name}" for name in SETTINGS], SLOTS)

    @app.callback(Output(f"{PAGE}-arms", "options"), Input("url", "pathname"), prevent_initial_call=True)
    def arms_by_now(_: str | None) -> Any:
        return _offered(bench)

    if bench.run is not None:
        _connect_run(app, bench)


def plan(
    bench: Session, behaviour: str, arms: list[str] | None, layer: float | None, multiplier: float | None,
    prompts: float | None, length: float | None, harm: str,
) -> tuple[str, Work]:  # fmt: skip
    """The work of the button.

    Raises:
        ValueError: names the control that is empty or out of range.
    """
    if multiplier is None:
        raise ValueError("multiplier must be a number, got nothing. Type one.")
    compared = Comparing(
        bench, behaviour, arms or [], whole_number("layer", layer, 0, bench.n_layers - 1), float(multiplier), prompts,
        whole_number("new tokens", length, 1, MOST_TOKENS), harm == HARM,
    )  # fmt: skip
    return "comparing", compared.run


class Comparing:
    """Arms on some validation prompts of one behaviour.

    Args:
        bench: the model, its vectors and deltas.
        behaviour: whose prompts and scorer.
        arms: `steered`, and names of deltas; the untuned model is always among them.
        layer: block at which `steered` is steered.
        multiplier: times the vector's own length.
        prompts: how many validation prompts to ask.
        length: new tokens of an answer.
        harm: whether to measure perplexity and KL on neutral paragraphs.

    Raises:
        ValueError: names the setting that is wrong.
    """

    def __init__(
        self, bench: Session, behaviour: str, arms: Sequence[str], layer: int, multiplier: float, prompts: float | None,
        length: int, harm: bool,
    ) -> None:  # fmt: skip
        experiment = bench.experiment(behaviour)
        if not arms:
            raise ValueError("arms must name at least one arm besides the untuned model, got none. Choose one.")
        if gone := [name for name in arms if name not in (STEERED, *bench.deltas())]:
            raise ValueError(
                f"arms must be among {', '.join((STEERED, *bench.deltas()))}, got {', '.join(gone)}. Tune it again on "
                "the page Tuning."
            )
        if STEERED in arms and multiplier == 0:
            raise ValueError(
                "multiplier must not be 0, which steers nothing, got 0. Move the slider, or remove the arm steered."
            )
        self.bench, self.behaviour, self.layer, self.multiplier, self.harm = bench, behaviour, layer, multiplier, harm
        self.names, self.experiment, self.length = list(dict.fromkeys(arms)), experiment, length
        self.n_prompts = whole_number("prompts", prompts, FEWEST, MOST_PROMPTS)
        self.vectors: SteeringVectors | None = None

    def run(self, job: Job) -> None:
        model, seed = self.bench.model, self.experiment.test.seed
        exam = self._exam()
        if STEERED in self.names:  # once, for another tab may put others in use meanwhile
            self.vectors = self.bench.vectors(self.behaviour)
            self.vectors.at_layers([self.layer], self.vectors.kind)
        for slot in SLOTS:
            job.show(slot, None)
        texts = neutral_paragraphs()[: self.experiment.choose.n_paragraphs] if self.harm else ()
        board = ArmEvaluator(model, {SET: exam}, texts, seed=seed)
        with Bar(["untuned", *self.names], desc="arms", unit="arm", disable=True) as bar:
            for name in bar:
                label, direction, tuned_with, worn = self._arm(name)
                board.measure(label, worn, direction=direction, seed=tuned_with)
                self._show_scores(job, board, [])
        compared = board.scoreboard().comparisons(_pairs(board), [(SET, exam.made[0].name)])
        rows = plain(compared.to_dict("records"))
        self._show_scores(job, board, [_without_seed(row, row["a"], row["b"]) for row in rows])

    def _exam(self) -> EvalTask:
        """Validation prompts with the behaviour's scorer, as a run would choose by."""
        experiment = self.experiment
        if experiment.honesty is None:  # its protocol would ask for as many test topics as a whole run needs
            topics = self.bench.pairs(self.behaviour)[1].topics[: self.n_prompts]
            if len(topics) < FEWEST:
                raise ValueError(
                    f"{self.behaviour} must have at least {FEWEST} validation topics, got {len(topics)}. Add topics to "
                    "its file."
                )
            return _with_repetition(EvalTask(topics, (experiment.made_scorer,), self.length))
        choose = replace(experiment.choose, n_prompts=self.n_prompts, max_new_tokens=self.length)
        return _with_repetition(protocol_of(replace(experiment, choose=choose), self.bench.model).choosing)

    def _arm(self, name: str) -> tuple[str, str, int, Intervention]:
        """How it is called in figures, its direction as to this behaviour, its tuning seed, and what it puts on."""
        if name == "untuned":
            return name, "none", 0, None
        if name == STEERED:
            vectors = self.vectors if self.vectors is not None else self.bench.vectors(self.behaviour)
            hooks = add(vectors, [self.layer], self.multiplier, hook=vectors.kind)
            return STEERED, "toward" if self.multiplier > 0 else "away", 0, hooks
        delta = self.bench.delta(name)
        seed = delta.config.get("seed", 0)
        of = {own.get("behaviour") for own in delta.config.get("vectors", ())}
        label = tuned_label(name)
        if label.direction == "none" or (of and self.behaviour not in of):  # its direction is another behaviour's
            return name, "none", seed, delta
        return label.arm, label.direction, seed, delta

    def _show_scores(self, job: Job, board: ArmEvaluator, compared: list[dict[str, Any]]) -> None:
        found = board.scoreboard()
        rows = [_without_seed(row, row["arm"]) for row in plain(tables_of(found, exams=[SET], writing=SET)["summary"])]
        title, about = f"{self.behaviour}: {rows[0]['n']} validation prompts, bootstrap seed {found.seed}", ""
        if self.vectors is not None:
            steered = f"steered at layer {self.layer} by {with_minus_sign(f'{self.multiplier:g}')}"
            about = f" ({steered}; {made(self.vectors)})"
        job.show("scores", arms_figure(rows, compared, title + about, f"{PAGE}-scores-graph"))
        if compared:
            job.show("differences", differences(list(map(_dashed, compared)), len(compared), live=True))
            job.show("cost", costs(list(map(_dashed, rows)), rows[0]["n"]))
            job.show("pareto", effect_against_cost(rows, self.behaviour + about, f"{PAGE}-pareto-graph"))
        score = rows[0]["scorer"]
        answers = [{**answer, "score": answer[score]} for answer in found.answers]
        job.show("answers", answers_table(answers, found.seed))


def _with_repetition(exam: EvalTask) -> EvalTask:
    """What is written shows a cost too: how far it repeats itself."""
    if exam.made[0].reads != "text" or exam.made[0].name == "repetition":
        return exam
    return EvalTask(exam.asked, (*exam.made, "repetition"), exam.max_new_tokens)


def _without_seed(row: dict[str, Any], *arms: str) -> dict[str, Any]:
    """The row, without a tuning seed where nothing was tuned."""
    return row if set(arms) - {"untuned", STEERED} else {**row, "seeds": []}


def _dashed(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row for a table, which has a dash where there is no seed."""
    return {**row, "seeds": row["seeds"] or None}


def _pairs(board: ArmEvaluator) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Each arm with the untuned one, and those of one direction with one another."""
    labels = board.scoreboard().scores[["arm", "direction"]].drop_duplicates().itertuples(index=False, name=None)
    untuned, *others = labels
    same = [(b, a) for a, b in itertools.combinations(others, 2) if a[1] == b[1]]
    return [*same, *((other, untuned) for other in others)]


def _controls(bench: Session) -> list[Component]:
    names = [name for name in bench.behaviours() if name in bench.with_pairs()]
    last = bench.n_layers - 1
    choices: Mapping[str, Any] = choices_of(bench.run.content) if bench.run is not None else {}
    usual = choices.get("away", {"layer": bench.usual_layer, "multiplier": -2})
    # Dash's lists of ticks have no name for screen readers; its drop-downs have.
    arms = dcc.Dropdown(
        id=f"{PAGE}-arms", options=_offered(bench), value=[STEERED, *bench.deltas()[:1]], multi=True, clearable=False
    )
    harm = choice(f"{PAGE}-harm", {HARM: "perplexity and KL", "none": "not measured"}, HARM)
    prompts = dcc.Input(id=f"{PAGE}-prompts", type="number", min=FEWEST, step=1, value=8)
    layer = slider(f"{PAGE}-layer", 0, last, 1, int(usual["layer"]), range(0, last + 1, 5))
    multiplier = slider(f"{PAGE}-multiplier", -4, 4, 0.25, float(usual["multiplier"]), range(-4, 5))
    length = slider(f"{PAGE}-length", 10, 60, 10, 20, (10, 20, 40, 60))
    return [
        field("Behaviour", choice(f"{PAGE}-behaviour", names)),
        field("Arms", arms, "beside the untuned model; the page Tuning makes more"),
        field("Layer", layer, "block at which steered is steered"),
        field("Multiplier m", multiplier, "times the vector's own length; below 0: away"),
        field("Prompts", prompts, "of validation topics; as many as there are, if fewer"),
        field("New tokens", length, "where the scorer reads text"),
        field("Side effects", harm, "on a few neutral paragraphs"),
    ]


def _offered(bench: Session) -> list[dict[str, str]]:
    return [{"label": name.replace("_", " "), "value": name} for name in (STEERED, *bench.deltas())]


def _of_run(bench: Session) -> list[Component]:
    """The run's tables for a chosen set, what its arms cost, and its answers to a chosen prompt."""
    if bench.run is None:
        return []
    below = [html.P(html.A("Compare arms of your own choice, below", href=f"#{PAGE}-live"))] if bench.has_model else []
    content = bench.run.content
    sets = list(of_first_scorer(content["summary"]))
    parts: list[Component] = [
        *below,
        html.H3("What the run found"),
        field("Set", choice(f"{PAGE}-set", sets), "of prompts that the arms were tested on"),
        html.Div(of_set(content, sets[0]), id=f"{PAGE}-of-set"),
        html.H4("Side effects"),
        costs(content["summary"], _written(content["side_effects"])),
        *other_sets(content["side_effects"]),
        html.H4("The same prompt, every arm"),
    ]
    try:
        rows = _responses(bench)
    except (FileNotFoundError, ValueError) as refusal:
        return [*parts, html.P(str(refusal), className="error")]
    asked = list(dict.fromkeys(row["set"] for row in rows))
    offered = prompts_of(rows, asked[0], "")
    search = dcc.Input(id=f"{PAGE}-search", type="text", debounce=0.4, value="")
    return [
        *parts,
        html.Div(
            [
                field("Set", choice(f"{PAGE}-asked", asked)),
                field("Words", search, "only prompts where a question or an answer holds them"),
                field("Prompt", choice(f"{PAGE}-prompt", offered)),
            ],
            style=_BESIDE,
        ),
        html.P(f"{len(offered)} prompts.", id=f"{PAGE}-matches", className="note", role="status"),
        html.Div(answers_to(rows, asked[0], next(iter(offered), None)), id=f"{PAGE}-answered"),
    ]


def _written(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """How many answers an arm's repetition was measured on."""
    return next((row["n"] for row in rows if row["scorer"] == "repetition"), None)


def _responses(bench: Session) -> list[dict[str, Any]]:
    """The run's answers; older runs have one set without a name."""
    assert bench.run is not None
    first = bench.run.content["summary"][0]["set"]
    return [{"set": first, **row} for row in bench.run.responses()]


def _connect_run(app: Dash, bench: Session) -> None:
    responses = cache(lambda: _responses(bench))

    @app.callback(Output(f"{PAGE}-of-set", "children"), Input(f"{PAGE}-set", "value"), prevent_initial_call=True)
    def other_set(name: str) -> Any:
        assert bench.run is not None
        return of_set(bench.run.content, name)

    @app.callback(
        Output(f"{PAGE}-prompt", "options"), Output(f"{PAGE}-prompt", "value"), Output(f"{PAGE}-matches", "children"),
        Input(f"{PAGE}-asked", "value"), Input(f"{PAGE}-search", "value"), State(f"{PAGE}-prompt", "value"),
        prevent_initial_call=True,
    )  # fmt: skip
    def other_prompts(name: str, words: str | None, now: str | None) -> tuple[Any, Any, str]:
        offered = prompts_of(responses(), name, words or "")
        options = [{"label": label, "value": prompt} for prompt, label in offered.items()]
        told = f"{len(offered)} prompts." if offered else "No prompt or answer holds these words."
        return options, no_update if now in offered else next(iter(offered), None), told

    @app.callback(
        Output(f"{PAGE}-answered", "children"), Input(f"{PAGE}-prompt", "value"), State(f"{PAGE}-asked", "value"),
        prevent_initial_call=True,
    )  # fmt: skip
    def other_answers(prompt: str | None, name: str) -> Any:
        return answers_to(responses(), name, prompt)
