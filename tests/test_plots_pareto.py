"""The figure of effect against side effect shows its table's numbers, and no label hides another."""

from __future__ import annotations

import doctest
import itertools

import numpy as np
import plotly.graph_objects as go
import pytest
from drawn import HOSTILE, check_drawn_as_it_is

from rt_lens import plots
from rt_lens.common.statistics.calibration import calibration_curve
from rt_lens.plots import arms_at_kl, pareto
from rt_lens.plots import pareto as exported
from rt_lens.plots.style import ARM_COLOURS, SYMBOLS
from rt_lens.results.tables import efficient

MEANS = {
    ("untuned", "none"): (0.31, 21.4, 0.0),
    ("steered", "toward"): (0.62, 22.6, 0.19),
    ("steered", "away"): (-0.08, 23.1, 0.24),
    ("token_tuned", "toward"): (0.48, 21.6, 0.03),
    ("token_tuned", "away"): (0.12, 21.7, 0.04),
    ("rep_tuned", "toward"): (0.71, 21.8, 0.07),
    ("rep_tuned", "away"): (-0.27, 21.9, 0.08),
    ("tuned + steered", "toward"): (0.69, 22.0, 0.075),
    ("tuned + steered", "away"): (-0.25, 22.0, 0.085),
}


def rows() -> list[dict]:
    return [
        {
            **{"arm": arm, "direction": direction, "set": "test", "scorer": "vader", "n": 60, "n_texts": 18},
            **{"mean": mean, "low": mean - 0.1, "high": mean + 0.09, "seeds": [0, 1]},
            **{"perplexity": perplexity, "perplexity_low": perplexity - 0.4, "perplexity_high": perplexity + 0.5},
            **{"kl": kl, "kl_low": 0.8 * kl or None, "kl_high": 1.2 * kl or None},
        }
        for (arm, direction), (mean, perplexity, kl) in MEANS.items()
    ]


def marks_of(figure: go.Figure) -> dict[str, go.Scatter]:
    return {trace.name: trace for trace in figure.data if trace.mode == "markers"}


def label_of(row: dict) -> str:
    return row["arm"] if row["direction"] == "none" else f"{row['arm']}, {row['direction']}"


@pytest.mark.parametrize("harm", ["kl", "perplexity"])
def test_marks_stand_where_the_table_says_with_both_intervals(harm, only_returned):
    marks = marks_of(pareto(efficient(rows(), side_effect=harm), against=harm))
    assert len(marks) == len(MEANS)
    for row in rows():
        mark = marks[label_of(row)]
        assert (mark.x[0], mark.y[0]) == (row[harm], row["mean"])
        assert mark.error_y.array[0] == pytest.approx(row["high"] - row["mean"])
        assert mark.error_y.arrayminus[0] == pytest.approx(row["mean"] - row["low"])
        if row[f"{harm}_low"] is None:
            assert not mark.error_x.visible, "nothing is claimed where nothing was measured"
        else:
            assert mark.error_x.array[0] == pytest.approx(row[f"{harm}_high"] - row[harm])
            assert mark.error_x.arrayminus[0] == pytest.approx(row[harm] - row[f"{harm}_low"])


def test_efficient_marks_are_filled_in_their_arms_colour_and_others_hollow():
    table = efficient(rows())
    marks = marks_of(pareto(table))
    assert {row["efficient"] for row in table} == {True, False}
    for row in table:
        mark = marks[label_of(row)].marker
        colour = mark.line.color
        assert mark.color == (colour if row["efficient"] else "white")
        assert mark.symbol == SYMBOLS[row["direction"]]
        assert colour == ARM_COLOURS.get(row["arm"], colour)
    assert len({marks[label_of(row)].marker.line.color for row in table}) == 5, "a colour for each arm"


def test_each_direction_has_a_line_through_its_efficient_marks_from_the_untuned_model_on():
    lines = [trace for trace in pareto(efficient(rows())).data if trace.mode == "lines"]
    assert [list(line.y) for line in lines] == [[0.31, 0.48, 0.71], [0.31, 0.12, -0.27]]
    assert all(list(line.x) == sorted(line.x) for line in lines)
    flat = [{**row, "direction": "none", "arm": label_of(row)} for row in rows()]
    (line,) = [trace for trace in pareto(efficient(flat)).data if trace.mode == "lines"]
    assert list(line.y) == [0.31, 0.48, 0.71]


def test_hover_tells_numbers_n_and_seeds():
    text = marks_of(pareto(efficient(rows())))["steered, away"].hovertext
    for said in (
        "-0.080 [-0.180, 0.010], n = 60",
        "kl 0.240 [0.192, 0.288], n = 18 texts",
        "seeds 0, 1",
        "test, vader",
    ):
        assert said in text
    subtitle = pareto(efficient(rows())).layout.title.subtitle.text
    assert "Score: n = 60; seeds 0, 1." in subtitle and "Side effect: n = 18 texts." in subtitle


def boxes_of(figure: go.Figure) -> list[tuple[float, float, float, float]]:
    """The labels' boxes in pixels of a page's panel: left, right, low, high; a little smaller than a browser's."""
    (left, right), (low, high) = figure.layout.xaxis.range, figure.layout.yaxis.range
    boxes = []
    for label in figure.layout.annotations:
        x = (label.x - left) / (right - left) * 900 + label.ax
        y = (label.y - low) / (high - low) * 330 - label.ay
        half = 3.5 * len(label.text)
        boxes.append((x - half, x + half, y - 8, y + 8))
    return boxes


def overlapping(boxes: list) -> int:
    return sum(a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3] for a, b in itertools.combinations(boxes, 2))


