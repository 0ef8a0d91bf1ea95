"""The pages Vectors and Steering without a browser: what they draw is what the API gives, and what they refuse."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dash import Dash
from pages import cells, figures, parts
from small_runs import make_board, write_run

import rt_lens as rtl
from rt_lens.apps.dashboard import steering, vectors
from rt_lens.apps.dashboard.app import make_app
from rt_lens.apps.dashboard.session import MOST_ASIDE, Session, provenance_text
from rt_lens.apps.dashboard.work import Job, Stopped
from rt_lens.arms.sweeping import Sweep
from rt_lens.common.progress import Step, watched
from rt_lens.evaluation.tasks import EvalTask
from rt_lens.experiment.config import Experiment, load_experiment
from rt_lens.experiment.validation import validation_task
from rt_lens.results.schema import load_results
from rt_lens.vectors.steering_vectors import Provenance, SteeringVectors
from rt_lens.vectors.validation import VectorValidation

BEHAVIOUR = "<b>glad</b>"
TOPICS = [f"What do you think of {thing}?" for thing in (
    "rain", "trains", "bread", "Mondays", "chess", "cats", "soup", "maps", "snow", "tea",
    "boats", "hills", "shoes", "clocks", "songs", "paint", "stairs", "lamps", "frogs", "ink",
)]  # fmt: skip


@pytest.fixture
def own_file(tmp_path: Path) -> Experiment:
    """A behaviour with a name that would be markup if it were not escaped."""
    path = tmp_path / "glad.toml"
    topics = ", ".join(f'"{topic}"' for topic in TOPICS)
    path.write_text(
        f'scorer = "length"\n[pairs]\npositive = ["You are glad."]\nnegative = ["You are sad."]\ntopics = [{topics}]\n'
    )
    read = load_experiment(path)  # no file may have such a name; what is made in Python may
    return replace(read, name=BEHAVIOUR, pairs=replace(read.pairs, name=BEHAVIOUR))


@pytest.fixture
def session(tiny: Any, own_file: Experiment) -> Session:
    return Session(tiny, {}, experiments=[own_file])


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with vectors of the tiny model's two blocks."""
    dose = [
        {"layer": layer, "multiplier": multiplier, "n": 16, "mean": 0.1 * multiplier, "low": -1.0, "high": 1.0,
         "perplexity": 20.0 + layer, "admissible": True}
        for layer in (0, 1) for multiplier in (-2.0, 0.0, 2.0)
    ]  # fmt: skip
    separable = [
        {"layer": layer, "accuracy": 0.6 + 0.1 * layer, "low": 0.5, "high": 0.9, "n": 31} for layer in range(3)
    ]
    lens = [{"layer": 0, "sign": sign, "tokens": [" <b>word</b>"]} for sign in ("+v", "-v")]
    board = make_board(0, seeds=(0,), prompts=tuple(range(6)), n_texts=2)
    folder = write_run(
        tmp_path_factory.mktemp("run") / "run",
        board,
        separability=separable,
        dose_response=dose,
        logit_lens=lens,
        seed=7,
    )
    noise = torch.Generator().manual_seed(3)
    made = {f"blocks.{layer}.hook_resid_post": torch.randn(32, generator=noise) for layer in range(2)}
    provenance = Provenance("tiny", "mood", "mean_diff", "last", "none", 12, "0" * 64, 0, "0.1.0")
    SteeringVectors(made, provenance).save(folder / "vectors.safetensors")
    return folder


def text(content: Any) -> str:
    held = [getattr(part, "children", None) for part in parts(content)]
    each = [child for children in held for child in (children if isinstance(children, list) else [children])]
    return "".join(child for child in each if isinstance(child, str))


def done(work: Callable[[Job], Any]) -> Job:
    job = Job("work", "1", work)
    with watched(job.watch):
        work(job)
    return job


# Vectors


@pytest.fixture
def found(session: Session) -> tuple[Job, VectorValidation]:
    """The page's work, and what the API says of the same pairs."""
    train, held_out = session.pairs(BEHAVIOUR)
    name, work = vectors.plan(session, BEHAVIOUR, "mean_diff", 6, 3)
    assert name == "extracting vectors"
    return done(work), rtl.validate_vectors(session.model, train.sample(6, 3), held_out, seed=3)


def remembered(job: Job) -> dict[str, str]:
    """What the page keeps of the vectors that stand on it."""
    return next(part.data for part in parts(job.shown["summary"]) if getattr(part, "id", "") == "vectors-current")


