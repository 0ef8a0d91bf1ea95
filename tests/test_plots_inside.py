"""The figures on what tuning did inside, against their tables."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from drawn import HOSTILE, check_drawn_as_it_is

from rt_lens.plots import inside

NAN = float("nan")


def weight_rows(aligned: bool = True) -> list[dict]:
    rows = []
    for layer in (17, 18, 20):
        for place, kind in enumerate(("down", "o", "q")):
            row = {
                "parameter": f"blocks.{layer}.{kind}", "layer": layer, "kind": kind, "norm": 0.1 * layer + place,
                "relative": 0.001 * layer + 0.0001 * place, "effective_rank": 10.0 + place, "rank_limit": 576,
                "top_share": 0.25,
            }  # fmt: skip
            rows.append(row | ({"alignment": 0.05 * 2**place, "chance": 0.05} if aligned else {}))
    return rows


def new_bias(norm: float = 3.0) -> dict:
    return {
        "parameter": "blocks.18.mlp.b_out", "layer": 18, "kind": "bias", "norm": norm, "relative": NAN,
        "effective_rank": 1.0, "rank_limit": 1, "top_share": 1.0, "alignment": 1.0, "chance": 0.05,
    }  # fmt: skip


def projection_rows() -> list[dict]:
    return [
        {"arm": arm, "layer": layer, "n": 24, "mean": sign * layer, "low": sign * layer - 1, "high": sign * layer + 1,
         "seed": 0}
        for arm, sign in (("steered", 1), ("rep_tuned", -1), ("my own", 0.5))
        for layer in range(6)
    ]  # fmt: skip


def along_rows(arms=("steered", "rep_tuned", "baked")) -> list[dict]:
    rows = []
    for arm in arms:
        for layer in range(10):
            there = layer >= 4
            cosine = (-1.0 + 0.05 * layer) if there else NAN
            rows.append(
                {"arm": arm, "layer": layer, "n": 24, "norm_mean": float(there), "norm_low": float(there),
                 "norm_high": float(there), "n_cosine": 23 * there, "cosine_mean": cosine, "cosine_low": cosine - 0.01,
                 "cosine_high": cosine + 0.01, "seed": 5}
            )  # fmt: skip
    return rows


def between_rows(pairs=(("steered", "rep_tuned"), ("steered", "baked"), ("rep_tuned", "baked"))) -> list[dict]:
    return [
        {"a": a, "b": b, "layer": layer, "n": 23 * (layer >= 4), "mean": 0.08 * layer if layer >= 4 else NAN,
         "low": 0.07 * layer if layer >= 4 else NAN, "high": 0.09 * layer if layer >= 4 else NAN, "seed": 5}
        for a, b in pairs
        for layer in range(10)
    ]  # fmt: skip


FIGURES = {
    "weights": lambda: inside.weight_changes([*weight_rows(), new_bias()]),
    "weights alone": lambda: inside.weight_changes(weight_rows(aligned=False)),
    "projections": lambda: inside.projection_changes(projection_rows()),
    "curves": lambda: inside.projection_curves(projection_rows()),
    "shifts": lambda: inside.residual_shifts(along_rows(), between_rows()),
    "shifts of one arm": lambda: inside.residual_shifts(along_rows(("steered",)), []),
}


def reading(figure: go.Figure) -> str:
    return figure.layout.title.subtitle.text.replace("<br>", " ")


def named(figure: go.Figure, name: str) -> go.Scatter:
    (trace,) = [trace for trace in figure.data if trace.name == name]
    return trace


def heats(figure: go.Figure) -> list[go.Heatmap]:
    return [trace for trace in figure.data if isinstance(trace, go.Heatmap)]


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_only_returned_and_titled(name, only_returned):
    figure = FIGURES[name]()
    assert figure.layout.title.text
    assert len(reading(figure)) > 40
    assert figure.layout.xaxis.title.text or figure.layout.xaxis2.title.text


def test_the_tables_stay_as_they_were():
    tables = [pd.DataFrame([*weight_rows(), new_bias()]), pd.DataFrame(along_rows()), pd.DataFrame(between_rows())]
    before = [table.copy() for table in tables]
    inside.weight_changes(tables[0])
    inside.residual_shifts(tables[1], tables[2])
    assert all(table.equals(copy) for table, copy in zip(tables, before, strict=True))


def test_sizes_are_the_tables_in_percent_at_their_layer_and_kind():
    size, _ = heats(inside.weight_changes(weight_rows()))
    figure = inside.weight_changes(weight_rows())
    assert list(figure.layout.xaxis.ticktext) == ["q", "o", "down"]
    assert list(figure.layout.yaxis.ticktext) == ["17", "18", "19", "20"]
    found = {(layer, kind): size.z[row][column] for row, layer in enumerate((17, 18, 19, 20))
             for column, kind in enumerate(("q", "o", "down"))}  # fmt: skip
    for row in weight_rows():
        assert found[row["layer"], row["kind"]] == pytest.approx(100 * row["relative"])
    assert all(math.isnan(found[19, kind]) for kind in ("q", "o", "down"))
    scale = figure.layout.coloraxis
    assert (scale.cmin, scale.cmax) == (0, pytest.approx(2.02))


def test_alignment_is_drawn_as_multiples_of_chance_centred_on_chance():
    figure = inside.weight_changes(weight_rows())
    _, folds = heats(figure)
    assert np.array(folds.z, dtype=float)[0] == pytest.approx(
        [2, 1, 0]
    )  # q 4, o 2, down 1 times chance, as powers of 2
    scale = figure.layout.coloraxis2
    assert scale.cmin == -scale.cmax < 0
    assert dict(zip(scale.colorbar.tickvals, scale.colorbar.ticktext, strict=True))[0] == "1×"
    assert "random direction" in reading(figure)


def test_no_alignment_no_second_panel():
    for rows in (weight_rows(aligned=False), [row | {"alignment": NAN} for row in weight_rows()]):
        figure = inside.weight_changes(rows)
        assert len(heats(figure)) == 1
        assert "random direction" not in reading(figure)


def test_no_alignment_at_all_along_the_vector_stays_on_the_scale():
    rows = [weight_rows()[0] | {"alignment": 0.0}]
    _, folds = heats(inside.weight_changes(rows))
    assert np.isfinite(np.array(folds.z, dtype=float)).all()


def test_a_weight_that_was_zero_says_so_instead_of_a_percentage():
    figure = inside.weight_changes([*weight_rows(), new_bias()])
    (mark,) = [trace for trace in figure.data if isinstance(trace, go.Scatter)]
    kinds, layers = list(figure.layout.xaxis.ticktext), list(figure.layout.yaxis.ticktext)
    assert [(layers[y], kinds[x], word) for x, y, word in zip(mark.x, mark.y, mark.text, strict=True)] == [
        ("18", "bias", "new")
    ]
    assert "new: zero before" in reading(figure)
    assert "new" not in reading(inside.weight_changes(weight_rows()))
    alone = inside.weight_changes([new_bias()])
    assert alone.layout.coloraxis.cmax == 1
    assert "was zero" in heats(alone)[0].hovertext[0][0]


def test_of_several_parameters_in_a_cell_the_largest_change_is_drawn_and_named():
    small = new_bias(0.5) | {"parameter": "blocks.18.attn.b_O", "relative": 0.5}
    large = new_bias(9.0) | {"relative": 0.07}
    size = heats(inside.weight_changes([small, large]))[0]
    assert size.z[0][0] == pytest.approx(7)
    assert "blocks.18.mlp.b_out" in size.hovertext[0][0]


def test_what_did_not_change_is_not_drawn():
    still = new_bias(0.0) | {"effective_rank": NAN, "top_share": NAN, "alignment": NAN}
    figure = inside.weight_changes([*weight_rows(), still])
    assert figure.to_json() == inside.weight_changes(weight_rows()).to_json()
    assert "9 weights changed" in reading(figure)
    with pytest.raises(ValueError, match="at least one changed parameter"):
        inside.weight_changes([still])


def test_what_lies_outside_the_blocks_has_a_row_of_its_own():
    embedding = new_bias() | {"parameter": "embed.W_E", "layer": NAN, "kind": "embed", "relative": 0.5}
    figure = inside.weight_changes([*weight_rows(), embedding])
    assert list(figure.layout.yaxis.ticktext) == ["no block", "17", "18", "19", "20"]
    assert list(figure.layout.xaxis.ticktext) == ["q", "o", "down", "embed"]
    assert heats(figure)[0].z[0][3] == pytest.approx(50)


@pytest.mark.parametrize(
    ("draw", "measured"),
    [(inside.projection_changes, "change of projection"), (inside.projection_curves, "projection")],
)
def test_lines_and_bands_of_projections_are_the_tables(draw, measured):
    figure = draw(projection_rows())
    frame = pd.DataFrame(projection_rows())
    for arm in ("steered", "rep_tuned", "my own"):
        own, line = frame[frame["arm"] == arm], named(figure, arm)
        assert list(line.x) == list(own["layer"])
        assert list(line.y) == pytest.approx(list(own["mean"]))
        place = list(figure.data).index(line)
        low, high = figure.data[place - 2 : place]
        assert list(low.y) == pytest.approx(list(own["low"]))
        assert list(high.y) == pytest.approx(list(own["high"]))
        assert high.fill == "tonexty"
        assert f"<br>layer 3<br>{measured} " in line.hovertext[3]
        assert line.hovertext[3].endswith("] activation units<br>n = 24")
    assert named(figure, "steered").line.color == inside.arm_colours([])["steered"]
    assert "n = 24; seed 0." in reading(figure)
    assert "activation units" in figure.layout.yaxis.title.text


def test_shifts_are_drawn_above_and_their_pairs_below():
    figure = inside.residual_shifts(along_rows(), between_rows())
    arm, pair = named(figure, "rep_tuned"), named(figure, "steered and baked")
    assert list(arm.y)[4:] == pytest.approx([-1 + 0.05 * layer for layer in range(4, 10)])
    assert all(math.isnan(value) for value in arm.y[:4])
    assert list(pair.y)[4:] == pytest.approx([0.08 * layer for layer in range(4, 10)])
    assert (arm.yaxis, pair.yaxis) == ("y", "y2")
    assert "norm of the shift 1.000" in arm.hovertext[9]
    assert "n = 23" in arm.hovertext[9]
    assert "n = 24; seed 5." in reading(figure)
    for axis in (figure.layout.yaxis, figure.layout.yaxis2):
        assert axis.range[0] == -axis.range[1] < -1


def test_the_layers_begin_just_below_the_first_shift():
    figure = inside.residual_shifts(along_rows(), between_rows())
    assert tuple(figure.layout.xaxis.range) == (2.5, 9.5)
    still = [row | {"norm_mean": 0.0} for row in along_rows()]
    assert tuple(inside.residual_shifts(still, between_rows()).layout.xaxis.range) == (-0.5, 9.5)


def test_pairs_of_many_arms_can_be_told_apart():
    names = "abcde"
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    figure = inside.residual_shifts(along_rows(names), between_rows(pairs))
    looks = {(named(figure, f"{a} and {b}").line.color, named(figure, f"{a} and {b}").line.dash) for a, b in pairs}
    assert len(looks) == len(pairs) == 10


def test_one_arm_has_no_panel_of_pairs():
    figure = inside.residual_shifts(along_rows(("steered",)), [])
    assert {trace.yaxis for trace in figure.data} == {"y"}
    assert "two arms" not in reading(figure)


@pytest.mark.parametrize(
    ("draw", "rows", "argument", "column"),
    [
        (inside.weight_changes, weight_rows, "table", "relative"),
        (inside.weight_changes, weight_rows, "table", "chance"),
        (inside.projection_changes, projection_rows, "table", "low"),
        (inside.projection_curves, projection_rows, "table", "high"),
        (lambda rows: inside.residual_shifts(rows, between_rows()), along_rows, "along", "cosine_mean"),
        (lambda rows: inside.residual_shifts(along_rows(), rows), between_rows, "between", "mean"),
    ],
)
def test_a_missing_column_is_named(draw, rows, argument, column):
    without = [{name: value for name, value in row.items() if name != column} for row in rows()]
    with pytest.raises(ValueError, match=f"{argument} must have the columns .* Add {column}"):
        draw(without)


@pytest.mark.parametrize("draw", [inside.weight_changes, inside.projection_changes])
def test_no_rows_are_refused(draw):
    with pytest.raises(ValueError, match="at least one row, got none"):
        draw([])
    with pytest.raises(ValueError, match="along must have at least one row"):
        inside.residual_shifts([], [])


def test_a_hostile_arm_is_drawn_as_the_text_it_is():
    rows = [{**row, "arm": "<b>bold</b>"} for row in projection_rows() if row["arm"] == "steered"]
    figure = inside.projection_curves(pd.DataFrame(rows))
    line = named(figure, "&lt;b&gt;bold&lt;/b&gt;")
    assert list(line.y) == [row["mean"] for row in rows] and "<b>" not in line.hovertext[0]


def test_names_that_look_like_markup_are_drawn_as_they_are():
    def hostile(rows: list[dict], *columns: str) -> list[dict]:
        return [{**row, **{key: HOSTILE for key in columns if row[key] == "steered"}} for row in rows]

    check_drawn_as_it_is(inside.projection_changes(hostile(projection_rows(), "arm"), title=HOSTILE))
    check_drawn_as_it_is(inside.residual_shifts(hostile(along_rows(), "arm"), hostile(between_rows(), "a", "b")))
    named = [{**row, "parameter": HOSTILE} for row in weight_rows()]
    check_drawn_as_it_is(inside.weight_changes(named, title=HOSTILE))
