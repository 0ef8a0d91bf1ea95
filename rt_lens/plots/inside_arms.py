"""What happens inside the model under each arm, side by side."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rt_lens.common.formatting import number
from rt_lens.plots.style import (
    DIRECTIONS,
    FAINT,
    INK,
    Table,
    apply_style,
    arm_colours,
    band,
    check_table,
    ordered,
    sample,
)

_SETS = {"own": "circle", "toward": "triangle-up", "away": "triangle-down"}
RESPONSES = {
    "own": "the untuned model's own", "toward": "the positive personas'", "away": "the negative personas'",
}  # fmt: skip
_PANELS = (
    "likelihood of responses<br>change of NLL (nats per token)", "shift along the vector<br>(lengths of the vector)",
    "share of the shift that<br>lies along the vector", "change of weights by block<br>(% of the weights' norm)",
)  # fmt: skip
_READING = (
    "First: left of 0 a response became likelier. Second and third: by layer, mean over the untuned model's own "
    "responses. Fourth: arms that change weights; hover for the effective rank. Bars and bands: 95 % intervals."
)


def inside_arms(
    shifts: Table, likelihoods: Table, weights: Table, *, title: str = "What happens inside, at equal KL"
) -> go.Figure:
    """Draws what `InsideMeter` found of each arm: a row of panels for each direction, a colour for each arm.

    Args:
        shifts: columns arm, direction, seed, layer, n, along, along_low, along_high (lengths of the vector), share,
            share_low, share_high (0 to 1; NaN where nothing is shifted).
        likelihoods: columns arm, direction, seed, set (own, toward or away), n, change, low, high (nats per token).
        weights: columns arm, direction, seed, block, relative, effective_rank, rank_limit; may be empty.
        title: heading of the figure.

    Raises:
        ValueError: if a column is missing, or all rows of `shifts` or `likelihoods`.

    Example:
        >>> arm = {"arm": "rep_tuned", "direction": "away", "seed": 0, "n": 12}
        >>> along = {"along": -0.4, "along_low": -0.5, "along_high": -0.3}
        >>> shift = along | {"share": 0.2, "share_low": 0.1, "share_high": 0.3}
        >>> likelihood = arm | {"set": "own", "change": 0.1, "low": 0.05, "high": 0.15}
        >>> weight = arm | {"relative": 0.01, "effective_rank": 40.0, "rank_limit": 576}
        >>> figure = inside_arms(
        ...     [arm | shift | {"layer": layer} for layer in (20, 21)], [likelihood], [weight | {"block": 20}],
        ... )
        >>> sorted({trace.name for trace in figure.data if trace.name})
        ['rep_tuned', "the untuned model's own"]
    """
    names = ("arm", "direction", "seed")
    measured = [f"{name}{end}" for name in ("along", "share") for end in ("", "_low", "_high")]
    moved = check_table(shifts, labels=names, numbers=("layer", "n", *measured), argument="shifts")
    likely = check_table(
        likelihoods, labels=(*names, "set"), numbers=("n", "change", "low", "high"), argument="likelihoods"
    )
    numbers = ("block", "relative", "effective_rank", "rank_limit")
    changed = check_table(weights, labels=names, numbers=numbers, argument="weights") if len(weights) else None
    directions, arms = ordered(likely["direction"], DIRECTIONS), ordered(likely["arm"])
    colours = arm_colours(arms)
    figure = make_subplots(
        rows=len(directions), cols=4, horizontal_spacing=0.065, vertical_spacing=0.12, column_widths=[1.2, 1, 1, 1],
        subplot_titles=_PANELS, row_titles=directions,
    )  # fmt: skip
    for row, direction in enumerate(directions, start=1):
        figure.add_traces(_likelihoods(likely[likely["direction"] == direction], arms, colours), rows=row, cols=1)
        panel = moved[moved["direction"] == direction]
        for column, measure in enumerate(("along", "share"), start=2):
            figure.add_traces(_curves(panel, measure, arms, colours), rows=row, cols=column)
        if changed is not None:
            figure.add_traces(_weights(changed[changed["direction"] == direction], colours), rows=row, cols=4)
        for column in (1, 2):
            line = {"color": FAINT, "width": 1}
            (figure.add_vline if column == 1 else figure.add_hline)(0, line=line, row=row, col=column)
    _legend(figure, arms, colours, ordered(likely["set"], tuple(_SETS)))
    figure.update_yaxes(categoryorder="array", categoryarray=arms[::-1], col=1)
    figure.update_yaxes(rangemode="tozero", col=3)
    figure.update_yaxes(rangemode="tozero", col=4)
    for column, text in enumerate(("nats per token", "layer", "layer", "block"), start=1):
        figure.update_xaxes(title_text=text, row=len(directions), col=column)
    legend = {"orientation": "h", "yref": "container", "y": 0.01, "yanchor": "bottom", "x": 0, "xanchor": "left"}
    height = 220 + max(280, 24 * len(arms)) * len(directions)
    apply_style(figure, title, _READING, f"Responses in each set: {sample(likely)}", height=height)
    return figure.update_layout(legend=legend, margin_b=150)


def _likelihoods(rows: pd.DataFrame, arms: list[str], colours: dict[str, str]) -> list[go.Scatter]:
    """A marker with its interval for each arm and set."""
    traces = []
    for name in ordered(rows["set"], tuple(_SETS)):
        part = rows[rows["set"] == name].set_index("arm").reindex(arms).dropna(subset=["change"]).reset_index()
        hover = [
            f"{row['arm']}<br>{RESPONSES.get(name, name)} responses<br>change {number(row['change'], 3)} "
            f"[{number(row['low'], 3)}, {number(row['high'], 3)}] nats per token<br>n = {number(row['n'], 0)}"
            for _, row in part.iterrows()
        ]
        bars = {"array": part["high"] - part["change"], "arrayminus": part["change"] - part["low"]}
        traces.append(
            go.Scatter(
                x=part["change"], y=part["arm"], mode="markers", showlegend=False, hovertext=hover, hoverinfo="text",
                marker={"symbol": _SETS.get(name, "square"), "size": 10, "color": [colours[a] for a in part["arm"]],
                        "line": {"color": INK, "width": 0.5}},
                error_x={"type": "data", "color": FAINT, "thickness": 1, "width": 2, **bars},
            )
        )  # fmt: skip
    return traces


def _curves(rows: pd.DataFrame, measure: str, arms: list[str], colours: dict[str, str]) -> list[go.Scatter]:
    """A line with its band for each arm, over layers."""
    renamed = {f"{measure}_low": "low", f"{measure}_high": "high"}
    traces: list[go.Scatter] = []
    for arm in arms:
        part = rows[rows["arm"] == arm].rename(columns=renamed).sort_values("layer").dropna(subset=[measure])
        if part.empty:
            continue
        hover = [
            f"{arm}<br>layer {number(row['layer'], 0)}<br>{number(row[measure], 3)} "
            f"[{number(row['low'], 3)}, {number(row['high'], 3)}], n = {number(row['n'], 0)}"
            for _, row in part.iterrows()
        ]
        traces += band(part, "layer", colours[arm])
        traces.append(
            go.Scatter(
                x=part["layer"], y=part[measure], mode="lines", line={"color": colours[arm], "width": 2},
                showlegend=False, legendgroup=arm, hovertext=hover, hoverinfo="text",
            )
        )  # fmt: skip
    return traces


def _weights(rows: pd.DataFrame, colours: dict[str, str]) -> list[go.Scatter]:
    """A line with markers for each arm that changes weights, over blocks."""
    traces = []
    for arm in ordered(rows["arm"]):
        part = rows[rows["arm"] == arm].sort_values("block")
        hover = [
            f"{arm}<br>block {number(row['block'], 0)}<br>{number(100 * row['relative'], 2)} % of the weights' norm<br>"
            f"effective rank {number(row['effective_rank'], 0)} of {number(row['rank_limit'], 0)}"
            for _, row in part.iterrows()
        ]
        traces.append(
            go.Scatter(
                x=part["block"], y=100 * part["relative"], mode="lines+markers", showlegend=False, legendgroup=arm,
                line={"color": colours[arm], "width": 2}, marker={"size": 5}, hovertext=hover, hoverinfo="text",
            )
        )  # fmt: skip
    return traces


def _legend(figure: go.Figure, arms: list[str], colours: dict[str, str], sets: list[str]) -> None:
    """An entry for each arm, which hides its curves, and one for each marker."""
    for arm in arms:
        line = {"color": colours[arm], "width": 3}
        figure.add_trace(
            go.Scatter(x=[None], y=[None], mode="lines", line=line, name=arm, legendgroup=arm), row=1, col=2
        )
    for name in sets:
        marker = {"symbol": _SETS.get(name, "square"), "color": FAINT, "size": 9}
        shown = go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=RESPONSES.get(name, name))
        figure.add_trace(shown, row=1, col=2)
