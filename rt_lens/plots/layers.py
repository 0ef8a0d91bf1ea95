"""The vectors and the activations, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from rt_lens.common.arm_labels import ArmLabel
from rt_lens.common.formatting import estimate, number
from rt_lens.plots.style import (
    FAINT,
    INK,
    PerLayer,
    PerToken,
    Table,
    apply_style,
    arm_colours,
    band,
    check_table,
    escape_html,
    ordered,
    sample,
    shown,
)

# An arm's directions share its colour, and differ in the dash of their line.
DASHES = {"away": "dash", "suppress": "dot"}


def separability(table: Table, *, title: str = "Separability, by layer") -> go.Figure:
    """Draws the accuracy on held-out pairs along the vector at every layer, with its interval and the chance line.

    Args:
        table: one row per layer. Columns: layer (block index), accuracy, low, high (0 to 1), n (held-out pairs).
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing.

    Example:
        >>> rows = [{"layer": 20, "accuracy": 0.8, "low": 0.7, "high": 0.9, "n": 60, "seed": 0}]
        >>> rows += [{"layer": 21, "accuracy": 0.95, "low": 0.87, "high": 1.0, "n": 60, "seed": 0}]
        >>> figure = separability(rows)
        >>> figure.data[-1].x.tolist(), figure.data[-1].y.tolist()
        ([20.0, 21.0], [0.8, 0.95])
    """
    frame = check_table(table, numbers=("layer", "accuracy", "low", "high", "n")).sort_values("layer")
    colour = "#0072B2"
    hover = [
        f"layer {row['layer']:g}<br>accuracy {estimate(row['accuracy'], row['low'], row['high'])}<br>n = {row['n']:g}"
        for _, row in frame.iterrows()
    ]
    line = go.Scatter(
        x=frame["layer"],
        y=frame["accuracy"],
        mode="lines+markers",
        line={"color": colour, "width": 2.5},
        hovertext=hover,
        hoverinfo="text",
    )
    figure = go.Figure([*band(frame, "layer", colour), line])
    figure.add_hline(
        y=0.5, line={"dash": "dot", "color": INK}, annotation_text="chance", annotation_position="bottom right"
    )
    figure.update_xaxes(title_text="layer (block index)")
    figure.update_yaxes(
        title_text="accuracy on held-out pairs (share)", range=[min(0.42, frame["low"].min() - 0.03), 1.03]
    )
    reading = (
        "Higher is better: the share of held-out pairs that this layer's vector orders correctly. Band: 95 % interval."
    )
    return apply_style(figure, title, reading, sample(frame), showlegend=False)


def projection_by_layer(
    projections: Mapping[str, PerLayer | PerToken],
    *,
    tokens: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    title: str = "Projection on the vector, by layer",
) -> go.Figure:
    """Draws the mean projection of one text on the unit vector, layer by layer, a line per arm.

    `projection_curves` draws the mean over texts with its interval.

    Args:
        projections: name of an arm, such as "rep_tuned, away", -> "layer" or "layer pos", in activation units;
            positions are averaged. The first token often has huge activations, which `without_first` leaves out.
        tokens: the tokens at the positions; the subtitle names the first and the last.
        layers: block indices of the rows; by default counted from 0.
        title: heading of the figure.

    Raises:
        ValueError: if there is no projection, or one does not fit the tokens or layers.

    Example:
        >>> figure = projection_by_layer({"untuned": np.array([1.0, 2.0]), "rep_tuned, away": np.array([1.0, -2.0])})
        >>> [(line.name, line.line.dash) for line in figure.data]  # a direction has its dash, an arm its colour
        [('untuned', 'solid'), ('rep_tuned, away', 'dash')]
    """
    arrays = _arrays(projections, layers=layers, tokens=tokens)
    labels = {name: ArmLabel.parse(name) for name in arrays}
    colours = arm_colours(label.arm for label in labels.values())
    figure = go.Figure()
    for name, values in arrays.items():
        mean = values.mean(axis=1) if values.ndim == 2 else values
        blocks = list(layers) if layers is not None else list(range(len(mean)))
        dash = DASHES.get(labels[name].direction, "solid")
        style = {"color": colours[labels[name].arm], "dash": dash, "width": 2.5}
        hover = [
            f"{name}<br>layer {block}<br>projection {number(value)} activation units"
            for block, value in zip(blocks, mean, strict=True)
        ]
        figure.add_trace(go.Scatter(x=blocks, y=mean, name=name, line=style, hovertext=hover, hoverinfo="text"))
    figure.add_hline(y=0, line={"color": FAINT, "width": 1})
    figure.update_xaxes(title_text="layer (block index)")
    figure.update_yaxes(title_text="mean projection on unit vector<br>(activation units)")
    sizes = sorted({values.shape[1] for values in arrays.values() if values.ndim == 2})
    ends = ", “{}” to “{}”".format(*(escape_html(shown(tokens[index])) for index in (0, -1))) if tokens else ""
    facts = f"Mean over n = {' or '.join(map(str, sizes))} tokens{ends}; one text, so no interval." if sizes else ""
    return apply_style(
        figure,
        title,
        "Above zero activations lie on the vector's positive side, below zero on its negative side.",
        facts,
    )


def without_first(
    projections: Mapping[str, np.ndarray], tokens: Sequence[str]
) -> tuple[dict[str, np.ndarray], Sequence[str]]:
    """Projections and tokens for `projection_by_layer` without the first token, unless it is the only one.

    The first token is an attention sink, whose huge activations would dominate the mean.

    Args:
        projections: name -> "layer pos".
        tokens: one per position.

    Example:
        >>> projections, tokens = without_first({"untuned": np.array([[90.0, 1.0, 2.0]])}, ["<s>", "Hello", "!"])
        >>> tokens, projections["untuned"].shape
        (['Hello', '!'], (1, 2))
    """
    rest = slice(1, None) if len(tokens) > 1 else slice(None)
    return {name: values[:, rest] for name, values in projections.items()}, tokens[rest]


def projection_heatmap(
    projections: Mapping[str, PerToken],
    tokens: Sequence[str],
    layers: Sequence[int],
    *,
    title: str = "Projection on the vector, by layer and token",
) -> go.Figure:
    """Draws heat maps of the projection at every layer and token, and of each later arm's difference from the first.

    The panels stand side by side, or one above the other where the tokens would be too narrow to read. The colour scale
    spans the largest magnitude after the first token, whose activations are often so large that they hide the rest.

    Args:
        projections: name -> "layer pos", in activation units.
        tokens: one per position, as they are; the figure escapes what Plotly would read as markup.
        layers: block index of every row.
        title: heading of the figure.

    Raises:
        ValueError: if there is no projection, or one is not of shape (layers, tokens).

    Example:
        >>> arms = {"untuned": np.array([[1.0, 2.0]]), "steered": np.array([[1.0, 5.0]])}
        >>> figure = projection_heatmap(arms, ["<s>", "Hello"], [21])
        >>> [panel.z.tolist() for panel in figure.data]  # both arms, and steered minus untuned
        [[[1.0, 2.0]], [[1.0, 5.0]], [[0.0, 3.0]]]
    """
    arrays = _arrays(projections, layers=layers, tokens=tokens)
    first, *others = arrays
    panels = [(name, values, "coloraxis") for name, values in arrays.items()]
    panels += [(f"{name} minus {first}", arrays[name] - arrays[first], "coloraxis2") for name in others]
    beside = len(panels) * len(tokens) <= 48
    rows, columns = (1, len(panels)) if beside else (len(panels), 1)
    labels = [shown(token) for token in tokens]
    longest = min(max(map(len, labels)), 30)  # upright labels take height from the panels
    labels = escape_html(labels)
    height = (480 if beside else 150 + 230 * rows) + 7 * longest
    gap = 60 / height  # as a share of the height, so that the title of every panel has a line
    figure = make_subplots(
        rows=rows,
        cols=columns,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=gap if rows > 1 else 0,
        subplot_titles=[name for name, _, _ in panels],
    )
    # A template fills the hover texts in the browser; written out for every cell they would be most of a report's size.
    rows_of = [str(layer) for layer in layers]
    positions = [f"{label}, position {pos}" for pos, label in enumerate(labels)]
    for index, (name, values, scale) in enumerate(panels):
        noun = "projection" if scale == "coloraxis" else "difference"
        heat = go.Heatmap(
            z=values,
            y=rows_of,
            text=[positions] * len(layers),
            coloraxis=scale,
            hovertemplate=f"{name}<br>layer %{{y}}<br>%{{text}}<br>{noun} %{{z:.3f}} activation units<extra></extra>",
            xgap=1,
        )
        row, column = (1, index + 1) if beside else (index + 1, 1)
        figure.add_trace(heat, row=row, col=column)
    step = -(-len(tokens) // 80)  # beyond 80 tokens only some have room for a label; the hover names every one
    named = list(range(0, len(tokens), step))
    figure.update_xaxes(
        tickvals=named,
        ticktext=[labels[pos] for pos in named],
        tickangle=-90,
        tickfont_size=14 if beside or len(tokens) <= 55 else 10,
        showgrid=False,
    )
    ticks = list(range(0, len(layers), max(1, len(layers) // 8)))
    figure.update_yaxes(type="category", tickvals=[rows_of[row] for row in ticks], showgrid=False)
    figure.update_yaxes(title_text="layer (block index)", col=1)
    bars = {"coloraxis": ("projection", 1.0 if others else 0.5), "coloraxis2": ("difference", 0.47)}
    for scale, (name, top) in bars.items():
        limit = _colour_limit([values for _, values, used in panels if used == scale])
        bar = {"title": name, "len": 0.47 if others else 1.0, "y": top, "yanchor": "top" if others else "middle"}
        figure.update_layout({scale: {"colorscale": "RdBu_r", "cmin": -limit, "cmax": limit, "colorbar": bar}})
    reading = "Red: positive projection on the vector; blue: negative; white: zero (activation units)."
    clipped = len(tokens) > 1 and any(np.abs(v[:, 0]).max() > np.abs(v[:, 1:]).max() for v in arrays.values())
    note = " The first token exceeds the colour scale; hover for its value." if clipped else ""
    return apply_style(figure, title, reading + note, height=height)


def logit_lens(table: Table, *, title: str = "Logit lens of the vectors") -> go.Figure:
    """Draws a table of the tokens whose logits the vector, and its negative, raise most at each layer.

    Args:
        table: one row per layer and sign. Columns: layer (block index), sign ("+v" or "-v"), tokens (list of str,
            strongest first).
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing.

    Example:
        >>> rows = [{"layer": 21, "sign": "+v", "tokens": [" joy", " happy"]}]
        >>> figure = logit_lens([*rows, {"layer": 21, "sign": "-v", "tokens": [" grim", " sad"]}])
        >>> [column[0] for column in figure.data[0].cells.values]
        [21, '·joy\u2003·happy', '·grim\u2003·sad']
    """
    frame = check_table(table, labels=("sign", "tokens"), numbers=("layer",), unescaped=("tokens",))
    layers = sorted(int(layer) for layer in frame["layer"].unique())
    signs = ordered(frame["sign"], ("+v", "-v"))
    texts = {(int(row["layer"]), row["sign"]): "\u2003".join(map(shown, row["tokens"])) for _, row in frame.iterrows()}
    columns = [[texts.get((layer, sign), "–") for layer in layers] for sign in signs]
    longest = [max(len(column[row]) for column in columns) for row in range(len(layers))]
    lines = sum(1 + length // (120 // len(signs)) for length in longest)
    cells = go.Table(
        columnwidth=[1] + [14 / len(signs)] * len(signs),
        header={"values": ["layer", *signs], "align": "left", "fill_color": "#EEEEEE", "height": 30},
        cells={
            "values": [layers, *escape_html(columns)],
            "align": "left",
            "fill_color": "white",
            "line_color": "#DDDDDD",
            "height": 28,
        },
    )
    reading = (
        "Tokens whose logits the vector (+v) and its negative (-v) raise most, strongest first; · is a leading space."
    )
    figure = apply_style(go.Figure(cells), title, reading, height=150 + 30 * lines)
    return figure.update_layout(margin={"l": 15, "r": 15, "b": 10})


def _arrays(
    projections: Mapping[str, Any], *, layers: Sequence[int] | None, tokens: Sequence[str] | None
) -> dict[str, np.ndarray]:
    """The projections as numpy arrays, checked against the number of layers and tokens."""
    if not projections:
        raise ValueError("projections must map at least one name to its array, got none.")
    arrays = {}
    for name, values in projections.items():
        array = (
            values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=float)
        )
        fits_layers = layers is None or array.shape[:1] == (len(layers),)
        fits_tokens = tokens is None or array.ndim == 1 or array.shape[1:] == (len(tokens),)
        if array.ndim not in (1, 2) or not (fits_layers and fits_tokens):
            expected = f"({'layer' if layers is None else len(layers)}, {'pos' if tokens is None else len(tokens)})"
            raise ValueError(
                f"projections[{name!r}] must have shape {expected} (layers, tokens), got {array.shape}. Give one row "
                "for each layer and one column for each token."
            )
        arrays[escape_html(name)] = array
    return arrays


def _colour_limit(panels: Sequence[np.ndarray]) -> float:
    """The largest magnitude after the first position, or of the only one; 1 where all values are zero."""
    magnitudes = [np.abs(values[:, 1:] if values.shape[1] > 1 else values) for values in panels]
    return max((float(np.nanmax(values)) for values in magnitudes), default=0.0) or 1.0
