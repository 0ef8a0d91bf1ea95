"""Effect against side effect: the arms that no other arm beats on both."""

from __future__ import annotations

import math
from html import unescape
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from rt_lens.common.arm_labels import ArmLabel
from rt_lens.common.formatting import number
from rt_lens.plots.style import (
    FAINT,
    INK,
    SYMBOLS,
    Table,
    apply_style,
    arm_colours,
    check_table,
    check_unique,
    ordered,
    row_estimate,
    sample,
    seeds_of,
)

_AXIS_TITLES = {"kl": "KL from the untuned model (nats per token)", "perplexity": "perplexity on neutral texts"}
_PANEL = (900.0, 330.0)  # size in pixels of the panel on a page, in which labels must not overlap
_LABEL_HEIGHT, _LETTER = 19.0, 7.6


class _Box(NamedTuple):
    """An area that a label should not cover, in pixels of the panel; `weight` is the penalty."""

    left: float
    right: float
    low: float
    high: float
    weight: float = 1.0

    def covers(self, other: _Box) -> bool:
        return self.left < other.right and other.left < self.right and self.low < other.high and other.low < self.high


def pareto(
    table: Table, *, against: Literal["kl", "perplexity"] = "kl", title: str = "Effect against side effect"
) -> go.Figure:
    """Draws the score of every arm against its side effect; the Pareto-efficient arms are filled and joined.

    Args:
        table: one row per arm and direction, of one set and one scorer. Columns: arm, direction, set, scorer, n, mean,
            low, high (score), seeds (list of int), n_texts, efficient (bool), kl or perplexity and, if measured, their
            intervals kl_low, kl_high and so on. `ArmScores.pareto` and `rt_lens.results.efficient` return such rows.
        against: the side effect on the x axis.
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing, an arm and direction have two rows, or `against` is neither.

    Example:
        >>> row = {"arm": "steered", "direction": "toward", "set": "test", "scorer": "vader", "n": 60, "seeds": [0]}
        >>> row |= {"mean": 0.6, "low": 0.5, "high": 0.7, "kl": 0.15, "kl_low": 0.1, "kl_high": 0.2, "n_texts": 18}
        >>> figure = pareto([row | {"efficient": True}])
        >>> figure.data[1].name, figure.data[1].x, figure.data[1].y
        ('steered, toward', (0.15,), (0.6,))
    """
    if against not in _AXIS_TITLES:
        raise ValueError(f"against must be 'kl' or 'perplexity', got {against!r}.")
    labels = ("arm", "direction", "set", "scorer", "seeds", "efficient")
    frame = check_table(table, labels=labels, numbers=("n", "mean", "low", "high", against, "n_texts"))
    check_unique(frame, ["arm", "direction"], fix="Keep one set and one scorer, pooled over seeds.")
    for end in ("_low", "_high"):
        frame[f"side_effect{end}"] = frame.get(f"{against}{end}", pd.Series(np.nan, frame.index)).astype(float)
    frame = frame.assign(side_effect=frame[against]).dropna(subset=["side_effect", "mean"]).reset_index(drop=True)
    if frame.empty:
        raise ValueError(
            f"table must hold {against} in at least one row, got only empty values. Measure the arms on texts."
        )
    frame["label"] = [
        str(ArmLabel(arm, direction)) for arm, direction in zip(frame["arm"], frame["direction"], strict=True)
    ]
    spans = [
        _span(frame[["side_effect", "side_effect_low", "side_effect_high"]]),
        _span(frame[["mean", "low", "high"]]),
    ]
    figure = go.Figure([*_fronts(frame), *_marks(frame, against)])
    _add_labels(figure, frame, spans)
    figure.update_xaxes(title_text=f"{_AXIS_TITLES[against]}: less is better", range=spans[0], zeroline=False)
    scorers = ", ".join(ordered(frame["scorer"]))
    figure.update_yaxes(title_text=f"mean score ({scorers})", range=spans[1], zerolinecolor=FAINT)
    reading = (
        "Filled and joined: no other arm of that direction has at least as good a score and no larger side effect. "
        "Best is left and high (low for away). Whiskers: 95 % intervals; the choice of filled marks ignores them."
    )
    texts = sample(frame[["n_texts"]].rename(columns={"n_texts": "n"})).replace(".", " texts.")
    facts = f"Score: {sample(frame)} Side effect: {texts}"
    return apply_style(figure, title, reading, facts, height=520, showlegend=False)


def _fronts(frame: pd.DataFrame) -> list[go.Scatter]:
    """For each direction a line through its efficient marks and those of the arms without a direction."""
    best = frame[frame["efficient"].astype(bool)]
    directions = [direction for direction in ordered(best["direction"]) if direction != "none"] or ["none"]
    lines = []
    for direction in directions:
        rows = best[best["direction"].isin([direction, "none"])].sort_values("side_effect")
        line = {"color": FAINT, "width": 1.5, "dash": "dot"}
        lines.append(go.Scatter(x=rows["side_effect"], y=rows["mean"], mode="lines", line=line, hoverinfo="skip"))
    return lines