def test_the_vectors_page_draws_what_trust_says_and_no_other_page_uses_its_vectors(session, found):
    job, wanted = found
    drawn = figures(job.shown["validation"])["vectors-validation-graph"]
    by_name = {trace.name: trace for trace in drawn.data if trace.name and trace.x is not None}
    assert list(by_name["pair accuracy"].x) and set(by_name["AUC"].y) == set(wanted.layers["auc"])
    heat = next(trace for trace in drawn.data if trace.type == "heatmap")
    square = wanted.cosines.pivot(index="layer", columns="other", values="cosine")
    assert np.allclose(np.asarray(heat.z, float), square)
    assert wanted.reason in text(job.shown["summary"])
    assert "6 training pairs, tested on pairs of 4 validation topics; seed 3" in text(job.shown["summary"])
    assert not session.has_vectors(BEHAVIOUR)
    _, aside = session.aside(remembered(job)["key"])
    assert aside.provenance.seed == 3 and aside.provenance.n_pairs == 6
    assert all(torch.equal(aside[name], vector) for name, vector in wanted.vectors.vectors.items())
    assert "on the same pairs" in wanted.reason or wanted.best is None
    head, *rows = cells(job.shown["table"])
    assert head == ["layer", "pair accuracy [95 %]", "AUC [95 %]", "cosine of two halves [95 %]", "n"]
    first = wanted.layers.iloc[0]
    assert rows[0][1] == f"{first['accuracy']:.3f} [{first['accuracy_low']:.3f}, {first['accuracy_high']:.3f}]"
    assert [row[-1] for row in rows] == ["4", "4"]


def test_the_map_lengths_and_words_are_those_of_the_api_and_no_name_is_markup(session, found):
    job, wanted = found
    _, held_out = session.pairs(BEHAVIOUR)
    mapped = rtl.vectors.activation_map(session.model, held_out.sample(60, 3), layers=[0, 1], seed=3)
    drawn = figures(job.shown["map"])["vectors-map-graph"]
    dots = [trace for trace in drawn.data if trace.x is not None and len(trace.x) > 1]
    assert np.allclose(sorted(np.concatenate([dot.x for dot in dots])), sorted(mapped["x"]))
    lengths = rtl.vectors.norms(session.model, wanted.vectors, held_out.topics, seed=3)
    traces = {trace.name: trace for trace in figures(job.shown["norms"])["vectors-norms-graph"].data if trace.name}
    assert np.allclose(traces["activations"].y, lengths["mean"])
    assert np.allclose(traces["vector (multiplier 1)"].y, lengths["vector"])
    lens = rtl.logit_lens(session.model, wanted.vectors)
    (table,) = figures(job.shown["lens"])["vectors-lens-graph"].data
    assert list(table.cells.values[0]) == sorted(set(lens["layer"]))
    for slot in ("validation", "map", "norms", "lens"):
        for figure in figures(job.shown[slot]).values():
            assert "<b>glad" not in figure.to_json()
    assert "&lt;b&gt;glad" in figures(job.shown["validation"])["vectors-validation-graph"].layout.title.text


def test_another_behaviours_vectors_are_set_beside_those_found(session, found, tiny_vectors):
    job, wanted = found
    assert job.shown["cosines"] is None  # it stood alone
    session.keep_vectors("mood", tiny_vectors)
    session.keep_vectors(BEHAVIOUR, -1 * wanted.vectors)  # those in use are not those found
    beside = vectors._beside_others(session, BEHAVIOUR, wanted)
    layer = wanted.best if wanted.best is not None else 1
    name = f"blocks.{layer}.hook_resid_post"
    cosine = float(torch.cosine_similarity(wanted.vectors[name], tiny_vectors[name], dim=0))
    heat = figures(beside)["vectors-cosines-graph"].data[0]
    assert np.allclose(np.asarray(heat.z, float), [[1, cosine], [cosine, 1]], atol=1e-5)


def test_random_directions_are_judged_as_any_method(session):
    job = done(vectors.plan(session, BEHAVIOUR, "random", 6, 0)[1])
    assert session.aside(remembered(job)["key"])[1].provenance.method == "random"
    assert (
        "random directions, as a control"
        in figures(job.shown["validation"])["vectors-validation-graph"].layout.title.text
    )


def test_the_download_is_the_file_that_save_writes(session, found, tmp_path):
    job, trusted = found
    done(vectors.plan(session, BEHAVIOUR, "random", 6, 0)[1])  # another tab finds others meanwhile
    sent = vectors.as_download(session, remembered(job)["key"])
    path = tmp_path / "sent.safetensors"
    path.write_bytes(b64decode(sent["content"]))
    back, mine = SteeringVectors.load(path), trusted.vectors
    assert back.provenance == mine.provenance
    assert all(torch.equal(back[name], mine[name]) for name in mine.hook_names)
    assert sent["filename"] == f"{BEHAVIOUR}_mean_diff.safetensors"


