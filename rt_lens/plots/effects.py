"""The effect and the side effects of each arm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import unescape
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from rt_lens.common.arm_labels import ArmLabel
from rt_lens.common.formatting import estimate, number
from rt_lens.plots.brackets import LABEL, comparisons_of, difference, draw_bracket, stack_brackets
from rt_lens.plots.style import (
    ARM_COLOURS,
    DIRECTIONS,
    FAINT,
    INK,
    SYMBOLS,
    Number,
    Table,
    apply_style,
    arm_colours,
    check_table,
    check_unique,
    doses_by_layer,
    legend_entry,
    ordered,
    row_estimate,
    sample,
    seeds_of,
    unsteered,
    with_minus_sign,
)

_PANEL = 328  # px: the height of the panels of `arms` without brackets


def arms(table: Table, *, comparisons: Table | None = None, title: str = "Score of every arm") -> go.Figure:
    """Draws the arms' mean scores as bars, one panel per direction, beside the untuned mean.

    Args:
        table: one row per arm and direction, of one set of prompts and one scorer. Columns: arm, direction, n (scored
            responses), mean, low, high (score), perplexity, kl (nats per token), scorer, seeds (list of int).
        comparisons: one row per pair of arms. Columns: a, a_direction, b, b_direction, scorer, n, difference (a minus
            b), low, high, p, p_holm (p corrected for all comparisons), seeds. A pair within one panel gets a bracket
            with its p; a pair across panels, such as one with the untuned arm, appears in the hover of a's bar. Rows of
            other scorers, and of other sets if both tables have a column set, are left out.
        title: heading of the figure.

    Raises:
        ValueError: if a column, all rows or the untuned arm is missing, an arm and direction have two rows, or a
            comparison is not of two arms of the table.

    Example:
        >>> shared = {"scorer": "vader", "n": 60, "perplexity": 21.0, "kl": 0.1}
        >>> figure = arms([
        ...     shared | {"arm": "untuned", "direction": "none", "mean": 0.3, "low": 0.2, "high": 0.4, "seeds": []},
        ...     shared | {"arm": "tuned", "direction": "away", "mean": -0.2, "low": -0.3, "high": -0.1, "seeds": [0]},
        ... ])
        >>> [(bars.x[0], bars.y.tolist()) for bars in figure.data]
        [('untuned', [0.3]), ('tuned', [-0.2])]
    """
    frame = _arm_rows(table)
    pairs = comparisons_of(comparisons, frame)
    untuned = _untuned(frame)["mean"]
    directions = ordered(frame["direction"], DIRECTIONS)
    panels = [_sorted_by_arm(frame[frame["direction"] == direction]) for direction in directions]
    figure = make_subplots(
        cols=len(panels),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        column_widths=[len(panel) for panel in panels],
        subplot_titles=["" if direction == "none" else f"direction: {direction}" for direction in directions],
    )
    colours = arm_colours(frame["arm"])
    low, high = _padded(np.r_[frame[["mean", "low", "high"]].to_numpy(float).ravel(), 0.0], 0.12)
    per_pixel, tallest = (high - low) / _PANEL, 0.0
    for column, panel in enumerate(panels, start=1):
        bars = go.Bar(
            x=panel["arm"],
            y=panel["mean"],
            error_y=_interval(panel, INK),
            marker_color=[colours[arm] for arm in panel["arm"]],
            hovertext=[_arm_hover(row, pairs) for _, row in panel.iterrows()],
            hoverinfo="text",
            width=0.7,
        )
        figure.add_trace(bars, row=1, col=column)
        names, ends = list(panel["arm"]), [_end(row) for _, row in panel.iterrows()]
        for name, mean, end in zip(names, panel["mean"], ends, strict=True):
            label = with_minus_sign(number(mean, 2))
            if not np.isnan(mean):
                figure.add_annotation(x=name, y=end, text=label, yshift=14 if mean >= 0 else -14, row=1, col=column)
        within = pairs[
            (pairs["a_direction"] == panel["direction"].iloc[0]) & (pairs["a_direction"] == pairs["b_direction"])
        ]
        tops = [(max(end, high, 0.0) - low) / per_pixel + LABEL for end, high in zip(ends, panel["high"], strict=True)]
        for bracket in stack_brackets(within, names, tops):
            line, note = draw_bracket(bracket, names, low, per_pixel)
            figure.add_trace(line, row=1, col=column)
            figure.add_annotation(**note, row=1, col=column)
            tallest = max(tallest, bracket.y + LABEL)
        figure.update_xaxes(range=[-0.5, len(names) - 0.5], row=1, col=column)
    figure.update_annotations(showarrow=False, bgcolor="rgba(255,255,255,0.85)")
    figure.add_hline(y=untuned, line={"dash": "dash", "color": INK, "width": 1.5})
    taller = max(0.0, tallest - _PANEL)
    figure.update_yaxes(range=[low, high + taller * per_pixel], zeroline=True, zerolinecolor=FAINT)
    figure.update_yaxes(title_text=f"mean score ({', '.join(ordered(frame['scorer']))})", col=1)
    reading = "Compare each bar with the dashed line (untuned mean). Whiskers: 95 % intervals."
    reading += " Brackets: paired p, and p after Holm’s correction." if tallest else ""
    apply_style(figure, title, reading, sample(frame), height=470 + round(taller), showlegend=False)
    figure.update_annotations(font_size=12, borderpad=0, selector={"name": "p"})
    return figure.update_layout(margin_b=40)


def dose_response(
    table: Table,
    *,
    bound: Number | None = None,
    chosen: Sequence[tuple[int, Number]] = (),
    title: str = "Dose-response of steering",
) -> go.Figure:
    """Draws the score against the multiplier, one line per layer, and the perplexity at each multiplier below it.

    Args:
        table: one row per layer and multiplier. Columns: layer (block index), multiplier (times the vector's own
            length), n, mean, low, high (score), perplexity (per token), admissible (bool: within the bound). The row of
            multiplier 0 is the unsteered model; a single one, of any layer or none, serves every line.
        bound: largest admissible perplexity, as a ratio to the unsteered one.
        chosen: (layer, multiplier) of the points to mark with a star.
        title: heading of the figure.

    Raises:
        ValueError: if a column, all rows or multiplier 0 is missing, or a chosen point is not in the table.

    Example:
        >>> row = {"layer": 20, "n": 30, "low": 0.2, "high": 0.5, "admissible": True}
        >>> figure = dose_response([
        ...     row | {"multiplier": 0, "mean": 0.3, "perplexity": 20.0},
        ...     row | {"multiplier": 2, "mean": 0.4, "perplexity": 21.0},
        ... ], bound=1.1, chosen=[(20, 2)])
        >>> [list(map(float, line.y)) for line in figure.data[:2]]  # the score, and the ratio of the perplexities
        [[0.3, 0.4], [1.0, 1.05]]
    """
    numbers = ("layer", "multiplier", "n", "mean", "low", "high", "perplexity")
    frame = check_table(table, labels=("admissible",), numbers=numbers)
    lines = doses_by_layer(frame.assign(ratio=frame["perplexity"] / unsteered(frame)["perplexity"].iloc[0]))
    ratios = pd.concat(lines.values())["ratio"]

    figure = make_subplots(rows=2, shared_xaxes=True, row_heights=[0.64, 0.36], vertical_spacing=0.07)
    # Layers are ordered, so their colours are too; the scale's yellow end is too pale for a thin line.
    shades = sample_colorscale("Viridis", np.linspace(0.0, 0.8, max(len(lines), 2)).tolist())
    for (layer, rows), shade in zip(lines.items(), shades, strict=False):
        hover = [
            f"layer {layer}, multiplier {row['multiplier']:g}<br>score {row_estimate(row)}<br>perplexity "
            f"{number(row['perplexity'])} (x {number(row['ratio'])})<br>n = {row['n']:g}"
            for _, row in rows.iterrows()
        ]
        symbols = ["circle" if admissible else "circle-open" for admissible in rows["admissible"]]
        style = {
            "x": rows["multiplier"],
            "mode": "lines+markers",
            "name": f"layer {layer}",
            "showlegend": False,
            "line": {"color": shade, "width": 2},
            "marker": {"symbol": symbols, "size": 9, "line": {"width": 2, "color": shade}},
            "hovertext": hover,
            "hoverinfo": "text",
        }
        figure.add_trace(go.Scatter(y=rows["mean"], error_y=_interval(rows, shade), **style), row=1, col=1)
        figure.add_trace(go.Scatter(y=rows["ratio"], **style), row=2, col=1)
        # Plotly's own legend entry would show the first point's symbol, hollow or not, for the whole line.
        figure.add_trace(legend_entry(f"layer {layer}", mode="lines", line={"color": shade, "width": 2}))
    if not frame["admissible"].astype(bool).all():
        hollow = {"symbol": "circle-open", "size": 9, "color": INK, "line_width": 2}
        figure.add_trace(legend_entry("above the bound", mode="markers", marker=hollow))
    if chosen:
        stars = [_row_of(lines, layer, multiplier) for layer, multiplier in chosen]
        star = {"symbol": "star", "size": 17, "color": "#D55E00", "line": {"color": "white", "width": 1.5}}
        x = [row["multiplier"] for row in stars]
        for panel, column in enumerate(("mean", "ratio"), start=1):
            y = [row[column] for row in stars]
            marks = go.Scatter(
                x=x, y=y, mode="markers", marker=star, name="chosen", showlegend=panel == 1, hoverinfo="skip"
            )
            figure.add_trace(marks, row=panel, col=1)
    wide = ratios.max() > 3 * ratios.min()
    if wide:
        figure.update_yaxes(type="log", tickvals=[1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10_000], row=2)
    if bound is not None:
        figure.add_hline(y=bound, line={"dash": "dash", "color": INK, "width": 1.5}, row=2, col=1)
        # Right of the panel, where no line runs. On a log axis an annotation, unlike a line, takes the logarithm.
        height = math.log10(bound) if wide else bound
        label = {"text": f"bound {bound:g}", "showarrow": False, "xanchor": "left"}
        figure.add_annotation(x=1.01, xref="x domain", y=height, row=2, col=1, **label)
    figure.update_yaxes(title_text="mean score", row=1)
    figure.update_yaxes(title_text="perplexity<br>(ratio to unsteered)", row=2)
    figure.update_xaxes(title_text="multiplier (negative: away)", row=2)
    reading = (
        "Look for a change of the score before the perplexity rises. Hollow: above the perplexity bound. Bars: 95 % "
        "intervals."
    )
    return apply_style(figure, title, reading, sample(frame), height=620)


def side_effects(
    table: Table,
    *,
    against: Literal["perplexity", "kl"] = "perplexity",
    title: str = "Effect and side effect of each arm",
) -> go.Figure:
    """Draws how far each arm moves the score against its side effect, in perplexity or KL.

    Args:
        table: rows as for `arms`.
        against: the side effect on the x axis: perplexity as a ratio to the untuned model's, or KL in nats per token.
        title: heading of the figure.

    Raises:
        ValueError: if a column, all rows or the untuned arm is missing, or `against` is neither.

    Example:
        >>> shared = {"scorer": "vader", "n": 60, "seeds": [0], "low": 0.2, "high": 0.4}
        >>> figure = side_effects([
        ...     shared | {"arm": "untuned", "direction": "none", "mean": 0.3, "perplexity": 20.0, "kl": 0.0},
        ...     shared | {"arm": "steered", "direction": "toward", "mean": 0.7, "perplexity": 23.0, "kl": 0.2},
        ... ])
        >>> [(point.text[0], float(point.x[0])) for point in figure.data]
        [('untuned', 1.0), ('steered, toward', 1.15)]
    """
    frame = _arm_rows(table)
    untuned = _untuned(frame)
    if against == "perplexity":
        measured, axis, none = frame["perplexity"] / untuned["perplexity"], "perplexity (ratio to untuned)", 1.0
    elif against == "kl":
        measured, axis, none = frame["kl"], "KL from untuned (nats per token)", 0.0
    else:
        raise ValueError(f"against must be 'perplexity' or 'kl', got {against!r}.")
    frame = frame.assign(side_effect=measured.where(frame["arm"] != "untuned", none))
    sign = np.where(frame["mean"] >= untuned["mean"], 1.0, -1.0)
    near, far = ((frame[side] - untuned["mean"]) * sign for side in ("low", "high"))
    frame = frame.assign(
        shift=(frame["mean"] - untuned["mean"]).abs(), low=np.minimum(near, far), high=np.maximum(near, far)
    )
    labels = [str(ArmLabel(*names)) for names in zip(frame["arm"], frame["direction"], strict=True)]
    frame = frame.assign(label=labels)
    spans = [_padded(frame["side_effect"], 0.2), _padded(frame[["low", "high", "shift"]].to_numpy().ravel(), 0.1)]
    frame = frame.assign(side=_label_sides(frame, spans, none))
    colours = arm_colours(frame["arm"])
    figure = go.Figure()
    for _, row in frame.iterrows():
        point = go.Scatter(
            x=[row["side_effect"]],
            y=[row["shift"]],
            error_y=_interval(row.to_frame().T, colours[row["arm"]], "shift"),
            mode="markers+text",
            text=[row["label"]],
            textposition=row["side"],
            marker={"color": colours[row["arm"]], "symbol": SYMBOLS.get(row["direction"], "square"), "size": 13},
            hovertext=(
                f"{row['label']}<br>shift {estimate(row['shift'], row['low'], row['high'])}<br>"
                f"{axis} {number(row['side_effect'])}<br>n = {row['n']:g}"
            ),
            hoverinfo="text",
        )
        figure.add_trace(point)
    figure.add_vline(x=none, line={"dash": "dash", "color": INK, "width": 1})
    figure.update_xaxes(title_text=axis, range=spans[0])
    figure.update_yaxes(title_text="|shift of mean score| from untuned", range=spans[1])
    reading = "Best is high and near the dashed line: a large effect, no side effect. Bars: 95 % interval of each arm."
    return apply_style(figure, title, reading, sample(frame), showlegend=False)


def _arm_rows(table: Table) -> pd.DataFrame:
    labels, numbers = ("arm", "direction", "scorer", "seeds"), ("n", "mean", "low", "high", "perplexity", "kl")
    frame = check_table(table, labels=labels, numbers=numbers)
    check_unique(frame, ["arm", "direction"], fix="Keep one set and one scorer, pooled over seeds.")
    return frame


def _untuned(frame: pd.DataFrame) -> pd.Series:
    rows = frame[frame["arm"] == "untuned"]
    if rows.empty:
        raise ValueError(
            f"table must have a row of the arm 'untuned', got {unescape(', '.join(ordered(frame['arm'])))}. Add it."
        )
    return rows.iloc[0]


def _row_of(lines: Mapping[int, pd.DataFrame], layer: int, multiplier: Number) -> pd.Series:
    rows = lines.get(layer, pd.DataFrame({"multiplier": []}))
    rows = rows[np.isclose(rows["multiplier"].astype(float), multiplier)]
    if rows.empty:
        raise ValueError(
            f"chosen must hold points of the table (layers {list(lines)}), got layer {layer}, multiplier "
            f"{multiplier:g}."
        )
    return rows.iloc[0]


def _interval(frame: pd.DataFrame, colour: str, centre: str = "mean") -> dict[str, Any]:
    up, down = frame["high"] - frame[centre], frame[centre] - frame["low"]
    return {
        "type": "data",
        "array": up.astype(float),
        "arrayminus": down.astype(float),
        "color": colour,
        "thickness": 1.5,
        "width": 4,
    }


def _arm_hover(row: pd.Series, pairs: pd.DataFrame) -> str:
    """The hover text of a bar: its estimates, and its comparisons with arms of other panels."""
    of_arm = pairs[(pairs["a"] == row["arm"]) & (pairs["a_direction"] == row["direction"])]
    across = [difference(pair) for _, pair in of_arm[of_arm["b_direction"] != row["direction"]].iterrows()]
    measures = (
        f"{row['arm']}, {row['direction']}<br>score {row_estimate(row)}<br>perplexity {number(row['perplexity'])}"
        f"<br>KL {number(row['kl'])} nats per token<br>n = {row['n']:g}, {seeds_of(row)}"
    )
    return "<br><br>".join([measures, *across])


def _end(row: pd.Series) -> float:
    """The end of the whisker on the bar's outer side."""
    reach = np.nanmax if row["mean"] >= 0 else np.nanmin
    return float(reach([row["mean"], row["high" if row["mean"] >= 0 else "low"], 0.0]))


