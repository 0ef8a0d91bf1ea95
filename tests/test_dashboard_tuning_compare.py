"""The pages Tuning and Compare without a browser: what they draw is what the API gives, and what they refuse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pages import cells, figures, parts
from small_runs import make_board, write_run

import rt_lens as rtl
from rt_lens.apps.dashboard import compare, explore, tuning
from rt_lens.apps.dashboard.app import make_app
from rt_lens.apps.dashboard.compared import prompts_of, responses_to
from rt_lens.apps.dashboard.session import Session
from rt_lens.apps.dashboard.work import Job, Stopped
from rt_lens.arms.comparison import EvalTask, compare_arms
from rt_lens.arms.inspection import residual_shifts, weight_changes
from rt_lens.arms.projections import projection_changes
from rt_lens.common.progress import watched
from rt_lens.data.builtin import neutral_paragraphs, neutral_prompts
from rt_lens.experiment.config import Experiment, load_experiment
from rt_lens.models.generation import as_chat
from rt_lens.results.schema import load_results
from rt_lens.tuning.delta import WeightDelta
from rt_lens.tuning.targets import Target

BEHAVIOUR, HOST = "<b>glad</b>", "http://127.0.0.1"
THINGS = (
    "rain", "trains", "bread", "Mondays", "chess", "cats", "soup", "maps", "snow", "tea",
    "boats", "hills", "shoes", "clocks", "songs", "paint", "stairs", "lamps", "frogs", "ink",
)  # fmt: skip
TUNE = "layers = [1]\nmax_steps = 4\nbatch_size = 2\nneutral_batch_size = 1\nn_targets = 6\ntarget_tokens = 3\n"
SETTINGS = ("1", 4, 3e-3, 14.0, 1.0, 1.0, 5)


@pytest.fixture(scope="module")
def once() -> dict[str, Any]:
    """What the tests share, for tuning takes seconds: a model, which each leaves as it was, and the results."""
    return {}


@pytest.fixture
def glad(tmp_path: Path) -> Experiment:
    """A behaviour whose name would be markup if it were not escaped."""
    path = tmp_path / "glad.toml"
    topics = ", ".join(f'"What do you think of {thing}?"' for thing in THINGS)
    path.write_text(
        f'[pairs]\npositive = ["You are glad."]\nnegative = ["You are sad."]\n'
        f'topics = [{topics}]\n[scorer]\nkind = "pattern"\npattern = "a"\n[tune]\n{TUNE}validate_every = 2\n'
        "[choose]\nn_paragraphs = 2\n"
    )
    read = load_experiment(path)  # no file may have such a name; what is made in Python may
    return replace(read, name=BEHAVIOUR, pairs=replace(read.pairs, name=BEHAVIOUR))


@pytest.fixture
def session(make_tiny: Callable[..., Any], once: dict[str, Any], glad: Experiment) -> Session:
    if "model" not in once:
        once["model"] = make_tiny()
        once["weights"] = weights(once["model"])
    return Session(once["model"], once.get("vectors", {}), experiments=[glad])


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    history = [
        {"arm": arm, "direction": "away", "seed": 0, "step": step, "split": "train", "total": 2.0 / step, "token": 1.0,
         "cosine": None, "kl": 0.1}
        for arm in ("token_tuned", "rep_tuned") for step in (1, 2, 3)
    ]  # fmt: skip
    return write_run(
        tmp_path_factory.mktemp("run") / "run", make_board(0, prompts=tuple(range(8)), n_texts=3), history=history
    )


class RecordedJob(Job):
    """A job that remembers all that it showed, and can be stopped at some showing."""

    def __init__(self, work: Callable[[Job], Any], stop_at: tuple[str, int] = ("", 0)) -> None:
        super().__init__("work", "1", work)
        self.all: dict[str, list[Any]] = {}
        self.stop_at = stop_at

    def show(self, slot: str, content: Any) -> None:
        super().show(slot, content)
        self.all.setdefault(slot, []).append(content)
        if (slot, len(self.all[slot])) == self.stop_at:
            self.stop.set()


def done(work: Callable[[Job], Any], stop_at: tuple[str, int] = ("", 0)) -> RecordedJob:
    job = RecordedJob(work, stop_at)
    with watched(job.watch):
        work(job)
    return job


def text(content: Any) -> str:
    held = [getattr(part, "children", part) for part in parts(content)]
    each = [child for children in held for child in (children if isinstance(children, list) else [children])]
    return " ".join(child for child in each if isinstance(child, str))


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(before: dict[str, torch.Tensor], model: Any) -> bool:
    return all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def drawn_losses(figure: Any, split: str, n_parts: int = 4) -> list[list[float]]:
    lines = [list(trace.y) for trace in figure.data if trace.name.endswith(split)]
    assert len(lines) == n_parts
    return lines


# Tuning


@pytest.fixture
def tuned(session: Session, once: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> RecordedJob:
    monkeypatch.setattr(tuning, "_BETWEEN", 0.0)
    if "tuned" not in once:
        name, work = tuning.plan(session, BEHAVIOUR, "away", *SETTINGS)
        assert name == "tuning away"
        once["tuned"], once["vectors"] = done(work), {BEHAVIOUR: session.vectors(BEHAVIOUR)}
        (once["name"],) = session.deltas()
        once["delta"] = session.delta(once["name"])
    session.keep_delta(once["name"], once["delta"])
    return once["tuned"]


def test_tuning_keeps_and_draws_what_tune_gives_and_leaves_the_model_as_it_was(session, tuned, once):
    model = session.model
    assert same(once["weights"], model)
    config = replace(session.experiment(BEHAVIOUR).tune, seed=5, learning_rate=3e-3, epochs=4)
    train, validation = session.pairs(BEHAVIOUR)
    wanted = rtl.tune(
        model, session.vectors(BEHAVIOUR), train, config, validation=validation, neutral=neutral_prompts()[:4],
        progress=False,
    )  # fmt: skip
    (name,) = session.deltas()
    kept = session.delta(name)
    assert name == f"rep_tuned_away ({BEHAVIOUR})" and kept.history == wanted.history
    assert all(torch.equal(change, wanted.changes[key]) for key, change in kept.changes.items())
    assert any(change.abs().max() > 0 for change in kept.changes.values())
    final = figures(tuned.shown["losses"])["tuning-losses-graph"]
    for split in ("train", "validation"):
        rows = [row for row in wanted.history if row["split"] == split]
        each = [[row[part] for row in rows] for part in ("total", "token", "cosine", "kl")]
        assert drawn_losses(final, split) == each and len(rows) == {"train": 4, "validation": 2}[split]


def test_the_losses_are_drawn_step_by_step_while_it_tunes(tuned):
    last = drawn_losses(figures(tuned.shown["losses"])["tuning-losses-graph"], "train")
    growing = [figures(shown)["tuning-losses-graph"] for shown in tuned.all["losses"][1:-1]]
    assert [len(drawn_losses(figure, "train")[0]) for figure in growing] == [1, 2, 3, 4]
    for figure in growing:
        for line, whole in zip(drawn_losses(figure, "train"), last, strict=True):
            assert line == pytest.approx(whole[: len(line)], abs=5.1e-4)  # the bar's three decimals


def test_what_tuning_did_inside_is_what_the_inspection_says(session, tuned):
    model, vectors = session.model, session.vectors(BEHAVIOUR)
    (name,) = session.deltas()
    delta = session.delta(name)
    changed = weight_changes(model, delta, vectors)
    heat, *_ = figures(tuned.shown["weights"])["tuning-weights-weights-graph"].data
    drawn = sorted(value for row in heat.z for value in row if value is not None and not np.isnan(value))
    assert drawn == pytest.approx(sorted(100 * changed["relative"].dropna()))
    prompts = session.pairs(BEHAVIOUR)[1].topics[: tuning.N_PROMPTS]
    arms = {"steered": rtl.add(vectors, [1], -2.0), "rep_tuned": delta}
    moved = projection_changes(model, vectors, as_chat(model, prompts), arms, seed=5)
    lines = {
        trace.name: trace
        for trace in figures(tuned.shown["projections"])["tuning-projections-graph"].data
        if trace.mode == "lines+markers"
    }
    for arm, own in moved.groupby("arm"):
        assert list(lines[arm].y) == pytest.approx(own["mean"].tolist(), abs=1e-6)
    shifts = residual_shifts(model, arms, prompts, vectors, seed=5)
    both = figures(tuned.shown["shifts"])["tuning-shifts-graph"].data
    wanted = shifts.between.dropna(subset=["mean"])["mean"].tolist()
    line = next(trace for trace in both if trace.name == "steered and rep_tuned" and trace.mode == "lines+markers")
    assert [value for value in line.y if not np.isnan(value)] == pytest.approx(wanted, abs=1e-6)
    for slot in ("projections", "shifts"):
        (figure,) = figures(tuned.shown[slot]).values()
        title = figure.layout.title
        assert (
            f"(steered: layer 1, m = −2; {said(session)})" in title.text
            and "n = 4" in title.subtitle.text
            and "seed 5" in title.subtitle.text
        )
        assert "<b>" not in title.text
    assert figures(tuned.shown["losses"])["tuning-losses-graph"].layout.title.text.endswith(f"seed 5 ({said(session)})")
    title = figures(tuned.shown["weights"])["tuning-weights-weights-graph"].layout.title.text
    assert title.endswith(f"(along {said(session)})")


def said(session: Session) -> str:
    """The vectors in use, as titles have them."""
    made = session.vectors(BEHAVIOUR).provenance
    return f"&lt;b&gt;glad&lt;/b&gt;: mean_diff, {made.n_pairs} pairs, seed 0"


def test_vectors_of_another_hook_point_are_tuned_along_where_they_are(session, once):
    train, _ = session.pairs(BEHAVIOUR)
    session.keep_vectors(BEHAVIOUR, rtl.extract_vectors(session.model, train.sample(6, 0), hook="attn_out", seed=0))
    assert session.experiment(BEHAVIOUR).tune.hook == "resid_post"
    job = done(tuning.plan(session, BEHAVIOUR, "away", "1", 1, 1e-3, 14.0, 0.0, 0.0, 0)[1])
    (name,) = session.deltas()
    assert session.delta(name).config["hook"] == "hook_attn_out"
    changed = weight_changes(session.model, session.delta(name), session.vectors(BEHAVIOUR), hook="attn_out")
    _, along, *_ = [
        trace for trace in figures(job.shown["weights"])["tuning-weights-weights-graph"].data if trace.type == "heatmap"
    ]
    drawn = sorted(value for row in along.z for value in row if value is not None and not np.isnan(value))
    assert drawn and drawn == pytest.approx(sorted(np.log2(changed["alignment"] / changed["chance"]).dropna()))
    shifts = figures(job.shown["shifts"])["tuning-shifts-graph"].data
    assert any(trace.y is not None and not np.isnan(np.asarray(trace.y, float)).all() for trace in shifts)


def test_tuning_where_there_is_no_vector_is_refused_before_any_work(session, tiny_vectors):
    session.keep_vectors(BEHAVIOUR, tiny_vectors.select([0]))
    with pytest.raises(ValueError, match=r"layers.* 1.*\b0\.\.0"):
        tuning.plan(session, BEHAVIOUR, "away", *SETTINGS)
    session.forget_kept(BEHAVIOUR)
    _, work = tuning.plan(session, BEHAVIOUR, "away", *SETTINGS)
    session.keep_vectors(BEHAVIOUR, tiny_vectors.select([0]))  # while it waits
    job = RecordedJob(work)
    with pytest.raises(ValueError, match="layers.* 1"):
        job.work(job)
    assert not job.shown  # what stood there is not wiped away


def test_a_second_arm_gets_a_name_of_its_own_and_all_pages_offer_it(session, tuned):
    done(tuning.plan(session, BEHAVIOUR, "away", "1", 1, 1e-3, 14.0, 0.0, 0.0, 0)[1])
    done(tuning.plan(session, BEHAVIOUR, "suppress", "1", 1, 1e-3, 0.0, 1.0, 0.0, 0)[1])
    names = [f"rep_tuned_away ({BEHAVIOUR})", f"rep_tuned_away ({BEHAVIOUR}) 2", f"token_tuned_suppress ({BEHAVIOUR})"]
    assert session.deltas() == names
    assert names[0] in text(tuned.shown["kept"]) and "seed 5" in text(tuned.shown["kept"])
    assert [option["value"] for option in compare._arm_options(session)] == ["steered", *names]
    assert list(explore._arms(session))[1:] == names
    again = done(tuning.plan_weights(session, names[2])[1])
    title = figures(again.shown["changes"])["tuning-changes-weights-graph"].layout.title.text
    assert title == f"Changed weights: token_tuned_suppress (&lt;b&gt;glad&lt;/b&gt;) (along {said(session)})"


@pytest.mark.parametrize("stop_at", [("losses", 3), ("kept", 2)])
def test_stopping_leaves_the_model_bit_for_bit_as_it_was(session, hooks_on, monkeypatch, stop_at):
    monkeypatch.setattr(tuning, "_BETWEEN", 0.0)
    session.vectors(BEHAVIOUR)
    before, hooks = weights(session.model), hooks_on(session.model)
    with pytest.raises(Stopped):
        done(tuning.plan(session, BEHAVIOUR, "toward", *SETTINGS)[1], stop_at)
    assert same(before, session.model) and hooks_on(session.model) == hooks
    assert len(session.deltas()) == (stop_at[0] == "kept")  # what was finished is kept


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({0: ""}, "layers.*''"),
        ({0: "one"}, "layers.*'one'"),
        ({0: "0-9"}, "layers.* 2"),
        ({1: None}, "steps.*whole number"),
        ({1: 2.5}, r"steps.* 2\.5"),
        ({2: None}, "learning rate must be a number, got nothing"),
        ({2: 0.0}, r"learning_rate.* 0"),
        ({3: 0.0, 4: 0.0}, "nothing to learn"),
        ({5: -1.0}, r"kl_weight.* -1\.0"),
        ({6: -1}, "seed.* -1"),
    ],
)
def test_tuning_refuses_by_name_before_any_work(session, changed, wanted, as_a_user):
    settings = [changed.get(place, value) for place, value in enumerate(SETTINGS)]
    with pytest.raises(ValueError, match=f"^(?s:.*){wanted}"):
        tuning.plan(session, BEHAVIOUR, "away", *settings)


def test_the_controls_begin_with_the_behaviours_own_file_and_fit_the_model(session, make_tiny):
    own = load_experiment("honesty").tune
    found = tuning.usual(Session(make_tiny(n_layers=20), {}), "honesty")
    assert found == {
        "layers": "12, 14, 16, 18", "steps": own.max_steps, "rate": own.learning_rate, "cosine": own.cosine_weight,
        "token": own.token_weight, "kl": own.kl_weight, "seed": own.seed,
    }  # fmt: skip
    assert tuning.usual(session, "honesty")["layers"] == "1"  # two blocks have no layer 12


def test_honesty_learns_what_its_protocol_says(session, monkeypatch):
    asked = [[Target("Is water wet?", " Yes.")], [Target("Is fire cold?", " No.")]]

    def protocol_of(experiment: Experiment, model: Any) -> Any:  # the real one first asks what the model can do
        assert experiment.name == "honesty" and model is session.model
        return SimpleNamespace(targets=lambda direction, seed: tuple(asked if (direction, seed) == ("away", 0) else []))

    monkeypatch.setattr(tuning, "protocol_of", protocol_of)
    made = tuning.Tuning(session, "honesty", session.experiment("honesty").tune)
    assert list(made._targets()) == asked


def test_a_kept_change_can_be_downloaded_and_no_other_file(session, tuned, tmp_path):
    client, (name,) = make_app(session).server.test_client(), session.deltas()
    (link,) = [part for part in parts(tuned.shown["kept"]) if type(part).__name__ == "A"]
    assert "<" not in link.href
    file = tmp_path / "down.safetensors"
    file.write_bytes(client.get(link.href, base_url=HOST).data)
    loaded, kept = WeightDelta.load(file), session.delta(name)
    assert loaded.history == kept.history
    assert all(torch.equal(change, kept.changes[key]) for key, change in loaded.changes.items())
    for other in ("rep_tuned_toward", "../../etc/passwd", "..%2Fglad"):
        assert client.get(f"/tuned/{other}.safetensors", base_url=HOST).status_code == 404


# Compare


def bars(figure: Any) -> dict[str, float]:
    drawn = [bar for bar in figure.data if bar.type == "bar"]
    return {name: mean for bar in drawn for name, mean in zip(bar.x, bar.y, strict=True)}


@pytest.fixture
def compared(session: Session, tuned: RecordedJob, once: dict[str, Any]) -> RecordedJob:
    if "compared" not in once:
        arms = ["steered", *session.deltas()]
        once["compared"] = done(compare.plan(session, BEHAVIOUR, arms, 1, -4.0, 4, 5, compare.MEASURED)[1])
    return once["compared"]


def test_compare_draws_what_compare_arms_gives(session, compared):
    (name,) = session.deltas()
    prompts = session.pairs(BEHAVIOUR)[1].topics[:4]
    arms = {
        "untuned": None,
        "steered": rtl.add(session.vectors(BEHAVIOUR), [1], -4.0),
        f"rep_tuned ({BEHAVIOUR})": {5: session.delta(name)},
    }
    score = session.experiment(BEHAVIOUR).scorer
    board = compare_arms(
        session.model, arms, {"validation": EvalTask(prompts, (score, "repetition"), 5)},
        texts=neutral_paragraphs()[:2], progress=False,
    )  # fmt: skip
    wanted = board.summary().query("scorer == 'pattern'").set_index("arm")
    drawn = figures(compared.shown["scores"])["compare-scores-graph"]
    means = bars(drawn)
    escaped = {"untuned": "untuned", "steered": "steered", "rep_tuned (&lt;b&gt;glad&lt;/b&gt;)": list(arms)[2]}
    assert means == {shown: pytest.approx(wanted.loc[arm, "mean"]) for shown, arm in escaped.items()}
    title = drawn.layout.title
    assert "n = 4; seed 5" in title.subtitle.text  # the only one that was tuned
    assert "4 validation prompts, bootstrap seed 0 (steered at layer 1 by −4; mean_diff, " in title.text
    dots = figures(compared.shown["pareto"])["compare-pareto-graph"].data
    harms = sorted(dot.x[0] for dot in dots if dot.mode == "markers")
    assert harms == pytest.approx(sorted(wanted["kl"]))
    head, *rows = cells(compared.shown["side-effects"])
    assert head[:2] == ["arm", "perplexity [95 %]"]
    assert [row[-1] for row in rows] == ["–", "–", "5"]  # nothing was tuned in the first two
    for row, arm in zip(rows, arms, strict=True):
        assert row[1].startswith(f"{wanted.loc[arm, 'perplexity']:.3f} [")
        said = board.summary().query("scorer == 'repetition'").set_index("arm").loc[arm, "mean"]
        assert row[3].startswith(f"{said:.3f}")
    answers = {(each["prompt"], each["arm"]): each for each in board.answers}
    head, *rows = cells(compared.shown["answers"])
    assert head == ["prompt", "untuned", "steered, away", f"rep_tuned ({BEHAVIOUR}), away"]
    assert [row[0] for row in rows] == prompts
    for prompt, *told in rows:
        for said, arm in zip(told, arms, strict=True):
            assert said == f"{answers[prompt, arm]['response']} ({answers[prompt, arm]['pattern']:.2f})"


def test_every_arm_is_compared_with_the_untuned_one_and_with_those_of_its_direction(session, compared):
    head, *rows = cells(compared.shown["differences"])
    name = f"rep_tuned ({BEHAVIOUR}), away"
    assert [row[:2] for row in rows] == [[name, "steered, away"], ["steered, away", "untuned"], [name, "untuned"]]
    _, steered, ours = bars(figures(compared.shown["scores"])["compare-scores-graph"]).values()
    assert rows[0][3].replace("−", "-").startswith(f"{ours - steered + 0.0:.3f}")
    assert head[4:6] == ["p", "p, Holm"]
    assert [float(row[5]) >= float(row[4]) for row in rows] == [True] * 3
    told = text(compared.shown["differences"])
    assert "all 3 comparisons of this job, and no others" in told
    assert "may have been chosen on these same validation topics" in told
    assert [row[-1] for row in rows] == ["5", "–", "5"]  # the tuning seeds


def test_the_figure_grows_arm_by_arm_and_no_test_topic_is_asked(session, compared):
    growing = [figures(shown)["compare-scores-graph"] for shown in compared.all["scores"] if shown]
    assert [sum(bar.type == "bar" and len(bar.x) for bar in figure.data) for figure in growing] == [1, 2, 3, 3]
    train, validation = session.pairs(BEHAVIOUR)
    asked = {row[0] for row in cells(compared.shown["answers"])[1:]}
    assert asked <= set(validation.topics) and not asked & set(train.topics)


def test_without_harm_none_is_measured_and_another_behaviours_arm_has_no_direction(session, tuned):
    (name,) = session.deltas()
    made = compare.Comparing(session, BEHAVIOUR, [name], 1, 0.0, 4, 3, False)
    assert made._arm(name)[:3] == (f"rep_tuned ({BEHAVIOUR})", "away", 5)
    made.behaviour = "mood"
    assert made._arm(name)[:3] == (name, "none", 5)
    job = done(compare.plan(session, BEHAVIOUR, [name], 1, 0.0, 4, 3, "none")[1])
    assert cells(job.shown["side-effects"])[0] == ["arm", "repetition [95 %]", "seeds"]
    assert "No side effect" in text(job.shown["pareto"])


@pytest.mark.parametrize(
    ("arms", "layer", "multiplier", "prompts", "length", "wanted"),
    [
        ([], 1, 2.0, 4, 5, "arms must name at least one arm"),
        (None, 1, 2.0, 4, 5, "arms must name at least one arm"),
        (["rep_tuned_away"], 1, 2.0, 4, 5, "arms must be among .*, got rep_tuned_away"),
        (["steered"], 1, 0.0, 4, 5, "multiplier must not be 0"),
        (["steered"], 1, None, 4, 5, "multiplier must be a number, got nothing"),
        (["steered"], 2, 2.0, 4, 5, "layer.* 2"),
        (["steered"], 1, 2.0, None, 5, "prompts.*whole number"),
        (["steered"], 1, 2.0, 3, 5, "prompts.*whole number from 4 to 2,000"),
        (["steered"], 1, 2.0, 4, None, "new tokens.*whole number"),
    ],
)
def test_compare_refuses_by_name_before_any_work(session, arms, layer, multiplier, prompts, length, wanted, as_a_user):
    with pytest.raises(ValueError, match=f"^{wanted}"):
        compare.plan(session, BEHAVIOUR, arms, layer, multiplier, prompts, length, compare.MEASURED)


def test_a_comparison_splits_the_pairs_in_its_job_and_asks_all_topics_where_they_are_few(session, once, monkeypatch):
    seen, whole = [], Session.pairs
    monkeypatch.setattr(Session, "pairs", lambda self, behaviour: seen.append(behaviour) or whole(self, behaviour))
    _, work = compare.plan(session, BEHAVIOUR, ["steered"], 1, 2.0, 99, 2, "none")
    assert not seen
    job = done(work)
    assert BEHAVIOUR in seen and len(cells(job.shown["answers"])) == 1 + 4


def test_a_comparison_on_too_few_topics_or_without_a_vector_wipes_nothing_away(session, tiny_vectors):
    session.keep_vectors(BEHAVIOUR, tiny_vectors.select([0]))
    for few, wanted in ((False, r"layers.* 1"), (True, "must have at least 4 validation topics, got 3")):
        _, work = compare.plan(session, BEHAVIOUR, ["steered"], 1, 2.0, 4, 2, "none")
        if few:
            train, validation = session.pairs(BEHAVIOUR)
            session._pairs[BEHAVIOUR] = train, validation.split(0.75, seed=0)[0]
        job = RecordedJob(work)
        with pytest.raises(ValueError, match=wanted):
            job.work(job)
        assert not job.shown


def test_stopping_a_comparison_leaves_the_model_as_it_was(session, hooks_on):
    session.vectors(BEHAVIOUR)
    before, hooks = weights(session.model), hooks_on(session.model)
    with pytest.raises(Stopped):
        done(compare.plan(session, BEHAVIOUR, ["steered"], 1, 2.0, 4, 5, compare.MEASURED)[1], ("scores", 2))
    assert same(before, session.model) and hooks_on(session.model) == hooks


# A finished run


@pytest.mark.parametrize("page", [tuning, compare])
def test_a_run_without_its_model_is_shown_with_a_word_why_there_is_nothing_live(page, run_folder):
    shown = page.layout(Session(None, {}, load_results(run_folder)))
    assert figures(shown) and "tiny is not on this machine" in text(shown)
    assert not [part for part in parts(shown) if type(part).__name__ == "Button"]


@pytest.mark.parametrize("page", [tuning, compare])
def test_no_two_parts_of_a_page_have_one_name(page, tiny, run_folder):
    shown = page.layout(Session(tiny, {}, load_results(run_folder)))
    names = Counter(part.id for part in parts(shown) if getattr(part, "id", None))
    assert len(names) > 15 and max(names.values()) == 1


def test_the_runs_losses_and_projections_are_its_files(run_folder):
    run = load_results(run_folder)
    shown = figures(tuning.layout(Session(None, {}, run)))
    rows = [row for row in run.content["history"] if row["arm"] == "rep_tuned"]
    totals = [list(line.y) for line in shown["tuning-run-losses"].data if line.name == "rep_tuned, train"]
    assert totals[0] == [row["total"] for row in rows]
    found = run.projections()
    (line,) = [each for each in shown["tuning-run-lines"].data if each.name == "untuned"]
    assert list(line.y) == [np.mean(row[1:]) for row in found["arms"]["untuned"]]


def test_maps_of_the_tuned_arms_only(tiny, tmp_path):
    arms = {"untuned": [[0.1, 0.2]], "steered away": [[0.3, 0.4]], "rep_tuned <b>": [[1.0, 3.0]]}
    shown = tuning._projections({"tokens": ["a", "b"], "layers": [0], "arms": arms})
    maps = {part.id: part.figure for each in shown for part in parts(each) if "map" in (getattr(part, "id", "") or "")}
    assert list(maps) == ["tuning-run-map-0"]
    heats = [np.asarray(heat.z, float) for heat in maps["tuning-run-map-0"].data]
    assert np.allclose(heats[2], [[0.9, 2.8]])


def test_what_the_run_compared_is_drawn_and_told_as_it_is(run_folder):
    run = load_results(run_folder)
    shown = compare.layout(Session(None, {}, run))
    wanted = {(row["arm"], row["direction"]): row for row in run.content["summary"] if row["scorer"] == "vader"}
    drawn = [bar for bar in figures(shown)["compare-run-scores"].data if bar.type == "bar"]
    assert sorted(mean for bar in drawn for mean in bar.y) == sorted(row["mean"] for row in wanted.values())
    rows = {tuple(row[:2]): row for row in cells(shown) if len(row) == 8 and row[2] == "vader"}
    for row in run.content["comparisons"]:
        if (row["set"], row["scorer"]) == ("test", "vader"):
            told = rows[f"{row['a']}, {row['a_direction']}", row["b"]]
            assert told[3].replace("−", "-").startswith(f"{row['difference'] + 0.0:.3f} [")
            assert told[6:] == [str(row["n"]), ", ".join(map(str, row["seeds"]))]
    assert f"all {len(run.content['comparisons'])} comparisons." in text(shown)
    assert "these same validation topics" not in text(shown)  # a run is tested on topics of its own
    assert "3 neutral texts" in text(shown) and "repetition in 8 responses" in text(shown)


def test_answers_of_a_run_side_by_side_by_prompt_and_by_words():
    rows = [
        {"arm": arm, "direction": direction, "seed": seed, "set": name, "prompt": prompt, "score": 0.25 - seed,
         "response": f"{arm} says <i>{prompt}</i> {seed}"}
        for arm, direction, seeds in (("untuned", "none", (0,)), ("rep_tuned", "away", (3, 4)))
        for seed in seeds for name in ("test", "facts") for prompt in ("Rain?", "x" * 90)
    ]  # fmt: skip
    assert list(prompts_of(rows, "test", "")) == ["Rain?", "x" * 90]
    assert prompts_of(rows, "test", "")["x" * 90] == "x" * 79 + "…"
    assert list(prompts_of(rows, "facts", " SAYS <I>RAIN")) == ["Rain?"]
    assert prompts_of(rows, "test", "snow") == {}
    shown = responses_to(rows, "test", "Rain?")
    told = text(shown)
    assert "untuned says <i>Rain?</i> 0" in told and "rep_tuned says <i>Rain?</i> 3" in told
    assert "rep_tuned, away" in told and "score −2.750, seed 3" in told and "seed 4" not in told
    assert responses_to(rows, "test", None) is None


def test_a_run_whose_answers_or_projections_are_gone_says_so(run_folder, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "results.json").write_bytes((run_folder / "results.json").read_bytes())
    session = Session(None, {}, load_results(folder))
    assert "responses.jsonl" in text(compare.layout(session))
    assert "projections.json" in text(tuning.layout(session))


# On the bundled model


def test_compare_on_the_real_model_asks_under_steering(model, glad):
    session = Session(model, {}, experiments=[glad])
    job = done(compare.plan(session, BEHAVIOUR, ["steered"], 21, 3.0, 4, 6, "none")[1])
    _, *rows = cells(job.shown["answers"])
    with rtl.applied(model, rtl.add(session.vectors(BEHAVIOUR), [21], 3.0)):
        said = rtl.generate(model, [row[0] for row in rows], max_new_tokens=6)
    assert [row[2].rsplit(" (", 1)[0] for row in rows] == said
    assert any(row[1] != row[2] for row in rows)
