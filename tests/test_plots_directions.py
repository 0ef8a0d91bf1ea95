"""The figures of vectors among each other and beside activations, against their tables."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from drawn import HOSTILE, check_drawn_as_it_is

from rt_lens import plots

NAN = float("nan")


def cosine_rows(names=("mood", "formality", "refusal")) -> list[dict]:
    return [
        {"a": a, "b": b, "cosine": 1.0 if i == j else -0.3 * i + 0.1 * j}
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if i <= j  # half of them is enough
    ]


def norm_rows(smallest: float = 0.03) -> list[dict]:
    return [
        {"layer": layer, "vector": smallest * 2**layer, "n": 24, "mean": 30.0 * (layer + 1), "low": 29.0 * (layer + 1),
         "high": 31.0 * (layer + 1), "ratio": 0.01 * (layer + 1), "ratio_low": 0.009 * (layer + 1),
         "ratio_high": 0.011 * (layer + 1), "seed": 4}
        for layer in range(8)
    ]  # fmt: skip


def map_rows(layers=(6, 12, 18), method: str = "pca", paired: bool = False) -> list[dict]:
    share = NAN if method == "tsne" else 0.34
    return [
        {"layer": layer, "side": side, "x": sign * number + layer, "y": 0.5 * number, "text": f"text {number}",
         "explained_x": share, "explained_y": share / 2, "method": method, "paired": paired, "n": 5, "seed": 0}
        for layer in layers
        for side, sign in (("positive", 1.0), ("negative", -1.0))
        for number in range(5)
    ]  # fmt: skip


FIGURES = {
    "cosines": lambda: plots.cosines(cosine_rows()),
    "norms": lambda: plots.norms(norm_rows()),
    "map": lambda: plots.activation_map(map_rows()),
    "map of one layer": lambda: plots.activation_map(map_rows([3], "tsne")),
}


def reading(figure: go.Figure) -> str:
    return figure.layout.title.subtitle.text.replace("<br>", " ")


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_only_returned_and_titled(name, only_returned):
    figure = FIGURES[name]()
    assert figure.layout.title.text
    assert len(reading(figure)) > 40


def test_the_tables_stay_as_they_were():
    tables = [pd.DataFrame(rows) for rows in (cosine_rows(), norm_rows(), map_rows())]
    before = [table.copy() for table in tables]
    for draw, table in zip((plots.cosines, plots.norms, plots.activation_map), tables, strict=True):
        draw(table)
    assert all(table.equals(copy) for table, copy in zip(tables, before, strict=True))


def test_cosines_fill_both_halves_in_the_order_they_came():
    rows = cosine_rows()
    (heat,) = plots.cosines(rows).data
    names = ["mood", "formality", "refusal"]
    for row in rows:
        i, j = names.index(row["a"]), names.index(row["b"])
        assert heat.z[i][j] == heat.z[j][i] == row["cosine"]
        assert heat.hovertext[i][j] == f"{row['a']} and {row['b']}<br>cosine {row['cosine']:.3f}"
    assert heat.text[0][1] == "0.10"
    figure = plots.cosines([row | {"chance": 0.08} for row in rows])
    assert list(figure.layout.xaxis.ticktext) == list(figure.layout.yaxis.ticktext) == names
    assert figure.layout.yaxis.autorange == "reversed", "read from the top, as a table is"
    assert "within ±0.08" in reading(figure)


def test_cosines_are_coloured_about_zero():
    axis = plots.cosines(cosine_rows()).layout.coloraxis
    assert (axis.cmin, axis.cmax) == (-1, 1)


def test_cosines_of_layers_stand_in_their_order():
    figure = plots.cosines(cosine_rows((21, 3, 12)))
    (heat,) = figure.data
    assert list(figure.layout.xaxis.ticktext) == ["3", "12", "21"]
    assert heat.z[0][2] == pytest.approx(0.1), "layers 3 and 21: rows 1 and 0"
    assert heat.hovertext[0][2] == "layers 3 and 21<br>cosine 0.100"
    assert figure.layout.xaxis.title.text == "layer (block index)"


def test_many_cosines_are_not_numbered_and_their_labels_have_gaps():
    figure = plots.cosines(cosine_rows(range(30)))
    assert figure.data[0].text is None
    assert list(figure.layout.xaxis.ticktext) == [str(layer) for layer in range(0, 30, 2)]


def test_norms_show_both_lengths_and_their_ratio():
    rows = norm_rows()
    figure = plots.norms(rows[::-1])
    lines = {trace.name: trace for trace in figure.data if trace.mode == "lines+markers"}
    assert list(lines["activations"].y) == [row["mean"] for row in rows]
    assert list(lines["vector (multiplier 1)"].y) == [row["vector"] for row in rows]
    ratio = figure.data[-1]
    np.testing.assert_allclose(ratio.y, [100 * row["ratio"] for row in rows])
    assert ratio.hovertext[1] == "layer 1<br>2.0 [1.8, 2.2] % of the activations' norm<br>n = 24"
    assert lines["activations"].hovertext[1] == (
        "layer 1<br>activations 60.000 [58.000, 62.000], n = 24<br>vector 0.060 activation units"
    )
    assert "n = 24; seed 4." in reading(figure)


@pytest.mark.parametrize(("smallest", "kind"), [(0.03, "log"), (30.0, None), (0.0, None)])
def test_lengths_of_different_orders_get_a_log_axis(smallest, kind):
    axis = plots.norms(norm_rows(smallest)[:3]).layout.yaxis
    assert axis.type == kind
    if kind:
        assert 10 ** axis.range[0] <= 0.03
        assert 10 ** axis.range[1] >= 90


def test_norms_of_one_text_have_no_band_but_a_line():
    rows = [row | dict.fromkeys(("low", "high", "ratio_low", "ratio_high"), NAN) for row in norm_rows()]
    figure = plots.norms(rows)
    assert "[" not in figure.data[-1].hovertext[0]
    assert not any(math.isnan(value) for value in figure.data[-1].y)


def test_norms_refuse_a_layer_that_comes_twice():
    with pytest.raises(ValueError, match="got 3 more than once"):
        plots.norms([*norm_rows(), norm_rows()[3]])


def test_a_map_puts_each_layers_points_in_its_panel():
    rows = map_rows()
    figure = plots.activation_map(rows)
    drawn = [trace for trace in figure.data if trace.hovertext]
    assert len(drawn) == 6
    for place, trace in enumerate(drawn):
        layer, side = (6, 12, 18)[place // 2], ("positive", "negative")[place % 2]
        own = [row for row in rows if row["layer"] == layer and row["side"] == side]
        assert list(trace.x) == [row["x"] for row in own]
        assert list(trace.y) == [row["y"] for row in own]
        assert trace.hovertext[2] == f"text 2<br>{side}, layer {layer}<br>at {own[2]['x']:.2f}, 1.00 activation units"
    assert [title.text for title in figure.layout.annotations] == ["layer 6", "layer 12", "layer 18"]
    assert figure.layout.xaxis3.title.text == "component 1 (34 %)"
    assert figure.layout.yaxis.title.text == "component 2 (17 %)"


def test_a_map_tells_the_sides_apart_by_more_than_colour():
    positive, negative = plots.activation_map(map_rows([3])).data[:2]
    assert positive.marker.color != negative.marker.color
    assert positive.marker.symbol != negative.marker.symbol


def test_a_map_says_what_it_shows():
    assert "n (pairs) = 5; seed 0." in reading(plots.activation_map(map_rows()))
    assert "mean is subtracted" in reading(plots.activation_map(map_rows(paired=True)))
    assert "mean is subtracted" not in reading(plots.activation_map(map_rows()))
    tsne = plots.activation_map(map_rows(method="tsne"))
    assert "have no meaning" in reading(tsne)
    assert tsne.layout.xaxis.title.text is None
    assert tsne.layout.xaxis.showticklabels is False
    assert "activation units" not in tsne.data[0].hovertext[0]


def test_many_maps_stand_in_rows_of_five():
    figure = plots.activation_map(map_rows(range(11)))
    tops = [figure.layout[f"yaxis{panel}" if panel > 1 else "yaxis"].domain for panel in range(1, 12)]
    assert [tops.count(top) for top in dict.fromkeys(tops)] == [5, 5, 1]


def test_a_map_refuses_a_third_side():
    with pytest.raises(ValueError, match="side must be 'positive' or 'negative', got neutral"):
        plots.activation_map([*map_rows(), map_rows()[0] | {"side": "neutral"}])


@pytest.mark.parametrize("draw", [plots.cosines, plots.norms, plots.activation_map])
def test_a_table_without_rows_is_refused(draw):
    with pytest.raises(ValueError, match="at least one row, got none"):
        draw([])


def test_names_that_look_like_markup_are_drawn_as_they_are():
    check_drawn_as_it_is(plots.cosines([*cosine_rows(("mood", HOSTILE))], title=HOSTILE), least=4)
    check_drawn_as_it_is(plots.activation_map([{**row, "text": HOSTILE} for row in map_rows()]), least=6)
