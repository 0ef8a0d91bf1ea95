"""What tuning changes inside the model: weights, projections, and the residual stream in comparison with steering."""

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
    """Draws heat maps over layers and weight matrices: the size of each change, and its share along the vector.

    Where a cell holds several parameters (a layer's biases), the figure shows the one that changed most, and the hover
    names it. Parameters whose change is zero are left out.

    Args:
        table: one row per changed parameter. Columns: parameter, layer (block index; NaN outside the blocks), kind (q,
            k, v, o, gate, up, down, bias, norm, embed, other), norm, relative (share of the weight's own norm; NaN
            where that is zero), effective_rank, rank_limit, top_share; and, for the second panel, alignment (0 to 1;
            NaN where it has no meaning) and chance (that of a random direction).
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing, or nothing changed.

    Example:
        >>> row = {"parameter": "blocks.21.mlp.W_out", "layer": 21, "kind": "down", "norm": 0.8, "relative": 0.02}
        >>> row |= {"effective_rank": 3.1, "rank_limit": 576, "top_share": 0.6, "alignment": 0.4, "chance": 0.05}
        >>> figure = weight_changes([row])
        >>> float(figure.data[0].z[0, 0]), float(figure.data[2].z[0, 0])  # 2 % of the weight; log2 of 8 times chance
        (2.0, 3.0)
    """
    numbers = ["layer", "norm", "relative", "effective_rank", "rank_limit", "top_share"]
    frame = check_table(table, labels=("parameter", "kind"), numbers=numbers)
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
    names = ["no block" if np.isnan(rows[index]) else f"{rows[index]:g}" for index in shown]
    figure.update_yaxes(tickvals=shown, ticktext=names, range=[-0.5, len(rows) - 0.5], showgrid=False, zeroline=False)
    figure.update_yaxes(title_text="layer (block index)", col=1)
    reading = (
        f"{'Left: darker' if aligned else 'Darker'} is a larger change ({len(frame)} weights changed; grey: unchanged"
    )
    reading += "; new: zero before)." if frame["relative"].isna().any() else ")."
    if aligned:
        reading += (
            " Right: red means that the change writes along the layer's vector (or reads from it) more than along a "
            "random direction; white: as much; blue: less."
        )
    figure.update_layout(plot_bgcolor=STAYS)
    return apply_style(figure, title, reading, height=max(340, 220 + 24 * len(rows)))


def projection_changes(table: Table, *, title: str = "Change of the mean projection, by layer") -> go.Figure:
    """Draws the change of the mean projection from the untuned model, layer by layer: a line with its band per arm.

    Args:
        table: one row per arm and layer. Columns: arm, layer (block index), n (texts), mean, low, high (95 % interval;
            activation units), seed.
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing.

    Example:
        >>> row = {"arm": "rep_tuned", "n": 24, "seed": 0}
        >>> figure = projection_changes([
        ...     row | {"layer": 20, "mean": 0.0, "low": -0.1, "high": 0.1},
        ...     row | {"layer": 21, "mean": -2.0, "low": -2.3, "high": -1.7},
        ... ])
        >>> figure.data[-1].name, figure.data[-1].y.tolist()
        ('rep_tuned', [0.0, -2.0])
    """
    reading = "Above zero the arm moves activations along the vector, below zero against it. Band: 95 % interval."
    axis = "change of mean projection<br>on unit vector (activation units)"
    return _over_layers(table, "change of projection", axis, title, reading)


def projection_curves(table: Table, *, title: str = "Mean projection on the vector, by layer") -> go.Figure:
    """Draws the mean projection of texts on the unit vector, layer by layer: a line with its band per arm.

    Args:
        table: one row per arm and layer. Columns: arm, layer (block index), n (texts), mean, low, high (95 % interval;
            activation units), seed.
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing.

    Example:
        >>> row = {"arm": "untuned", "n": 24, "low": 1.0, "high": 3.0, "seed": 0}
        >>> figure = projection_curves([row | {"layer": layer, "mean": layer / 10} for layer in (19, 20, 21)])
        >>> figure.data[-1].y.tolist()
        [1.9, 2.0, 2.1]
    """
    reading = (
        "Above zero texts lie on the vector's positive side, below zero on its negative side. Band: 95 % interval."
    )
    axis = "mean projection on unit vector<br>(activation units)"
    return _over_layers(table, "projection", axis, title, reading)


