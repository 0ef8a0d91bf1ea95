"""Evidence for and against the vectors of an extraction."""

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
    check_unique,
    legend_entry,
    ordered,
    row_estimate,
    sample,
)

# A quantity keeps its colour and dash in every panel.
STYLES = {
    "accuracy": {"color": "#0072B2", "dash": "solid"},
    "auc": {"color": "#D55E00", "dash": "dash"},
    "cosine": {"color": "#009E73", "dash": "solid"},
    "d_prime": {"color": "#CC79A7", "dash": "solid"},
}
SHADE = "rgba(240,228,66,0.3)"


def validation(
    layers: Table,
    learning: Table,
    cosines: Table,
    *,
    recommended: Sequence[int],
    title: str = "Can these vectors be trusted?",
) -> go.Figure:
    """Draws five panels on one extraction: separation, stability and d' by layer, learning curve, cosines of layers.

    Args:
        layers: one row per layer. Columns: layer (block index), n (held-out pairs), accuracy, accuracy_low,
            accuracy_high and auc, auc_low, auc_high (0 to 1, on held-out pairs), stability, stability_low,
            stability_high (cosine between the vectors of two random halves of the pairs; 95 % range over splits),
            control_low, control_high (95 % range of random directions' accuracy), d_prime (mean held-out margin
            over its standard deviation).
        learning: one row per number of pairs, of one layer. Columns: layer, n_pairs, accuracy, accuracy_low,
            accuracy_high (on held-out pairs), cosine, cosine_low, cosine_high (to the vector of all pairs), n
            (held-out pairs).
        cosines: one row per two layers, in either order or both. Columns: layer, other, cosine (of their vectors).
        recommended: block indices to shade; empty if no layer can be trusted.
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing, a layer has two rows, the learning curve is of several layers,
            or a recommended layer is not in the table.

    Example:
        >>> row = {"layer": 21, "n": 60, "stability": 0.9, "stability_low": 0.85, "stability_high": 0.95}
        >>> row |= {"auc": 0.97, "auc_low": 0.93, "auc_high": 1.0, "control_low": 0.3, "control_high": 0.7}
        >>> accuracy = {"accuracy": 0.95, "accuracy_low": 0.87, "accuracy_high": 1.0}
        >>> curve = {"layer": 21, "n_pairs": 96, "cosine": 1.0, "cosine_low": 1.0, "cosine_high": 1.0, "n": 60}
        >>> square = [{"layer": 21, "other": 21, "cosine": 1.0}]
        >>> layers, learning = [row | accuracy | {"d_prime": 2.5}], [curve | accuracy]
        >>> figure = validation(layers, learning, square, recommended=[21])
        >>> [panel.text for panel in figure.layout.annotations][:2]
        ['Do they separate held-out pairs?', 'Do other pairs give the same vector?']
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
            "Do they separate held-out pairs?",
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
    for name, label in (("accuracy", "pair accuracy"), ("auc", "AUC")):
        figure.add_traces(_curve(by_layer, "layer", name, name, label, showlegend=True), rows=1, cols=1)
    figure.add_traces(_curve(by_layer, "layer", "stability", "cosine", "stability"), rows=1, cols=2)
    d_prime = go.Scatter(
        x=by_layer["layer"],
        y=by_layer["d_prime"],
        mode="lines+markers",
        line={"width": 2.5} | STYLES["d_prime"],
        marker_size=5,
        showlegend=False,
        hovertext=[
            f"layer {row['layer']:g}<br>d′ {number(row['d_prime'])}<br>n = {row['n']:g}"
            for _, row in by_layer.iterrows()
        ],
        hoverinfo="text",
    )
    figure.add_trace(d_prime, row=2, col=2)
    figure.add_traces(_curve(by_pairs, "n_pairs", "accuracy", "accuracy", "pair accuracy"), rows=3, cols=1)
    figure.add_traces(
        _curve(by_pairs, "n_pairs", "cosine", "cosine", "cosine of vectors", showlegend=True), rows=3, cols=1
    )
    heat = cosine_cells(matrix, "layers").update(x=matrix.columns, y=matrix.index)
    figure.add_trace(heat, row=3, col=2)
    square = {"color": SHADE, "symbol": "square", "size": 14}
    grey = {"color": "rgba(138,138,138,0.3)", "symbol": "square", "size": 14}
    figure.add_trace(legend_entry("random directions", mode="markers", marker=grey), row=1, col=1)
    figure.add_trace(legend_entry("chance (accuracy)", mode="lines", line=chance), row=1, col=1)
    if recommended:
        figure.add_trace(legend_entry("recommended layers", mode="markers", marker=square), row=1, col=1)

    for row in (1, 3):
        figure.add_hline(y=0.5, line=chance, row=row, col=1)
    for first, last in _runs(recommended):
        sides = {"x0": first - 0.5, "x1": last + 0.5}
        for row, column in ((1, 1), (1, 2), (2, 2)):
            figure.add_vrect(**sides, fillcolor=SHADE, line_width=0, layer="below", row=row, col=column)
        figure.add_shape(**sides, y0=first - 0.5, y1=last + 0.5, line={"color": INK, "width": 1.5}, row=3, col=2)
    separation = float(np.nanmin(by_layer[["accuracy_low", "auc_low", "control_low"]]))
    figure.update_yaxes(title_text="pair accuracy, AUC", range=[min(0.4, separation - 0.03), 1.03], row=1, col=1)
    figure.update_yaxes(title_text="cosine", range=[min(0, by_layer["stability_low"].min()) - 0.03, 1.06], row=1, col=2)
    figure.update_yaxes(title_text="d′ (margin / sd)", rangemode="tozero", row=2, col=2)
    learned = float(np.nanmin(by_pairs[["accuracy_low", "cosine_low"]]))
    figure.update_yaxes(title_text="pair accuracy, cosine", range=[min(0.4, learned - 0.03), 1.03], row=3, col=1)
    pairs = _labelled(by_pairs["n_pairs"])
    figure.update_xaxes(title_text="number of pairs (log scale)", type="log", tickvals=pairs, tickangle=0, row=3, col=1)
    for row, column in ((1, 1), (2, 2), (3, 2)):
        figure.update_xaxes(title_text="layer (block index)", row=row, col=column)
    # Plotly numbers the axes panel by panel: x2 and x3 are the upper two of the right column, x5 is the heat map's.
    figure.update_xaxes(matches="x3", showticklabels=False, row=1, col=2)
    figure.update_xaxes(constrain="domain", showgrid=False, row=3, col=2)
    figure.update_yaxes(
        title_text="layer (block index)", scaleanchor="x5", constrain="domain", showgrid=False, row=3, col=2
    )
    bar = {"len": 0.4, "y": 0, "yanchor": "bottom"}
    figure.update_layout(coloraxis=COSINES, coloraxis_colorbar=bar)
    shaded = ", ".join(f"{first}" if first == last else f"{first}–{last}" for first, last in _runs(recommended))
    reading = (
        "Trust a layer with accuracy above the grey band (random directions), stability near 1 and a learning curve "
        f"that has levelled off. {f'Recommended: {shaded}' if shaded else 'No layer is recommended'}. Bands: 95 %."
    )
    apply_style(figure, title, reading, sample(by_layer), height=960)
    figure.update_annotations(yshift=4)
    # The legend lies between the subtitle and the panel titles, with room for a second line on a narrow page.
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
    numbers = ("layer", "n", *measured, "control_low", "control_high", "d_prime")
    frame = check_table(layers, numbers=numbers, argument="layers")
    check_unique(frame, ["layer"], "layers")
    unknown = [layer for layer in recommended if layer not in set(frame["layer"])]
    if unknown:
        raise ValueError(
            f"recommended must name layers of the table ({frame['layer'].min():g} to {frame['layer'].max():g}), got "
            f"{', '.join(map(str, unknown))}."
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
    """The cosines as a square table with both orders of every two layers."""
    frame = check_table(cosines, numbers=("layer", "other", "cosine"), argument="cosines")
    frame = frame.astype({"layer": int, "other": int})
    return square(frame, "layer", "other")


def _curve(
    frame: pd.DataFrame, x: str, name: str, style: str, label: str, *, showlegend: bool = False
) -> list[go.Scatter]:
    """The line of a column, with the band from its _low to its _high."""
    frame = frame.assign(low=frame[f"{name}_low"], high=frame[f"{name}_high"])
    hover = [
        f"{x.replace('n_pairs', 'pairs')} {row[x]:g}<br>{label} {row_estimate(row, name)}<br>n = {row['n']:g}"
        for _, row in frame.iterrows()
    ]
    line = go.Scatter(
        x=frame[x],
        y=frame[name],
        mode="lines+markers",
        line={"width": 2.5} | STYLES[style],
        marker_size=5,
        name=label,
        showlegend=showlegend,
        hovertext=hover,
        hoverinfo="text",
    )
    return [*band(frame, x, STYLES[style]["color"]), line]


def _runs(layers: Sequence[int]) -> list[tuple[int, int]]:
    """The first and last block index of every unbroken run."""
    runs: list[tuple[int, int]] = []
    for layer in sorted(set(layers)):
        if runs and runs[-1][1] == layer - 1:
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer, layer))
    return runs


def _labelled(values: Iterable[float]) -> list[float]:
    """The values that have room for a label on a log axis: the largest, and others at most two thirds of the next."""
    labelled: list[float] = []
    for value in sorted(values, reverse=True):
        if not labelled or 1.5 * value <= labelled[-1]:
            labelled.append(value)
    return labelled[::-1]
