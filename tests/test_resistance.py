"""Arms steered online: the grid is what steering each arm by hand gives, and shares are of the first arm."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import rt_lens as rtl
from rt_lens.common.statistics.intervals import mean_interval
from rt_lens.models.backends import backend_of, parameters_of
from rt_lens.tuning.delta import WeightDelta

PROMPTS = ["How are you?", "What is it?", "Tell me more about the hills.", "And now?"]
TASK = rtl.evaluation.LogitDifference(PROMPTS, " yes", " no")


@pytest.fixture
def damped(tiny):
    """A delta that makes the last block write less of all it reads, so that steering before it does something else."""
    noise = torch.Generator().manual_seed(5)
    name = backend_of(tiny).writer(1, "down")[0]
    change = torch.randn(parameters_of(tiny)[name].shape, generator=noise) * 0.5
    return WeightDelta({name: change}, "tiny", {}, [])


def test_each_cell_is_what_steering_that_arm_by_hand_gives(tiny, tiny_vectors, damped):
    arms = {"untuned": None, "damped": damped}
    found = rtl.arms.resistance(tiny, arms, tiny_vectors, TASK, layer=0, multipliers=(-2, 0, 2), progress=False)
    assert len(found.table) == 6
    seen = set()
    for arm, delta in arms.items():
        for dose in (-2.0, 0.0, 2.0):
            with rtl.applied(tiny, delta, rtl.add(tiny_vectors, [0], dose)):
                by_hand = TASK(tiny)
            row = found.table.query(f"arm == {arm!r} and multiplier == {dose}").iloc[0]
            assert row["mean"] == pytest.approx(np.mean(by_hand), abs=1e-4)
            assert row["n"] == len(PROMPTS)
            seen.add(round(float(row["mean"]), 4))
    assert len(seen) == 6  # every arm and dose did something of its own


def test_moved_is_paired_and_a_share_of_the_first_arm(tiny, tiny_vectors, damped):
    found = rtl.arms.resistance(
        tiny, {"untuned": None, "damped": damped, "again": None}, tiny_vectors, TASK, layer=0,
        multipliers=(-2, 2), progress=False,
    )  # fmt: skip
    grid = found.scores.pivot(index=["arm", "prompt"], columns="multiplier", values="score")
    moved = found.moved.set_index("arm")
    by_hand = (grid[2.0] - grid[-2.0]).groupby("arm").mean()
    for arm in moved.index:
        assert moved.loc[arm, "mean"] == pytest.approx(by_hand[arm])
        assert moved.loc[arm, "of_first"] == pytest.approx(by_hand[arm] / by_hand["untuned"])
    assert abs(by_hand["untuned"]) > 1e-3
    assert moved.loc["untuned", ["of_first", "of_first_low", "of_first_high"]].tolist() == [1.0, 1.0, 1.0]
    assert moved.loc["again", "of_first"] == pytest.approx(1.0)
    assert moved.loc["damped", "of_first"] != pytest.approx(1.0, abs=1e-3)
    expected = mean_interval((grid[2.0] - grid[-2.0]).loc["damped"].to_numpy(), 0)
    assert moved.loc["damped", ["low", "high"]].tolist() == [expected.low, expected.high]


def test_a_first_arm_that_nothing_moves_has_no_share(tiny, tiny_vectors):
    """Steering after the block that is read: hooks on the last block's output removed again by a second edit."""
    undo = rtl.ablate(tiny_vectors, [1])
    found = rtl.arms.resistance(
        tiny, {"deaf": undo}, tiny_vectors.select([1]), lambda model: [0.5] * 4, layer=1, multipliers=(-1, 1),
        progress=False,
    )  # fmt: skip
    row = found.moved.iloc[0]
    assert row["mean"] == 0.0
    assert pd.isna(row["of_first"]) and pd.isna(row["of_first_low"])


def test_the_model_is_left_alone(tiny, tiny_vectors, damped, hooks_on):
    before = {name: parameter.detach().clone() for name, parameter in parameters_of(tiny).items()}

    def failing(model):
        raise RuntimeError("the metric's own")

    with pytest.raises(RuntimeError, match="the metric's own"):
        rtl.arms.resistance(tiny, {"damped": damped}, tiny_vectors, failing, layer=0, progress=False)
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters_of(tiny).items())
    assert not hooks_on(tiny)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"arms": {}}, "arms must map at least one name"),
        ({"multipliers": (0, 1, 2)}, "both signs"),
        ({"multipliers": ()}, "both signs"),
        ({"layer": 7}, "layers.*7"),
        ({"arms": {"away": rtl.add}}, "hooks|arms"),
    ],
)
def test_bad_requests_are_named(tiny, tiny_vectors, changed, says, as_a_user):
    request = {"arms": {"untuned": None}, "layer": 0, "progress": False, **changed}
    arms = request.pop("arms")
    with pytest.raises((ValueError, TypeError), match=says):
        rtl.arms.resistance(tiny, arms, tiny_vectors, TASK, **request)


def test_it_draws(tiny, tiny_vectors, damped):
    found = rtl.arms.resistance(tiny, {"untuned": None, "damped": damped}, tiny_vectors, TASK, layer=0, progress=False)
    assert len(rtl.plots.resistance(found.table, found.moved).data) >= 2