def residual_shifts(
    along: Table, between: Table, *, title: str = "Does tuning shift activations as steering does?"
) -> go.Figure:
    """Draws the cosine of each arm's shift of the residual stream with the vector, and with the other arms' shifts.

    Args:
        along: one row per arm and layer. Columns: arm, layer (block index), n (texts), norm_mean, norm_low, norm_high
            (activation units), n_cosine, cosine_mean, cosine_low, cosine_high (95 % interval; NaN where nothing is
            shifted), seed.
        between: one row per two arms and layer; may be empty if there is one arm. Columns: a, b, layer, n, mean, low,
            high, seed.
        title: heading of the figure.

    Raises:
        ValueError: if a column is missing, or all rows of `along`.

    Example:
        >>> row = {"layer": 21, "n": 12, "norm_mean": 5.0, "norm_low": 4.0, "norm_high": 6.0, "n_cosine": 12, "seed": 0}
        >>> along = [row | {"arm": "steered", "cosine_mean": 1.0, "cosine_low": 1.0, "cosine_high": 1.0}]
        >>> along += [row | {"arm": "rep_tuned", "cosine_mean": 0.6, "cosine_low": 0.5, "cosine_high": 0.7}]
        >>> pair = {"a": "steered", "b": "rep_tuned", "layer": 21, "n": 12, "seed": 0}
        >>> figure = residual_shifts(along, [pair | {"mean": 0.6, "low": 0.5, "high": 0.7}])
        >>> [trace.name for trace in figure.data if trace.name]
        ['steered', 'rep_tuned', 'steered and rep_tuned']
    """
    measured = [f"{name}_{end}" for name in ("norm", "cosine") for end in ("mean", "low", "high")]
    arms = check_table(along, labels=("arm", "seed"), numbers=("layer", "n", *measured, "n_cosine"), argument="along")
    paired = len(between) > 0
    figure = make_subplots(
        rows=1 + paired,
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.11,
        subplot_titles=["Shift of each arm and the layer's vector", *(["Shifts of two arms"] if paired else [])],
    )
    renamed = {f"cosine_{end}": end for end in ("mean", "low", "high")}
    figure.add_traces(_lines(arms.rename(columns=renamed), "cosine with the vector"), rows=1, cols=1)
    if paired:
        labels, numbers = ("a", "b", "seed"), ("layer", "n", "mean", "low", "high")
        pairs = check_table(between, labels=labels, numbers=numbers, argument="between")
        pairs = pairs.assign(arm=[f"{row['a']} and {row['b']}" for _, row in pairs.iterrows()])
        cycle = itertools.cycle(itertools.product((INK, FAINT), DASHES))
        styles = dict(zip(ordered(pairs["arm"]), cycle, strict=False))
        figure.add_traces(_lines(pairs, "cosine of the shifts", styles, legend="legend2"), rows=2, cols=1)
        figure.update_yaxes(title_text="cosine of the two shifts", row=2, col=1)
    for row in range(1, 2 + paired):
        figure.add_hline(y=0, line={"color": FAINT, "width": 1}, row=row, col=1)
    figure.update_yaxes(range=[-1.06, 1.06], tickvals=[-1, -0.5, 0, 0.5, 1])
    figure.update_yaxes(title_text="cosine with the vector", row=1, col=1)
    shifted = arms.loc[arms["norm_mean"] > 0, "layer"]
    first = max(arms["layer"].min(), shifted.min() - 1) if len(shifted) else arms["layer"].min()
    figure.update_xaxes(range=[first - 0.5, arms["layer"].max() + 0.5], showticklabels=True)
    figure.update_xaxes(title_text="layer (block index)", row=1 + paired, col=1)
    reading = (
        "Top: at 1 an arm shifts the residual stream along the layer's vector, at -1 against it, at 0 orthogonally."
    )
    if paired:
        reading += " Bottom: at 1 two arms shift it in the same direction."
    reading += (
        " A line starts at the first layer that its arms shift. Bands: 95 % intervals; last token of each prompt."
    )
    apply_style(figure, title, reading, sample(arms), height=430 + 320 * paired)
    legend = {"x": 1.01, "xanchor": "left", "yanchor": "top", "traceorder": "normal"}
    return figure.update_layout(
        legend={**legend, "y": 1, "title_text": "arm"}, legend2={**legend, "y": 0.44, "title_text": "two arms"}
    )


def _over_layers(table: Table, measured: str, axis: str, title: str, reading: str) -> go.Figure:
    """Draws a projection in activation units, layer by layer: a line with its band per arm."""
    frame = check_table(table, labels=("arm", "seed"), numbers=("layer", "n", "mean", "low", "high"))
    figure = go.Figure(_lines(frame, measured, units=" activation units"))
    figure.add_hline(y=0, line={"color": FAINT, "width": 1})
    figure.update_xaxes(title_text="layer (block index)")
    figure.update_yaxes(title_text=axis)
    return apply_style(figure, title, reading, sample(frame), showlegend=True, legend_traceorder="normal")


