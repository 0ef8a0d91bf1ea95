"""What steering does to models that were tuned: whether they resist it, and what it costs them.

Scores come measured; no figure here knows of a model or a scorer.
"""

from __future__ import annotations

from html import unescape

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rt_lens.common.formatting import number
from rt_lens.plots.style import (
    ARM_COLOURS,
    FAINT,
    INK,
    Table,
    apply_style,
    arm_colours,
    check_table,
    escape_html,
    ordered,
    row_estimate,
    sample,
    with_minus_sign,
)
from rt_lens.plots.tuned import once, renamed, whiskers


def resistance(
    table: Table, moved: Table | None = None, *, title: str = "Do tuned models resist steering?"
) -> go.Figure:
    """Heat map of the score over arms and steering multipliers; at its right, how far steering moves each arm.

    Args:
        table: one row per arm and multiplier, arms in the order in which to draw them. Columns: arm, multiplier (times
            the vector's own length), n (scored responses), mean, low, high (score; 0 is neutral), seed.
        moved: one row per arm, or none at all: no panel. Columns: arm, multiplier (m), n, mean, low, high (score at +m
            minus score at -m, on the same prompts).
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing, an arm and multiplier or a moved arm comes twice, or a moved
            arm is not in the table.

    Example:
        >>> row = {"arm": "untuned", "n": 40, "mean": 0.3, "low": 0.2, "high": 0.4, "seed": 0}
        >>> figure = resistance([row | {"multiplier": m, "mean": 0.3 + 0.1 * m} for m in (-2, 0, 2)])
    """
    frame = check_table(table, words=("arm", "seed"), numbers=("multiplier", "n", "mean", "low", "high"))
    once(frame, ["arm", "multiplier"])
    frame, arms = renamed(frame, "score"), ordered(frame["arm"])
    shifts = None if moved is None else _moved_rows(moved, arms)
    multipliers = sorted(frame["multiplier"].unique())
    cells = frame.set_index(["arm", "multiplier"])
    rows = [cells.loc[arm].reindex(multipliers) for arm in arms]
    figure = make_subplots(
        cols=1 if shifts is None else 2,
        shared_yaxes=True,
        column_widths=None if shifts is None else [0.64, 0.36],
        horizontal_spacing=0.04,
    )
    heat = go.Heatmap(
        z=[own["score"] for own in rows],
        y=arms,
        coloraxis="coloraxis",
        text=[["" if np.isnan(mean) else with_minus_sign(number(mean, 2)) for mean in own["score"]] for own in rows],
        texttemplate="%{text}",
        hovertext=[
            [
                f"{arm}, multiplier {multiplier:g}<br>score {row_estimate(cell, 'score')}<br>n = {number(cell['n'], 0)}"
                for multiplier, cell in own.iterrows()
            ]
            for arm, own in zip(arms, rows, strict=True)
        ],
        hoverinfo="text",
        xgap=1,
        ygap=1,
    )
    figure.add_trace(heat, row=1, col=1)
    # Places are counted, for the multipliers need not be evenly spaced.
    names = [with_minus_sign(f"{multiplier:g}") for multiplier in multipliers]
    ticks = {"tickvals": list(range(len(names))), "ticktext": names}
    words = "multiplier of steering (negative: away)"
    figure.update_xaxes(title_text=words, showgrid=False, zeroline=False, **ticks, row=1, col=1)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, zeroline=False)
    reading = "A row that keeps its colour from left to right resists steering. In the cells: mean score."
    if shifts is not None:
        _draw_moved(figure, shifts)
        reading += " Right: the nearer to 0, the more it resists; whiskers are 95 % intervals."
    hole = any(own["score"].isna().any() for own in rows)
    reading += " Grey: not measured." if hole else ""
    limit = float(np.nanmax(np.abs(frame["score"]), initial=0.0)) or 1.0
    bar = {"title": {"text": "score", "side": "right"}}
    figure.update_layout(coloraxis={"colorscale": "RdBu_r", "cmin": -limit, "cmax": limit, "colorbar": bar})
    height = 220 + max(46 * len(arms), 180)
    background = "#D0D0D0" if hole else "white"
    return apply_style(figure, title, reading, sample(frame), height=height, plot_bgcolor=background)


