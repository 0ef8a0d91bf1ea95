"""Text, token by token: coloured by its projection, and as a line that grows while the model generates."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.colors import colorscale_to_colors, get_colorscale, unlabel_rgb
from plotly.subplots import make_subplots
from torch import Tensor

from rt_lens.common.formatting import number
from rt_lens.plots.style import (
    FAINT,
    INK,
    Table,
    apply_style,
    arm_colours,
    check_table,
    check_unique,
    escape_html,
    legend_entry,
    ordered,
    sample,
    shown,
    with_new_names,
)

PerPosition: TypeAlias = Float[Tensor, " pos"] | Float[np.ndarray, " pos"]

COLUMNS = 76  # characters per line: as many as fit a figure of 700 px in this font
MONOSPACE = {"family": "DejaVu Sans Mono, Menlo, Consolas, monospace", "size": 14}
LINE = 27  # px
STRIP = 76  # px: the height of an upright token of nine letters
UNITS = "projection on unit vector (activation units)"
_OLD_NAMES = {"place": "index"}
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star")


def coloured_tokens(
    tokens: Sequence[str], projections: Mapping[str, PerPosition], *, title: str = "Projection of every token"
) -> go.Figure:
    """Draws the text in reading order, every token on the colour of its projection; one block of lines per name.

    All blocks share one colour scale. It spans the largest magnitude after the first token, whose activations are often
    so large that they hide the rest. A newline appears as ⏎ and ends the line, a tab as ⇥, and a token of spaces as ·.

    Args:
        tokens: one per position, as they are.
        projections: name -> "pos", in activation units.
        title: heading of the figure.

    Raises:
        ValueError: if there is no token or projection, or a projection has another length than the tokens, or is not
            finite.

    Example:
        >>> figure = coloured_tokens(["What", " a", " day", "!"], {"untuned": np.array([9.0, 0.5, 3.0, -1.0])})
        >>> figure.data[0].text[2], figure.data[0].customdata[2]  # `token_projections` measures them
        ('\xa0day', np.float64(3.0))
    """
    values = _per_token(tokens, projections)
    labels = [_label(token) for token in tokens]
    starts, lines = _wrapped_positions(tokens, labels)
    widths = [_width(label) for label in labels]
    n_lines = lines[-1] + 1
    limit = max(float(np.abs(array[1:] if len(array) > 1 else array).max()) for array in values.values()) or 1.0
    height = (n_lines * LINE + 34) * len(values) + 8
    figure = make_subplots(
        rows=len(values),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=34 / height if len(values) > 1 else 0,
        subplot_titles=list(values),
    )
    border = {"color": "white", "width": 1}
    for row, (name, array) in enumerate(values.items(), start=1):
        shades = _shades(array, limit)
        cells = go.Bar(
            orientation="h",
            y=lines,
            base=starts,
            x=widths,
            width=0.88,
            # In a bar with text inside, Plotly reads a number as the name of a colour, and warns of every one.
            marker={"color": [f"rgb({r:.0f},{g:.0f},{b:.0f})" for r, g, b in 255 * shades], "line": border},
            customdata=array,
            text=escape_html(labels),
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            constraintext="none",
            textfont={**MONOSPACE, "color": _inks(shades)},
            hovertext=[
                f"{name}<br>{escape_html(shown(token))}, token {position}<br>"
                f"projection {number(value)} activation units"
                for position, (token, value) in enumerate(zip(tokens, array, strict=True))
            ],
            hoverinfo="text",
            showlegend=False,
        )
        figure.add_trace(cells, row=row, col=1)
    figure.add_trace(
        legend_entry("", mode="markers", marker={"color": [0], "coloraxis": "coloraxis"}, showlegend=False)
    )
    figure.update_xaxes(range=[0, COLUMNS], visible=False)
    figure.update_yaxes(range=[n_lines - 0.5, -0.5], visible=False)
    figure.update_annotations(x=0, xanchor="left")
    bar = {
        "title": {"text": UNITS, "side": "top", "font_size": 14},
        "orientation": "h",
        "x": 0.5,
        "y": 0,
        "yanchor": "top",
    }
    bar |= {"thickness": 14, "len": 0.6, "ypad": 14}
    figure.update_layout(coloraxis={"colorscale": "RdBu_r", "cmin": -limit, "cmax": limit, "colorbar": bar})
    reading = "Red: positive projection on the vector; blue: negative; white: zero."
    facts = _counted(len(tokens))
    if any(abs(array[0]) > limit for array in values.values()):
        facts += " The first token exceeds the colour scale; hover for its value."
    apply_style(figure, title, reading, facts, barmode="overlay")
    return figure.update_layout(height=height + figure.layout.margin.t + 95, margin={"l": 15, "r": 15, "b": 95})


def trace(table: Table, *, title: str = "Projection of each new token") -> go.Figure:
    """Draws the projection along each arm's response as a line, with the tokens of every arm below.

    A caller may draw it again after every new token: the axes grow in steps, so that they rarely move. Beyond 80 tokens
    only every second or third has a label.

    Args:
        table: one row per arm and new token. Columns: arm, index (of the token in the response, from 0), token
            (text), projection (activation units); and optionally seed (of the sampling).
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing, or an arm has two tokens at one index.

    Example:
        >>> rows = [{"arm": "steered", "index": 0, "token": "What", "projection": 3.2}]
        >>> figure = trace([*rows, {"arm": "steered", "index": 1, "token": " joy", "projection": 5.1}])
        >>> figure.data[0].y, figure.layout.xaxis.ticktext
        (array([3.2, 5.1]), ('What', '·joy'))
    """
    frame = check_table(
        with_new_names(table, _OLD_NAMES),
        labels=("arm", "token"),
        numbers=("index", "projection"),
        unescaped=("token",),
    )
    check_unique(frame, ["arm", "index"])
    names, n_tokens = ordered(frame["arm"]), int(frame["index"].max()) + 1
    colours, plot = arm_colours(names), 260 + STRIP * len(names)  # px
    lines, axes, labels = [], {}, []
    for index, name in enumerate(names):
        rows = frame[frame["arm"] == name].sort_values("index")
        axis, top = str(index + 1) if index else "", STRIP * (len(names) - index) / plot
        style = {"line": {"color": colours[name], "width": 2}, "xaxis": f"x{axis}"}
        lines.append(_response_line(rows, name, MARKERS[index % len(MARKERS)], style))
        axes[f"xaxis{axis}"] = _token_axis(rows, n_tokens, top) | ({"overlaying": "x", "matches": "x"} if axis else {})
        labels.append({"text": name, "y": top, "yshift": -8, "x": 0, "xshift": -8, "xanchor": "right"})
    labels.append({"text": "new tokens, in order", "y": 0, "x": 0.5, "xanchor": "center"})
    paper = {"xref": "paper", "yref": "paper", "yanchor": "top", "showarrow": False}
    upright: dict[str, Any] = {
        "title": {"text": UNITS.replace(" (", "<br>("), "font_size": 14},
        "range": _steps(frame["projection"]),
    }
    upright |= {"domain": [STRIP * len(names) / plot, 1], "zerolinecolor": FAINT, "zerolinewidth": 1.5}
    notes = [label | paper for label in labels]
    figure = go.Figure(lines, {**axes, "yaxis": upright, "annotations": notes, "uirevision": "trace"})
    reading = "Above zero a token lies on the vector's positive side, below zero on its negative side."
    facts = f"{_counted(len(frame))} {sample(frame[frame.columns.intersection(['seed'])])}".strip()
    legend = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"}
    apply_style(figure, title, reading, facts, showlegend=True, legend=legend)
    margins = {"l": 110, "b": 40, "t": figure.layout.margin.t + 14}
    return figure.update_layout(margin=margins, height=plot + margins["t"] + margins["b"])


def _response_line(rows: pd.DataFrame, name: str, symbol: str, style: dict[str, Any]) -> go.Scatter:
    """The line of one arm."""
    return go.Scatter(
        x=rows["index"],
        y=rows["projection"],
        name=name,
        mode="lines+markers",
        marker={"size": 6, "symbol": symbol},
        hovertext=[
            f"{name}<br>{escape_html(shown(token))}, new token {index:g}<br>projection {number(value)} activation units"
            for token, index, value in zip(rows["token"], rows["index"], rows["projection"], strict=True)
        ],
        hoverinfo="text",
        **style,
    )


def _token_axis(rows: pd.DataFrame, n_tokens: int, top: float) -> dict[str, Any]:
    """An axis with the tokens of one arm as labels, at a height of the figure."""
    step = -(-n_tokens // 80)
    return {
        "range": [-0.5, 20 * -(-n_tokens // 20) - 0.5],
        "tickvals": rows["index"].tolist()[::step],
        "ticktext": [escape_html(_cut(shown(token), 9)) for token in rows["token"]][::step],
        "tickangle": -90,
        "tickfont": {"size": 11, "color": INK},  # the arms' colours are too pale for text
        "showgrid": False,
        "zeroline": False,
        "anchor": "free",
        "position": top,
    }


def _label(token: str) -> str:
    """The token as in the text: a space before a word stays a space, and an invisible character is marked."""
    stripped = token.lstrip(" ") if token.strip() else token
    label = token[: len(token) - len(stripped)] + shown(stripped)
    return _cut(label.replace(" ", "\u00a0"), COLUMNS)


def _counted(n: int) -> str:
    return f"{n} token." if n == 1 else f"{n} tokens."


def _cut(label: str, columns: int) -> str:
    """The label, cut to so many columns."""
    if _width(label) <= columns:
        return label
    start = ""
    for letter in label:
        if _width(start + letter) >= columns:
            break
        start += letter
    return start + "…"


def _width(label: str) -> int:
    """The columns of a label in a monospaced font: two per emoji or East Asian letter, none per accent."""
    wide = (
        0 if unicodedata.combining(letter) or unicodedata.category(letter) in ("Cf", "Mn") else
        1 + (unicodedata.east_asian_width(letter) in "WF")
        for letter in label
    )  # fmt: skip
    return sum(wide)


def _wrapped_positions(tokens: Sequence[str], labels: Sequence[str]) -> tuple[list[int], list[int]]:
    """First column and line of every label; lines wrap before they overflow and after a newline."""
    starts, lines, column, line = [], [], 0, 0
    for token, label in zip(tokens, labels, strict=True):
        if column and column + _width(label) > COLUMNS:
            column, line = 0, line + 1
        starts.append(column)
        lines.append(line)
        column += _width(label)
        if token.endswith("\n"):
            column, line = 0, line + 1
    return starts, lines


def _per_token(tokens: Sequence[str], projections: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if isinstance(tokens, str) or not tokens:
        received = "one string" if tokens else "none"
        raise ValueError(f"tokens must be a list of at least one token, got {received}.")
    if not projections:
        raise ValueError("projections must map at least one name to its array, got none.")
    arrays = {}
    for name, values in projections.items():
        array = (
            values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=float)
        )
        if array.shape != (len(tokens),):
            raise ValueError(
                f"projections[{name!r}] must have shape ({len(tokens)},), a number for each token, got {array.shape}. "
                "From an array of several layers take one row."
            )
        if not np.isfinite(array).all():
            position = int(np.flatnonzero(~np.isfinite(array))[0])
            raise ValueError(
                f"projections[{name!r}] must hold finite numbers, got {array[position]} at token {position}."
            )
        arrays[escape_html(name)] = array
    return arrays


def _shades(values: Float[np.ndarray, " pos"], limit: float) -> Float[np.ndarray, "pos rgb"]:
    """The colour of every value on the scale, as red, green and blue from 0 to 1."""
    scale = np.array([unlabel_rgb(colour) for colour in colorscale_to_colors(get_colorscale("RdBu_r"))]) / 255
    at = (np.clip(values / limit, -1, 1) + 1) / 2 * (len(scale) - 1)
    return np.stack([np.interp(at, np.arange(len(scale)), channel) for channel in scale.T], axis=-1)


def _inks(shades: Float[np.ndarray, "pos rgb"]) -> list[str]:
    """White or dark text for every token, whichever has the higher contrast ratio (WCAG) with its colour."""
    linear = np.where(shades <= 0.04045, shades / 12.92, ((shades + 0.055) / 1.055) ** 2.4)
    bright = linear @ np.array([0.2126, 0.7152, 0.0722])
    # The contrast with white, 1.05 / (b + 0.05), and with the ink, (b + 0.05) / 0.066, are equal at b = 0.213.
    return ["white" if b < 0.213 else INK for b in bright]


def _steps(values: Any) -> tuple[float, float]:
    """The ends of an axis that holds the values and 0, rounded outwards to half of the next 1, 2 or 5 times 10^k."""
    # Below the smallest normal numbers no power of ten fits; values all but zero get the axis of zero.
    largest = float(np.nanmax(np.abs(values), initial=0.0))
    limit = largest if largest > 1e-300 else 1.0
    power = 10.0 ** math.floor(math.log10(limit))
    step = next(nice * power for nice in (1, 2, 5, 10) if nice * power >= limit) / 2
    low, high = math.floor(float(np.nanmin(values)) / step), math.ceil(float(np.nanmax(values)) / step)
    return min(low, -1) * step, max(high, 1) * step
