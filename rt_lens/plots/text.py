"""Text itself, token by token: coloured by its projection, and as a line that grows while the model writes."""

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
    escape_html,
    key,
    ordered,
    sample,
    shown,
)
from rt_lens.plots.tuned import once

PerPosition: TypeAlias = Float[Tensor, " pos"] | Float[np.ndarray, " pos"]

COLUMNS = 76  # characters to a line: what a figure of 700 px holds in this font
MONOSPACE = {"family": "DejaVu Sans Mono, Menlo, Consolas, monospace", "size": 14}
LINE = 27  # px
STRIP = 76  # px: an upright token of nine letters
UNITS = "projection on unit vector (activation units)"
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star")


def coloured_tokens(
    tokens: Sequence[str], projections: Mapping[str, PerPosition], *, title: str = "Where the text lies on the vector"
) -> go.Figure:
    """The text in reading order, each token on the colour of its projection; one block of lines for each name.

    All blocks share one scale. It spans the largest magnitude after the first token, whose activations are often so
    large that they would hide the rest. A newline is drawn as ⏎ and ends the line, a tab as ⇥, spaces that stand
    alone as ·.

    Args:
        tokens: one per position, as they are; repeats welcome.
        projections: name -> "pos", in activation units.
        title: heading of the figure.

    Raises:
        ValueError: if there is no token or projection, or one is not of the tokens' number, or not finite.

    Example:
        >>> tokens, found = token_projections(model, vectors.select([21]), "What a lovely day!")
        >>> coloured_tokens(tokens, {"untuned": found[0]}).show()
    """
    values = _per_token(tokens, projections)
    labels = [_label(token) for token in tokens]
    starts, lines = _places(tokens, labels)
    widths = [_width(label) for label in labels]
    n_lines = lines[-1] + 1
    limit = max(float(np.abs(own[1:] if len(own) > 1 else own).max()) for own in values.values()) or 1.0
    height = (n_lines * LINE + 34) * len(values) + 8
    figure = make_subplots(
        rows=len(values),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=34 / height if len(values) > 1 else 0,
        subplot_titles=list(values),
    )
    border = {"color": "white", "width": 1}
    for row, (name, own) in enumerate(values.items(), start=1):
        shades = _shades(own, limit)
        cells = go.Bar(
            orientation="h",
            y=lines,
            base=starts,
            x=widths,
            width=0.88,
            # Beside text inside a bar, Plotly takes a number for the name of a colour and warns of each.
            marker={"color": [f"rgb({r:.0f},{g:.0f},{b:.0f})" for r, g, b in 255 * shades], "line": border},
            customdata=own,
            text=escape_html(labels),
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            constraintext="none",
            textfont={**MONOSPACE, "color": _inks(shades)},
            hovertext=[
                f"{name}<br>{escape_html(shown(token))}, token {position}<br>"
                f"projection {number(value)} activation units"
                for position, (token, value) in enumerate(zip(tokens, own, strict=True))
            ],
            hoverinfo="text",
            showlegend=False,
        )
        figure.add_trace(cells, row=row, col=1)
    figure.add_trace(key("", mode="markers", marker={"color": [0], "coloraxis": "coloraxis"}, showlegend=False))
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
    reading = "Red: the token lies on the vector's side; blue: on the other; white: neither."
    facts = _counted(len(tokens))
    if any(abs(own[0]) > limit for own in values.values()):
        facts += " The first token goes off the scale; hover for its value."
    apply_style(figure, title, reading, facts, barmode="overlay")
    return figure.update_layout(height=height + figure.layout.margin.t + 95, margin={"l": 15, "r": 15, "b": 95})


def trace(table: Table, *, title: str = "Projection of each new token") -> go.Figure:
    """A line for each arm along its answer, with its tokens below; made to be drawn again with every new token.

    The axes move in steps, so that they hold still while the table grows. The arms' tokens differ, so each arm writes
    its own below the panel, in its colour; beyond 80 every second or third is named.

    Args:
        table: one row per arm and new token. Columns: arm, place (the token's number in the answer, from 0), token
            (text), projection (activation units); and, where there is one, seed (of the sampling).
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing, or an arm has two tokens of one place.

    Example:
        >>> rows = [{"arm": "steered", "place": 0, "token": " Hello", "projection": 3.2}]
        >>> figure = trace(rows)
    """
    frame = check_table(table, words=("arm", "token"), numbers=("place", "projection"), unescaped=("token",))
    once(frame, ["arm", "place"])
    names, n_places = ordered(frame["arm"]), int(frame["place"].max()) + 1
    colours, plot = arm_colours(names), 260 + STRIP * len(names)  # px
    lines, axes, labels = [], {}, []
    for index, name in enumerate(names):
        own = frame[frame["arm"] == name].sort_values("place")
        axis, top = str(index + 1) if index else "", STRIP * (len(names) - index) / plot
        look = {"line": {"color": colours[name], "width": 2}, "xaxis": f"x{axis}"}
        lines.append(_answer(own, name, MARKERS[index % len(MARKERS)], look))
        axes[f"xaxis{axis}"] = _strip(own, n_places, top) | ({"overlaying": "x", "matches": "x"} if axis else {})
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
    reading = "Above zero a new token lies on the vector's side, below on the other; the arms' words stand below."
    facts = f"{_counted(len(frame))} {sample(frame[frame.columns.intersection(['seed'])])}".strip()
    legend = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"}
    apply_style(figure, title, reading, facts, showlegend=True, legend=legend)
    margins = {"l": 110, "b": 40, "t": figure.layout.margin.t + 14}
    return figure.update_layout(margin=margins, height=plot + margins["t"] + margins["b"])