def effect_against_damage(
    table: Table,
    *,
    effect: str = "mood score",
    damage: str = "KL on neutral prompts (nats)",
    title: str = "Effect of steering against its damage",
) -> go.Figure:
    """What steering costs at each effect: a line per arm through its multipliers, in their order.

    Made for KL-then-steer (Stickland et al. 2024), whose claim is less damage at the same effect.

    Args:
        table: one row per arm and multiplier. Columns: arm, multiplier (times the vector's own length), effect,
            effect_low, effect_high (on n responses), damage, damage_low, damage_high (on n_damage prompts or tokens),
            n, n_damage, seed. NaN or None where nothing was measured; a line has a gap there.
        effect: title of the x axis, with its unit.
        damage: title of the y axis, with its unit.
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing, or an arm and multiplier come twice.

    Example:
        >>> row = {"arm": "steered", "effect": 0.3, "effect_low": 0.2, "effect_high": 0.4, "n": 40, "seed": 0}
        >>> row |= {"damage": 0.1, "damage_low": 0.08, "damage_high": 0.12, "n_damage": 30}
        >>> figure = effect_against_damage([row | {"multiplier": m, "effect": 0.1 * m} for m in (-2, 0, 2)])
    """
    measured = [f"{name}{end}" for name in ("effect", "damage") for end in ("", "_low", "_high")]
    frame = check_table(table, words=("arm", "seed"), numbers=("multiplier", *measured, "n", "n_damage"))
    once(frame, ["arm", "multiplier"])
    effect, damage = escape_html([effect, damage])
    colours = arm_colours(frame["arm"])
    figure = go.Figure()
    for place, arm in enumerate(ordered(frame["arm"], list(ARM_COLOURS))):
        own = frame[frame["arm"] == arm].sort_values("multiplier")
        line = go.Scatter(
            x=own["effect"],
            y=own["damage"],
            error_x=whiskers(own, "effect", colours[arm]),
            error_y=whiskers(own, "damage", colours[arm]),
            mode="lines+markers+text",
            text=[with_minus_sign(f"{multiplier:g}") for multiplier in own["multiplier"]],
            textposition=_corners(own, "top" if place % 2 == 0 else "bottom"),
            textfont={"color": colours[arm], "size": 13},
            line={"color": colours[arm], "width": 2},
            marker_size=8,
            name=arm,
            hovertext=[
                f"{arm}, multiplier {row['multiplier']:g}<br>{effect} {row_estimate(row, 'effect')}, n = "
                f"{number(row['n'], 0)}<br>{damage} {row_estimate(row, 'damage')}, n = {number(row['n_damage'], 0)}"
                for _, row in own.iterrows()
            ],
            hoverinfo="text",
            cliponaxis=False,
        )
        figure.add_trace(line)
    figure.update_xaxes(title_text=effect, zerolinecolor=FAINT)
    worst = float(np.nanmax(frame[["damage", "damage_high"]], initial=0.0)) or 1.0
    # Room below 0, where the multiplier of an undamaged point may stand.
    lowest = float(np.nanmin(frame[["damage", "damage_low"]], initial=0.0))
    figure.update_yaxes(title_text=damage, zerolinecolor=FAINT, range=[lowest - 0.07 * worst, 1.05 * worst])
    reading = (
        "At the same effect, the lower line does less damage. At the points: the multiplier. Whiskers: 95 % intervals."
    )
    size = sample(frame[["n_damage"]].rename(columns={"n_damage": "n"}))
    facts = f"Effect: {sample(frame[['n']])} Damage: {size} {sample(frame[['seed']])}"
    return apply_style(figure, title, reading, facts, height=560, legend_traceorder="normal")


def _corners(own: pd.DataFrame, side: str) -> list[str]:
    """For every point of a line that rises to both sides, the corner of its whiskers through which no line runs."""
    rising = np.sign(own["multiplier"]) * np.sign(own["multiplier"].corr(own["effect"]))
    return [f"{side} {'right' if (sign < 0) == (side == 'top') else 'left'}" for sign in rising]


def _moved_rows(moved: Table, arms: list[str]) -> pd.DataFrame:
    frame = check_table(moved, words=("arm",), numbers=("multiplier", "n", "mean", "low", "high"), argument="moved")
    once(frame, ["arm"], "moved")
    strangers = [arm for arm in frame["arm"] if arm not in arms]
    if strangers:
        raise ValueError(
            f"moved must be of arms in the table ({unescape(', '.join(arms))}), got {unescape(', '.join(strangers))}. "
            "Add the arm's rows to the table."
        )
    return renamed(frame.sort_values("arm", key=lambda own: own.map(arms.index)), "shift")


def _draw_moved(figure: go.Figure, shifts: pd.DataFrame) -> None:
    colours, doses = arm_colours(shifts["arm"]), shifts["multiplier"].unique()
    for _, row in shifts.iterrows():
        dot = go.Scatter(
            x=[row["shift"]],
            y=[row["arm"]],
            error_x=whiskers(row.to_frame().T.astype({"shift": float}), "shift", colours[row["arm"]]),
            mode="markers",
            marker={"color": colours[row["arm"]], "size": 11},
            hovertext=(
                f"{row['arm']}<br>multiplier {row['multiplier']:g} against −{row['multiplier']:g}<br>"
                f"moved by {row_estimate(row, 'shift')}<br>n = {number(row['n'], 0)}"
            ),
            hoverinfo="text",
            showlegend=False,
        )
        figure.add_trace(dot, row=1, col=2)
    figure.add_vline(x=0, line={"dash": "dash", "color": INK, "width": 1.5}, row=1, col=2)
    dose = f"{doses[0]:g}" if len(doses) == 1 else "m"
    words = f"moved by steering<br>(score at +{dose} minus at −{dose})"
    figure.update_xaxes(title_text=words, rangemode="tozero", row=1, col=2)