def _sorted_by_arm(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.sort_values("arm", key=lambda arm: arm.map(ordered(arm, list(ARM_COLOURS)).index), kind="stable")


def _padded(values: Any, share: float) -> list[float]:
    """The range of the values, widened on both sides by a share of its span."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    margin = share * (high - low) if high > low else 0.05 * max(abs(high), 1.0)
    return [low - margin, high + margin]


def _label_sides(points: pd.DataFrame, spans: Sequence[Sequence[float]], line: float) -> list[str]:
    """The side of each point on which its label covers fewest error bars and earlier labels, and not the line at x."""

    def pixels(values: Any, span: Sequence[float], size: int) -> np.ndarray:
        return (np.atleast_1d(np.asarray(values, dtype=float)) - span[0]) / (span[1] - span[0]) * size

    x = pixels(points["side_effect"], spans[0], 800)
    y, low, high = (pixels(points[column], spans[1], 300) for column in ("shift", "low", "high"))
    edge = float(pixels(line, spans[0], 800)[0])
    # What a label should not cover, with a penalty: markers most, the line least.
    taken = [(px - 8, px + 8, py - 8, py + 8, 3.0) for px, py in zip(x, y, strict=True)]
    taken += [(px - 5, px + 5, down - 4, up + 4, 1.0) for px, down, up in zip(x, low, high, strict=True)]
    taken.append((edge - 2, edge + 2, 0.0, 300.0, 0.5))
    sides = []
    for px, py, label in zip(x, y, points["label"], strict=True):
        width, boxes = 8 * len(unescape(label)), {}
        for vertical, shift in (("middle", 0), ("top", 16), ("bottom", -16)):
            boxes[f"{vertical} right"] = (px + 9, px + 12 + width, py + shift - 9, py + shift + 9)
            boxes[f"{vertical} left"] = (px - 12 - width, px - 9, py + shift - 9, py + shift + 9)
        penalties = {
            side: 5 * (left < 0 or right > 800)
            + sum(weight for a, b, c, d, weight in taken if left < b and a < right and down < d and c < up)
            for side, (left, right, down, up) in boxes.items()
        }
        sides.append(min(penalties, key=lambda side: penalties[side]))
        taken.append((*boxes[sides[-1]], 3.0))
    return sides
