"""Whether to believe the vectors of an extraction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rt_lens.common.formatting import number
from rt_lens.plots.directions import COSINES, cosine_cells, square
from rt_lens.plots.style import (
    FAINT,
    INK,
    Table,
    apply_style,
    band,
    check_table,
    key,
    ordered,
    row_estimate,
    sample,
)

# A quantity keeps its colour and dash in every panel.
LOOKS = {
    "accuracy": {"color": "#0072B2", "dash": "solid"},
    "auc": {"color": "#D55E00", "dash": "dash"},
    "cosine": {"color": "#009E73", "dash": "solid"},
    "signal": {"color": "#CC79A7", "dash": "solid"},
}
SHADE = "rgba(240,228,66,0.3)"


def validation(
    layers: Table,
    learning: Table,
    cosines: Table,
    *,
    recommended: Sequence[int],
    title: str = "Are the vectors to be trusted?",
) -> go.Figure:
    """Five panels on one extraction: separation, stability and signal by layer, learning curve, cosines of layers.

    Args:
        layers: one row per layer. Columns: layer (block index), n (held-out pairs), accuracy, accuracy_low,
            accuracy_high and auc, auc_low, auc_high (0 to 1, on held-out pairs), stability, stability_low,
            stability_high (cosine between the vectors of two random halves of the pairs; 95 % range over splits),
            control_low, control_high (95 % range of random directions' accuracy), signal (mean held-out margin over
            its standard deviation, d').
        learning: one row per number of pairs, of one layer. Columns: layer, n_pairs, accuracy, accuracy_low,
            accuracy_high (on held-out pairs), cosine, cosine_low, cosine_high (to the vector of all pairs), n
            (held-out pairs).
        cosines: one row per two layers, in either order or both. Columns: layer, other, cosine (of their vectors).
        recommended: block indices to shade; none, if no layer is to be trusted.
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing, a layer comes twice, the learning curve is of several layers,
            or a recommended layer is not in the table.
    """
    by_layer, by_pairs, matrix = _layer_rows(layers, recommended), _learning_rows(learning), _square(cosines)
    layer = int(by_pairs["layer"].iloc[0])
    figure = make_subplots(
        rows=3,
        cols=2,
        specs=[[{"rowspan": 2}, {}], [None, {}], [{}, {}]],
        row_heights=[0.26, 0.26, 0.48],
        vertical_spacing=0.115,
        horizontal_spacing=0.12,
        subplot_titles=[
            "Do they tell held-out pairs apart?",
            "Do other pairs give the same vector?",
            "How far apart are the two sides?",
            f"Are there enough pairs? (layer {layer})",
            "Do the layers agree?",
        ],
    )
    chance = {"dash": "dot", "color": INK, "width": 1.5}

    control = [
        f"layer {row['layer']:g}<br>random directions {number(row['control_low'])} to {number(row['control_high'])}"
        for _, row in by_layer.iterrows()
    ]
    ends = {"low": "control_low", "high": "control_high"}
    grey_band = band(by_layer, "layer", FAINT, **ends, hovertext=control, hoverinfo="text")
    figure.add_traces(grey_band, rows=1, cols=1)
    for name, words in (("accuracy", "pair accuracy"), ("auc", "AUC")):
        figure.add_traces(_curve(by_layer, "layer", name, name, words, showlegend=True), rows=1, cols=1)
    figure.add_traces(_curve(by_layer, "layer", "stability", "cosine", "stability"), rows=1, cols=2)
    signal = go.Scatter(
        x=by_layer["layer"],
        y=by_layer["signal"],
        mode="lines+markers",
        line={"width": 2.5} | LOOKS["signal"],
        marker_size=5,
        showlegend=False,
        hovertext=[
            f"layer {row['layer']:g}<br>d′ {number(row['signal'])}<br>n = {row['n']:g}"
            for _, row in by_layer.iterrows()
        ],
        hoverinfo="text",
    )
    figure.add_trace(signal, row=2, col=2)
    figure.add_traces(_curve(by_pairs, "n_pairs", "accuracy", "accuracy", "pair accuracy"), rows=3, cols=1)
    figure.add_traces(
        _curve(by_pairs, "n_pairs", "cosine", "cosine", "cosine of vectors", showlegend=True), rows=3, cols=1
    )
    heat = cosine_cells(matrix, "layers").update(x=matrix.columns, y=matrix.index)
    figure.add_trace(heat, row=3, col=2)
    square = {"color": SHADE, "symbol": "square", "size": 14}
    grey = {"color": "rgba(138,138,138,0.3)", "symbol": "square", "size": 14}
    figure.add_trace(key("random directions", mode="markers", marker=grey), row=1, col=1)
    figure.add_trace(key("chance (accuracy)", mode="lines", line=chance), row=1, col=1)
    if recommended:
        figure.add_trace(key("recommended layers", mode="markers", marker=square), row=1, col=1)

    for row in (1, 3):
        figure.add_hline(y=0.5, line=chance, row=row, col=1)
    for first, last in _runs(recommended):
        sides = {"x0": first - 0.5, "x1": last + 0.5}
        for place in ((1, 1), (1, 2), (2, 2)):
            figure.add_vrect(**sides, fillcolor=SHADE, line_width=0, layer="below", row=place[0], col=place[1])
        figure.add_shape(**sides, y0=first - 0.5, y1=last + 0.5, line={"color": INK, "width": 1.5}, row=3, col=2)
    separation = float(np.nanmin(by_layer[["accuracy_low", "auc_low", "control_low"]]))
    figure.update_yaxes(title_text="pair accuracy, AUC", range=[min(0.4, separation - 0.03), 1.03], row=1, col=1)
    figure.update_yaxes(title_text="cosine", range=[min(0, by_layer["stability_low"].min()) - 0.03, 1.06], row=1, col=2)
    figure.update_yaxes(title_text="d′ (margin / sd)", rangemode="tozero", row=2, col=2)
    learned = float(np.nanmin(by_pairs[["accuracy_low", "cosine_low"]]))
    figure.update_yaxes(title_text="pair accuracy, cosine", range=[min(0.4, learned - 0.03), 1.03], row=3, col=1)
    pairs = _apart(by_pairs["n_pairs"])
    figure.update_xaxes(title_text="number of pairs (log scale)", type="log", tickvals=pairs, tickangle=0, row=3, col=1)
    for place in ((1, 1), (2, 2), (3, 2)):
        figure.update_xaxes(title_text="layer (block index)", row=place[0], col=place[1])
    # Plotly counts the axes panel by panel: x2 and x3 are the right column's upper two, x5 is the heat map's.
    figure.update_xaxes(matches="x3", showticklabels=False, row=1, col=2)
    figure.update_xaxes(constrain="domain", showgrid=False, row=3, col=2)
    figure.update_yaxes(
        title_text="layer (block index)", scaleanchor="x5", constrain="domain", showgrid=False, row=3, col=2
    )
    bar = {"len": 0.4, "y": 0, "yanchor": "bottom"}
    figure.update_layout(coloraxis=COSINES, coloraxis_colorbar=bar)
    shaded = ", ".join(f"{first}" if first == last else f"{first}–{last}" for first, last in _runs(recommended))
    reading = (
        "Trust a layer whose accuracy is above the grey band (random directions), with stability near 1 and a learning "
        f"curve that has levelled. {f'Recommended: {shaded}' if shaded else 'No layer is recommended'}. Bands: 95 %."
    )
    apply_style(figure, title, reading, sample(by_layer), height=960)
    figure.update_annotations(yshift=4)
    # Between the sentence and the panels' own titles, with room for a second line on a narrow page.
    top = figure.layout.margin.t + 46
    legend = {
        "orientation": "h",
        "x": 0,
        "xanchor": "left",
        "traceorder": "normal",
        "yref": "container",
        "y": 1 - (top - 32) / figure.layout.height,
        "yanchor": "bottom",
    }
    return figure.update_layout(legend=legend, margin_t=top)


def _layer_rows(layers: Table, recommended: Sequence[int]) -> pd.DataFrame:
    measured = [f"{name}{end}" for name in ("accuracy", "auc", "stability") for end in ("", "_low", "_high")]
    numbers = ("layer", "n", *measured, "control_low", "control_high", "signal")
    frame = check_table(layers, numbers=numbers, argument="layers")
    repeated = frame.loc[frame["layer"].duplicated(), "layer"]
    if not repeated.empty:
        raise ValueError(f"layers must have one row for each layer, got layer {repeated.iloc[0]:g} more than once.")
    strangers = [layer for layer in recommended if layer not in set(frame["layer"])]
    if strangers:
        raise ValueError(
            f"recommended must name layers of the table ({frame['layer'].min():g} to {frame['layer'].max():g}), got "
            f"{', '.join(map(str, strangers))}."
        )
    return frame.sort_values("layer")


def _learning_rows(learning: Table) -> pd.DataFrame:
    measured = [f"{name}{end}" for name in ("accuracy", "cosine") for end in ("", "_low", "_high")]
    frame = check_table(learning, numbers=("layer", "n_pairs", *measured, "n"), argument="learning")
    if frame["layer"].nunique() != 1:
        names = ", ".join(f"{layer:g}" for layer in ordered(frame["layer"]))
        raise ValueError(f"learning must be of one layer, got layers {names}. Keep the rows of one layer.")
    return frame.sort_values("n_pairs")


def _square(cosines: Table) -> pd.DataFrame:
    """The cosines as a square with both orders of every two layers."""
    frame = check_table(cosines, numbers=("layer", "other", "cosine"), argument="cosines")
    frame = frame.astype({"layer": int, "other": int})
    return square(frame, "layer", "other")


def _curve(
    frame: pd.DataFrame, x: str, name: str, look: str, words: str, *, showlegend: bool = False
) -> list[go.Scatter]:
    """The line of a column within the band of its _low and _high."""
    frame = frame.assign(low=frame[f"{name}_low"], high=frame[f"{name}_high"])
    hover = [
        f"{x.replace('n_pairs', 'pairs')} {row[x]:g}<br>{words} {row_estimate(row, name)}<br>n = {row['n']:g}"
        for _, row in frame.iterrows()
    ]
    line = go.Scatter(
        x=frame[x],
        y=frame[name],
        mode="lines+markers",
        line={"width": 2.5} | LOOKS[look],
        marker_size=5,
        name=words,
        showlegend=showlegend,
        hovertext=hover,
        hoverinfo="text",
    )
    return [*band(frame, x, LOOKS[look]["color"]), line]


def _runs(layers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of every unbroken run of block indices."""
    runs: list[tuple[int, int]] = []
    for layer in sorted(set(layers)):
        if runs and runs[-1][1] == layer - 1:
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer, layer))
    return runs


def _apart(values: Iterable[float]) -> list[float]:
    """The values that a log axis has room to label: the largest, and each at most two thirds of the next."""
    kept: list[float] = []
    for value in sorted(values, reverse=True):
        if not kept or 1.5 * value <= kept[-1]:
            kept.append(value)
    return kept[::-1]