def _marks(frame: pd.DataFrame, against: str) -> list[go.Scatter]:
    colours, marks = arm_colours(frame["arm"]), []
    for _, row in frame.iterrows():
        colour, symbol = colours[row["arm"]], SYMBOLS.get(row["direction"], "square")
        hollow = not row["efficient"]
        marks.append(
            go.Scatter(
                x=[row["side_effect"]],
                y=[row["mean"]],
                error_x=_whisker(row, "side_effect", "side_effect_low", "side_effect_high", colour),
                error_y=_whisker(row, "mean", "low", "high", colour),
                mode="markers",
                marker={
                    "color": "white" if hollow else colour,
                    "symbol": symbol,
                    "size": 13,
                    "line": {"width": 2.5, "color": colour},
                },
                name=row["label"],
                hovertext=(
                    f"{row['label']}{'' if hollow else ' (Pareto-efficient)'}<br>"
                    f"{row['set']}, {row['scorer']} {row_estimate(row)}, n = {row['n']:g}<br>"
                    f"{against} {row_estimate(row, 'side_effect')}, n = {number(row['n_texts'], 0)} texts"
                    f"<br>{seeds_of(row)}"
                ),
                hoverinfo="text",
            )
        )
    return marks


def _whisker(row: pd.Series, centre: str, low: str, high: str, colour: str) -> dict[str, Any]:
    up, down = row[high] - row[centre], row[centre] - row[low]
    style = {"type": "data", "color": colour, "thickness": 1.5, "width": 4}
    return {**style, "array": [float(up)], "arrayminus": [float(down)], "visible": bool(np.isfinite([up, down]).all())}


def _span(values: pd.DataFrame) -> list[float]:
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    margin = 0.12 * (high - low) if high > low else 0.05 * max(abs(high), 1.0)
    return [low - margin, high + margin]


def _add_labels(figure: go.Figure, frame: pd.DataFrame, spans: list[list[float]]) -> None:
    """Adds the labels: beside their marks where there is room, else farther away with a line to the mark."""
    pixels = {
        column: ((frame[column] - spans[axis][0]) / (spans[axis][1] - spans[axis][0]) * _PANEL[axis]).tolist()
        for axis, column in [
            (0, "side_effect"),
            (0, "side_effect_low"),
            (0, "side_effect_high"),
            (1, "mean"),
            (1, "low"),
            (1, "high"),
        ]
    }
    taken: list[_Box] = []
    for x, left, right, y, low, high in zip(*pixels.values(), strict=True):
        taken.append(_Box(x - 9, x + 9, y - 9, y + 9, 3.0))
        if math.isfinite(left + right):
            taken.append(_Box(left, right, y - 3, y + 3))
        if math.isfinite(low + high):
            taken.append(_Box(x - 3, x + 3, low, high))
    rows = frame[["side_effect", "mean", "label"]].itertuples(index=False, name=None)
    for (side_effect, mean, label), x, y in zip(rows, pixels["side_effect"], pixels["mean"], strict=True):
        box, (right, up) = _free_box(x, y, _LETTER * len(unescape(label)) + 6, taken)
        taken.append(box._replace(weight=10.0))
        figure.add_annotation(
            x=side_effect, y=mean, ax=right, ay=-up, text=label, showarrow=True, arrowhead=0, arrowwidth=1, standoff=8,
            arrowcolor=FAINT if abs(up) > 20 else "rgba(0,0,0,0)", font_color=INK, bgcolor="rgba(255,255,255,0.75)",
        )  # fmt: skip


def _free_box(x: float, y: float, width: float, taken: list[_Box]) -> tuple[_Box, tuple[float, float]]:
    """The box near a mark in which its label covers least, and the distance of its centre from the mark."""
    shifts = [
        (side * (width / 2 + 12), lift)
        for lift in (0.0, 18.0, -18.0, 36.0, -36.0, 60.0, -60.0, 90.0, -90.0)
        for side in (1.0, -1.0)
    ]
    shifts += [(0.0, lift) for lift in (22.0, -22.0, 44.0, -44.0)]
    boxes = [
        _Box(x + dx - width / 2, x + dx + width / 2, y + dy - _LABEL_HEIGHT / 2, y + dy + _LABEL_HEIGHT / 2)
        for dx, dy in shifts
    ]

    def penalty(index: int) -> float:
        box = boxes[index]
        outside = box.left < 0 or box.right > _PANEL[0] or box.low < 0 or box.high > _PANEL[1]
        distance = abs(shifts[index][1]) / 100
        return 5 * outside + distance + sum(other.weight for other in taken if box.covers(other))

    best = min(range(len(boxes)), key=penalty)
    return boxes[best], shifts[best]
