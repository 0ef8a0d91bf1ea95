"""The search over arms' settings: the same for every arm, kept trial by trial, and what a run does with it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest
from tiny_behaviour import tiny_behaviour

from rt_lens import plots
from rt_lens.apps.report.page import write_report
from rt_lens.arms.knobs import Among, Between, Blocks, Personas, Room
from rt_lens.arms.registry import BUILT_IN, register_arm, registered_arm, unregister_arm
from rt_lens.common.statistics.intervals import Interval
from rt_lens.experiment.config import Experiment, load_experiment
from rt_lens.experiment.plan import plan_of
from rt_lens.experiment.run import run_experiment
from rt_lens.experiment.search import RULE, Trial, found_of
from rt_lens.results.schema import load_results
from rt_lens.steering.binding import add


@pytest.fixture(scope="module")
def behaviour(tmp_path_factory) -> Path:
    return tiny_behaviour(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def searched(behaviour, tmp_path_factory) -> Path:
    """A finished run whose settings were searched with two trials."""
    out = tmp_path_factory.mktemp("searched")
    run_experiment(load_experiment(behaviour, search=2), out, source=behaviour, progress=False)
    return out


def trials_of(folder: Path) -> list[dict]:
    """The trials in a journal, in the order in which they were kept."""
    kept = []
    for line in (folder / "search.journal").read_text().splitlines():
        row = json.loads(line)
        kept += [row["user_attrs"]["trial"]] if "trial" in row.get("user_attrs", {}) else []
    return kept


def without_time(rows: list[dict]) -> list[dict]:
    return sorted(({**row, "seconds": 0} for row in rows), key=lambda row: (row["arm"], row["number"]))


def test_every_arm_has_as_many_trials_and_every_tuned_one_as_many_trained_tokens(searched):
    search = load_results(searched).content["search"]
    assert Counter(row["arm"] for row in search["table"]) == dict.fromkeys(
        ("prompted", "steered", "token_tuned", "rep_tuned", "weight_steered", "random"), 2
    )
    done = [row for row in search["table"] if not row["reason"]]
    assert len(done) > 8
    tokens = {arm: {row["trained_tokens"] for row in done if row["arm"] == arm} for arm in BUILT_IN}
    assert tokens["token_tuned"] == tokens["rep_tuned"] == tokens["weight_steered"] != {0}
    assert tokens["prompted"] == tokens["steered"] == tokens["random"] == {0}
    assert all(row["n"] == 4 and row["low"] <= row["effect"] <= row["high"] and row["own_kl"] > 0 for row in done)


def test_the_first_trial_is_the_files_settings_and_the_others_are_drawn_of_the_knobs(searched, behaviour):
    room = Room(n_layers=4, n_personas=3)
    for row in load_results(searched).content["search"]["table"]:
        knobs = registered_arm(row["arm"]).knobs
        assert set(row["settings"]) == (set(knobs) if row["number"] else set())
        for name, value in row["settings"].items():
            assert knobs[name].allows(value) and knobs[name].fits(value, room), (name, value)


def test_the_trial_with_the_largest_effect_is_chosen_and_the_run_goes_on_with_it(searched):
    content = load_results(searched).content
    for arm in ("steered", "rep_tuned"):
        done = [row for row in content["search"]["table"] if row["arm"] == arm and not row["reason"]]
        (chosen,) = (row for row in done if row["chosen"])
        assert chosen["effect"] == max(row["effect"] for row in done) and chosen["front"]
    chosen = {row["arm"]: row["settings"] for row in content["search"]["table"] if row["chosen"] and row["settings"]}
    assert chosen and tomllib.loads(content["search"]["toml"])["settings"] == chosen
    assert (searched / "settings.toml").read_text() == content["search"]["toml"]
    assert content["reproducibility"]["command"].endswith("--search 2")


def test_settings_found_give_the_same_arms_without_a_search(searched, behaviour, tmp_path):
    content = load_results(searched).content
    file = tmp_path / "found.toml"
    file.write_text(behaviour.read_text() + content["search"]["toml"], encoding="utf-8")
    experiment = load_experiment(file)
    assert experiment.settings and experiment.search.trials == 0
    again = run_experiment(experiment, tmp_path / "out", source=file, progress=False)
    assert again["search"] is None
    assert again["summary"] == content["summary"] and again["at_kl"]["strengths"] == content["at_kl"]["strengths"]
    own = [f"{arm} {values['layer']}" for arm, values in experiment.settings.items() if "layer" in values]
    for rule in (again["choices"]["rule"], content["choices"]["rule"]):
        assert ("but for those whose settings name one" in rule) == bool(own) and all(arm in rule for arm in own)


def test_a_search_goes_on_where_it_was_killed_and_does_no_trial_twice(searched, behaviour, tmp_path):
    command = [sys.executable, "-m", "rt_lens.apps.cli", "run", str(behaviour), "--search", "2", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = tmp_path / "search.journal"
    for _ in range(1200):
        if journal.exists() and journal.read_text().count('"trial"') >= 4:
            break
        time.sleep(0.1)
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = trials_of(tmp_path)
    assert 4 <= len(before) < 12 and not (tmp_path / "results.json").exists()
    with journal.open("a") as stream:
        stream.write('{"op_code":4,"study_id":0,"half a li')  # as a machine that lost power would leave it
    run_experiment(load_experiment(behaviour, search=2), tmp_path, source=behaviour, progress=False)
    after = trials_of(tmp_path)
    assert after[: len(before)] == before
    assert max(Counter((row["arm"], row["number"]) for row in after).values()) == 1
    # As if it had never been stopped: what is drawn depends on the seed and the trials before alone.
    assert without_time(after) == without_time(trials_of(searched))


def test_more_trials_later_keep_those_done_and_another_search_is_refused(searched, behaviour, tmp_path):
    experiment = replace(load_experiment(behaviour, search=1), arms=("steered",))
    run_experiment(experiment, tmp_path, progress=False)
    first = trials_of(tmp_path)
    longer = replace(experiment, search=replace(experiment.search, trials=2))
    run_experiment(longer, tmp_path, progress=False)
    assert len(first) == 1 and trials_of(tmp_path)[:1] == first and len(trials_of(tmp_path)) == 2
    other = replace(longer, choose=replace(longer.choose, max_new_tokens=3))
    with pytest.raises(ValueError, match=r"made with the same settings, got another choose for steered\. Choose"):
        run_experiment(other, tmp_path, progress=False)


def test_the_report_shows_what_was_tried_and_the_settings_to_paste(searched):
    page = write_report(searched).read_text(encoding="utf-8")
    search = load_results(searched).content["search"]
    assert "What the search tried" in page and escape(search["toml"]) in page and escape(RULE) in page
    assert "Settings: searched before the test, with 2 trials for each of 6 arms" in page


def test_an_arm_of_ones_own_is_searched_by_its_own_knobs(behaviour, tmp_path):
    shares = []

    @register_arm("shared", "A share of the vector.", knobs={"share": Among((0.25, 0.5))})
    def shared(inputs):
        shares.append(inputs.settings.get("share", 1.0))
        return add(inputs.vectors, inputs.layers, inputs.sign * shares[-1])

    try:
        experiment = replace(load_experiment(behaviour, search=2), arms=("shared",))
        results = run_experiment(experiment, tmp_path, progress=False)
    finally:
        unregister_arm("shared")
    first, second = results["search"]["table"]
    assert first["settings"] == {} and second["settings"]["share"] in (0.25, 0.5)
    chosen = next(row["settings"] for row in (first, second) if row["chosen"])
    assert shares == [
        1.0,
        1.0,
        second["settings"]["share"],
        second["settings"]["share"],
        *[chosen.get("share", 1.0)] * 2,
    ]


def test_the_figure_marks_the_trial_chosen_and_joins_the_front():
    trials = [trial(0, 0.1, 0.02), trial(1, 0.3, 0.05, layer=20), trial(2, 0.2, 0.01, layer=18)]
    figure = plots.trials(found_of(trials).table(), budget=0.01, seed=3)
    drawn = {trace.name: trace for trace in figure.data}
    assert (list(drawn["front"].x), list(drawn["front"].y)) == ([0.01, 0.05], [0.2, 0.3])
    assert (list(drawn["chosen"].x), list(drawn["chosen"].y)) == ([0.05], [0.3])
    assert list(drawn["chosen"].error_y.array) == pytest.approx([0.1]) and "layer = 20" in drawn["chosen"].hovertext[0]
    assert sorted(drawn["trials"].x) == [0.01, 0.02]
    assert (
        "n = 24 validation prompts" in figure.layout.title.subtitle.text
        and "seed 3" in figure.layout.title.subtitle.text
    )
    with pytest.raises(ValueError, match="at least one trial with an effect, got 1 that all failed"):
        plots.trials(found_of([Trial("steered", 0, {}, reason="No.")]).table(), budget=0.01, seed=0)


def test_a_plan_counts_the_search(behaviour):
    def tokens(trials: int) -> float:
        stages = plan_of(load_experiment(behaviour, search=trials)).stages
        return stages["search"].tokens if "search" in stages else 0

    assert tokens(0) == 0 < tokens(2)
    assert 1.9 < (tokens(5) - tokens(3)) / (tokens(2) - tokens(1)) < 2.1


def trial(number: int, effect: float, own_kl: float, **settings: object) -> Trial:
    return Trial("steered", number, settings, Interval(24, effect, effect - 0.1, effect + 0.1), own_kl)


def test_the_front_holds_the_trials_that_none_beats_in_both_goals():
    failed = Trial("steered", 4, {"layer": 3}, reason="KL is at most 0.002.")
    others = [trial(1, 0.3, 0.05, layer=20), trial(2, 0.2, 0.01, layer=18), trial(3, 0.2, 0.04, layer=9)]
    trials = [trial(0, 0.1, 0.02), *others, failed]
    found = found_of(trials)
    assert found.front == {"steered": [1, 2]} and found.chosen == {"steered": 1}
    assert found.toml() == "[settings.steered]\nlayer = 20\n"
    rows = found.table()
    assert [row["front"] for row in rows] == [False, True, True, False, False]
    assert rows[4]["effect"] is None and rows[4]["reason"] == "KL is at most 0.002."


def test_where_the_files_settings_are_best_or_nothing_was_measured_they_stay():
    assert found_of([trial(0, 0.3, 0.1), trial(1, 0.2, 0.1, layer=20)]).settings == {}
    assert found_of([Trial("steered", 0, {}, reason="No.")]).settings == {}


class Drawn:
    """Draws the lowest value of everything."""

    def suggest_categorical(self, name, choices):
        return choices[0]

    def suggest_float(self, name, low, high, *, log=False):
        return low * 1.23456

    def suggest_int(self, name, low, high):
        return low


def test_knobs_draw_what_they_allow():
    room = Room(n_layers=30, n_personas=8)
    assert Among(((0, 1), (2,))).draw(Drawn(), "x", room) == (0, 1)
    assert Between(1e-4, 1e-3, log=True).draw(Drawn(), "x", room) == 1.23e-4  # as one would write it
    assert Blocks(0.5, 0.9).draw(Drawn(), "x", room) == 14
    assert Blocks(0.5, 0.9, width=3).draw(Drawn(), "x", room) == (14, 15, 16)
    assert Blocks(0.9, 0.95, width=8).draw(Drawn(), "x", Room(4, 1)) == (0, 1, 2, 3)  # a small model
    assert Personas().draw(Drawn(), "x", Room(30, 0)) == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("[settings.stered]\nlayer = 1", "arms must be of"),
        ("[settings.steered]\nlayers = 1", "unknown key 'layers' in [settings.steered]. Did you mean 'layer'?"),
        ("[settings.steered]\nlayer = 1.5", "settings.steered.layer must be"),
        ("[settings.rep_tuned]\nlearning_rate = 'fast'", "settings.rep_tuned.learning_rate must be"),
        ("[settings.rep_tuned]\ntarget_modules = ['w']", "target_modules"),
        ("[settings]\nsteered = 3", "settings.steered must be a table"),
        ("[search]\ntrials = -1", "search.trials must be a whole number from 0 on, got -1"),
    ],
)
def test_wrong_settings_are_refused_when_the_file_is_read(behaviour, tmp_path, settings, says):
    file = tmp_path / "wrong.toml"
    file.write_text(behaviour.read_text() + settings, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(says)):
        load_experiment(file)


def with_settings(experiment: Experiment, **settings: dict) -> Experiment:
    return replace(experiment, settings=settings)


def test_an_arm_made_of_others_has_tuning_runs_of_its_own_only_with_settings_of_its_own(behaviour):
    experiment = load_experiment(behaviour)
    shared = [("token_tuned", way, 0) for way in ("toward", "away")]
    rep = [("rep_tuned", way, 0) for way in ("toward", "away")]
    assert sorted(experiment.tuning_runs) == sorted(shared + rep)
    own = with_settings(experiment, weight_steered={"learning_rate": 5e-3})
    assert sorted(own.tuning_runs) == sorted(shared + rep + [("weight_steered", way, 0) for way in ("toward", "away")])
    assert own.tuned_arms["weight_steered"].cosine_weight == 0
    assert {arm: config.learning_rate for arm, config in own.tuned_arms.items()} == {
        "token_tuned": 1e-2, "rep_tuned": 1e-2, "weight_steered": 5e-3,
    }  # fmt: skip


def test_a_persona_that_there_is_not_is_refused_before_anything_is_measured(behaviour, tmp_path):
    beyond = with_settings(load_experiment(behaviour), prompted={"persona": 9})
    with pytest.raises(ValueError, match=r"settings\.prompted\.persona must fit .* training personas .*, got 9"):
        run_experiment(beyond, tmp_path, progress=False)


def test_blocks_outside_the_model_are_refused_before_the_run(behaviour, tmp_path):
    outside = with_settings(load_experiment(behaviour), steered={"layer": 9})
    with pytest.raises(ValueError, match="contains 9, but this model has blocks 0"):
        run_experiment(outside, tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"settings\.steered\.layer contains 9"):
        plan_of(outside)
