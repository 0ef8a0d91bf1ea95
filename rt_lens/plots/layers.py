"""What happens inside the model, layer by layer."""

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


def separability(table: Table, *, title: str = "Separability by layer") -> go.Figure:
    """Held-out pair accuracy along the vector at every layer, with its interval and the chance line.

    Args:
        table: one row per layer. Columns: layer (block index), accuracy, low, high (0 to 1), n (held-out pairs).
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing.
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
    figure.update_yaxes(title_text="held-out pair accuracy (share)", range=[min(0.42, frame["low"].min() - 0.03), 1.03])
    reading = "The higher the line, the better this layer's vector tells a held-out pair apart; band: 95 % interval."
    return apply_style(figure, title, reading, sample(frame), showlegend=False)


def projection_by_layer(
    projections: Mapping[str, PerLayer | PerToken],
    *,
    tokens: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    title: str = "Projection on the vector, by layer",
) -> go.Figure:
    """Mean projection of each arm's residual stream on the unit vector, layer by layer, of one text.

    For the mean over texts with its interval see `projection_curves`.

    Args:
        projections: name ("rep_tuned away") -> "layer" or "layer pos", in activation units; positions are averaged. The
            first token often carries huge activations: leave its column out if it is not meant.
        tokens: the tokens at the positions, to be named in the subtitle.
        layers: block indices of the rows; counted from 0 if not given.
        title: heading of the figure.

    Raises:
        ValueError: if there is no projection, or one does not fit the tokens or layers.
    """
    arrays = _arrays(projections, layers=layers, tokens=tokens)
    labels = {name: ArmLabel.parse(name) for name in arrays}
    colours = arm_colours(label.arm for label in labels.values())
    figure = go.Figure()
    for name, values in arrays.items():
        mean = values.mean(axis=1) if values.ndim == 2 else values
        blocks = list(layers) if layers is not None else list(range(len(mean)))
        look = {"color": colours[labels[name].arm], "dash": DASHES.get(labels[name].direction, "solid"), "width": 2.5}
        hover = [
            f"{name}<br>layer {block}<br>projection {number(value)} activation units"
            for block, value in zip(blocks, mean, strict=True)
        ]
        figure.add_trace(go.Scatter(x=blocks, y=mean, name=name, line=look, hovertext=hover, hoverinfo="text"))
    figure.add_hline(y=0, line={"color": FAINT, "width": 1})
    figure.update_xaxes(title_text="layer (block index)")
    figure.update_yaxes(title_text="mean projection on unit vector<br>(activation units)")
    sizes = sorted({values.shape[1] for values in arrays.values() if values.ndim == 2})
    ends = ", “{}” to “{}”".format(*(escape_html(shown(tokens[place])) for place in (0, -1))) if tokens else ""
    facts = f"Mean over n = {' or '.join(map(str, sizes))} tokens{ends}; one text, so no interval." if sizes else ""
    return apply_style(figure, title, "Above zero the arm lies on the vector's side, below on the other.", facts)


def without_first(
    projections: Mapping[str, np.ndarray], tokens: Sequence[str]
) -> tuple[dict[str, np.ndarray], Sequence[str]]:
    """Projections and tokens for `projection_by_layer`, without the first token, if it is not the only one.

    It is an attention sink: its huge activations would drown the average of the others.

    Args:
        projections: name -> "layer pos".
        tokens: one per position.
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
    """Heat maps of the projection at every layer and token, and of each later one's difference to the first.

    The panels stand side by side, or one above the other when the tokens would be too narrow to read. The colours span
    the largest magnitude after the first token, whose activations are often so large that they would hide the rest.

    Args:
        projections: name -> "layer pos", in activation units.
        tokens: one per position, as they are (what Plotly would take for markup is escaped here); repeats welcome.
        layers: block index of every row.
        title: heading of the figure.

    Raises:
        ValueError: if there is no projection, or one is not of shape (layers, tokens).
    """
    arrays = _arrays(projections, layers=layers, tokens=tokens)
    first, *later = arrays
    panels = [(name, values, "coloraxis") for name, values in arrays.items()]
    panels += [(f"{name} minus {first}", arrays[name] - arrays[first], "coloraxis2") for name in later]
    beside = len(panels) * len(tokens) <= 48
    rows, columns = (1, len(panels)) if beside else (len(panels), 1)
    labels = [shown(token) for token in tokens]
    longest = min(max(map(len, labels)), 30)  # the labels stand upright and would eat into the panels
    labels = escape_html(labels)
    height = (480 if beside else 150 + 230 * rows) + 7 * longest
    gap = 60 / height  # in shares of the height, so that every panel's name keeps its own line
    figure = make_subplots(
        rows=rows,
        cols=columns,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=gap if rows > 1 else 0,
        subplot_titles=[name for name, _, _ in panels],
    )
    # What a hover says of a cell is put together on the page: written out for each it made most of a report.
    rows_of, places = [str(layer) for layer in layers], [f"{label}, position {pos}" for pos, label in enumerate(labels)]
    for index, (name, values, scale) in enumerate(panels):
        words = "projection" if scale == "coloraxis" else "difference"
        heat = go.Heatmap(
            z=values,
            y=rows_of,
            text=[places] * len(layers),
            coloraxis=scale,
            hovertemplate=f"{name}<br>layer %{{y}}<br>%{{text}}<br>{words} %{{z:.3f}} activation units<extra></extra>",
            xgap=1,
        )
        place = (1, index + 1) if beside else (index + 1, 1)
        figure.add_trace(heat, row=place[0], col=place[1])
    step = -(-len(tokens) // 80)  # beyond 80 tokens even the smallest font needs gaps; hover still names each
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
    bars = {"coloraxis": ("projection", 1.0 if later else 0.5), "coloraxis2": ("difference", 0.47)}
    for scale, (name, top) in bars.items():
        limit = _colour_limit([values for _, values, used in panels if used == scale])
        bar = {"title": name, "len": 0.47 if later else 1.0, "y": top, "yanchor": "top" if later else "middle"}
        figure.update_layout({scale: {"colorscale": "RdBu_r", "cmin": -limit, "cmax": limit, "colorbar": bar}})
    reading = "Red: on the vector's side; blue: on the other; white: neither (activation units)."
    clipped = len(tokens) > 1 and any(np.abs(v[:, 0]).max() > np.abs(v[:, 1:]).max() for v in arrays.values())
    note = " The first token goes off the scale; hover for its value." if clipped else ""
    return apply_style(figure, title, reading + note, height=height)


def logit_lens(table: Table, *, title: str = "The vector read through the logit lens") -> go.Figure:
    """A table of the tokens that the vector, and its negative, most raise at each layer.

    Args:
        table: one row per layer and sign. Columns: layer (block index), sign ("+v" or "-v"), tokens (list of str,
            strongest first).
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing.
    """
    frame = check_table(table, words=("sign", "tokens"), numbers=("layer",), unescaped=("tokens",))
    layers = sorted(int(layer) for layer in frame["layer"].unique())
    signs = ordered(frame["sign"], ("+v", "-v"))
    words = {(int(row["layer"]), row["sign"]): "\u2003".join(map(shown, row["tokens"])) for _, row in frame.iterrows()}
    columns = [[words.get((layer, sign), "–") for layer in layers] for sign in signs]
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
        "Tokens the unembedding ties to the vector (+v) and its negative (-v), strongest first; · is a leading space."
    )
    figure = apply_style(go.Figure(cells), title, reading, height=150 + 30 * lines)
    return figure.update_layout(margin={"l": 15, "r": 15, "b": 10})


def _arrays(
    projections: Mapping[str, Any], *, layers: Sequence[int] | None, tokens: Sequence[str] | None
) -> dict[str, np.ndarray]:
    """The projections as numpy arrays, each checked against the number of layers and tokens."""
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
    """Largest magnitude after the first position (of all positions if there is but one); 1 where all is zero."""
    magnitudes = [np.abs(values[:, 1:] if values.shape[1] > 1 else values) for values in panels]
    return max((float(np.nanmax(values)) for values in magnitudes), default=0.0) or 1.0
