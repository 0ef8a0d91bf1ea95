"""Brackets over compared bars, as in journals, with the p-value written out."""

from __future__ import annotations

from collections.abc import Sequence
from html import unescape
from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go

from rt_lens.common.formatting import p_value
from rt_lens.plots.style import INK, Table, check_table, escape_html, row_estimate, seeds_of

LABEL = 26  # px from a bar's whisker to above its label
_STEP, _FOOT = 29, 6  # px: from one bracket to the next, and the length of its ends


class Bracket(NamedTuple):
    """One bracket of a panel.

    Attributes:
        left, right: positions of the two bars in the panel.
        y: height of its line, in px above the bottom of the panel.
        row: the comparison.
    """

    left: int
    right: int
    y: float
    row: pd.Series


def comparisons_of(comparisons: Table | None, frame: pd.DataFrame) -> pd.DataFrame:
    """The comparisons of the frame's scorer, and of its set if it has one, checked against its arms.

    Raises:
        ValueError: if a column is missing, an arm is not in the frame, or two arms are compared twice.
    """
    labels = ("a", "a_direction", "b", "b_direction", "scorer", "seeds")
    numbers = ("n", "difference", "low", "high", "p", "p_holm")
    if comparisons is None or not len(comparisons):
        return pd.DataFrame(columns=[*labels, *numbers])
    rows = check_table(comparisons, labels=labels, numbers=numbers, argument="comparisons")
    rows = rows[rows["scorer"].isin(frame["scorer"])]
    if "set" in rows and "set" in frame:
        rows = rows[rows["set"].isin(frame["set"])]
    pair = ["a", "a_direction", "b", "b_direction"]
    arms_drawn = set(zip(frame["arm"], frame["direction"], strict=True))
    for _, row in rows.iterrows():
        for side in ("a", "b"):
            if (row[side], row[f"{side}_direction"]) not in arms_drawn:
                raise ValueError(
                    f"comparisons must be of arms in the table, got {unescape(str(row[side]))}, "
                    f"{row[f'{side}_direction']}. Keep the rows of the arms that are drawn."
                )
    if (repeated := rows[rows.duplicated(pair)]).size:
        arms = unescape(" ".join(map(str, repeated.iloc[0][pair])))
        raise ValueError(
            f"comparisons must have one row for each pair of arms, got {arms} more than once. Keep one set and one "
            "scorer."
        )
    return rows


def stack_brackets(rows: pd.DataFrame, arms: Sequence[str], tops: Sequence[float]) -> list[Bracket]:
    """The brackets of one panel: short ones at the bottom, none across a bar, a label or another bracket.

    Args:
        rows: comparisons of two arms of this panel.
        arms: their names, from left to right.
        tops: height of each bar with its label, in px above the bottom of the panel.
    """
    spans: list[tuple[int, int, pd.Series]] = []
    for _, row in rows.iterrows():
        ends = arms.index(row["a"]), arms.index(row["b"])
        spans.append((min(ends), max(ends), row))
    placed: list[Bracket] = []
    for left, right, row in sorted(spans, key=lambda span: (span[1] - span[0], span[0])):
        heights = [tops[bar] + _FOOT + 4 for bar in range(left, right + 1)]
        # Brackets that share only one bar count too, because their labels are wider than they are.
        heights += [other.y + _STEP for other in placed if other.left <= right and left <= other.right]
        placed.append(Bracket(left, right, max(heights), row))
    return placed


def draw_bracket(bracket: Bracket, arms: Sequence[str], floor: float, per_pixel: float) -> tuple[go.Scatter, dict]:
    """The line and the label of a bracket, in units of the y axis: `floor` + px x `per_pixel`."""
    height, foot = (floor + px * per_pixel for px in (bracket.y, bracket.y - _FOOT))
    ends = [arms[bar] for bar in (bracket.left, bracket.left, bracket.right, bracket.right)]
    hover = difference(bracket.row)
    line = go.Scatter(
        x=ends,
        y=[foot, height, height, foot],
        mode="lines",
        line={"color": INK, "width": 1.2},
        hovertext=hover,
        hoverinfo="text",
        showlegend=False,
    )
    label = {
        "x": (bracket.left + bracket.right) / 2,
        "y": height,
        "yshift": 11,
        "text": significance(bracket.row),
        "hovertext": hover,
        "name": "p",
    }
    return line, label


def significance(row: pd.Series) -> str:
    """`p = 0.010; Holm 0.070`, or p alone where it is not corrected."""
    corrected = "" if pd.isna(row["p_holm"]) else f"; Holm {p_value(row['p_holm']).removeprefix('= ')}"
    return escape_html(f"p {p_value(row['p'])}{corrected}")  # Plotly reads a bare < as the start of a tag


def difference(row: pd.Series) -> str:
    """The hover text of a comparison: the difference, its p-values, n and seeds."""
    return (
        f"{row['a']} minus {row['b']}: {row_estimate(row, 'difference')}<br>{significance(row)}"
        f"<br>n = {row['n']:g}, {seeds_of(row)}"
    )
