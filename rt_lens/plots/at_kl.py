"""Effect against damage, one curve per arm: what each does to the behaviour at the same KL from the untuned model."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rt_lens.common.formatting import number
from rt_lens.plots.style import (
    DIRECTIONS,
    INK,
    SYMBOLS,
    Table,
    apply_style,
    arm_colours,
    band,
    check_table,
    check_unique,
    ordered,
    row_estimate,
    sample,
    seeds_of,
)

_LABELS = ("arm", "direction", "set", "scorer", "seeds")
_NUMBERS = ("budget", "n", "mean", "low", "high", "kl", "n_texts")
_AXES = {
    "neutral": "KL (nats per token, logarithmic)",
    "own": "KL on the behaviour's own prompts (nats per token, logarithmic)",
}
_READING = {
    "neutral": (
        "KL from the untuned model on neutral texts: the damage. At one KL, the arm furthest from the dashed line "
        "moves the behaviour most. Markers stand at the KL reached on texts that set no strength."
    ),
    "own": (
        "KL from the untuned model on its own responses to the behaviour's prompts, which no budget limits. Each arm "
        "is at the budgets of neutral text; one further right at the same effect changes these responses more."
    ),
}
_ROUND = [factor * 10.0**power for power in range(-6, 2) for factor in (1, 3)]
_HEADINGS = {"toward": "toward<br>higher: more effect", "away": "away<br>lower: more effect", "none": ""}


def effect_at_kl(
    table: Table,
    gaps: Table | None = None,
    *,
    budget: float | None = None,
    on: Literal["neutral", "own"] = "neutral",
    title: str = "Effect at equal damage",
) -> go.Figure:
    """Draws the score of every arm against its KL from the untuned model, a panel for each direction.

    Args:
        table: one row per arm, direction and budget, of one set and one scorer, and one of the untuned model, whose
            direction is `none`. An arm without a strength has one row, without a budget: a point. Columns: arm,
            direction, budget, set, scorer, n, mean, low, high (score), seeds (list of int), kl (nats per token, as
            reached), n_texts. `KLCurves.table` returns such rows.
        gaps: rows of arm, direction, budget that were not reached, which the figure names.
        budget: one of the budgets, to be marked by a vertical line and by larger markers of the arms that reached it.
        on: the texts of the KL: `neutral` ones, on which the budgets are; or `own`, the untuned responses to the
            behaviour's prompts: then from the columns own_kl and n_own.
        title: heading of the figure.

    Raises:
        ValueError: if a column is missing, an arm, direction and budget have two rows, or there is not one untuned row.

    Example:
        >>> row = {"set": "test", "scorer": "vader", "n": 60, "low": 0.0, "high": 0.4, "seeds": [0], "n_texts": 18}
        >>> untuned = row | {"arm": "untuned", "direction": "none", "budget": None, "mean": 0.2, "kl": 0.0}
        >>> steered = row | {"arm": "steered", "direction": "away", "budget": 0.01, "mean": -0.1, "kl": 0.011}
        >>> [trace.name for trace in effect_at_kl([untuned, steered]).data if trace.name]
        ['untuned', 'steered']
    """
    frame = check_table(table, labels=_LABELS, numbers=(*_NUMBERS, *(("own_kl", "n_own") if on == "own" else ())))
    if on == "own":  # an interval of the mean over seeds was not measured
        frame = frame.assign(kl=frame["own_kl"], n_texts=frame["n_own"], kl_low=np.nan, kl_high=np.nan)
    check_unique(frame, ["arm", "direction", "budget"], fix="Keep one set and one scorer, pooled over seeds.")
    is_untuned = frame["budget"].isna() & (frame["direction"] == "none")
    untuned, curves = frame[is_untuned], frame[~is_untuned]
    if len(untuned) != 1 or curves["budget"].isna().all():
        raise ValueError(
            f"table must have one row without budget and direction, the untuned model, and some with a budget, got "
            f"{len(untuned)} and {curves['budget'].notna().sum()}. Use the table of compare_at_kl."
        )
    directions = ordered(curves["direction"], DIRECTIONS)
    headings = [_HEADINGS.get(direction, direction) for direction in directions]
    figure = make_subplots(
        cols=len(directions), shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=headings,
        x_title=_AXES[on],  # once, as two would run into each other in a narrow window
    )  # fmt: skip
    missed = _missed(gaps)
    budgets = sorted({*curves["budget"].dropna(), *missed["budget"]})
    drawn = [*curves.loc[curves["kl"] > 0, "kl"], *(budgets if on == "neutral" else ())]
    span = [min(drawn) / 1.4, max(drawn) * 1.4]
    curves = curves.assign(kl=curves["kl"].clip(lower=span[0]))  # a logarithmic axis has no zero
    colours = arm_colours(frame["arm"])
    named: set[str] = set()
    for column, direction in enumerate(directions, start=1):
        panel = curves[curves["direction"] == direction]
        traces = _untuned(untuned.iloc[0], span, colours)
        for arm in ordered(panel["arm"]):
            traces += _curve(panel[panel["arm"] == arm].sort_values("kl"), colours[arm], SYMBOLS[direction], budget)
        for trace in sorted(traces, key=lambda trace: trace.line.width != 0):  # all bands below all lines
            trace.showlegend = bool(trace.name) and trace.name not in named
            named |= {trace.name} if trace.name else set()
            figure.add_trace(trace, row=1, col=column)
    if budget is not None and on == "neutral":
        figure.add_vline(x=budget, line={"color": INK, "width": 2, "dash": "dot"}, layer="below")
    ticks = budgets if on == "neutral" else [tick for tick in _ROUND if span[0] <= tick <= span[1]]
    figure.update_xaxes(
        type="log", range=np.log10(span).tolist(), tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks],
        zeroline=False,
    )  # fmt: skip
    figure.update_yaxes(zeroline=False, range=_range(frame))
    scorers = ", ".join(ordered(frame["scorer"]))
    figure.update_yaxes(title_text=f"mean score ({scorers})", col=1)
    reading = f"{_READING[on]} Bands: 95 % intervals. {_gap_sentence(missed)}".strip()
    n_texts = frame.loc[frame["n_texts"].notna(), ["n_texts"]].rename(columns={"n_texts": "n"})
    texts = sample(n_texts).replace(".", " texts." if on == "neutral" else " responses.")
    legend = {"orientation": "h", "y": -0.2, "x": 0.5, "xanchor": "center"}
    return apply_style(figure, title, reading, f"Score: {sample(frame)} KL: {texts}", height=520, legend=legend)


def _range(frame: pd.DataFrame) -> list[float]:
    """All means with their intervals; an interval far wider than what separates the means leaves the panel."""
    low, high = float(frame["mean"].min()), float(frame["mean"].max())
    room = (high - low) or 1.0
    # With the means, since scores that are all alike have no interval.
    ends = frame[["low", "mean", "high"]].to_numpy(float)
    bottom, top = max(float(np.nanmin(ends)), low - room), min(float(np.nanmax(ends)), high + room)
    return [min(bottom, low) - room / 20, max(top, high) + room / 20]


def _untuned(row: pd.Series, span: list[float], colours: dict[str, str]) -> list[go.Scatter]:
    """The untuned score across the panel, dashed, with its interval."""
    colour = colours[row["arm"]]
    ends = pd.DataFrame({"kl": span, "low": row["low"], "high": row["high"]})
    hover = f"{row['arm']}<br>score {row_estimate(row)}<br>n = {number(row['n'], 0)}"
    line = {"color": colour, "width": 2, "dash": "dash"}
    return [
        *band(ends, "kl", colour),
        go.Scatter(
            x=span, y=[row["mean"]] * 2, mode="lines", line=line, name=row["arm"], legendgroup=row["arm"],
            hovertext=[hover] * 2, hoverinfo="text",
        ),
    ]  # fmt: skip


def _curve(rows: pd.DataFrame, colour: str, symbol: str, marked: float | None) -> list[go.Scatter]:
    """One arm's score over KL, with its interval: a line over the budgets, or a point with a bar."""
    arm, point = rows["arm"].iloc[0], len(rows) == 1
    hover = [
        f"{arm}{_budget(row)}<br>score {row_estimate(row)}<br>"
        f"KL {row_estimate(row, 'kl')}<br>n = {number(row['n'], 0)}, {seeds_of(row)}"
        for _, row in rows.iterrows()
    ]
    at_mark = (rows["budget"] == marked).tolist()
    line = {"color": INK, "width": [2 if here else 0.5 for here in at_mark]}
    size = [15 if here else 10 for here in at_mark]
    marker = {"symbol": symbol, "size": size, "opacity": 1, "color": colour, "line": line}  # many sizes: pale otherwise
    bar = {"array": rows["high"] - rows["mean"], "arrayminus": rows["mean"] - rows["low"], "color": colour}
    return [
        *([] if point else band(rows, "kl", colour)),
        go.Scatter(
            x=rows["kl"], y=rows["mean"], mode="lines+markers", line={"color": colour, "width": 3}, marker=marker,
            error_y={"type": "data", "visible": point, **bar}, name=arm, legendgroup=arm, hovertext=hover,
            hoverinfo="text",
        ),
    ]  # fmt: skip


def _budget(row: pd.Series) -> str:
    return "" if np.isnan(row["budget"]) else f", budget {row['budget']:g}"


def _missed(gaps: Table | None) -> pd.DataFrame:
    if gaps is None or not len(gaps):
        return pd.DataFrame(columns=["arm", "direction", "budget"])
    return check_table(gaps, labels=("arm", "direction"), numbers=("budget",), argument="gaps")


def _gap_sentence(missed: pd.DataFrame) -> str:
    """Which arms did not reach which budgets."""
    if missed.empty:
        return ""
    cells: dict[tuple[str, str], list[float]] = {}
    for arm, way, budget in zip(missed["arm"], missed["direction"], missed["budget"], strict=True):
        cells.setdefault((arm, way), []).append(budget)
    named = (
        f"{arm} ({way}) {', '.join(f'{b:g}' for b in sorted(set(budgets)))}" for (arm, way), budgets in cells.items()
    )
    return f"Not reached: {'; '.join(named)}."
