"""What tuning did inside: changed weights, moved projections, and shifts of the residual stream beside steering's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rt_lens.common.formatting import estimate, number
from rt_lens.plots.style import (
    FAINT,
    INK,
    Table,
    apply_style,
    arm_colours,
    band,
    check_table,
    ordered,
    row_estimate,
    sample,
    with_numbers,
)

KINDS = ("q", "k", "v", "o", "gate", "up", "down", "bias", "norm", "embed", "other")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
STAYS = "#EFEFEF"


def weight_changes(table: Table, *, title: str = "Which weights changed") -> go.Figure:
    """Heat maps over layers and kinds of weight: how large the change is, and how much of it lies along the vector.

    Where a cell holds several parameters (a layer's biases), the one that changed most is drawn; hover names it.
    Parameters whose change is zero are left out.

    Args:
        table: one row per changed parameter. Columns: parameter, layer (block index; NaN outside the blocks), kind (q,
            k, v, o, gate, up, down, bias, norm, embed, other), norm, relative (share of the weight's own norm; NaN
            where that is zero), effective_rank, rank_limit, top_share; and, for the second panel, alignment (0 to 1;
            NaN where it has no meaning) and chance (that of a random direction).
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing, or nothing changed.
    """
    numbers = ["layer", "norm", "relative", "effective_rank", "rank_limit", "top_share"]
    frame = check_table(table, words=("parameter", "kind"), numbers=numbers)
    if "alignment" in frame:
        frame = with_numbers(frame, ("alignment", "chance"))
    frame = frame[frame["norm"] > 0]
    if frame.empty:
        raise ValueError("table must have at least one changed parameter, got only norms of 0.")
    aligned = "alignment" in frame and bool(frame["alignment"].notna().any())
    cells = frame.sort_values("norm", ascending=False).drop_duplicates(["layer", "kind"])
    kinds = ordered(cells["kind"], KINDS)
    inside = cells["layer"].dropna()
    layers = list(range(int(inside.min()), int(inside.max()) + 1)) if not inside.empty else []
    rows = [*([float("nan")] if cells["layer"].isna().any() else []), *layers]
    panels = ["size of the change (% of the weight)", "share along the vector (times chance)"][: 1 + aligned]
    figure = make_subplots(cols=len(panels), shared_yaxes=True, horizontal_spacing=0.22, subplot_titles=panels)
    size = _heat(cells, 100 * cells["relative"], rows, kinds, "coloraxis")
    figure.add_traces([size, _new(cells, rows, kinds)], rows=1, cols=1)
    top = float(np.nanmax(size.z, initial=0.0)) or 1.0
    bar = {"title": "%", "x": 0.43 if aligned else 1.01, "thickness": 18}
    figure.update_layout(coloraxis={"colorscale": "Blues", "cmin": 0, "cmax": top, "colorbar": bar})
    if aligned:
        times = (cells["alignment"] / cells["chance"]).clip(lower=1 / 64)  # a log scale has no zero
        folds = _heat(cells, np.log2(times), rows, kinds, "coloraxis2")
        figure.add_trace(folds, row=1, col=2)
        figure.update_layout(coloraxis2=_times_chance(folds.z))
    figure.update_xaxes(title_text="kind of weight", showgrid=False, zeroline=False, tickangle=0)
    figure.update_xaxes(tickvals=list(range(len(kinds))), ticktext=kinds, range=[-0.5, len(kinds) - 0.5])
    shown = list(range(0, len(rows), max(1, len(rows) // 16)))
    names = ["no block" if np.isnan(rows[place]) else f"{rows[place]:g}" for place in shown]
    figure.update_yaxes(tickvals=shown, ticktext=names, range=[-0.5, len(rows) - 0.5], showgrid=False, zeroline=False)
    figure.update_yaxes(title_text="layer (block index)", col=1)
    reading = (
        f"{'Left: the' if aligned else 'The'} darker, the more a weight changed ({len(frame)} changed; grey: as it was"
    )
    reading += "; new: it was zero)." if frame["relative"].isna().any() else ")."
    if aligned:
        reading += (
            " Right: red: the change writes along the layer's vector (or reads from it) more than along a random "
            "direction; white: as much; blue: less."
        )
    figure.update_layout(plot_bgcolor=STAYS)
    return apply_style(figure, title, reading, height=max(340, 220 + 24 * len(rows)))


def projection_changes(table: Table, *, title: str = "How far along the vector each arm moves texts") -> go.Figure:
    """A line with its band per arm: the change of the mean projection against the untouched model, layer by layer.

    Args:
        table: one row per arm and layer. Columns: arm, layer (block index), n (texts), mean, low, high (95 % interval;
            activation units), seed.
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing.
    """
    reading = "Above zero the arm moves texts towards the vector's side, below to the other; band: 95 % interval."
    axis = "change of mean projection<br>on unit vector (activation units)"
    return _over_layers(table, "change of projection", axis, title, reading)


def projection_curves(table: Table, *, title: str = "Where each arm's texts lie on the vector") -> go.Figure:
    """A line with its band per arm: the mean projection of texts on the unit vector, layer by layer.

    Args:
        table: one row per arm and layer. Columns: arm, layer (block index), n (texts), mean, low, high (95 % interval;
            activation units), seed.
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing.
    """
    reading = "Above zero an arm's texts lie on the vector's side, below on the other. Band: 95 % interval over texts."
    axis = "mean projection on unit vector<br>(activation units)"
    return _over_layers(table, "projection", axis, title, reading)


def residual_shifts(
    along: Table, between: Table, *, title: str = "Does tuning do inside what steering does?"
) -> go.Figure:
    """Cosine of each arm's shift of the residual stream with the vector, and of the arms' shifts with each other.

    Args:
        along: one row per arm and layer. Columns: arm, layer (block index), n (texts), norm_mean, norm_low, norm_high
            (activation units), n_cosine, cosine_mean, cosine_low, cosine_high (95 % interval; NaN where nothing is
            shifted), seed.
        between: one row per two arms and layer; may be empty if there is one arm. Columns: a, b, layer, n, mean, low,
            high, seed.
        title: heading of the figure.

    Raises:
        ValueError: if a column is missing, or all rows of `along`.
    """
    measured = [f"{name}_{end}" for name in ("norm", "cosine") for end in ("mean", "low", "high")]
    arms = check_table(along, words=("arm", "seed"), numbers=("layer", "n", *measured, "n_cosine"), argument="along")
    paired = len(between) > 0
    figure = make_subplots(
        rows=1 + paired,
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.11,
        subplot_titles=["Each arm's shift and the layer's vector", *(["The shifts of two arms"] if paired else [])],
    )
    renamed = {f"cosine_{end}": end for end in ("mean", "low", "high")}
    figure.add_traces(_lines(arms.rename(columns=renamed), "cosine with the vector"), rows=1, cols=1)
    if paired:
        words, numbers = ("a", "b", "seed"), ("layer", "n", "mean", "low", "high")
        pairs = check_table(between, words=words, numbers=numbers, argument="between")
        pairs = pairs.assign(arm=[f"{row['a']} and {row['b']}" for _, row in pairs.iterrows()])
        drawn = itertools.cycle(itertools.product((INK, FAINT), DASHES))
        looks = dict(zip(ordered(pairs["arm"]), drawn, strict=False))
        figure.add_traces(_lines(pairs, "cosine of the shifts", looks, legend="legend2"), rows=2, cols=1)
        figure.update_yaxes(title_text="cosine of the two shifts", row=2, col=1)
    for row in range(1, 2 + paired):
        figure.add_hline(y=0, line={"color": FAINT, "width": 1}, row=row, col=1)
    figure.update_yaxes(range=[-1.06, 1.06], tickvals=[-1, -0.5, 0, 0.5, 1])
    figure.update_yaxes(title_text="cosine with the vector", row=1, col=1)
    shifted = arms.loc[arms["norm_mean"] > 0, "layer"]
    first = max(arms["layer"].min(), shifted.min() - 1) if len(shifted) else arms["layer"].min()
    figure.update_xaxes(range=[first - 0.5, arms["layer"].max() + 0.5], showticklabels=True)
    figure.update_xaxes(title_text="layer (block index)", row=1 + paired, col=1)
    reading = "Top: at 1 an arm shifts the stream along the layer's vector, at -1 against it, at 0 across it."
    if paired:
        reading += " Bottom: at 1 two arms shift it alike."
    reading += " A line begins where its arms first shift anything. Bands: 95 %; last token of each prompt."
    apply_style(figure, title, reading, sample(arms), height=430 + 320 * paired)
    legend = {"x": 1.01, "xanchor": "left", "yanchor": "top", "traceorder": "normal"}
    return figure.update_layout(
        legend={**legend, "y": 1, "title_text": "arm"}, legend2={**legend, "y": 0.44, "title_text": "two arms"}
    )


def _over_layers(table: Table, measured: str, axis: str, title: str, reading: str) -> go.Figure:
    """A line with its band per arm, of a projection in activation units."""
    frame = check_table(table, words=("arm", "seed"), numbers=("layer", "n", "mean", "low", "high"))
    figure = go.Figure(_lines(frame, measured, units=" activation units"))
    figure.add_hline(y=0, line={"color": FAINT, "width": 1})
    figure.update_xaxes(title_text="layer (block index)")
    figure.update_yaxes(title_text=axis)
    return apply_style(figure, title, reading, sample(frame), showlegend=True, legend_traceorder="normal")


def _heat(
    cells: pd.DataFrame, values: pd.Series | np.ndarray, rows: Sequence[float], kinds: Sequence[str], scale: str
) -> go.Heatmap:
    """Numbers of parameters at their layer and kind, with all there is to say of each on hovering."""
    told = _grid(cells.assign(value=[_told(row) for _, row in cells.iterrows()]), rows, kinds)
    return go.Heatmap(
        x=list(range(len(kinds))),
        y=list(range(len(rows))),
        z=_grid(cells.assign(value=values), rows, kinds).astype(float),
        coloraxis=scale,
        hovertext=told,
        hoverinfo="text",
        xgap=2,
        ygap=2,
    )


def _times_chance(folds: np.ndarray) -> dict[str, Any]:
    """A colour axis of powers of 2, white at 1."""
    limit = max(1, int(np.ceil(np.nanmax(np.abs(folds)))))
    ticks = [tick for tick in range(-limit, limit + 1) if limit < 4 or tick % 2 == 0]
    words = [f"{2**tick}×" if tick >= 0 else f"1/{2**-tick}×" for tick in ticks]
    bar = {"title": "× chance", "x": 1.01, "thickness": 18, "tickvals": ticks, "ticktext": words}
    return {"colorscale": "RdBu_r", "cmin": -limit, "cmax": limit, "colorbar": bar}


def _new(cells: pd.DataFrame, rows: Sequence[float], kinds: Sequence[str]) -> go.Scatter:
    """A word where a weight was zero before, of which no change is a percentage."""
    places = _places(cells[cells["relative"].isna()], rows, kinds)
    return go.Scatter(
        x=[column for _, column in places],
        y=[row for row, _ in places],
        text=["new"] * len(places),
        mode="text",
        hoverinfo="skip",
        showlegend=False,
    )


def _told(row: pd.Series) -> str:
    """What hovering over one parameter says."""
    relative = "was zero" if pd.isna(row["relative"]) else f"{100 * row['relative']:.2f} % of the weight"
    said = [
        str(row["parameter"]),
        f"norm of the change {row['norm']:.3g} ({relative})",
        f"effective rank {number(row['effective_rank'], 1)} of {row['rank_limit']:g}",
        f"largest direction {number(100 * row['top_share'], 1)} % of the squares",
    ]
    if pd.notna(row.get("alignment")):
        said.append(f"share along the vector {row['alignment']:.3f} (chance {row['chance']:.3f})")
    return "<br>".join(said)


def _places(cells: pd.DataFrame, rows: Sequence[float], kinds: Sequence[str]) -> list[tuple[int, int]]:
    """Row and column of each parameter."""
    row_of = {None if np.isnan(layer) else layer: row for row, layer in enumerate(rows)}  # NaN equals nothing
    found = zip(cells["layer"], cells["kind"], strict=True)
    return [(row_of[None if np.isnan(layer) else layer], kinds.index(kind)) for layer, kind in found]


def _grid(cells: pd.DataFrame, rows: Sequence[float], kinds: Sequence[str]) -> np.ndarray:
    """The column `value` as an array of layers and kinds, NaN where there is no parameter."""
    grid = np.full((len(rows), len(kinds)), np.nan, dtype=object)
    for place, value in zip(_places(cells, rows, kinds), cells["value"], strict=True):
        grid[place] = value
    return grid


def _lines(
    frame: pd.DataFrame,
    measured: str,
    looks: dict[str, tuple[str, str]] | None = None,
    legend: str = "legend",
    units: str = "",
) -> list[go.Scatter]:
    """A band and a line for each arm, over the layers where it has a number."""
    names = ordered(frame["arm"])
    looks = looks or {name: (arm_colours(names)[name], "solid") for name in names}
    traces: list[go.Scatter] = []
    for name in names:
        own = frame[frame["arm"] == name].sort_values("layer")
        there = own.dropna(subset=["mean", "low", "high"])
        colour, dash = looks[name]
        hover = [
            f"{name}<br>layer {row['layer']:g}<br>{measured} {row_estimate(row)}{units}{_size(row)}"
            for _, row in own.iterrows()
        ]
        line = go.Scatter(
            x=own["layer"],
            y=own["mean"],
            name=name,
            mode="lines+markers",
            marker_size=5,
            line={"color": colour, "dash": dash, "width": 2.5},
            hovertext=hover,
            hoverinfo="text",
            legend=legend,
        )
        traces += [*band(there, "layer", colour), line]
    return traces


def _size(row: pd.Series) -> str:
    """The observations behind a point, and how long the shift is, where the table says it."""
    n = row["n_cosine"] if "n_cosine" in row else row["n"]
    if "norm_mean" not in row:
        return f"<br>n = {n:g}"
    length = estimate(row["norm_mean"], row["norm_low"], row["norm_high"])
    return f"<br>length of the shift {length} activation units<br>n = {n:g}"
