"""The figures of learned scalings against their tables."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import HOSTILE, check_drawn_as_it_is

from rt_lens import plots


def factors(role: str = "all") -> list[dict]:
    return [
        {"role": role, "layer": layer, "component": part, "alpha": sign * layer / 10, "n": 84, "seed": 3}
        for layer in range(4)
        for part, sign in (("attn_out", 1), ("mlp_out", -2))
    ]


def edits() -> list[dict]:
    return [
        {"task": "capitals", "edit": edit, "not_zero": number, "n": 72, "seed": 0, "shift": shift,
         "shift_low": shift - 1, "shift_high": shift + 1, "KL_of_others": 0.1,
         "KL_of_others_low": 0.05, "KL_of_others_high": 0.2}
        for edit, number, shift in (("scaling", 40, 3.0), ("scaling", 5, 2.0), ("vector", 576, 4.0))
    ]  # fmt: skip


def test_scaling_draws_every_factor_on_a_scale_centred_on_zero():
    figure = plots.scaling([*factors("giver"), *factors("last")])
    first, second = figure.data
    np.testing.assert_allclose(first.z, [[0, 0.1, 0.2, 0.3], [0, -0.2, -0.4, -0.6]])
    assert list(first.y) == ["attn_out", "mlp_out"] and np.array_equal(first.z, second.z)
    axis = figure.layout.coloraxis
    assert (axis.cmin, axis.cmax) == (-0.6, 0.6)
    said = [note.text for note in figure.layout.annotations]
    assert "giver" in said and "last" in said
    drawn = figure.to_json().replace("<br>", " ")
    assert "12 of 16 factors are not 0" in drawn and "n = 84; seed 3" in drawn


def test_scaling_without_a_factor_that_acts_is_white():
    figure = plots.scaling([{**row, "alpha": 0.0} for row in factors()])
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-1.0, 1.0)


def test_few_numbers_draws_each_edit_with_its_intervals():
    scaling, _, vector, _ = plots.few_numbers(edits()).data
    assert scaling.x.tolist() == [5, 40] and scaling.y.tolist() == [2.0, 3.0]
    assert scaling.error_y.array.tolist() == [1.0, 1.0] == scaling.error_y.arrayminus.tolist()
    assert vector.name == "vector" and vector.x.tolist() == [576]


@pytest.mark.parametrize("draw", [plots.scaling, plots.few_numbers])
def test_what_is_missing_is_named_and_a_table_is_not_changed(draw):
    rows = factors() if draw is plots.scaling else edits()
    before = [dict(row) for row in rows]
    draw(rows)
    assert rows == before
    with pytest.raises(ValueError, match="table must have the column"):
        draw([{key: value for key, value in row.items() if key != "n"} for row in rows])
    with pytest.raises(ValueError, match="table must"):
        draw([])


def test_names_are_drawn_as_they_are():
    rows = [{**row, "role": HOSTILE, "component": HOSTILE} for row in factors()[::2]]
    check_drawn_as_it_is(plots.scaling([*rows, *factors("last")], title=HOSTILE))
    check_drawn_as_it_is(
        plots.few_numbers([{**row, "task": HOSTILE, "edit": HOSTILE} for row in edits()[:2]], title=HOSTILE)
    )
