"""Sweeps: every cell is what a separate steered run gives, nothing is run twice, and a broken-off one goes on."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import rt_lens as rtl
from rt_lens import plots
from rt_lens.arms.older_files import fingerprint
from rt_lens.arms.sweeping import DoseResponse, Sweep
from rt_lens.data.questions import Question
from rt_lens.evaluation import registry as making
from rt_lens.evaluation.tasks import EvalTask, LogitDifference
from rt_lens.models.activations import last_token_activations
from rt_lens.models.checksums import hooks_of
from rt_lens.models.generation import as_chat
from rt_lens.models.tokens.batches import encode
from rt_lens.steering.conditions import Condition
from rt_lens.steering.edits import Linear
from rt_lens.vectors.steering_vectors import SteeringVectors, hook_names

PROMPTS = ["Rain?", "Tell me, at some length, about your last weekend in the hills.", "Name a tree."]
DOSES = (-2.0, -0.5, 0.0, 1.0)


class Projection:
    """Measure: how far the last block's activation at each prompt's end lies along a direction. Counts its calls."""

    def __init__(self, sign: float = 1.0, fails_at: int | None = None, prompts: Sequence[str] = PROMPTS) -> None:
        self.direction = sign * torch.randn(32, generator=torch.Generator().manual_seed(4))
        self.fails_at, self.asked, self.prompts = fails_at, [], list(prompts)

    def repeated(self, times: int) -> Projection:
        copied = copy.copy(self)
        copied.prompts = self.prompts * times
        return copied

    def __call__(self, model: Any) -> list[float]:
        self.asked.append(self.prompts)
        if self.fails_at == len(self.asked):
            raise KeyboardInterrupt
        (name,) = hook_names([1])
        ends = last_token_activations(model, as_chat(model, self.prompts), [name], batch_size=4)[name]
        return (ends @ self.direction).tolist()


def along(vectors: SteeringVectors, sign: float = 1.0) -> Projection:
    metric = Projection()
    metric.direction = sign * vectors[hook_names([1])[0]]
    return metric


def swept(model, vectors, metric, **arguments) -> Sweep:
    return rtl.sweep(model, vectors, metric, **{"multipliers": DOSES, "progress": False, **arguments})


def table_of(scores: Sequence[Sequence[float]], doses: Sequence[float] = (-1, 0, 1), layer: int = 0) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"layer": layer, "multiplier": float(dose), "prompt": prompt, "score": score}
            for prompt, row in enumerate(scores)
            for dose, score in zip(doses, row, strict=True)
        ]
    )


# The table


def test_the_table_is_tidy_and_every_cell_is_that_of_a_separate_steered_run(tiny, tiny_vectors):
    found = swept(tiny, tiny_vectors, Projection())
    assert list(found.table) == ["layer", "multiplier", "prompt", "score"]
    assert len(found.table) == 2 * 4 * 3
    assert not found.table.duplicated(["layer", "multiplier", "prompt"]).any()
    assert (found.prompts, found.metric, found.seed) == (PROMPTS, "Projection", 0)
    for (layer, dose), cell in found.table.groupby(["layer", "multiplier"]):
        with rtl.applied(tiny, rtl.add(tiny_vectors, [layer], dose)):
            alone = [Projection(prompts=[prompt])(tiny)[0] for prompt in PROMPTS]
        assert cell["prompt"].tolist() == [0, 1, 2]
        assert cell["score"].tolist() == pytest.approx(alone, abs=1e-4)
    spread = found.table.groupby("prompt")["score"].std()
    assert spread.min() > 0.1


def test_answers_are_scored_as_evaluate_scores_them(tiny, tiny_vectors):
    found = swept(tiny, tiny_vectors, EvalTask(PROMPTS, len, max_new_tokens=3, batch_size=2), layers=[1])
    assert found.metric == "len"
    for dose, cell in found.table.groupby("multiplier"):
        with rtl.applied(tiny, rtl.add(tiny_vectors, [1], dose)):
            alone = rtl.evaluate(tiny, PROMPTS, len, max_new_tokens=3)
        assert cell["score"].tolist() == alone.scores
    assert found.table["score"].nunique() > 3


def test_multiplier_0_is_the_unsteered_model_and_is_run_once_for_all_layers(tiny, tiny_vectors):
    metric = Projection()
    found = swept(tiny, tiny_vectors, metric)
    assert metric.asked == [PROMPTS, PROMPTS * 3, PROMPTS * 3]
    unsteered = Projection()(tiny)
    for _, cell in found.table[found.table["multiplier"] == 0].groupby("layer"):
        assert cell["score"].tolist() == unsteered
    without = Projection()
    swept(tiny, tiny_vectors, without, multipliers=(1.0, -1.0))
    assert without.asked == [PROMPTS * 2] * 2
    only = Projection()
    assert swept(tiny, tiny_vectors, only, multipliers=[0]).table["score"].tolist() == unsteered * 2
    assert only.asked == [PROMPTS]


def test_multipliers_are_sorted_and_each_run_once(tiny, tiny_vectors):
    found = swept(tiny, tiny_vectors, Projection(), multipliers=[1, -2, 1, 0, -0.5, 1.0])
    pd.testing.assert_frame_equal(found.table, swept(tiny, tiny_vectors, Projection()).table)


def test_layers_in_the_order_asked_for_and_another_way_to_steer(tiny, tiny_vectors):
    found = swept(tiny, tiny_vectors, Projection(), layers=[1, 0], steer=rtl.steering.add_preserving_norm)
    assert found.table["layer"].unique().tolist() == [1, 0]
    with rtl.applied(tiny, rtl.steering.add_preserving_norm(tiny_vectors, [1], 1.0)):
        alone = Projection()(tiny)
    cell = found.table.query("layer == 1 and multiplier == 1")["score"].tolist()
    assert cell == pytest.approx(alone, abs=1e-4)
    plain = swept(tiny, tiny_vectors, Projection()).table.query("layer == 1 and multiplier == 1")["score"].tolist()
    assert cell != pytest.approx(plain, abs=1e-2)


def test_the_models_own_hooks_stay_and_the_sweeps_go(tiny, tiny_vectors, hooks_on):
    tiny.add_perma_hook("blocks.0.hook_resid_post", lambda x, hook: None)
    before = hooks_on(tiny)
    swept(tiny, tiny_vectors, Projection())
    assert hooks_on(tiny) == before
    with pytest.raises(KeyboardInterrupt):
        swept(tiny, tiny_vectors, Projection(fails_at=2))
    assert hooks_on(tiny) == before


def test_the_summary_has_a_row_for_each_cell_and_can_be_drawn(tiny, tiny_vectors):
    found = swept(tiny, tiny_vectors, Projection(), seed=5)
    summary = found.summary()
    assert list(summary) == ["layer", "multiplier", "n", "mean", "low", "high", "seed"]
    assert summary[["layer", "multiplier"]].values.tolist() == [[layer, dose] for layer in (0, 1) for dose in DOSES]
    means = found.table.groupby(["layer", "multiplier"])["score"].mean().tolist()
    assert summary["mean"].tolist() == pytest.approx(means)
    assert (summary["low"] <= summary["mean"]).all() and (summary["mean"] <= summary["high"]).all()
    assert set(summary["n"]) == {3} and set(summary["seed"]) == {5}
    figure = plots.sweep(summary)
    assert np.shape(figure.data[0].z) == (2, 4)
    assert figure.data[0].z[1][3] == pytest.approx(means[7] - means[6])


# The difference of two logits


@torch.no_grad()
def test_a_logit_difference_is_that_of_plain_runs_one_prompt_at_a_time(tiny, tiny_vectors):
    yes, no = (tiny.tokenizer.encode(word, add_special_tokens=False)[0] for word in (" Yes", " No"))

    def direct(prompt: str) -> float:
        logits = tiny(torch.tensor([encode(tiny, as_chat(tiny, [prompt])[0])]))[0, -1]
        return float(logits[yes] - logits[no])

    metric = LogitDifference(PROMPTS, " Yes, of course", " No", batch_size=2)
    assert metric(tiny) == pytest.approx([direct(prompt) for prompt in PROMPTS], abs=1e-4)
    assert np.std([direct(prompt) for prompt in PROMPTS]) > 1e-3
    found = swept(tiny, tiny_vectors, metric, layers=[0]).table
    with rtl.applied(tiny, rtl.add(tiny_vectors, [0], -2.0)):
        steered = [direct(prompt) for prompt in PROMPTS]
    assert found[found["multiplier"] == -2]["score"].tolist() == pytest.approx(steered, abs=1e-4)


@pytest.mark.parametrize(("positive", "negative"), [("", " No"), (" Yes", ""), (" Yes, sir", " Yes")])
def test_texts_without_two_different_first_tokens_are_refused(tiny, positive, negative):
    with pytest.raises(ValueError, match="positive and negative must begin with two different tokens, got"):
        LogitDifference(PROMPTS, positive, negative)(tiny)


# Going on


def test_a_broken_off_sweep_goes_on_and_ends_as_one_that_was_not(tmp_path, tiny, tiny_vectors):
    path = tmp_path / "sub" / "sweep.json"
    broken = Projection(fails_at=3)  # the baseline, the first layer, and then
    with pytest.raises(KeyboardInterrupt):
        swept(tiny, tiny_vectors, broken, path=path)
    assert len(broken.asked) == 3
    again = Projection()
    found = swept(tiny, tiny_vectors, again, path=path)
    assert again.asked == [PROMPTS * 3]  # one layer, and no baseline
    whole = swept(tiny, tiny_vectors, Projection())
    pd.testing.assert_frame_equal(found.table, whole.table)
    third = Projection()
    pd.testing.assert_frame_equal(swept(tiny, tiny_vectors, third, path=path).table, whole.table)
    assert third.asked == []
    assert list(path.parent.iterdir()) == [path]


def test_more_layers_may_be_asked_for_later_and_another_seed(tmp_path, tiny, tiny_vectors):
    swept(tiny, tiny_vectors, Projection(), path=tmp_path / "s.json", layers=[1])
    more = Projection()
    found = swept(tiny, tiny_vectors, more, path=tmp_path / "s.json", seed=3)
    assert more.asked == [PROMPTS * 3]
    pd.testing.assert_frame_equal(found.table, swept(tiny, tiny_vectors, Projection()).table)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"multipliers": (0, 1)}, "multipliers"),
        ({"task": LogitDifference(PROMPTS, " Yes", " No")}, "task"),
        ({"steer": rtl.steering.add_preserving_norm}, "steer"),
        ({"steer": partial(rtl.add, positions="last")}, "steer"),
        ({"vectors": 2}, "vectors"),
        ({"task": Projection(prompts=PROMPTS[:2])}, "prompts"),
    ],
)
def test_a_file_of_other_settings_is_refused_and_says_which(tmp_path, tiny, tiny_vectors, changed, says):
    path = tmp_path / "s.json"
    swept(tiny, tiny_vectors, Projection(), path=path)
    before = path.read_bytes()
    asked = {"vectors": tiny_vectors, "task": Projection(), "multipliers": DOSES, **changed}
    said = rf"must be the file of a sweep with the same settings, got .*s\.json with other .*{says}.*Choose a different"
    with pytest.raises(ValueError, match=said):
        rtl.sweep(tiny, **{**asked, "vectors": changed.get("vectors", 1) * tiny_vectors}, path=path, progress=False)
    assert path.read_bytes() == before


def test_ways_to_steer_with_other_arguments_are_other_settings(tmp_path, tiny, tiny_vectors):
    def run(positions: str) -> Sweep:
        steer = partial(rtl.add, positions=positions)
        return swept(tiny, tiny_vectors, Projection(), path=tmp_path / "s.json", steer=steer)

    run("last")
    run("last")
    with pytest.raises(ValueError, match="other steer"):
        run("all")


def test_one_changed_number_in_the_vectors_is_another_sweep(tmp_path, tiny, tiny_vectors):
    swept(tiny, tiny_vectors, Projection(), path=tmp_path / "s.json")
    changed = {name: vector.clone() for name, vector in tiny_vectors.vectors.items()}
    changed[hook_names([1])[0]][3] += 1e-4
    with pytest.raises(ValueError, match="other vectors"):
        swept(tiny, SteeringVectors(changed, tiny_vectors.provenance), Projection(), path=tmp_path / "s.json")


@pytest.mark.parametrize(
    "content",
    [b"", b"no json", b"[]", b"3", b"null", b"{}", b"\xff\xfe\x00", b'{"settings": [], "baseline": null, "layers": {}}',
     b'{"settings": null, "baseline": null, "layers": {}}', b'{"settings": {}, "baseline": null, "layers": 3}'],
)  # fmt: skip
def test_a_foreign_file_is_refused_and_left_alone(tmp_path, tiny, tiny_vectors, content):
    path = tmp_path / "s.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"path must be the file of a sweep, got .*s\.json"):
        swept(tiny, tiny_vectors, Projection(), path=path)
    assert path.read_bytes() == content


def test_a_truncated_file_is_refused_at_every_length(tmp_path, tiny, tiny_vectors):
    path = tmp_path / "s.json"
    swept(tiny, tiny_vectors, Projection(), path=path)
    content = path.read_bytes()
    assert json.loads(content)["kind"] == "sweep"
    for share in (0.01, 0.3, 0.9, 0.999):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(
            ValueError,
            match=r"must be the file of a sweep, got .*s\.json, which is none\. Choose a different name, or remove it",
        ):
            swept(tiny, tiny_vectors, Projection(), path=path)


# Dose and response


def wrong_prompts(found: DoseResponse) -> list[int]:
    return sorted(found.table.loc[found.table["wrong_way"], "prompt"].unique().tolist())


def test_the_tables_of_a_dose_response_can_be_drawn(tiny, tiny_vectors):
    found = swept(tiny, tiny_vectors, along(tiny_vectors)).dose_response(1)
    assert set(found.summary["layer"]) == set(found.table["layer"]) == {1}
    figure = rtl.plots.steerability(found.table, found.summary, note=str(found))
    assert "Spearman 1.00 [1.00, 1.00]" in str(found) and "1.00 [1.00, 1.00]" in figure.layout.title.subtitle.text


def test_a_metric_along_the_vector_rises_with_the_dose_for_every_prompt(tiny, tiny_vectors):
    (name,) = hook_names([1])
    for sign in (1, -1):
        found = swept(tiny, tiny_vectors, along(tiny_vectors, sign)).dose_response(1)
        assert (found.layer, found.spearman.mean, found.spearman.low, found.spearman.high) == (1, sign, sign, sign)
        assert found.spearman.n == found.wrong_way.n == 3
        assert found.wrong_way.mean == (sign < 0)
        assert wrong_prompts(found) == ([] if sign > 0 else [0, 1, 2])
        slope = sign * float(tiny_vectors[name].square().sum())  # h + m v, along v
        assert [found.slope.mean, found.slope.low, found.slope.high] == pytest.approx([slope] * 3, rel=1e-4)


def test_the_slope_of_each_prompt_is_that_of_least_squares_and_wrong_ones_are_named():
    noise = np.random.default_rng(0)
    doses = [-3, -1, 0, 2, 5]
    scores = noise.normal(size=(12, 5)) + 0.1 * np.array(doses)
    found = Sweep(table_of(scores, doses), ["?"] * 12, "it", 0).dose_response(0)
    slopes = np.polyfit(doses, scores.T, 1)[0]
    assert found.slope.mean == pytest.approx(slopes.mean())
    assert found.slope.low < found.slope.mean < found.slope.high
    assert wrong_prompts(found) == np.flatnonzero(slopes < 0).tolist()
    assert 0 < len(wrong_prompts(found)) < 12
    assert found.wrong_way.mean == len(wrong_prompts(found)) / 12
    again = Sweep(table_of(scores, doses), ["?"] * 12, "it", 0).dose_response(0)
    assert found == again
    assert Sweep(table_of(scores, doses), ["?"] * 12, "it", 1).dose_response(0).slope != found.slope


@pytest.mark.parametrize("level", [0.0, 0.3, 0.44, 0.8913])
def test_prompts_that_do_not_move_go_neither_way(level):
    doses = [-3, -2, -1, 0, 1, 2, 3]
    found = Sweep(table_of([[level] * 7] * 4, doses), ["?"] * 4, "it", 0).dose_response(0)
    assert wrong_prompts(found) == [] and found.wrong_way.mean == 0
    assert (found.slope.mean, found.spearman.mean, found.spearman.low, found.spearman.high) == (0, 0, 0, 0)


def test_the_order_of_the_doses_in_the_table_does_not_matter():
    table = table_of([[1, 2, 3], [0, 5, 6]])
    first, second = (Sweep(rows, ["?"] * 2, "it", 0).dose_response(0) for rows in (table, table.iloc[::-1]))
    assert first == second
    assert first.spearman.mean == 1


# Faults


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"multipliers": []}, r"multipliers must be finite numbers, at least one, got \[\]"),
        ({"multipliers": [1, float("nan")]}, "multipliers must be finite numbers.*nan"),
        ({"layers": [2]}, r"layers contains 2, but these vectors are of blocks 0\.\.1"),
    ],
)
def test_bad_arguments_are_named(tiny, tiny_vectors, arguments, says):
    with pytest.raises(ValueError, match=says):
        swept(tiny, tiny_vectors, Projection(), **arguments)


@pytest.mark.parametrize("prompts", [[], "one string"])
def test_no_prompts_are_refused(tiny, tiny_vectors, prompts):
    with pytest.raises(ValueError, match="prompts must be a list of at least one text"):
        rtl.sweep(tiny, tiny_vectors, prompts, progress=False)


@pytest.mark.parametrize("multipliers", [(1.0,), (0.0,), (0.0, 1.0)])
def test_a_metric_that_gives_too_few_numbers_is_refused(tiny, tiny_vectors, multipliers):
    class TooFew(Projection):
        def __call__(self, model: Any) -> list[float]:
            return [0.0]

    with pytest.raises(ValueError, match=r"task must give one number for each of \d prompts, in order, got 1 numbers"):
        swept(tiny, tiny_vectors, TooFew(), multipliers=multipliers)


def test_vectors_of_another_model_are_refused_before_anything_runs(make_tiny, tiny_vectors):
    metric = Projection()
    with pytest.raises(ValueError, match="with d_model 32 .*this model has 48"):
        swept(make_tiny(d_model=48, n_heads=6), tiny_vectors, metric)
    assert not metric.asked


def test_a_dose_response_needs_a_swept_layer_and_three_doses(tiny, tiny_vectors):
    found = swept(tiny, tiny_vectors, Projection(), layers=[0])
    with pytest.raises(
        ValueError, match=r"layer must be one .* at least 3 multipliers, got 1 with 0\. Layers swept: \[0\]"
    ):
        found.dose_response(1)
    with pytest.raises(ValueError, match=r"got 0 with 2"):
        swept(tiny, tiny_vectors, Projection(), multipliers=(0, 1)).dose_response(0)


# The real model


def test_mood_steering_moves_the_odds_of_a_happy_word_with_the_dose(model, pairs):
    train, test = pairs.split(0.7, seed=0)
    vectors = rtl.extract_vectors(model, train.sample(8), layers=[16])
    prompts = [f"How do you feel about {topic.lower()} Answer in one word." for topic in test.topics[:5]]
    found = rtl.sweep(
        model, vectors, LogitDifference(prompts, "Happy", "Sad"), multipliers=(-2, -1, 0, 1, 2), progress=False,
    ).dose_response(16)  # fmt: skip
    assert found.spearman.mean == pytest.approx(1)
    assert found.slope.low > 0
    assert found.wrong_way.mean == 0


def test_a_function_of_ones_own_is_called_once_per_multiplier(tiny, tiny_vectors):
    def lengths_of_responses(model: Any) -> list[float]:
        return EvalTask(PROMPTS, len, max_new_tokens=3)(model)

    by_function = swept(tiny, tiny_vectors, lengths_of_responses, layers=[1])
    by_task = swept(tiny, tiny_vectors, EvalTask(PROMPTS, len, max_new_tokens=3), layers=[1])
    pd.testing.assert_frame_equal(by_function.table, by_task.table)
    assert (by_function.metric, by_function.prompts, by_task.prompts) == ("lengths_of_responses", [], PROMPTS)


def test_another_models_sweep_is_not_gone_on_with(tmp_path, tiny, tiny_vectors):
    swept(tiny, tiny_vectors, Projection(), path=tmp_path / "s.json")
    with (
        tiny.hooks(fwd_hooks=rtl.add(tiny_vectors, [0], 3.0)),
        pytest.raises(ValueError, match=r"with other hooks"),
    ):
        swept(tiny, tiny_vectors, Projection(), path=tmp_path / "s.json")


def only_long_prompts(strength: float) -> Any:
    """A hook that acts far from the beginning of a text alone: no short text shows it."""

    def act(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        moved = activation.clone()
        moved[:, 12:] += strength
        return moved

    return act


class Shift:
    """A hook with a state."""

    def __init__(self, by: torch.Tensor) -> None:
        self.by = by

    def __call__(self, activation: torch.Tensor, hook: Any) -> torch.Tensor:
        return activation + self.by.to(activation)


def hooked(model: Any, hook: Any) -> Any:
    return model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", hook)])


def hooks_to_tell_apart(vectors: SteeringVectors) -> dict[str, tuple[Any, Any]]:
    """Two hooks of each kind that differ in one thing, which the logits of one short prompt need not show."""
    edits = [dict(rtl.add(vectors, [0], 1.0, positions=places))["blocks.0.hook_resid_post"] for places in ([0], [1])]
    condition = Condition("blocks.0.hook_resid_pre", torch.ones(32), 0.5)
    gates = [rtl.conditional(rtl.add(vectors, [0], 1.0), replace(condition, threshold=at))[1][1] for at in (0.5, 0.6)]
    scheduled = [rtl.add(vectors, [0], 1.0, schedule=Linear(1.0, end, 5))[0][1] for end in (0.0, 0.5)]
    return {
        "an edit's positions": (edits[0], edits[1]),
        "a condition's threshold": (gates[0], gates[1]),
        "a schedule": (scheduled[0], scheduled[1]),
        "a closure's number": (only_long_prompts(1.0), only_long_prompts(2.0)),
        "a partial's argument": (partial(scaled_by, factor=1.0), partial(scaled_by, factor=1.001)),
        "an object's tensor": (Shift(torch.zeros(32)), Shift(torch.full((32,), 1e-4))),
        "a method's object": (Shift(torch.zeros(32)).__call__, Shift(torch.ones(32)).__call__),
        "code": (lambda x, hook: x * 1.0, lambda x, hook: x + 0.0),
    }


def scaled_by(activation: torch.Tensor, hook: Any, factor: float) -> torch.Tensor:
    return activation * factor


@pytest.mark.parametrize(
    "what",
    ["an edit's positions", "a condition's threshold", "a schedule", "a closure's number", "a partial's argument",
     "an object's tensor", "a method's object", "code"],
)  # fmt: skip
def test_a_sweep_goes_on_under_the_same_hooks_only(tmp_path, tiny, tiny_vectors, what):
    first, other = hooks_to_tell_apart(tiny_vectors)[what]
    same, _ = hooks_to_tell_apart(tiny_vectors)[what]
    settings = {"metric": lengths, "path": tmp_path / "s.json", "layers": [1], "multipliers": [0.0]}
    if what == "a condition's threshold":  # an edit with a gate cannot run alone: the file is all that is looked at
        told = [checksums_of(tiny, each) for each in (first, same, other)]
        assert told[0] == told[1] != told[2]
        return
    with hooked(tiny, first):
        swept(tiny, tiny_vectors, **settings)
    with hooked(tiny, same):
        swept(tiny, tiny_vectors, **settings)
    says = r"with other hooks"
    with hooked(tiny, other), pytest.raises(ValueError, match=says):
        swept(tiny, tiny_vectors, **settings)
    with pytest.raises(ValueError, match=says):
        swept(tiny, tiny_vectors, **settings)


def lengths(model: Any) -> list[float]:
    return [float(len(prompt)) for prompt in PROMPTS]


def checksums_of(model: Any, hook: Any) -> list[str]:
    with hooked(model, hook):
        return [each["sha256"] for each in hooks_of(model)]


@pytest.mark.hooked  # by its names
def test_hooks_are_told_by_where_they_are_and_in_which_order(tiny):
    def told(*hooks: tuple[str, Any]) -> list[dict[str, str]]:
        with tiny.hooks(fwd_hooks=list(hooks)):
            return hooks_of(tiny)

    one, other = Shift(torch.ones(32)), partial(scaled_by, factor=2.0)
    here, there = "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"  # the same activations
    assert told() == []
    assert told((here, one)) != told((there, one))
    assert told((here, one), (here, other)) != told((here, other), (here, one))
    handle = tiny.blocks[1].mlp.register_forward_hook(lambda module, taken, given: 2 * given)  # torch's own
    assert [each["point"] for each in told()] == ["blocks.1.mlp"]
    handle.remove()


def test_hooks_have_the_same_checksums_in_another_process(tiny, tiny_vectors):
    names = ["an edit's positions", "a closure's number", "an object's tensor", "code"]
    here = [checksums_of(tiny, hooks_to_tell_apart(tiny_vectors)[name][0]) for name in names]
    script = (
        "import test_sweeping as t, torch; from rt_lens.vectors.steering_vectors import *\n"
        "from transformer_lens.hook_points import HookPoint\n"
        "noise = torch.Generator().manual_seed(2)\n"
        "points = ['blocks.0.hook_resid_post', 'blocks.1.hook_resid_post']\n"
        "made = Provenance('tiny', 'mood', 'mean_diff', 'last', 'none', 12, '0' * 64, 0, '0.1.0')\n"
        "vectors = SteeringVectors({name: torch.randn(32, generator=noise) for name in points}, made)\n"
        "class Model(torch.nn.Module): pass\n"
        f"for name in {names!r}:\n"
        "    model = Model(); model.point = HookPoint(); model.point.name = 'point'\n"
        "    model.point.add_hook(t.hooks_to_tell_apart(vectors)[name][0])\n"
        "    print(t.hooks_of(model)[0]['sha256'])\n"
    )
    again = []
    for seed in ("1", "2"):  # of Python's own hashes
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )  # fmt: skip
        again.append(done.stdout.split())
    assert again[0] == again[1] and len(again[0]) == len(set(again[0])) == len(here)


@pytest.mark.hooked  # by its names
def test_a_hook_that_python_cannot_look_into_is_refused_before_anything_runs(tmp_path, tiny, tiny_vectors):
    metric, lock = Projection(), threading.Lock()

    def guarded(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        with lock:
            return activation

    says = r"the hook at blocks\.0\.hook_resid_post holds a lock.*leave path out"
    with hooked(tiny, guarded), pytest.raises(ValueError, match=says):
        swept(tiny, tiny_vectors, metric, path=tmp_path / "s.json")
    assert not metric.asked and not list(tmp_path.iterdir())
    with hooked(tiny, guarded):
        swept(tiny, tiny_vectors, metric)


@pytest.mark.parametrize("name", ["blocks.1.attn.W_Q", "embed.W_E", "blocks.0.attn.rotary_cos"])
def test_one_changed_number_of_the_model_is_another_sweep(tmp_path, tiny, tiny_vectors, name):
    swept(tiny, tiny_vectors, Projection(), path=tmp_path / "s.json")
    held = {**dict(tiny.named_parameters()), **dict(tiny.named_buffers())}[name]
    held.data.view(-1)[-1 if "W_E" in name else 7] += 1e-5  # the last token's row: no prompt reads it
    with pytest.raises(ValueError, match="with other (weights|buffers)"):
        swept(tiny, tiny_vectors, Projection(), path=tmp_path / "s.json")


@pytest.mark.hooked  # by its names
def test_tables_that_grow_with_longer_texts_are_no_other_model(tmp_path, tiny, tiny_vectors):
    swept(tiny, tiny_vectors, Projection(), path=tmp_path / "s.json")
    for block in tiny.blocks:
        block.attn._extend_rotary_embeddings(400)
    again = Projection()
    swept(tiny, tiny_vectors, again, path=tmp_path / "s.json")
    assert not again.asked


def test_a_metric_that_holds_another_direction_is_another_metric(tmp_path, tiny, tiny_vectors):
    swept(tiny, tiny_vectors, Projection(), path=tmp_path / "s.json")
    with pytest.raises(ValueError, match="with other task"):
        swept(tiny, tiny_vectors, Projection(sign=-1.0), path=tmp_path / "s.json")


def test_a_metric_of_one_name_whose_code_was_edited_is_another_metric(tmp_path, tiny, tiny_vectors):
    def sweep_with(code: str) -> None:
        exec(f"def score(model):\n    return [{code} for prompt in ('a', 'bc')]", space := {"__name__": "mine"})
        swept(tiny, tiny_vectors, space["score"], path=tmp_path / "s.json")

    sweep_with("float(len(prompt))")
    sweep_with("float(len(prompt))")
    with pytest.raises(ValueError, match="with other task"):
        sweep_with("-float(len(prompt))")


def as_older(path: Path, model: Any, schema: int) -> None:
    """The file as an older rt_lens wrote it; that of schema 1 kept a few logits of the model."""
    stored = json.loads(path.read_text())
    settings, parts = stored["settings"], stored["parts"]
    kept = {name: settings[name] for name in ("model", "vectors", "multipliers")}
    code = {"vectors": kept["vectors"].pop("erasers"), "metric": "of an older version", "steer": "of an older version"}
    kept |= {"prompts_sha256": settings["prompts"], "steer": settings["steer"]["is"]}
    on_model = {name: settings[name] for name in ("weights", "buffers", "hooks")}
    more = {"fingerprint": fingerprint(model)} if schema == 1 else {**on_model, "code": code}
    older = {**kept, **more, "schema": schema, "kind": "sweep", "metric": "Projection"}
    unsteered = parts.pop("unsteered")
    path.write_text(json.dumps({"settings": older, "baseline": unsteered, "layers": parts}))


@pytest.mark.parametrize("schema", [1, 2])
def test_an_older_file_goes_on_where_the_model_is_the_same_with_a_warning(tmp_path, tiny, tiny_vectors, schema):
    path = tmp_path / "s.json"
    swept(tiny, tiny_vectors, Projection(), path=path, layers=[0])
    as_older(path, tiny, schema)
    with (
        tiny.hooks(fwd_hooks=rtl.add(tiny_vectors, [0], 3.0)),
        pytest.raises(ValueError, match=r"with other (hooks|weights or hooks of the model \(its logits\))"),
    ):
        swept(tiny, tiny_vectors, Projection(), path=path)
    for says, changed in (
        ("prompts", {"metric": Projection(prompts=[*PROMPTS[:2], "Name a river."])}),
        ("steer", {"metric": Projection(), "steer": rtl.steering.add_preserving_norm}),
        ("multipliers", {"metric": Projection(), "multipliers": [0.0, 1.0]}),
        ("vectors", {"metric": Projection(), "vectors": 2 * tiny_vectors}),
    ):
        with pytest.raises(ValueError, match=f"same settings, got .* with other {says}"):
            swept(tiny, **{"vectors": tiny_vectors, "path": path, **changed})
    metric = Projection()
    with pytest.warns(UserWarning, match=r"s\.json was written by an older rt_lens"):
        found = swept(tiny, tiny_vectors, metric, path=path, layers=[0, 1])
    assert metric.asked == [PROMPTS * 3]
    pd.testing.assert_frame_equal(found.table, swept(tiny, tiny_vectors, Projection()).table)
    assert swept(tiny, tiny_vectors, metric, path=path).table.equals(found.table)  # now in the new format
    assert metric.asked == [PROMPTS * 3]


def test_a_lambda_cannot_be_kept(tmp_path, tiny, tiny_vectors):
    with pytest.raises(ValueError, match=r"path needs functions with a name of their own, got .*<lambda>"):
        swept(tiny, tiny_vectors, lambda model: [0.0] * 3, path=tmp_path / "s.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.hooked  # by its names
def test_a_layer_with_vectors_at_several_points_is_swept_once(tiny, tiny_vectors):
    everywhere = tiny_vectors.everywhere(tiny, 1)
    found = rtl.sweep(
        tiny, everywhere, EvalTask(["Rain?", "Snow?"], len, 2), hook="any", steer=rtl.ablate, multipliers=[0, 0.5, 1],
        progress=False,
    )  # fmt: skip
    assert set(found.summary()["n"]) == {2}
    assert len(found.table) == 2 * 2 * 3


def test_the_dose_response_of_mood_at_the_recommended_layer(model, pairs):
    train, validation, _ = pairs.split(0.4, 0.2, seed=0)
    found = rtl.validate_vectors(model, train.sample(48), validation, layers=range(17, 25), splits=5)
    assert found.best is not None
    along_doses = rtl.sweep(model, found.vectors, validation.topics[:16], layers=[found.best], progress=False)
    answer = along_doses.dose_response(found.best)
    assert answer.spearman.mean >= 0.9
    assert answer.wrong_way.mean <= 0.25


def test_options_sweep_the_share_of_the_right_ones(tiny, tiny_vectors, tmp_path):
    asked = tuple(Question(f"Is {thing} cold?", ("yes",), ("no", "never")) for thing in ("ice", "fire", "snow"))
    task = EvalTask(asked, {"kind": "likelihood"})
    found = rtl.sweep(
        tiny, tiny_vectors, task, layers=[0], multipliers=[-2, 0, 2], progress=False, path=tmp_path / "s.json"
    )
    for multiplier in (-2.0, 0.0, 2.0):
        with tiny.hooks(fwd_hooks=rtl.add(tiny_vectors, [0], multiplier)):
            alone = rtl.evaluate(tiny, asked, {"kind": "likelihood"}).scores
        mine = found.table[found.table["multiplier"] == multiplier]["score"].tolist()
        assert mine == pytest.approx(alone, abs=1e-5)
    assert found.table.groupby("multiplier")["score"].mean().nunique() == 3


def test_a_costly_scorer_is_made_once_for_a_whole_sweep(tiny, tiny_vectors, tmp_path, monkeypatch):
    """A classifier loads a model and has it write: not for every layer, the baseline and the name."""
    topics = [f"What of the {thing}?" for thing in ("rain", "sea", "moon", "road", "bread", "bus", "tea", "snow")]
    rows = [json.dumps({"positive": "Be glad.", "negative": "Be sad.", "user": topic}) for topic in topics]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows), encoding="utf-8")
    loaded = []
    monkeypatch.setattr(making, "load_model", lambda name: loaded.append(name) or tiny)
    table = {"kind": "classifier", "model": "tiny", "pairs": str(tmp_path / "pairs.jsonl")}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="classifier: on held-out topics")
        task = EvalTask(PROMPTS, table, max_new_tokens=3)
        found = swept(tiny, tiny_vectors, task, path=tmp_path / "sweep.json")
    assert loaded == ["tiny"]
    assert found.metric == "classifier_pairs" and len(found.table["layer"].unique()) == 2
