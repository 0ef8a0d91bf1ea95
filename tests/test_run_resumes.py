"""A run that was stopped goes on with the arm at which it stopped, and ends as if it had never been."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_behaviour import tiny_behaviour

from rt_lens.arms.equal_damage import KLEvaluator
from rt_lens.experiment.config import Experiment, load_experiment
from rt_lens.experiment.run import run_experiment
from rt_lens.results.schema import load_results


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Experiment:
    experiment = load_experiment(tiny_behaviour(tmp_path_factory.mktemp("resumes")))
    return replace(experiment, tune_seeds={"toward": (0,), "away": (0, 1)})


@pytest.fixture(scope="module")
def whole(experiment, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    run_experiment(experiment, out, progress=False)
    return out


def content(folder: Path) -> dict:
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {key: value for key, value in results.items() if key != "seconds"}


def stopped_at(number: int, measured: Counter, monkeypatch) -> None:
    """The measurement of this number is interrupted, as by Ctrl-C."""
    measure = KLEvaluator.measure

    def counting(self, arm, interventions, seed=0):
        if sum(measured.values()) == number:
            raise KeyboardInterrupt
        measured[arm, seed] += 1
        return measure(self, arm, interventions, seed)

    monkeypatch.setattr(KLEvaluator, "measure", counting)


def test_responses_at_every_budget_are_kept_once(whole):
    run = load_results(whole)
    stated, others = run.responses(), run.responses_at_kl()
    assert {row["budget"] for row in others} == {0.002} and "responses_at_kl.jsonl" in run.files
    with_strength = {row["arm"] for row in run.content["at_kl"]["strengths"] if row["budget"] == 0.002}
    assert {row["arm"] for row in others} == with_strength == {row["arm"] for row in stated} - {"untuned", "prompted"}
    label = ("arm", "direction", "seed", "set", "prompt")
    of_test = [[tuple(row[key] for key in label) for row in rows if row["set"] == "test"] for rows in (stated, others)]
    assert set(of_test[1]) < set(of_test[0]) and len(set(of_test[1])) == len(of_test[1])


@pytest.mark.parametrize("number", [4, 16])  # between directions of the first seed, and within the second
def test_it_ends_with_the_same_files_and_no_arm_is_measured_twice(experiment, whole, number, tmp_path, monkeypatch):
    measured: Counter = Counter()
    with monkeypatch.context() as patch:
        stopped_at(number, measured, patch)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(experiment, tmp_path, progress=False)
    assert sum(measured.values()) == number
    assert [file.name.startswith("unfinished-") for file in tmp_path.glob("*.json")] == [True] * (number > 0)
    with monkeypatch.context() as patch:
        stopped_at(-1, measured, patch)
        run_experiment(experiment, tmp_path, progress=False)
    assert set(measured.values()) == {1}
    assert content(tmp_path) == content(whole)  # with a checksum of every other file: responses, scores, deltas
    assert not list(tmp_path.glob("unfinished-*"))


def test_other_settings_neither_take_nor_lose_what_an_unfinished_run_has(experiment, tmp_path, monkeypatch):
    measured: Counter = Counter()
    with monkeypatch.context() as patch:
        stopped_at(3, measured, patch)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(experiment, tmp_path, progress=False)
    (kept,) = tmp_path.glob("unfinished-*.json")
    other = replace(experiment, arms=("steered",), test=replace(experiment.test, max_new_tokens=3))
    run_experiment(other, tmp_path, progress=False)
    assert kept.is_file()
    assert {row["arm"] for row in load_results(tmp_path).content["arms"]} == {"untuned", "steered"}
