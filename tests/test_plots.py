"""Figures against the tables they are drawn from: the same numbers, honest axes, no side effects."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from drawn import HOSTILE, as_drawn, check_drawn_as_it_is
from hypothesis import given, settings
from hypothesis import strategies as st

from rt_lens import plots

_MEANS = {
    ("untuned", "none"): (0.31, 21.4, 0.0),
    ("steered", "toward"): (0.62, 22.6, 0.19),
    ("steered", "away"): (-0.08, 23.1, 0.24),
    ("token_tuned", "toward"): (0.48, 21.6, 0.03),
    ("token_tuned", "away"): (0.12, 21.7, 0.04),
    ("rep_tuned", "toward"): (0.71, 21.8, 0.07),
    ("rep_tuned", "away"): (-0.27, 21.9, 0.08),
}
TOKENS = ["<|im_start|>", "user", "\n", "Tell", " me", " about", " your", " weekend", ".", " me", "\n"]


def arm_rows() -> list[dict]:
    return [
        {
            "arm": arm,
            "direction": direction,
            "scorer": "vader",
            "n": 216,
            "seeds": [0, 1, 2],
            "mean": mean,
            "low": mean - 0.07,
            "high": mean + 0.06,
            "perplexity": perplexity,
            "kl": kl,
        }
        for (arm, direction), (mean, perplexity, kl) in _MEANS.items()
    ]


def dose_rows() -> list[dict]:
    rows = []
    for layer, strength in ((12, 0.05), (18, 0.11), (24, 0.07)):
        for multiplier in (-6, -4, -2, 0, 2, 4, 6):
            mean = 0.31 + strength * multiplier
            perplexity = 21.4 * math.exp(strength * 0.12 * multiplier**2)
            rows.append(
                {
                    "layer": layer,
                    "multiplier": multiplier,
                    "n": 72,
                    "mean": mean,
                    "perplexity": perplexity,
                    "low": mean - 0.09,
                    "high": mean + 0.08,
                    "admissible": perplexity <= 1.1 * 21.4,
                    "seed": 0,
                }
            )
    return rows


def separability_rows() -> list[dict]:
    accuracies = [min(0.99, 0.52 + 0.03 * layer) for layer in range(30)]
    return [
        {"layer": layer, "accuracy": a, "low": a - 0.06, "high": min(1.0, a + 0.05), "n": 432, "seed": 0}
        for layer, a in enumerate(accuracies)
    ]


def history_rows() -> list[dict]:
    rows = []
    for arm, direction in (
        ("token_tuned", "toward"),
        ("rep_tuned", "toward"),
        ("token_tuned", "away"),
        ("rep_tuned", "away"),
    ):
        for seed in (0, 1, 2):
            for step in range(0, 301, 20):
                decay = math.exp(-step / (90 + 15 * seed))
                for split, offset in (("train", 0.0), ("validation", 0.06)):
                    token, kl = 1.2 + 1.4 * decay + offset, 0.02 + 0.05 * (1 - decay)
                    cosine = 0.18 + 0.3 * decay + offset if arm == "rep_tuned" else None
                    total = token + kl + (cosine or 0.0)
                    parts = {"total": total, "token": token, "cosine": cosine, "kl": kl}
                    rows.append(
                        {"arm": arm, "direction": direction, "seed": seed, "step": step, "split": split, **parts}
                    )
    return rows


def lens_rows() -> list[dict]:
    words = {
        "+v": [" wonderful", " joy", "\n", " bright", " delight", " smile"],
        "-v": [" awful", " grim", "dead", " sad"],
    }
    return [{"layer": layer, "sign": sign, "tokens": words[sign]} for layer in (12, 18, 24) for sign in words]


def projection_arrays(tokens: int = len(TOKENS), layers: int = 30) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    ramp = np.linspace(0.2, 6.0, layers)[:, None]
    untuned = ramp * (0.3 + 0.25 * generator.standard_normal((layers, tokens)))
    untuned[4:, 0] = 90.0  # the attention sink
    return {"untuned": untuned, "rep_tuned away": untuned - 0.5 * ramp, "rep_tuned toward": untuned + 0.6 * ramp}


FIGURES = {
    "arms": lambda: plots.arms(arm_rows()),
    "dose_response": lambda: plots.dose_response(dose_rows(), bound=1.1, chosen=[(18, 2), (18, -2)]),
    "separability": lambda: plots.separability(separability_rows()),
    "projection_by_layer": lambda: plots.projection_by_layer(projection_arrays(), tokens=TOKENS),
    "projection_heatmap": lambda: plots.projection_heatmap(projection_arrays(), TOKENS, list(range(30))),
    "losses": lambda: plots.losses(history_rows()),
    "logit_lens": lambda: plots.logit_lens(lens_rows()),
    "side_effects": lambda: plots.side_effects(arm_rows()),
}
TABLES = {
    plots.arms: arm_rows,
    plots.dose_response: dose_rows,
    plots.separability: separability_rows,
    plots.losses: history_rows,
    plots.logit_lens: lens_rows,
    plots.side_effects: arm_rows,
}


def reading(figure: go.Figure) -> str:
    return figure.layout.title.subtitle.text.replace("<br>", " ")


def floats(values) -> list[float]:
    return [float(value) for value in values]


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_only_returned(name, only_returned):
    figure = FIGURES[name]()
    assert isinstance(figure, go.Figure)
    assert figure.layout.title.text and figure.layout.title.subtitle.text


@pytest.mark.parametrize("draw", TABLES, ids=lambda draw: draw.__name__)
def test_a_table_is_not_changed_and_a_list_draws_the_same(draw):
    frame = pd.DataFrame(TABLES[draw]())
    before = frame.copy(deep=True)
    assert draw(frame).to_json() == draw(TABLES[draw]()).to_json()
    pd.testing.assert_frame_equal(frame, before)


@pytest.mark.parametrize("draw", TABLES, ids=lambda draw: draw.__name__)
def test_a_missing_column_and_an_empty_table_are_named(draw):
    rows = TABLES[draw]()
    column = [key for key in rows[0] if key not in ("seed",)][1]
    short = [{key: value for key, value in row.items() if key != column} for row in rows]
    with pytest.raises(ValueError, match=rf"(table|history) must have the columns .* Add {column}\."):
        draw(short)
    with pytest.raises(ValueError, match=r"(table|history) must have at least one row, got none"):
        draw([])


def test_a_word_among_numbers_is_named():
    with pytest.raises(ValueError, match="table must hold numbers in the column accuracy"):
        plots.separability([{**separability_rows()[0], "accuracy": "high"}])


def test_arms_draws_the_table():
    figure = plots.arms(arm_rows())
    drawn = {}
    for bars, panel in zip(figure.data, ("none", "toward", "away"), strict=True):
        columns = zip(bars.x, bars.y, bars.error_y.array, bars.error_y.arrayminus, bars.marker.color, strict=True)
        for arm, mean, up, down, colour in columns:
            drawn[arm, panel] = (mean, mean + up, mean - down, colour)
    for row in arm_rows():
        wanted = (row["mean"], row["high"], row["low"])
        *numbers, colour = drawn[row["arm"], row["direction"]]
        assert numbers == pytest.approx(wanted)
        assert colour == plots.ARM_COLOURS[row["arm"]]
    assert len(drawn) == len(arm_rows())
    assert {shape.y0 for shape in figure.layout.shapes} == {0.31}
    assert "n = 216; seeds 0, 1, 2." in reading(figure)
    assert any("perplexity 23.100" in text and "KL 0.240" in text for text in figure.data[2].hovertext)


def compared_rows(scorer: str = "vader") -> list[dict]:
    """Brackets of all kinds: side by side, one over the other, upside down, and across panels."""
    pairs = [
        ("rep_tuned", "toward", "token_tuned", "toward", 0.23, 0.0002, 0.0016),
        ("rep_tuned", "toward", "steered", "toward", 0.09, 0.012, 0.07),
        ("token_tuned", "toward", "steered", "toward", -0.14, 0.3, 1.0),
        ("steered", "toward", "untuned", "none", 0.31, 0.001, 0.0216),
        ("steered", "away", "rep_tuned", "away", 0.19, 0.04, None),
    ]
    names = ("a", "a_direction", "b", "b_direction", "difference", "p", "p_holm")
    return [
        {**dict(zip(names, pair, strict=True)), "low": pair[4] - 0.05, "high": pair[4] + 0.05, "n": 60, "seeds": [0, 1]}
        | {"scorer": scorer}
        for pair in pairs
    ]


def test_arms_joins_compared_bars_of_a_panel_and_tells_the_p():
    figure = plots.arms(arm_rows(), comparisons=compared_rows())
    lines = {(*line.x[::3], line.xaxis): line for line in figure.data if line.type == "scatter"}
    labels = [note for note in figure.layout.annotations if note.name == "p"]
    drawn = {
        ("token_tuned", "rep_tuned", "x2"): ("p &lt; 0.001; Holm 0.002", "rep_tuned minus token_tuned: 0.230 [0.180"),
        ("steered", "rep_tuned", "x2"): ("p = 0.012; Holm 0.070", "rep_tuned minus steered: 0.090 [0.040, 0.140]"),
        ("steered", "token_tuned", "x2"): ("p = 0.300; Holm 1.000", "token_tuned minus steered: -0.140 [-0.190"),
        ("steered", "rep_tuned", "x3"): ("p = 0.040", "steered minus rep_tuned: 0.190 [0.140, 0.240]"),
    }
    assert set(lines) == set(drawn) and len(labels) == len(drawn)
    for (*arms, axis), (text, told) in drawn.items():
        line = lines[*arms, axis]
        assert told in line.hovertext and "n = 60, seeds 0, 1" in line.hovertext
        (label,) = [note for note in labels if note.y == line.y[1] and note.xref == axis]
        assert label.text == text and label.hovertext == line.hovertext
    across = figure.data[1].hovertext[0]
    assert "steered minus untuned: 0.310 [0.260, 0.360]<br>p = 0.001; Holm 0.022<br>n = 60, seeds 0, 1" in across
    assert "Holm" in reading(figure) and "Holm" not in reading(plots.arms(arm_rows()))


def test_no_bracket_touches_a_bar_or_another_bracket():
    figure = plots.arms(arm_rows(), comparisons=compared_rows())
    low, high = figure.layout.yaxis.range
    plot = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
    per_pixel = (high - low) / plot
    for axis, place in (("x2", 1), ("x3", 2)):
        bars = figure.data[[trace.type for trace in figure.data].index("bar") :]
        (panel,) = [trace for trace in bars if trace.type == "bar" and trace.xaxis == axis]
        order = list(panel.x)
        tops = {arm: max(mean + up, 0.0) for arm, mean, up in zip(order, panel.y, panel.error_y.array, strict=True)}
        brackets = [trace for trace in figure.data if trace.type == "scatter" and trace.xaxis == axis]
        assert brackets, place
        spans = [(order.index(line.x[0]), order.index(line.x[3]), line.y[0], line.y[1]) for line in brackets]
        for left, right, foot, top in spans:
            assert all(tops[arm] + 20 * per_pixel < foot for arm in order[left : right + 1]), "above bars and labels"
            assert top + 20 * per_pixel <= high, "with its label inside the panel"
        for one, other in itertools.combinations(spans, 2):
            if one[0] <= other[1] and other[0] <= one[1]:
                assert abs(one[3] - other[3]) >= 24 * per_pixel, "one above the other, labels between"


def test_arms_grows_for_brackets_and_keeps_its_bars():
    plain, joined = plots.arms(arm_rows()), plots.arms(arm_rows(), comparisons=compared_rows())
    heights = [
        (each.layout.height - each.layout.margin.t - each.layout.margin.b) / -np.subtract(*each.layout.yaxis.range)
        for each in (plain, joined)
    ]
    assert heights[0] == pytest.approx(heights[1], rel=0.01), "pixels to a unit of score"
    assert joined.layout.height > plain.layout.height


def test_arms_leaves_out_comparisons_of_other_sets_and_scorers():
    rows = [{**row, "set": "test"} for row in arm_rows()]
    other = [{**row, "set": "talk"} for row in compared_rows()] + [
        {**row, "set": "test"} for row in compared_rows("length")
    ]
    assert plots.arms(rows, comparisons=other).to_json() == plots.arms(rows).to_json()
    assert plots.arms(rows, comparisons=[]).to_json() == plots.arms(rows).to_json()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**compared_rows()[0], "b": "ablated"}], "comparisons must be of arms in the table, got ablated, toward"),
        (compared_rows()[:1] * 2, "got rep_tuned toward token_tuned toward more than once"),
        ([{"a": "rep_tuned"}], r"comparisons must have the columns .*, got a\. Add a_direction"),
    ],
)
def test_arms_refuses_comparisons_that_it_cannot_draw(rows, message):
    with pytest.raises(ValueError, match=message):
        plots.arms(arm_rows(), comparisons=rows)


def test_arms_takes_an_unmeasured_damage_and_an_unknown_arm():
    figure = plots.arms([*arm_rows(), {**arm_rows()[1], "arm": "ablated", "kl": None}])
    assert len({colour for bars in figure.data for colour in bars.marker.color}) == 5


def test_arms_wants_one_row_for_each_bar_and_an_untuned_one():
    with pytest.raises(ValueError, match="got steered, toward more than once"):
        plots.arms([*arm_rows(), arm_rows()[1]])
    with pytest.raises(ValueError, match="must have a row of the arm 'untuned', got steered"):
        plots.arms(arm_rows()[1:])


def test_dose_response_draws_scores_ratios_bound_and_stars():
    figure = FIGURES["dose_response"]()
    frame = pd.DataFrame(dose_rows())
    for layer, own in frame.groupby("layer"):
        score, ratio = (trace for trace in figure.data if trace.name == f"layer {layer}" and len(trace.x) > 1)
        assert floats(score.x) == floats(ratio.x) == floats(own["multiplier"])
        assert floats(score.y) == pytest.approx(floats(own["mean"]))
        assert floats(ratio.y) == pytest.approx(floats(own["perplexity"] / 21.4))
        hollow = [symbol == "circle-open" for symbol in score.marker.symbol]
        assert hollow == [not admissible for admissible in own["admissible"]]
        assert any(hollow) and not all(hollow)
    star = next(trace for trace in figure.data if trace.name == "chosen")
    assert list(zip(star.x, star.y, strict=True)) == [(2, pytest.approx(0.53)), (-2, pytest.approx(0.09))]
    assert [shape.y0 for shape in figure.layout.shapes] == [1.1]


def test_dose_response_lets_one_unsteered_row_serve_all_layers():
    rows = [row for row in dose_rows() if row["multiplier"] != 0]
    zero = next(row for row in dose_rows() if row["multiplier"] == 0)
    figure = plots.dose_response([*rows, {**zero, "layer": None}])
    lines = [trace for trace in figure.data if len(trace.x) > 1]
    assert len(lines) == 6 and all(0.0 in floats(trace.x) for trace in lines)
    with pytest.raises(ValueError, match="a row of multiplier 0"):
        plots.dose_response(rows)


def test_dose_response_turns_logarithmic_only_for_a_wide_range():
    assert plots.dose_response(dose_rows()).layout.yaxis2.type != "log"
    wide = [{**row, "perplexity": 21.4 * 2 ** abs(row["multiplier"])} for row in dose_rows()]
    assert plots.dose_response(wide).layout.yaxis2.type == "log"


def test_dose_response_refuses_a_choice_that_is_not_there():
    with pytest.raises(ValueError, match=r"chosen must hold points of the table .*, got layer 18, multiplier 3"):
        plots.dose_response(dose_rows(), chosen=[(18, 3)])


def test_separability_draws_the_table():
    figure = plots.separability(separability_rows())
    low, high, line = figure.data
    for trace, column in ((low, "low"), (high, "high"), (line, "accuracy")):
        assert floats(trace.y) == [row[column] for row in separability_rows()]
    assert figure.layout.shapes[0].y0 == 0.5


@pytest.mark.parametrize("make", [np.asarray, lambda values: torch.tensor(values, requires_grad=True)])
def test_projection_by_layer_averages_positions(make):
    arrays = projection_arrays()
    figure = plots.projection_by_layer({name: make(values) for name, values in arrays.items()}, layers=range(1, 31))
    for trace, (name, values) in zip(figure.data, arrays.items(), strict=True):
        assert trace.name == name
        assert list(trace.x) == list(range(1, 31))
        assert floats(trace.y) == pytest.approx(floats(values.mean(axis=1)), rel=1e-5)
    one_dimensional = plots.projection_by_layer({name: values[:, 1] for name, values in arrays.items()})
    assert floats(one_dimensional.data[0].y) == floats(arrays["untuned"][:, 1])
    assert figure.data[0].hovertext[0].startswith("untuned<br>layer 1<br>projection ")
    assert figure.data[0].hovertext[0].endswith(" activation units")
    assert "Mean over n = 11 tokens; one text, so no interval." in reading(figure)
    assert "Mean" not in reading(one_dimensional)


def test_projection_heatmap_draws_each_and_the_differences():
    arrays = projection_arrays()
    figure = plots.projection_heatmap(arrays, TOKENS, list(range(30)))
    untuned, away, toward, away_less, toward_less = (np.asarray(trace.z) for trace in figure.data)
    for drawn, name in ((untuned, "untuned"), (away, "rep_tuned away"), (toward, "rep_tuned toward")):
        np.testing.assert_array_equal(drawn, arrays[name])
    np.testing.assert_allclose(away_less, arrays["rep_tuned away"] - arrays["untuned"])
    np.testing.assert_allclose(toward_less, arrays["rep_tuned toward"] - arrays["untuned"])
    assert [trace.coloraxis for trace in figure.data] == ["coloraxis"] * 3 + ["coloraxis2"] * 2
    assert figure.layout.coloraxis.cmax < 90, "the first token's huge activations would hide the rest"
    assert "exceeds the colour scale" in reading(figure)
    untuned_cells, less = figure.data[0], figure.data[3]
    assert untuned_cells.hovertemplate.startswith("untuned<br>layer %{y}<br>%{text}<br>projection %{z:.3f} activation")
    assert "difference %{z:.3f} activation units" in less.hovertemplate
    assert (untuned_cells.y[7], untuned_cells.text[7][4], less.text[7][4]) == ("7", *["·me, position 4"] * 2)


@pytest.mark.parametrize("tokens", [1, 11, 40, 200])
def test_projection_heatmap_keeps_repeated_tokens_apart(tokens):
    words = (TOKENS * 20)[:tokens]
    figure = plots.projection_heatmap(projection_arrays(tokens), words, list(range(30)))
    axis = figure.layout.xaxis
    assert all(np.asarray(trace.z).shape == (30, tokens) and trace.x is None for trace in figure.data)
    assert len(axis.ticktext) <= 80
    wanted = [words[pos].replace("\n", "⏎").replace(" ", "·") for pos in axis.tickvals]
    assert [as_drawn(label) for label in axis.ticktext] == wanted


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4), min_size=12, max_size=12),
    st.lists(st.floats(-1e4, 1e4), min_size=12, max_size=12),
)
def test_heatmap_colours_are_symmetric_about_zero(before, after):
    arrays = {"untuned": np.reshape(before, (3, 4)), "steered away": np.reshape(after, (3, 4))}
    layout = plots.projection_heatmap(arrays, ["a", "b", "a", "b"], [0, 1, 2]).layout
    for axis in (layout.coloraxis, layout.coloraxis2):
        assert axis.cmin == -axis.cmax < 0


def test_projections_of_the_wrong_shape_are_named():
    with pytest.raises(ValueError, match=r"projections\['untuned'\] must have shape \(29, 11\) .*, got \(30, 11\)"):
        plots.projection_heatmap(projection_arrays(), TOKENS, list(range(29)))
    with pytest.raises(ValueError, match=r"must have shape \(layer, 10\)"):
        plots.projection_by_layer(projection_arrays(), tokens=TOKENS[1:])
    with pytest.raises(ValueError, match="projections must map at least one name"):
        plots.projection_by_layer({})


def test_losses_draws_every_used_part_once_for_each_run():
    figure = plots.losses(history_rows())
    frame = pd.DataFrame(history_rows())
    runs = frame.groupby(["arm", "direction", "seed", "split"]).ngroups
    assert len(figure.data) == 3 * runs + runs // 2, "cosine belongs to half of the runs"
    curve = frame.query("arm == 'rep_tuned' and direction == 'toward' and seed == 1 and split == 'validation'")[
        "cosine"
    ]
    drawn = [trace for trace in figure.data if trace.name == "rep_tuned, validation"]
    assert len(drawn) == 4 * 2 * 3
    toward = next(trace for trace in drawn if "cosine" in trace.hovertemplate and "seed 1" in trace.hovertemplate)
    assert toward.hovertemplate.startswith(f"{toward.name}<br>step")
    assert floats(toward.y) == pytest.approx(floats(curve))
    assert toward.line.dash == "dash" and toward.line.color == plots.ARM_COLOURS["rep_tuned"]
    assert sum(bool(trace.showlegend) for trace in figure.data) == 4


def test_losses_refuses_history_without_a_number():
    with pytest.raises(ValueError, match="history must hold a number .*, got only empty values"):
        plots.losses([{**row, "total": None, "token": None, "cosine": None, "kl": None} for row in history_rows()])


def test_logit_lens_keeps_layers_signs_and_tokens():
    layers, positive, negative = plots.logit_lens(lens_rows()).data[0].cells["values"]
    assert list(layers) == [12, 18, 24]
    assert positive[0].split("\u2003") == ["·wonderful", "·joy", "⏎", "·bright", "·delight", "·smile"]
    assert negative[2].split("\u2003") == ["·awful", "·grim", "dead", "·sad"]


@pytest.mark.parametrize("against", ["perplexity", "kl"])
def test_side_effects_draws_damage_and_shift(against):
    figure = plots.side_effects(arm_rows(), against=against)
    for trace, row in zip(figure.data, arm_rows(), strict=True):
        damage = row["perplexity"] / 21.4 if against == "perplexity" else row["kl"]
        assert floats([*trace.x, *trace.y]) == pytest.approx([damage, abs(row["mean"] - 0.31)])
        ends = trace.y[0] + trace.error_y.array[0], trace.y[0] - trace.error_y.arrayminus[0]
        signed = 1 if row["mean"] >= 0.31 else -1
        assert sorted(ends) == pytest.approx(sorted(signed * (row[side] - 0.31) for side in ("low", "high")))
    assert {trace.text[0] for trace in figure.data} >= {"untuned", "rep_tuned, away"}


def test_side_effects_refuses_another_measure():
    # A runtime type checker, when it is on, refuses first.
    with pytest.raises((ValueError, TypeError), match="speed"):
        plots.side_effects(arm_rows(), against="speed")


# What Plotly would take for markup


def hostile(rows: list[dict], **named: str) -> list[dict]:
    """The rows with one name of each of these columns made hostile."""
    return [{**row, **{key: HOSTILE for key, old in named.items() if row.get(key) == old}} for row in rows]


@pytest.mark.parametrize(
    "draw",
    {
        "arms": lambda: plots.arms(
            [{**row, "scorer": HOSTILE} for row in hostile(arm_rows(), arm="rep_tuned")],
            comparisons=[{**row, "scorer": HOSTILE} for row in hostile(compared_rows(), a="rep_tuned", b="rep_tuned")],
            title=HOSTILE,
        ),
        "side_effects": lambda: plots.side_effects(hostile(arm_rows(), arm="steered"), title=HOSTILE),
        "losses": lambda: plots.losses(hostile(history_rows(), arm="rep_tuned", direction="away")),
        "logit_lens": lambda: plots.logit_lens([{"layer": 3, "sign": "+v", "tokens": [" x", HOSTILE]}], title=HOSTILE),
        "projection_by_layer": lambda: plots.projection_by_layer(
            {HOSTILE: np.ones((30, 2))}, tokens=[HOSTILE, HOSTILE], title=HOSTILE
        ),
        "projection_heatmap": lambda: plots.projection_heatmap(
            {HOSTILE: np.ones((2, 2)), "b": np.zeros((2, 2))}, [HOSTILE, "</b>"], [0, 1], title=HOSTILE
        ),
        "dose_response": lambda: plots.dose_response(dose_rows(), title=f"{HOSTILE} {HOSTILE}"),
        "separability": lambda: plots.separability(separability_rows(), title=HOSTILE),
    }.items(),
    ids=lambda case: case[0],
)
def test_what_a_caller_gives_is_drawn_as_it_is_and_is_no_markup(draw):
    name, figure = draw[0], draw[1]()
    check_drawn_as_it_is(figure, least=1 if name in ("dose_response", "separability") else 2)


def test_tokens_of_markup_tex_and_entities_are_drawn_letter_by_letter_and_blank_ones_are_seen():
    tokens = [
        "<s>",
        "</s>",
        "<br>",
        "$a$",
        "$$",
        "&lt;",
        "&#36;",
        "%{z}",
        " <b>",
        "",
        " ",
        "\n",
        "\r",
        "\u200b",
        "\u3000",
    ]
    figure = plots.projection_heatmap({"untuned": np.ones((2, 15))}, tokens, [0, 1])
    seen = [as_drawn(label) for label in figure.layout.xaxis.ticktext]
    assert seen[:8] == tokens[:8]
    assert seen[8:] == ["·<b>", "∅", "·", "⏎", "␍", "U+200B", "U+3000"]
    assert [as_drawn(label) for label in figure.data[0].text[0]] == [f"{s}, position {n}" for n, s in enumerate(seen)]
    cells = plots.coloured_tokens(tokens, {"untuned": np.ones(15)}).data[0]
    assert [as_drawn(label) for label in cells.text] == [*seen[:8], "\u00a0<b>", *seen[9:]]
    table = plots.logit_lens([{"layer": 0, "sign": "+v", "tokens": tokens}]).data[0]
    assert as_drawn(table.cells.values[1][0]).split("\u2003") == seen


def test_a_message_names_an_arm_as_the_caller_wrote_it():
    with pytest.raises(ValueError, match=r"got <s>, toward more than once"):
        plots.arms([row | {"arm": "<s>"} for row in arm_rows() if row["direction"] == "toward"] + arm_rows())