def _answer(own: pd.DataFrame, name: str, symbol: str, look: dict[str, Any]) -> go.Scatter:
    """One arm's line."""
    return go.Scatter(
        x=own["place"],
        y=own["projection"],
        name=name,
        mode="lines+markers",
        marker={"size": 6, "symbol": symbol},
        hovertext=[
            f"{name}<br>{escape_html(shown(token))}, new token {place:g}<br>projection {number(value)} activation units"
            for token, place, value in zip(own["token"], own["place"], own["projection"], strict=True)
        ],
        hoverinfo="text",
        **look,
    )


def _strip(own: pd.DataFrame, n_places: int, top: float) -> dict[str, Any]:
    """An axis that hangs from a height of the page and names one arm's tokens."""
    step = -(-n_places // 80)
    return {
        "range": [-0.5, 20 * -(-n_places // 20) - 0.5],
        "tickvals": own["place"].tolist()[::step],
        "ticktext": [escape_html(_cut(shown(token), 9)) for token in own["token"]][::step],
        "tickangle": -90,
        "tickfont": {"size": 11, "color": INK},  # the arms' own colours are too pale for letters
        "showgrid": False,
        "zeroline": False,
        "anchor": "free",
        "position": top,
    }


def _label(token: str) -> str:
    """The token as it stands in the text: a space before a word stays one, what would be invisible is marked."""
    words = token.lstrip(" ") if token.strip() else token
    label = token[: len(token) - len(words)] + shown(words)
    return _cut(label.replace(" ", "\u00a0"), COLUMNS)


def _counted(n: int) -> str:
    return f"{n} token." if n == 1 else f"{n} tokens."


def _cut(label: str, columns: int) -> str:
    """The label if it fits in so many columns, else its beginning."""
    if _width(label) <= columns:
        return label
    kept = ""
    for letter in label:
        if _width(kept + letter) >= columns:
            break
        kept += letter
    return kept + "…"


def _width(label: str) -> int:
    """Columns that a label takes in a monospaced font: two for emoji and East Asian letters, none for accents."""
    wide = (
        0 if unicodedata.combining(letter) or unicodedata.category(letter) in ("Cf", "Mn") else
        1 + (unicodedata.east_asian_width(letter) in "WF")
        for letter in label
    )  # fmt: skip
    return sum(wide)


def _places(tokens: Sequence[str], labels: Sequence[str]) -> tuple[list[int], list[int]]:
    """First column and line of every label, wrapped before a line overflows and after a newline."""
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
        own = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=float)
        if own.shape != (len(tokens),):
            raise ValueError(
                f"projections[{name!r}] must have shape ({len(tokens)},), a number for each token, got {own.shape}. "
                "From an array of several layers take one row."
            )
        if not np.isfinite(own).all():
            position = int(np.flatnonzero(~np.isfinite(own))[0])
            raise ValueError(
                f"projections[{name!r}] must hold finite numbers, got {own[position]} at token {position}."
            )
        arrays[escape_html(name)] = own
    return arrays


def _shades(values: Float[np.ndarray, " pos"], limit: float) -> Float[np.ndarray, "pos rgb"]:
    """The colour of each value on the scale, as shares of red, green and blue."""
    scale = np.array([unlabel_rgb(colour) for colour in colorscale_to_colors(get_colorscale("RdBu_r"))]) / 255
    at = (np.clip(values / limit, -1, 1) + 1) / 2 * (len(scale) - 1)
    return np.stack([np.interp(at, np.arange(len(scale)), channel) for channel in scale.T], axis=-1)


def _inks(shades: Float[np.ndarray, "pos rgb"]) -> list[str]:
    """White or dark for each token, whichever stands out more from its colour (WCAG's contrast ratio)."""
    linear = np.where(shades <= 0.04045, shades / 12.92, ((shades + 0.055) / 1.055) ** 2.4)
    bright = linear @ np.array([0.2126, 0.7152, 0.0722])
    # The ratios to white, 1.05 / (b + 0.05), and to our ink, (b + 0.05) / 0.066, cross at b = 0.213.
    return ["white" if b < 0.213 else INK for b in bright]


def _steps(values: Any) -> tuple[float, float]:
    """Ends of an axis that holds the values and 0, rounded outwards to half of the next 1, 2 or 5 times 10^k."""
    limit = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    power = 10.0 ** math.floor(math.log10(limit))
    step = next(nice * power for nice in (1, 2, 5, 10) if nice * power >= limit) / 2
    low, high = math.floor(float(np.nanmin(values)) / step), math.ceil(float(np.nanmax(values)) / step)
    return min(low, -1) * step, max(high, 1) * step
