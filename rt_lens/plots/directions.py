"""Vectors compared: their cosines, their norms beside the activations', and maps of both sides of the pairs."""

from __future__ import annotations

import math
from html import unescape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rt_lens.common.formatting import estimate, number
from rt_lens.plots.style import (
    FAINT,
    Table,
    apply_style,
    band,
    check_table,
    check_unique,
    legend_entry,
    ordered,
    row_estimate,
    sample,
    with_minus_sign,
    with_numbers,
)

SIDES = {"positive": ("#D55E00", "circle"), "negative": ("#0072B2", "diamond")}
COSINES: dict[str, Any] = {"colorscale": "RdBu_r", "cmin": -1, "cmax": 1, "colorbar": {"title": "cosine"}}


def cosines(table: Table, *, title: str = "Do the directions agree?") -> go.Figure:
    """Draws the cosines between directions (of layers, behaviours, or both) as a square heat map.

    Args:
        table: one row per two directions, in either order or both. Columns: a, b (block indices or names), cosine (-1
            to 1); and optionally chance (95 % of pairs of random directions lie within it).
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing.

    Example:
        >>> rows = [{"a": "mood", "b": "mood", "cosine": 1.0}, {"a": "mood", "b": "formality", "cosine": 0.3}]
        >>> figure = cosines([*rows, {"a": "formality", "b": "formality", "cosine": 1.0}])
        >>> figure.data[0].z  # both orders of every two
        array([[1. , 0.3],
               [0.3, 1. ]])
    """
    frame = check_table(table, labels=("a", "b"), numbers=("cosine",))
    of_layers = all(isinstance(label, int | np.integer) for column in ("a", "b") for label in frame[column])
    matrix = square(frame, "a", "b")
    names = [str(label) for label in matrix.index]
    figure = go.Figure(cosine_cells(matrix, "layers" if of_layers else "", numbered=len(names) <= 12))
    shown = list(range(0, len(names), -(-len(names) // 24)))
    ticks = {"tickvals": shown, "ticktext": [names[index] for index in shown], "showgrid": False, "zeroline": False}
    axis_title = {"title_text": "layer (block index)"} if of_layers else {}
    tilted = len(names) > 4 and not of_layers
    figure.update_xaxes(**ticks, **axis_title, constrain="domain", tickangle=-45 if tilted else 0)
    figure.update_yaxes(
        **ticks, **axis_title, constrain="domain", scaleanchor="x", autorange=None if of_layers else "reversed"
    )
    figure.update_layout(coloraxis=COSINES)
    reading = "Red: two directions point the same way; blue: opposite ways; white: they are orthogonal."
    facts = ""
    if "chance" in frame:
        chance = with_numbers(frame, ["chance"])["chance"].max()
        facts = f"95 % of pairs of random directions lie within ±{chance:.2f}."
    apply_style(figure, title, reading, facts, height=230 + min(max(26 * len(names), 300), 520))
    return figure.update_layout(margin_l=max(80, 30 + 8 * max(len(unescape(name)) for name in names)))


def square(frame: pd.DataFrame, a: str, b: str) -> pd.DataFrame:
    """The column cosine as a square table with both orders of every two, in the order in which the names appear."""
    half = frame.drop_duplicates([a, b]).pivot(index=a, columns=b, values="cosine")
    names = ordered([*frame[a], *frame[b]])
    if all(isinstance(name, int | np.integer) for name in names):
        names = sorted(names)
    return half.combine_first(half.T).reindex(index=names, columns=names)


def cosine_cells(matrix: pd.DataFrame, noun: str, *, numbered: bool = False) -> go.Heatmap:
    """A heat map of a square table of cosines, on `coloraxis`; `noun` stands before the two names in the hover text."""
    values = matrix.to_numpy(dtype=float)
    return go.Heatmap(
        z=values,
        coloraxis="coloraxis",
        text=[[with_minus_sign(number(value, 2)) for value in row] for row in values] if numbered else None,
        texttemplate="%{text}" if numbered else None,
        hovertext=[
            [f"{noun} {row} and {column}<br>cosine {number(value)}".lstrip() for column, value in cells.items()]
            for row, cells in matrix.iterrows()
        ],
        hoverinfo="text",
    )


def norms(table: Table, *, title: str = "Norm of the vectors and of the activations") -> go.Figure:
    """Draws the norm of each layer's vector beside the norm of the activations to which it is added, and their ratio.

    Args:
        table: one row per layer. Columns: layer (block index), vector (its norm), n (texts), mean, low, high (norm of
            the activations; activation units), ratio, ratio_low, ratio_high (vector / mean), seed.
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing, or a layer has two rows.

    Example:
        >>> row = {"layer": 20, "vector": 8.0, "n": 24, "mean": 80.0, "low": 78.0, "high": 82.0, "seed": 0}
        >>> figure = norms([row | {"ratio": 0.1, "ratio_low": 0.097, "ratio_high": 0.103}])
        >>> figure.data[-1].y  # the vector in % of the activations' norm
        array([10.])
    """
    numbers = ("layer", "vector", "n", "mean", "low", "high", "ratio", "ratio_low", "ratio_high")
    frame = check_table(table, labels=("seed",), numbers=numbers).sort_values("layer")
    check_unique(frame, ["layer"])
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.55, 0.45], vertical_spacing=0.08)
    lines = {"activations": ("#0072B2", "solid"), "vector (multiplier 1)": ("#D55E00", "dash")}
    hover = [
        f"layer {row['layer']:g}<br>activations {row_estimate(row)}, n = {row['n']:g}<br>vector "
        f"{number(row['vector'])} activation units"
        for _, row in frame.iterrows()
    ]
    with_interval = frame.dropna(subset=["low", "high"])
    figure.add_traces(band(with_interval, "layer", lines["activations"][0]), rows=1, cols=1)
    for (name, (colour, dash)), column in zip(lines.items(), ("mean", "vector"), strict=True):
        line = {"color": colour, "dash": dash, "width": 2.5}
        figure.add_trace(_line(frame["layer"], frame[column], hover, line, name=name), row=1, col=1)
    per_cent = frame[["layer"]].assign(**{end: 100 * frame[f"ratio{end}"] for end in ("", "_low", "_high")})
    colour = lines["vector (multiplier 1)"][0]
    figure.add_traces(band(per_cent.dropna(), "layer", colour, low="_low", high="_high"), rows=2, cols=1)
    hover = [
        f"layer {row['layer']:g}<br>{estimate(row[''], row['_low'], row['_high'], 1)} % of "
        f"the activations' norm<br>n = {n:g}"
        for (_, row), n in zip(per_cent.iterrows(), frame["n"], strict=True)
    ]
    line = {"color": colour, "dash": "dash", "width": 2.5}
    figure.add_trace(_line(per_cent["layer"], per_cent[""], hover, line, showlegend=False), row=2, col=1)
    both = frame[["mean", "vector"]].to_numpy()
    if (both > 0).all() and both.max() > 20 * both.min():
        low, high = math.floor(math.log10(both.min())), math.ceil(math.log10(both.max()))
        figure.update_yaxes(type="log", range=[low, high], tickvals=[10.0**k for k in range(low, high + 1)], row=1)
    else:
        figure.update_yaxes(rangemode="tozero", row=1)
    figure.update_yaxes(title_text="norm<br>(activation units)", row=1)
    figure.update_yaxes(title_text="vector / activations<br>(%)", rangemode="tozero", row=2)
    figure.update_xaxes(title_text="layer (block index)", row=2)
    reading = (
        "Bottom: norm of the vector (multiplier 1) in % of the activations' norm, at the last token of each prompt."
    )
    reading += " Bands: 95 % intervals."
    legend = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"}
    legend |= {"traceorder": "normal"}
    return apply_style(figure, title, reading, sample(frame), height=560, legend=legend)


def activation_map(table: Table, *, title: str = "Do the two sides separate?") -> go.Figure:
    """Draws both sides of the pairs on a plane, one panel per layer; the hover shows the text of a point.

    Args:
        table: one row per layer, side and text. Columns: layer (block index), side (positive or negative), x, y
            (activation units for PCA), text, explained_x, explained_y (share of the variance along each axis; NaN for
            t-SNE), method (pca or tsne), paired (bool: each pair's mean is subtracted), n (pairs), seed.
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing, or a side is neither.

    Example:
        >>> row = {"layer": 20, "y": 0.0, "explained_x": 0.6, "explained_y": 0.1, "method": "pca", "paired": False}
        >>> row |= {"n": 1, "seed": 0}
        >>> figure = activation_map([
        ...     row | {"side": "positive", "x": 2.0, "text": "I love it."},
        ...     row | {"side": "negative", "x": -2.0, "text": "I hate it."},
        ... ])
        >>> [(trace.name, trace.x.tolist()) for trace in figure.data[:2]]
        [('positive', [2.0]), ('negative', [-2.0])]
    """
    labels = ("side", "text", "method", "paired", "seed")
    frame = check_table(table, labels=labels, numbers=("layer", "x", "y", "explained_x", "explained_y", "n"))
    if unknown := set(frame["side"]) - set(SIDES):
        raise ValueError(f"side must be 'positive' or 'negative', got {unescape(', '.join(map(str, unknown)))}.")
    layers, tsne = sorted(frame["layer"].unique()), set(frame["method"]) == {"tsne"}
    columns = min(len(layers), 3 if len(layers) <= 9 else 5)
    rows = -(-len(layers) // columns)
    plot = rows * (330 if columns < 3 else 260)  # px
    figure = make_subplots(
        rows=rows,
        cols=columns,
        horizontal_spacing=0.03 + 0.2 / columns,
        vertical_spacing=75 / plot if rows > 1 else 0,
        subplot_titles=[f"layer {layer:g}" for layer in layers],
    )
    for index, layer in enumerate(layers):
        row, column = index // columns + 1, index % columns + 1
        at_layer = frame[frame["layer"] == layer]
        for side in SIDES:
            figure.add_trace(_points(at_layer[at_layer["side"] == side], side, tsne), row=row, col=column)
        first, second = (_axis(k, at_layer[f"explained_{axis}"].iloc[0]) for k, axis in (("1", "x"), ("2", "y")))
        if not tsne:
            figure.update_xaxes(title={"text": first, "font_size": 12, "standoff": 4}, row=row, col=column)
            figure.update_yaxes(title={"text": second, "font_size": 12, "standoff": 4}, row=row, col=column)
    for side, (colour, symbol) in SIDES.items():
        figure.add_trace(
            legend_entry(side, mode="markers", marker={"color": colour, "symbol": symbol, "size": 9}), row=1, col=1
        )
    style = {"zerolinecolor": FAINT, "zerolinewidth": 1, "zeroline": not tsne, "showticklabels": not tsne, "nticks": 5}
    figure.update_xaxes(**style, tickfont_size=11)
    figure.update_yaxes(**style, tickfont_size=11)
    reading = "Where the colours separate, the activations separate the two sides. "
    if frame["paired"].astype(bool).all():
        reading += "Each pair's mean is subtracted, and with it what its sides share (topic, prefill). "
    else:
        reading += "Where they overlap, something else varies more, such as topic or prefill. "
    reading += (
        "t-SNE: axes, gaps and cluster sizes have no meaning."
        if tsne
        else "Axes: principal components with their share of the variance (activation units)."
    )
    facts = sample(frame).replace("n = ", "n (pairs) = ")
    legend = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1 + 26 / plot, "yanchor": "bottom"}
    apply_style(figure, title, reading, facts, legend=legend)
    margins = {"t": figure.layout.margin.t + 34, "b": 60}
    return figure.update_layout(margin=margins, height=plot + margins["t"] + margins["b"])


def _points(rows: pd.DataFrame, side: str, tsne: bool) -> go.Scatter:
    """The activations of one side, with the text of each in the hover."""
    colour, symbol = SIDES[side]
    units = "" if tsne else " activation units"
    return go.Scatter(
        x=rows["x"],
        y=rows["y"],
        mode="markers",
        name=side,
        showlegend=False,
        marker={"color": colour, "symbol": symbol, "size": 7, "opacity": 0.7},
        hovertext=[
            f"{row['text']}<br>{side}, layer {row['layer']:g}<br>at {row['x']:.2f}, {row['y']:.2f}{units}"
            for _, row in rows.iterrows()
        ],
        hoverinfo="text",
    )


def _axis(name: str, share: float) -> str:
    return f"component {name}" + ("" if pd.isna(share) else f" ({100 * share:.0f} %)")


def _line(
    x: pd.Series, y: pd.Series, hover: list[str], line: dict[str, Any], *, name: str = "", showlegend: bool = True
) -> go.Scatter:
    style: dict[str, Any] = {"mode": "lines+markers", "marker_size": 5, "line": line, "hoverinfo": "text"}
    return go.Scatter(x=x, y=y, name=name, hovertext=hover, showlegend=showlegend, **style)
