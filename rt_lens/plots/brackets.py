"""Brackets over compared bars, as journals draw them, but with the p-value written out."""

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
        left, right: places of the two bars in the panel.
        y: height of its line, in px above the panel's floor.
        row: the comparison.
    """

    left: int
    right: int
    y: float
    row: pd.Series


def compared(comparisons: Table | None, frame: pd.DataFrame) -> pd.DataFrame:
    """The comparisons of the frame's scorer (and set, if it has one), checked against its arms."""
    words = ("a", "a_direction", "b", "b_direction", "scorer", "seeds")
    numbers = ("n", "difference", "low", "high", "p", "p_holm")
    if comparisons is None or not len(comparisons):
        return pd.DataFrame(columns=[*words, *numbers])
    rows = check_table(comparisons, words=words, numbers=numbers, argument="comparisons")
    rows = rows[rows["scorer"].isin(frame["scorer"])]
    if "set" in rows and "set" in frame:
        rows = rows[rows["set"].isin(frame["set"])]
    pair = ["a", "a_direction", "b", "b_direction"]
    drawn = set(zip(frame["arm"], frame["direction"], strict=True))
    for _, row in rows.iterrows():
        for side in ("a", "b"):
            if (row[side], row[f"{side}_direction"]) not in drawn:
                raise ValueError(
                    f"comparisons must be of arms in the table, got {unescape(str(row[side]))}, "
                    f"{row[f'{side}_direction']}. Keep the rows of the arms that are drawn."
                )
    if (again := rows[rows.duplicated(pair)]).size:
        arms = unescape(" ".join(map(str, again.iloc[0][pair])))
        raise ValueError(
            f"comparisons must have one row for each pair of arms, got {arms} more than once. Keep one set and one "
            "scorer."
        )
    return rows


def stacked(rows: pd.DataFrame, arms: Sequence[str], tops: Sequence[float]) -> list[Bracket]:
    """The brackets of one panel, short ones below, none through a bar, a label or another bracket.

    Args:
        rows: comparisons of two arms of this panel.
        arms: names, from left to right.
        tops: px above the panel's floor that each bar with its label takes.
    """
    spans: list[tuple[int, int, pd.Series]] = []
    for _, row in rows.iterrows():
        ends = arms.index(row["a"]), arms.index(row["b"])
        spans.append((min(ends), max(ends), row))
    placed: list[Bracket] = []
    for left, right, row in sorted(spans, key=lambda span: (span[1] - span[0], span[0])):
        applied = [tops[bar] + _FOOT + 4 for bar in range(left, right + 1)]
        # Those that share but a bar count too, for their labels are wider than they are.
        applied += [other.y + _STEP for other in placed if other.left <= right and left <= other.right]
        placed.append(Bracket(left, right, max(applied), row))
    return placed


def drawn(bracket: Bracket, arms: Sequence[str], floor: float, per_pixel: float) -> tuple[go.Scatter, dict]:
    """The bracket's line and its label, in the panel's own units: `floor` + px x `per_pixel`."""
    height, foot = (floor + px * per_pixel for px in (bracket.y, bracket.y - _FOOT))
    ends = [arms[place] for place in (bracket.left, bracket.left, bracket.right, bracket.right)]
    told = difference(bracket.row)
    line = go.Scatter(
        x=ends,
        y=[foot, height, height, foot],
        mode="lines",
        line={"color": INK, "width": 1.2},
        hovertext=told,
        hoverinfo="text",
        showlegend=False,
    )
    label = {
        "x": (bracket.left + bracket.right) / 2,
        "y": height,
        "yshift": 11,
        "text": significance(bracket.row),
        "hovertext": told,
        "name": "p",
    }
    return line, label


def significance(row: pd.Series) -> str:
    """`p = 0.010; Holm 0.070`, or p alone where it was not corrected."""
    corrected = "" if pd.isna(row["p_holm"]) else f"; Holm {p_value(row['p_holm']).removeprefix('= ')}"
    return escape_html(f"p {p_value(row['p'])}{corrected}")  # Plotly reads a bare < as the start of a tag


def difference(row: pd.Series) -> str:
    """The comparison in full, for a hover."""
    return (
        f"{row['a']} minus {row['b']}: {row_estimate(row, 'difference')}<br>{significance(row)}"
        f"<br>n = {row['n']:g}, {seeds_of(row)}"
    )