@pytest.mark.parametrize("harm", ["kl", "perplexity"])
def test_labels_do_not_overlap(harm):
    figure = pareto(efficient(rows(), side_effect=harm), against=harm)
    assert {label.text for label in figure.layout.annotations} == {label_of(row) for row in rows()}
    assert overlapping(boxes_of(figure)) == 0


def test_labels_do_not_overlap_even_if_marks_do():
    noise = np.random.default_rng(0)
    close = [{**row, "kl": 0.1 + 0.001 * noise.random(), "kl_low": 0.09, "kl_high": 0.13} for row in rows()]
    close = [{**row, "mean": 0.3 + 0.02 * noise.random(), "low": 0.1, "high": 0.5} for row in close]
    figure = pareto(efficient(close))
    for label in figure.layout.annotations:
        label.ax, label.ay, kept = 0, 0, (label.ax, label.ay)
        label.text, label.name = label.text, f"{kept[0]} {kept[1]}"
    assert overlapping(boxes_of(figure)) > 10, "on their marks they would"
    for label in figure.layout.annotations:
        label.ax, label.ay = map(float, label.name.split())
    assert overlapping(boxes_of(figure)) == 0


def test_rows_without_the_side_effect_are_left_out():
    table = [{**row, "kl": None if row["arm"] == "steered" else row["kl"]} for row in rows()]
    assert len(marks_of(pareto(efficient(table)))) == len(MEANS) - 2
    with pytest.raises(ValueError, match="table must hold kl in at least one row"):
        pareto(efficient([{**row, "kl": None} for row in rows()]))


def test_a_single_arm_and_one_without_interval_are_drawn():
    (row,) = efficient(rows()[:1])
    figure = pareto([{**row, "low": None, "high": None}])
    (mark,) = marks_of(figure).values()
    assert not mark.error_y.visible and mark.marker.color == ARM_COLOURS["untuned"]


def test_bad_tables_are_refused(as_a_user):
    table = efficient(rows())
    with pytest.raises(ValueError, match="table must have the columns .* Add efficient"):
        pareto(rows())
    with pytest.raises(ValueError, match="got untuned, none more than once"):
        pareto([*table, table[0]])
    with pytest.raises(ValueError, match="against must be 'kl' or 'perplexity', got 'cost'"):
        pareto(table, against="cost")
    with pytest.raises(ValueError, match="at least one row, got none"):
        pareto([])


def test_the_example_runs():
    source = exported.__doc__
    example = doctest.DocTestParser().get_doctest(source, {"pareto": exported}, "pareto", None, 0)
    assert example.examples and doctest.DocTestRunner().run(example).failed == 0


# --- calibration


@pytest.mark.usefixtures("only_returned")
def test_a_reliability_diagram_draws_the_table():
    table = calibration_curve([0.3, 0.35, 0.7, 0.75, 0.72, 0.95], [0, 1, 1, 0, 1, 1])
    figure = plots.calibration(table)
    diagonal, found = figure.data
    assert list(diagonal.x) == list(diagonal.y) == [0, 1]
    assert list(found.x) == table["predicted"].tolist() and list(found.y) == table["right"].tolist()
    assert list(found.error_y.array) == pytest.approx((table["high"] - table["right"]).tolist())
    assert list(found.error_y.arrayminus) == pytest.approx((table["right"] - table["low"]).tolist())
    assert "n = 6 questions" in figure.layout.title.subtitle.text
    with pytest.raises(ValueError, match="Add low"):
        plots.calibration(table.drop(columns="low"))


def test_names_that_look_like_markup_are_drawn_as_they_are():
    named = [
        {**row, "arm": HOSTILE if row["arm"] == "steered" else row["arm"], "scorer": HOSTILE}
        for row in efficient(rows())
    ]
    check_drawn_as_it_is(pareto(named, title=HOSTILE), least=6)


def at_one_kl() -> list[dict]:
    row = {"set": "test", "scorer": "vader", "n": 60, "seeds": [0], "kl": 0.01, "kl_low": 0.009, "kl_high": 0.011}
    rows = [row | {"arm": "untuned", "direction": "none", "budget": None, "mean": 0.2, "low": 0.1, "high": 0.3}]
    for arm, mean in (("a", 0.5), ("b", 0.3), ("c", 0.4)):
        for direction, sign in (("toward", 1), ("away", -1)):
            for budget, factor in ((0.01, 1.0), (0.03, 2.0)):
                score = sign * factor * mean
                at = {"mean": score, "low": score - 0.1, "high": score + 0.1, "budget": budget}
                rows.append(row | at | {"arm": arm, "direction": direction})
    return rows


def test_arms_at_one_kl_are_sorted_by_how_far_they_go_in_each_direction():
    rows = at_one_kl()
    prompted = rows[1] | {"arm": "prompted", "budget": None, "mean": 0.45}
    missed = rows[2] | {"arm": "missed", "budget": 0.03}
    figure = arms_at_kl([*rows, prompted, missed], 0.01)
    drawn = {axis.anchor: list(axis.categoryarray)[::-1] for axis in (figure.layout.yaxis, figure.layout.yaxis2)}
    assert list(drawn.values()) == [["a", "prompted", "c", "b", "missed"], ["a", "c", "b"]]
    toward = next(trace for trace in figure.data if trace.error_x.array is not None)
    assert dict(zip(toward.y, toward.x, strict=True)) == {"a": 0.5, "b": 0.3, "c": 0.4, "prompted": 0.45}
    assert dict(zip(toward.y, toward.marker.symbol, strict=True))["prompted"] == "triangle-up-open"
    others = figure.data[0]
    assert dict(zip(others.y, others.x, strict=True)) == {"a": 1.0, "b": 0.6, "c": 0.8, "missed": missed["mean"]}
    with pytest.raises(ValueError, match=r"some with budget 0\.1, got 1 and 0"):
        arms_at_kl(rows, 0.1)