def test_the_oldest_sets_are_dropped_and_asking_for_them_says_so(session, tiny_vectors):
    keys = [session.set_aside("mood", tiny_vectors) for _ in range(MOST_ASIDE + 1)]
    assert len(set(keys)) == len(keys)
    assert all(session.aside(key) == ("mood", tiny_vectors) for key in keys[1:])
    for gone in (keys[0], "9-of-a-former-life"):
        with pytest.raises(ValueError, match=f"no longer kept.* or computed {MOST_ASIDE} newer ones"):
            vectors.as_download(session, gone)
        with pytest.raises(ValueError, match="Compute them again"):
            vectors.use(session, {"key": gone, "behaviour": "mood"})
    assert not session.has_vectors("mood")


def test_vectors_are_put_in_use_by_hand_and_the_way_back_is_open(tiny, tiny_vectors, own_file):
    others = 2.0 * tiny_vectors
    session = Session(tiny, {"mood": tiny_vectors}, experiments=[own_file])
    mine, late = ({"key": session.set_aside("mood", each), "behaviour": "mood"} for each in (others, -1 * others))
    opened = "All pages use the vectors given at the start for mood (mean_diff, 12 pairs, seed 0), not these."
    assert vectors.in_use(session, mine) == opened
    vectors.use(session, mine)
    assert session.vectors("mood") is others and session.has_kept("mood")
    assert (
        vectors.in_use(session, mine)
        == f"All pages use these for mood from now on ({provenance_text(session.vectors('mood'))})."
    )
    vectors.use(session, late)
    assert "others for mood, extracted on this page" in vectors.in_use(session, mine)
    session.forget_kept("mood")
    assert session.vectors("mood") is tiny_vectors and vectors.in_use(session, late) == opened
    lone = {"key": session.set_aside(BEHAVIOUR, others), "behaviour": BEHAVIOUR}
    assert "the default vectors for <b>glad</b> (extracted when first needed), not these" in vectors.in_use(
        session, lone
    )
    vectors.use(session, lone)
    assert session.vectors(BEHAVIOUR) is others
    session.forget_kept(BEHAVIOUR)
    assert session.vectors(BEHAVIOUR).provenance.n_pairs < 96 and "the default vectors" in vectors.in_use(session, lone)


def test_a_runs_vectors_are_said_to_be_its_own(tiny, run_folder):
    session = Session(tiny, {}, load_results(run_folder))
    assert provenance_text(session.vectors("mood")) == "mean_diff, 12 pairs, seed 0"
    assert session.origin("mood") == "the vectors of the run" and session.origin("formality") == "the default vectors"


def pressed(app: Dash, button: str, found: dict[str, str]) -> dict[str, Any]:
    """What a press of a button changes on the page."""
    its = {name: [each["id"] for each in made["inputs"]] for name, made in app.callback_map.items()}
    (name,) = [name for name, inputs in its.items() if inputs == [button] and "vectors-in-use" in name]
    outputs = [
        {"id": part.rsplit(".", 1)[0], "property": part.rsplit(".", 1)[1]} for part in name.strip(".").split("...")
    ]
    sent = {
        "output": name, "outputs": outputs, "changedPropIds": [f"{button}.n_clicks"],
        "inputs": [{"id": button, "property": "n_clicks", "value": 1}],
        "state": [{"id": "vectors-current", "property": "data", "value": found}],
    }  # fmt: skip
    client = app.server.test_client()
    return client.post("/_dash-update-component", json=sent, base_url="http://127.0.0.1").json["response"]


def test_the_buttons_do_so_and_say_so(tiny, tiny_vectors):
    session = Session(tiny, {"mood": tiny_vectors})
    others = 2.0 * tiny_vectors
    found, app = {"key": session.set_aside("mood", others), "behaviour": "mood"}, make_app(session)
    answer = pressed(app, "vectors-use", found)
    assert session.vectors("mood") is others
    assert answer["vectors-in-use"]["children"].startswith("All pages use these for mood")
    assert answer["vectors-back"]["disabled"] is False
    answer = pressed(app, "vectors-back", {**found, "key": "gone"})  # the way back is open all the same
    assert session.vectors("mood") is tiny_vectors and answer["vectors-back"]["disabled"] is True
    answer = pressed(app, "vectors-use", {**found, "key": "gone"})
    assert list(answer) == ["vectors-error"] and "Compute them again" in answer["vectors-error"]["children"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("mean_diff", None, 0), "pairs.*whole number from 4 to 2,000"),
        (("mean_diff", 3, 0), "pairs.* 3"),
        (("mean_diff", 96, -1), "seed.* -1"),
        (("magic", 96, 0), "method must be one of mean_diff.*, got 'magic'"),
    ],
)
def test_settings_of_vectors_that_will_not_do_are_refused_before_any_work(session, settings, message):
    with pytest.raises(ValueError, match=message):
        vectors.plan(session, BEHAVIOUR, *settings)


