"""The figures on trust in the vectors and on sweeps, against their tables."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from drawn import HOSTILE, as_drawn, check_drawn_as_it_is

from rt_lens import plots


def layer_rows() -> list[dict]:
    generator = np.random.default_rng(0)
    rows = []
    for layer in range(30):
        rise = 1 / (1 + math.exp(-(layer - 8) / 2.5))
        accuracy = 0.52 + 0.46 * rise + 0.01 * generator.standard_normal()
        auc = 0.51 + 0.48 * rise
        stability = 0.45 + 0.5 * rise - 0.01 * max(0, layer - 20)
        spread = 0.13 + 0.02 * generator.standard_normal()
        rows.append(
            {
                "layer": layer,
                "n": 144,
                "accuracy": min(1.0, accuracy),
                "accuracy_low": accuracy - 0.06,
                "accuracy_high": min(1.0, accuracy + 0.04),
                "auc": auc,
                "auc_low": auc - 0.04,
                "auc_high": min(1.0, auc + 0.03),
                "stability": stability,
                "stability_low": stability - 0.08,
                "stability_high": min(1.0, stability + 0.04),
                "control_low": 0.5 - spread,
                "control_high": 0.5 + spread,
                "d_prime": 2.8 * rise - 0.06 * max(0, layer - 20) + 0.08 * generator.standard_normal(),
                "seed": 0,
            }
        )
    return rows


def learning_rows() -> list[dict]:
    rows = []
    for n_pairs in (4, 8, 16, 32, 64, 128, 256, 336):
        accuracy, cosine = 0.97 - 0.5 / n_pairs**0.6, 1 / math.sqrt(1 + 12 / n_pairs)
        rows.append(
            {
                "layer": 17,
                "n_pairs": n_pairs,
                "accuracy": accuracy,
                "accuracy_low": accuracy - 0.4 / n_pairs**0.5,
                "accuracy_high": min(1.0, accuracy + 0.15 / n_pairs**0.5),
                "cosine": cosine,
                "cosine_low": cosine - 0.3 / n_pairs**0.5,
                "cosine_high": min(1.0, cosine + 0.2 / n_pairs**0.5),
                "n": 144,
            }
        )
    return rows


def cosine_rows() -> list[dict]:
    return [
        {"layer": a, "other": b, "cosine": math.exp(-abs(a - b) / 7) * (-1 if min(a, b) < 2 < max(a, b) else 1)}
        for a in range(30)
        for b in range(30)
    ]


def sweep_rows(layers=range(30), multipliers=(-8, -4, -2, 0, 2, 4, 8)) -> list[dict]:
    rows = []
    for layer in layers:
        for multiplier in multipliers:
            mean = 0.31 + 0.6 * math.tanh(multiplier / 5) * math.exp(-(((layer - 16) / 6) ** 2))
            rows.append(
                {
                    "layer": layer,
                    "multiplier": multiplier,
                    "n": 72,
                    "mean": mean,
                    "low": mean - 0.09,
                    "high": mean + 0.08,
                    "seed": 0,
                }
            )
    return rows


def prompt_rows() -> list[dict]:
    generator = np.random.default_rng(0)
    rows = []
    for prompt in range(60):
        start, slope = generator.normal(0.2, 0.3), generator.normal(0.07, 0.05)
        for multiplier in (-6, -4, -2, 0, 2, 4, 6):
            score = float(np.clip(start + slope * multiplier + 0.05 * generator.standard_normal(), -1, 1))
            rows.append({"prompt": prompt, "multiplier": multiplier, "score": score, "wrong_way": slope < 0})
    return rows


def summary_rows() -> list[dict]:
    means = pd.DataFrame(prompt_rows()).groupby("multiplier")["score"].mean()
    return [
        {"multiplier": multiplier, "n": 60, "mean": mean, "low": mean - 0.08, "high": mean + 0.09, "seed": 0}
        for multiplier, mean in means.items()
    ]


FIGURES = {
    "trust": lambda: plots.validation(
        layer_rows(), learning_rows(), cosine_rows(), recommended=[14, 15, 16, 17, 18, 22]
    ),
    "sweep": lambda: plots.sweep(sweep_rows()),
    "sweep of few cells": lambda: plots.sweep(sweep_rows(layers=range(12, 24, 2))),
    "steerability": lambda: plots.steerability(prompt_rows(), summary_rows(), note="Spearman of the mean: 1.00."),
}
TABLES = {
    "layers": (layer_rows, lambda rows: plots.validation(rows, learning_rows(), cosine_rows(), recommended=[17])),
    "learning": (learning_rows, lambda rows: plots.validation(layer_rows(), rows, cosine_rows(), recommended=[17])),
    "cosines": (cosine_rows, lambda rows: plots.validation(layer_rows(), learning_rows(), rows, recommended=[17])),
    "table": (sweep_rows, plots.sweep),
    "table of prompts": (prompt_rows, lambda rows: plots.steerability(rows, summary_rows())),
    "summary": (summary_rows, lambda rows: plots.steerability(prompt_rows(), rows)),
}


def reading(figure: go.Figure) -> str:
    return figure.layout.title.subtitle.text.replace("<br>", " ")


def floats(values) -> list[float]:
    return [float(value) for value in values]


def panel(figure: go.Figure, axis: str) -> list[go.Scatter]:
    """The traces that hold numbers, of the panel with this x axis."""
    return [trace for trace in figure.data if trace.xaxis == axis and len(trace.x) > 1]


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_only_returned(name, only_returned):
    figure = FIGURES[name]()
    assert figure.layout.title.text and figure.layout.title.subtitle.text


@pytest.mark.parametrize("argument", TABLES)
def test_a_table_is_not_changed_and_a_shuffled_list_draws_the_same(argument):
    rows, draw = TABLES[argument]
    frame = pd.DataFrame(rows())
    before = frame.copy(deep=True)
    drawn = draw(frame).to_json()
    pd.testing.assert_frame_equal(frame, before)
    # Prompts keep the order of the table.
    assert draw(rows() if argument == "table of prompts" else rows()[::-1]).to_json() == drawn


@pytest.mark.parametrize("argument", TABLES)
def test_a_missing_column_and_an_empty_table_are_named(argument):
    rows, draw = TABLES[argument]
    word = argument.split()[0]
    for column in rows()[0]:
        if column == "seed":
            continue
        with pytest.raises(ValueError, match=rf"{word} must have the columns .* Add {column}\."):
            draw([{key: value for key, value in row.items() if key != column} for row in rows()])
    with pytest.raises(ValueError, match=f"{word} must have at least one row, got none"):
        draw([])


def test_trust_draws_the_layers_with_their_bands():
    figure, frame = FIGURES["trust"](), pd.DataFrame(layer_rows())
    control_low, control_high, *rest = panel(figure, "x")
    assert floats(control_low.y) == floats(frame["control_low"])
    assert floats(control_high.y) == floats(frame["control_high"]) and control_high.fill == "tonexty"
    assert "random directions 0.3" in control_high.hovertext[17]
    for name, traces in {"accuracy": rest[:3], "auc": rest[3:], "stability": panel(figure, "x2")}.items():
        for trace, end in zip(traces, ("_low", "_high", ""), strict=True):
            assert floats(trace.x) == floats(frame["layer"])
            assert floats(trace.y) == floats(frame[f"{name}{end}"])
    (d_prime,) = panel(figure, "x3")
    assert floats(d_prime.y) == floats(frame["d_prime"])
    row = layer_rows()[17]
    wanted = f"accuracy {row['accuracy']:.3f} [{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}]<br>n = 144"
    assert wanted in rest[2].hovertext[17]
    assert "n = 144; seed 0." in reading(figure)


def test_trust_draws_the_learning_curve_of_the_layer_it_names():
    figure, frame = FIGURES["trust"](), pd.DataFrame(learning_rows())
    traces = panel(figure, "x4")
    for name, own in (("accuracy", traces[:3]), ("cosine", traces[3:])):
        for trace, end in zip(own, ("_low", "_high", ""), strict=True):
            assert floats(trace.x) == floats(frame["n_pairs"])
            assert floats(trace.y) == floats(frame[f"{name}{end}"])
    assert any("layer 17" in note.text for note in figure.layout.annotations)
    axis = figure.layout.xaxis4
    assert axis.type == "log" and list(axis.tickvals) == [4, 8, 16, 32, 64, 128, 336], "256 would run into 336"


@pytest.mark.parametrize("keep", [lambda a, b: True, lambda a, b: a <= b], ids=["both orders", "one order"])
def test_trust_draws_the_cosines_square_and_centred_on_zero(keep):
    rows = [row for row in cosine_rows() if keep(row["layer"], row["other"])]
    figure = plots.validation(layer_rows(), learning_rows(), rows, recommended=[])
    (heat,) = (trace for trace in figure.data if isinstance(trace, go.Heatmap))
    assert np.asarray(heat.z).shape == (30, 30)
    for row in cosine_rows():
        assert heat.z[row["layer"]][row["other"]] == row["cosine"]
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax == -1
    assert figure.layout.yaxis5.scaleanchor == "x5"


def test_trust_shades_unbroken_runs_of_recommended_layers():
    figure = FIGURES["trust"]()
    shaded = [(shape.xref, shape.x0, shape.x1) for shape in figure.layout.shapes if shape.fillcolor]
    assert shaded == [(axis, *ends) for ends in ((13.5, 18.5), (21.5, 22.5)) for axis in ("x", "x2", "x3")]
    assert "Recommended: 14–18, 22." in reading(figure)
    assert {shape.y0 for shape in figure.layout.shapes if shape.type == "line"} == {0.5}
    none = plots.validation(layer_rows(), learning_rows(), cosine_rows(), recommended=[])
    assert "No layer is recommended." in reading(none)
    assert not any(trace.name == "recommended layers" for trace in none.data)


def test_trust_keeps_what_is_below_chance_in_view():
    rows = [{**row, "auc_low": 0.1, "stability_low": -0.4} for row in layer_rows()]
    layout = plots.validation(rows, learning_rows(), cosine_rows(), recommended=[]).layout
    assert layout.yaxis.range[0] < 0.1 and layout.yaxis2.range[0] < -0.4


def test_trust_refuses_strange_layers():
    with pytest.raises(ValueError, match=r"recommended must name layers of the table \(0 to 29\), got 30"):
        plots.validation(layer_rows(), learning_rows(), cosine_rows(), recommended=[17, 30])
    with pytest.raises(ValueError, match="got 3 more than once"):
        plots.validation([*layer_rows(), layer_rows()[3]], learning_rows(), cosine_rows(), recommended=[17])
    two = [*learning_rows(), {**learning_rows()[0], "layer": 18}]
    with pytest.raises(ValueError, match="learning must be of one layer, got layers 17, 18"):
        plots.validation(layer_rows(), two, cosine_rows(), recommended=[17])


def test_sweep_draws_shifts_and_writes_scores():
    figure = plots.sweep(sweep_rows())
    (heat,) = figure.data
    z, frame = np.asarray(heat.z), pd.DataFrame(sweep_rows())
    np.testing.assert_allclose(z, frame.pivot(index="layer", columns="multiplier", values="mean") - 0.31, atol=1e-12)
    assert figure.layout.coloraxis.cmax == -figure.layout.coloraxis.cmin == np.abs(z).max()
    assert list(figure.layout.xaxis.ticktext) == ["−8", "−4", "−2", "0", "2", "4", "8"]
    assert list(figure.layout.yaxis.ticktext) == [str(layer) for layer in range(30)]
    assert heat.text[16][0] == "−0.24" and heat.text[0][3] == "0.31"
    assert "layer 16, multiplier -8<br>score -0.243 [-0.333, -0.163]" in heat.hovertext[16][0]
    assert "n = 72" in heat.hovertext[16][0] and "n = 72; seed 0." in reading(figure)


@pytest.mark.parametrize("layers", [31, 90])
def test_sweep_leaves_out_numbers_without_room(layers):
    figure = plots.sweep(sweep_rows(layers=range(layers)))
    assert figure.data[0].text is None and "Hover" in reading(figure)
    assert len(figure.layout.yaxis.ticktext) <= 40
    assert list(figure.layout.yaxis.ticktext) == [str(place) for place in figure.layout.yaxis.tickvals]


def test_sweep_lets_one_unsteered_row_serve_all_layers():
    rows = [row for row in sweep_rows() if row["multiplier"] != 0]
    zero = next(row for row in sweep_rows() if row["multiplier"] == 0)
    figure = plots.sweep([*rows, {**zero, "layer": None}])
    np.testing.assert_array_equal(figure.data[0].z, plots.sweep(sweep_rows()).data[0].z)
    with pytest.raises(ValueError, match="a row of multiplier 0"):
        plots.sweep(rows)


def test_sweep_takes_each_layer_from_its_own_unsteered_score():
    rows = [{**row, "mean": row["layer"] + 0.01 * row["multiplier"]} for row in sweep_rows()]
    np.testing.assert_allclose(plots.sweep(rows).data[0].z[20], [-0.08, -0.04, -0.02, 0, 0.02, 0.04, 0.08], atol=1e-9)


def test_sweep_leaves_a_hole_where_nothing_was_measured():
    rows = sweep_rows()
    figure = plots.sweep([row for row in rows if (row["layer"], row["multiplier"]) != (5, 4)])
    assert np.isnan(np.asarray(figure.data[0].z)[5, 5]) and np.isnan(figure.data[0].z).sum() == 1
    assert figure.data[0].text[5][5] == "" and "not measured" in reading(figure)
    assert "not measured" not in reading(plots.sweep(rows))
    with pytest.raises(ValueError, match="got 0, -8 more than once"):
        plots.sweep([*rows, rows[0]])


def test_steerability_draws_prompts_and_mean():
    figure, frame = FIGURES["steerability"](), pd.DataFrame(prompt_rows())
    lines = {int(trace.name): trace for trace in figure.data if trace.name and trace.name.isdigit()}
    assert len(lines) == frame["prompt"].nunique()
    for prompt, own in frame.groupby("prompt"):
        assert floats(lines[prompt].x) == floats(own["multiplier"])
        assert floats(lines[prompt].y) == floats(own["score"])
        assert (lines[prompt].line.color == "#D55E00") == own["wrong_way"].any()
    mean = next(trace for trace in figure.data if trace.name == "mean")
    low, high = (trace for trace in figure.data if trace.line.width == 0)
    summary = pd.DataFrame(summary_rows())
    for trace, column in ((low, "low"), (high, "high"), (mean, "mean")):
        assert floats(trace.x) == floats(summary["multiplier"])
        assert floats(trace.y) == floats(summary[column])
    assert "n = 60" in mean.hovertext[0]


def test_steerability_counts_the_wrong_way_and_adds_the_note():
    figure = FIGURES["steerability"]()
    assert "2 of 60 move against the multiplier" in reading(figure)
    assert "Spearman of the mean: 1.00. n = 60; seed 0." in reading(figure)
    assert {"right way (58)", "wrong way (2)"} <= {trace.name for trace in figure.data}
    right = plots.steerability([{**row, "wrong_way": False} for row in prompt_rows()], summary_rows())
    assert not any("wrong" in (trace.name or "") for trace in right.data)


def test_steerability_shortens_long_prompts_in_the_hover():
    rows = [{**row, "prompt": "Tell me about your weekend. " * 40} for row in prompt_rows()[:7]]
    hover = plots.steerability(rows, summary_rows()).data[0].hovertext[0]
    assert hover.startswith("Tell me about your weekend.") and len(hover) < 220


def test_a_prompt_that_looks_like_markup_is_drawn_as_it_is():
    rows = [{**row, "prompt": HOSTILE} for row in prompt_rows()]
    check_drawn_as_it_is(plots.steerability(rows, summary_rows(), note=HOSTILE, title=HOSTILE), least=4)
    long = [{**row, "prompt": "<" * 150} for row in prompt_rows()]
    figure = plots.steerability(long, summary_rows())
    assert as_drawn(figure.data[0].hovertext[0]).startswith(" ".join(["<" * 60, "<" * 60, "<" * 30]))