def _heat(
    cells: pd.DataFrame, values: pd.Series | np.ndarray, rows: Sequence[float], kinds: Sequence[str], scale: str
) -> go.Heatmap:
    """A heat map of one number per parameter, at its layer and kind, with all its measures in the hover."""
    hover = _grid(cells.assign(value=[_hover(row) for _, row in cells.iterrows()]), rows, kinds)
    return go.Heatmap(
        x=list(range(len(kinds))),
        y=list(range(len(rows))),
        z=_grid(cells.assign(value=values), rows, kinds).astype(float),
        coloraxis=scale,
        hovertext=hover,
        hoverinfo="text",
        xgap=2,
        ygap=2,
    )


def _times_chance(folds: np.ndarray) -> dict[str, Any]:
    """A colour axis of powers of 2, white at 1."""
    limit = max(1, int(np.ceil(np.nanmax(np.abs(folds)))))
    ticks = [tick for tick in range(-limit, limit + 1) if limit < 4 or tick % 2 == 0]
    names = [f"{2**tick}×" if tick >= 0 else f"1/{2**-tick}×" for tick in ticks]
    bar = {"title": "× chance", "x": 1.01, "thickness": 18, "tickvals": ticks, "ticktext": names}
    return {"colorscale": "RdBu_r", "cmin": -limit, "cmax": limit, "colorbar": bar}


def _new(cells: pd.DataFrame, rows: Sequence[float], kinds: Sequence[str]) -> go.Scatter:
    """The word "new" where a weight was zero before, because no change is a percentage of zero."""
    positions = _positions(cells[cells["relative"].isna()], rows, kinds)
    return go.Scatter(
        x=[column for _, column in positions],
        y=[row for row, _ in positions],
        text=["new"] * len(positions),
        mode="text",
        hoverinfo="skip",
        showlegend=False,
    )


def _hover(row: pd.Series) -> str:
    """The hover text of one parameter."""
    relative = "was zero" if pd.isna(row["relative"]) else f"{100 * row['relative']:.2f} % of the weight"
    lines = [
        str(row["parameter"]),
        f"norm of the change {row['norm']:.3g} ({relative})",
        f"effective rank {number(row['effective_rank'], 1)} of {row['rank_limit']:g}",
        f"top singular direction {number(100 * row['top_share'], 1)} % of the squared norm",
    ]
    if pd.notna(row.get("alignment")):
        lines.append(f"share along the vector {row['alignment']:.3f} (chance {row['chance']:.3f})")
    return "<br>".join(lines)


def _positions(cells: pd.DataFrame, rows: Sequence[float], kinds: Sequence[str]) -> list[tuple[int, int]]:
    """Row and column of each parameter."""
    row_of = {None if np.isnan(layer) else layer: row for row, layer in enumerate(rows)}  # NaN equals nothing
    pairs = zip(cells["layer"], cells["kind"], strict=True)
    return [(row_of[None if np.isnan(layer) else layer], kinds.index(kind)) for layer, kind in pairs]


def _grid(cells: pd.DataFrame, rows: Sequence[float], kinds: Sequence[str]) -> np.ndarray:
    """The column `value` as an array of layers and kinds, NaN where there is no parameter."""
    grid = np.full((len(rows), len(kinds)), np.nan, dtype=object)
    for position, value in zip(_positions(cells, rows, kinds), cells["value"], strict=True):
        grid[position] = value
    return grid


def _lines(
    frame: pd.DataFrame,
    measured: str,
    styles: dict[str, tuple[str, str]] | None = None,
    legend: str = "legend",
    units: str = "",
) -> list[go.Scatter]:
    """A band and a line for each arm, over the layers for which it has a number."""
    names = ordered(frame["arm"])
    styles = styles or {name: (arm_colours(names)[name], "solid") for name in names}
    traces: list[go.Scatter] = []
    for name in names:
        rows = frame[frame["arm"] == name].sort_values("layer")
        with_interval = rows.dropna(subset=["mean", "low", "high"])
        colour, dash = styles[name]
        hover = [
            f"{name}<br>layer {row['layer']:g}<br>{measured} {row_estimate(row)}{units}{_size(row)}"
            for _, row in rows.iterrows()
        ]
        line = go.Scatter(
            x=rows["layer"],
            y=rows["mean"],
            name=name,
            mode="lines+markers",
            marker_size=5,
            line={"color": colour, "dash": dash, "width": 2.5},
            hovertext=hover,
            hoverinfo="text",
            legend=legend,
        )
        traces += [*band(with_interval, "layer", colour), line]
    return traces


def _size(row: pd.Series) -> str:
    """The number of observations of a point, and the norm of the shift where the table has it."""
    n = row["n_cosine"] if "n_cosine" in row else row["n"]
    if "norm_mean" not in row:
        return f"<br>n = {n:g}"
    norm = estimate(row["norm_mean"], row["norm_low"], row["norm_high"])
    return f"<br>norm of the shift {norm} activation units<br>n = {n:g}"