# Steering


def expected(session: Session, layers: list[int], n_prompts: int) -> tuple[Sweep, list[str]]:
    _, held_out = session.pairs(BEHAVIOUR)
    prompts = held_out.topics[:n_prompts]
    found = rtl.sweep(
        session.model, session.vectors(BEHAVIOUR), EvalTask(prompts, "length", 6), layers=layers,
        multipliers=[-4, 0, 4], progress=False,
    )  # fmt: skip
    return found, prompts


def test_the_steering_page_draws_what_sweep_finds_layer_after_layer(session):
    name, work = steering.plan(session, BEHAVIOUR, "0-1", "-4,0,4", 3, 6)
    job = done(work)
    wanted, prompts = expected(session, [0, 1], 3)
    assert name == "steering" and len(prompts) == 3
    assert job.versions == {"summary": 2, "heat": 2, "dose": 2, "table": 2}  # once for each layer
    grid = wanted.summary().pivot(index="layer", columns="multiplier", values="mean")
    assert grid.to_numpy().std() > 0  # else any drawing of it would do
    heat = figures(job.shown["heat"])["steering-heat-graph"].data[0]
    assert np.allclose(np.asarray(heat.z, float), grid.sub(grid[0.0], axis=0))
    told = text(job.shown["summary"])
    responses = [wanted.dose_response(layer) for layer in (0, 1)]
    assert all(str(response) in told for response in responses)
    steepest = max(responses, key=lambda response: abs(response.slope.mean))
    assert told.index(str(steepest)) == min(told.index(str(response)) for response in responses)
    _, *rows = cells(job.shown["table"])
    low = wanted.summary().iloc[0]
    assert rows[0] == ["0", "-4", f"{low['mean']:.3f} [{low['low']:.3f}, {low['high']:.3f}]", "3"]
    assert len(rows) == 6
    assert "the steepest of 2 layers on these same prompts, so its slope is optimistic" in told
    heat_title = figures(job.shown["heat"])["steering-heat-graph"].layout.title.text
    drawn = figures(job.shown["dose"])["steering-dose-graph"]
    made = session.vectors(BEHAVIOUR).provenance
    for title in (heat_title, drawn.layout.title.text):
        assert f"(&lt;b&gt;glad&lt;/b&gt;: mean_diff, {made.n_pairs} pairs, seed 0)" in title
    assert f"Layer {steepest.layer}: length (" in drawn.layout.title.text and "&lt;b&gt;glad" in drawn.layout.title.text
    lines = {trace.name: list(trace.y) for trace in drawn.data if trace.name in prompts}
    table = steepest.table.pivot(index="prompt", columns="multiplier", values="score")
    assert lines == {prompt: table.loc[number].tolist() for number, prompt in enumerate(prompts)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("x", "-2,0,2", 6, 20), "layers.*'x'"),
        ((None, "-2,0,2", 6, 20), "layers.*''"),
        (("0-2", "-2,0,2", 6, 20), r"layers contains 2, but this model has blocks 0\.\.1"),
        (("0", "-2,2,3", 6, 20), "multipliers must be at least three different numbers, and 0.* got -2,2,3"),
        (("0", "0,2", 6, 20), "multipliers must be at least three.* got 0,2"),
        (("0", "0,one", 6, 20), "multipliers.*'0,one'"),
        (("0", "-2,0,2", None, 20), "prompts.*whole number from 2 to 200"),
        (("0", "-2,0,2", 6, 0), "new tokens.* 0"),
    ],
)
def test_settings_of_steering_that_will_not_do_are_refused_before_any_work(session, settings, message):
    with pytest.raises(ValueError, match=message):
        steering.plan(session, BEHAVIOUR, *settings)


def test_a_layer_without_a_vector_is_refused_before_the_others_are_steered(session, tiny_vectors):
    session.keep_vectors(BEHAVIOUR, tiny_vectors.select([0]))
    job = Job("steering", "1", steering.plan(session, BEHAVIOUR, "0-1", "-2,0,2", 2, 2)[1])
    with pytest.raises(ValueError, match=r"layers.* 1.*\b0\.\.0"):
        job.work(job)
    assert not job.shown


