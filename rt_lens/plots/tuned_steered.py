"""Tuned models under steering: their resistance to it, and its side effects.

The tables hold measured scores; no figure in this module knows a model or a scorer.
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
    check_unique,
    escape_html,
    ordered,
    row_estimate,
    sample,
    whiskers,
    with_measure,
    with_minus_sign,
    with_new_names,
)

_OLD_NAMES = {
    "damage": "side_effect",
    "damage_low": "side_effect_low",
    "damage_high": "side_effect_high",
    "n_damage": "n_side_effect",
}


def resistance(
    table: Table, moved: Table | None = None, *, title: str = "Do tuned models resist steering?"
) -> go.Figure:
    """Draws the score over arms and steering multipliers as a heat map, and how far steering moves each arm.

    Args:
        table: one row per arm and multiplier, arms in the order in which to draw them. Columns: arm, multiplier (times
            the vector's own length), n (scored responses), mean, low, high (score; 0 is neutral), seed.
        moved: one row per arm, for a second panel. Columns: arm, multiplier (m), n, mean, low, high (score at +m
            minus score at -m, on the same prompts).
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing, an arm and multiplier or a moved arm has two rows, or a
            moved arm is not in the table.

    Example:
        >>> row = {"arm": "untuned", "n": 40, "mean": 0.3, "low": 0.2, "high": 0.4, "seed": 0}
        >>> figure = resistance([row | {"multiplier": m, "mean": 0.3 + 0.1 * m} for m in (-2, 0, 2)])
        >>> figure.data[0].y, figure.data[0].text
        (('untuned',), (['0.10', '0.30', '0.50'],))
    """
    frame = check_table(table, labels=("arm", "seed"), numbers=("multiplier", "n", "mean", "low", "high"))
    check_unique(frame, ["arm", "multiplier"])
    frame, arms = with_measure(frame, "score"), ordered(frame["arm"])
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
        z=[of_arm["score"] for of_arm in rows],
        y=arms,
        coloraxis="coloraxis",
        text=[
            ["" if np.isnan(mean) else with_minus_sign(number(mean, 2)) for mean in of_arm["score"]] for of_arm in rows
        ],
        texttemplate="%{text}",
        hovertext=[
            [
                f"{arm}, multiplier {multiplier:g}<br>score {row_estimate(cell, 'score')}<br>n = {number(cell['n'], 0)}"
                for multiplier, cell in of_arm.iterrows()
            ]
            for arm, of_arm in zip(arms, rows, strict=True)
        ],
        hoverinfo="text",
        xgap=1,
        ygap=1,
    )
    figure.add_trace(heat, row=1, col=1)
    # Cells are placed by their index, because multipliers need not be evenly spaced.
    names = [with_minus_sign(f"{multiplier:g}") for multiplier in multipliers]
    ticks = {"tickvals": list(range(len(names))), "ticktext": names}
    axis_title = "multiplier of steering (negative: away)"
    figure.update_xaxes(title_text=axis_title, showgrid=False, zeroline=False, **ticks, row=1, col=1)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, zeroline=False)
    reading = "A row with one colour from left to right resists steering. In the cells: mean score."
    if shifts is not None:
        _draw_moved(figure, shifts)
        reading += " Right: nearer to 0 is more resistance. Whiskers: 95 % intervals."
    hole = any(of_arm["score"].isna().any() for of_arm in rows)
    reading += " Grey: not measured." if hole else ""
    limit = float(np.nanmax(np.abs(frame["score"]), initial=0.0)) or 1.0
    bar = {"title": {"text": "score", "side": "right"}}
    figure.update_layout(coloraxis={"colorscale": "RdBu_r", "cmin": -limit, "cmax": limit, "colorbar": bar})
    height = 220 + max(46 * len(arms), 180)
    background = "#D0D0D0" if hole else "white"
    return apply_style(figure, title, reading, sample(frame), height=height, plot_bgcolor=background)


def effect_against_side_effect(
    table: Table,
    *,
    effect: str = "mood score",
    side_effect: str = "KL on neutral prompts (nats)",
    title: str = "Effect of steering against its side effect",
) -> go.Figure:
    """Draws the side effect of steering against its effect: a line per arm through its multipliers, in their order.

    It serves KL-then-steer (Stickland et al. 2024), which claims a smaller side effect at the same effect.

    Args:
        table: one row per arm and multiplier. Columns: arm, multiplier (times the vector's own length), effect,
            effect_low, effect_high (on n responses), side_effect, side_effect_low, side_effect_high (on n_side_effect
            prompts or tokens), n, n_side_effect, seed. NaN or None where nothing was measured; a line has a gap there.
        effect: title of the x axis, with its unit.
        side_effect: title of the y axis, with its unit.
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing, or an arm and multiplier come twice.

    Example:
        >>> row = {"arm": "steered", "effect": 0.3, "effect_low": 0.2, "effect_high": 0.4, "n": 40, "seed": 0}
        >>> row |= {"side_effect": 0.1, "side_effect_low": 0.08, "side_effect_high": 0.12, "n_side_effect": 30}
        >>> figure = effect_against_side_effect([row | {"multiplier": m, "effect": 0.1 * m} for m in (-2, 0, 2)])
    """
    measured = [f"{name}{end}" for name in ("effect", "side_effect") for end in ("", "_low", "_high")]
    numbers = ("multiplier", *measured, "n", "n_side_effect")
    frame = check_table(with_new_names(table, _OLD_NAMES), labels=("arm", "seed"), numbers=numbers)
    check_unique(frame, ["arm", "multiplier"])
    effect, side_effect = escape_html([effect, side_effect])
    colours = arm_colours(frame["arm"])
    figure = go.Figure()
    for index, arm in enumerate(ordered(frame["arm"], list(ARM_COLOURS))):
        rows = frame[frame["arm"] == arm].sort_values("multiplier")
        line = go.Scatter(
            x=rows["effect"],
            y=rows["side_effect"],
            error_x=whiskers(rows, "effect", colours[arm]),
            error_y=whiskers(rows, "side_effect", colours[arm]),
            mode="lines+markers+text",
            text=[with_minus_sign(f"{multiplier:g}") for multiplier in rows["multiplier"]],
            textposition=_corners(rows, "top" if index % 2 == 0 else "bottom"),
            textfont={"color": colours[arm], "size": 13},
            line={"color": colours[arm], "width": 2},
            marker_size=8,
            name=arm,
            hovertext=[
                f"{arm}, multiplier {row['multiplier']:g}<br>{effect} {row_estimate(row, 'effect')}, n = "
                f"{number(row['n'], 0)}<br>{side_effect} {row_estimate(row, 'side_effect')}, n = "
                f"{number(row['n_side_effect'], 0)}"
                for _, row in rows.iterrows()
            ],
            hoverinfo="text",
            cliponaxis=False,
        )
        figure.add_trace(line)
    figure.update_xaxes(title_text=effect, zerolinecolor=FAINT)
    worst = float(np.nanmax(frame[["side_effect", "side_effect_high"]], initial=0.0)) or 1.0
    # Room below 0 for the multiplier of a point without side effect.
    lowest = float(np.nanmin(frame[["side_effect", "side_effect_low"]], initial=0.0))
    figure.update_yaxes(title_text=side_effect, zerolinecolor=FAINT, range=[lowest - 0.07 * worst, 1.05 * worst])
    reading = (
        "At the same effect, the lower line has the smaller side effect. Labels: multipliers. Whiskers: 95 % intervals."
    )
    size = sample(frame[["n_side_effect"]].rename(columns={"n_side_effect": "n"}))
    facts = f"Effect: {sample(frame[['n']])} Side effect: {size} {sample(frame[['seed']])}"
    return apply_style(figure, title, reading, facts, height=560, legend_traceorder="normal")


def _corners(rows: pd.DataFrame, side: str) -> list[str]:
    """For every point of a line that rises to both sides, the corner of its whiskers that the line does not cross."""
    rising = np.sign(rows["multiplier"]) * np.sign(rows["multiplier"].corr(rows["effect"]))
    return [f"{side} {'right' if (sign < 0) == (side == 'top') else 'left'}" for sign in rising]


def _moved_rows(moved: Table, arms: list[str]) -> pd.DataFrame:
    frame = check_table(moved, labels=("arm",), numbers=("multiplier", "n", "mean", "low", "high"), argument="moved")
    check_unique(frame, ["arm"], "moved")
    unknown = [arm for arm in frame["arm"] if arm not in arms]
    if unknown:
        raise ValueError(
            f"moved must be of arms in the table ({unescape(', '.join(arms))}), got {unescape(', '.join(unknown))}. "
            "Add the arm's rows to the table."
        )
    return with_measure(frame.sort_values("arm", key=lambda column: column.map(arms.index)), "shift")


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
    axis_title = f"moved by steering<br>(score at +{dose} minus at −{dose})"
    figure.update_xaxes(title_text=axis_title, rangemode="tozero", row=1, col=2)