def test_honesty_weighs_options_instead_of_answers(tiny, tmp_path, tiny_vectors):
    path = tmp_path / "honest.toml"
    path.write_text('name = "honest"\n[honesty]\nprotocol = "likelihood"\nn_calibration = 4\nn_items = 4\n')
    task = validation_task(load_experiment(path), tiny, 5, n_prompts=2)
    assert task.name == "likelihood_share" and len(task.prompts) == 2
    session = Session(tiny, {"honest": tiny_vectors}, experiments=[path])
    job = done(steering.plan(session, "honest", "1", "-2,0,2", 2, 5)[1])
    wanted = rtl.sweep(
        tiny, tiny_vectors, task, layers=[1], multipliers=[-2, 0, 2], progress=False
    )  # fmt: skip
    told = text(job.shown["summary"])
    assert str(wanted.dose_response(1)) in told and "optimistic" not in told  # of one layer nothing was picked
    assert (
        "likelihood share of the right options" in figures(job.shown["heat"])["steering-heat-graph"].layout.title.text
    )


# Both


@pytest.mark.parametrize(
    ("page", "settings"),
    [(vectors, ("mean_diff", 6, 0)), (steering, ("0-1", "-2,0,2", 2, 4))],
    ids=["vectors", "steering"],
)
def test_work_that_is_stopped_leaves_no_hook(session, hooks_on, page, settings):
    model = session.model
    _, work = page.plan(session, BEHAVIOUR, *settings)
    job, hooks = Job("work", "1", work), []
    before = hooks_on(model)

    def watch(step: Step | None) -> None:
        """Presses Stop as soon as a hook is on."""
        if hooks_on(model) != before:
            hooks.append(hooks_on(model))
            job.stop.set()
        job.watch(step)

    if page is vectors:  # reads without hooks of its own between steps: stop at its first bar
        job.stop.set()
    with pytest.raises(Stopped), watched(watch):
        work(job)
    assert hooks or page is vectors
    assert hooks_on(model) == before
    assert not job.shown
    assert page is steering or not session.has_vectors(BEHAVIOUR)


def test_a_run_comes_first_with_its_own_numbers(tiny, run_folder):
    run = load_results(run_folder)
    page = vectors.layout(Session(tiny, {}, run))
    assert text(page).index("Results of the run") < text(page).index("Live")
    drawn = figures(page)
    assert list(drawn["vectors-run-separability"].data[2].y) == [row["accuracy"] for row in run.content["separability"]]
    assert "seed 7" in drawn["vectors-run-separability"].layout.title.subtitle.text
    own = SteeringVectors.load(run_folder / "vectors.safetensors")
    wanted = rtl.vectors.cosines({"mood": own}).pivot(index="a", columns="b", values="cosine")
    assert np.allclose(np.asarray(drawn["vectors-run-cosines"].data[0].z, float), wanted)
    assert "<b>" not in drawn["vectors-run-lens"].to_json()
    page = steering.layout(Session(tiny, {}, run))
    assert text(page).index("Results of the run") < text(page).index("Live")
    scores, *_ = [trace for trace in figures(page)["steering-run-dose"].data if trace.name == "layer 1"]
    assert list(scores.y) == [-0.2, 0.0, 0.2]
    assert run.content["choices"]["rule"] in text(page) and ": layer 1, multiplier -2. Furthest." in text(page)


def test_without_a_model_the_run_is_shown_and_one_sentence_why_no_more(run_folder):
    session = Session(None, {}, load_results(run_folder))
    for page, sentence in ((vectors, "vectors cannot be extracted"), (steering, "it cannot be steered")):
        laid = page.layout(session)
        assert figures(laid)
        assert f"tiny is not on this machine, so {sentence} here." in text(laid)
        assert f"{page.PAGE}-start" not in [getattr(part, "id", "") for part in parts(laid)]


def test_without_a_run_there_is_the_live_part_alone(session):
    for page in (vectors, steering):
        laid = page.layout(session)
        ids = {getattr(part, "id", "") for part in parts(laid)}
        assert not figures(laid) and "Results of the run" not in text(laid)
        assert {f"{page.PAGE}-{name}" for name in (*page.SETTINGS, *page.SLOTS, "start", "stop")} <= ids


def test_both_pages_connect(session):
    app = Dash(suppress_callback_exceptions=True)
    for page in (vectors, steering):
        page.connect(app, session)
    outputs = " ".join(app.callback_map)
    assert "vectors-download.data" in outputs and "steering-heat.children" in outputs
