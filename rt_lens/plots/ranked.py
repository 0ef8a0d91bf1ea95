"""Many arms at one KL: a row for each, the furthest first."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rt_lens.common.formatting import number
from rt_lens.plots.style import (
    DIRECTIONS,
    FAINT,
    INK,
    SYMBOLS,
    Table,
    apply_style,
    check_table,
    check_unique,
    ordered,
    row_estimate,
    sample,
    seeds_of,
)

_LABELS = ("arm", "direction", "set", "scorer", "seeds")
_NUMBERS = ("budget", "n", "mean", "low", "high", "kl")
_MARKED = {"rep_tuned": "#009E73", "token_tuned": "#56B4E9", "steered": "#E69F00", "random": "#7F7F7F"}
_READING = (
    "A row for each arm, the one that moves the score furthest first. Large markers with 95 % intervals: at the stated "
    "KL; small ones: at the other budgets, the larger the KL the larger. Dashed: the untuned model with its interval. "
    "An arm without a strength stands at its own KL (open)."
)


def arms_at_kl(table: Table, budget: float, *, title: str = "Effect of every arm at equal damage") -> go.Figure:
    """Draws the score of every arm at one KL from the untuned model, sorted, a panel for each direction.

    `effect_at_kl` draws the same as curves, which are too many to tell apart beyond about eight arms.

    Args:
        table: one row per arm, direction and budget, of one set and one scorer, and one of the untuned model; the
            columns of `effect_at_kl`.
        budget: the one that is compared.
        title: heading of the figure.

    Raises:
        ValueError: if a column is missing, an arm, direction and budget have two rows, there is not one untuned row, or
            no arm has the budget.

    Example:
        >>> row = {"set": "test", "scorer": "vader", "n": 60, "low": 0.0, "high": 0.4, "seeds": [0]}
        >>> untuned = row | {"arm": "untuned", "direction": "none", "budget": None, "mean": 0.2, "kl": 0.0}
        >>> away = row | {"direction": "away", "budget": 0.01, "kl": 0.01}
        >>> dpo, lorra = (away | {"arm": arm, "mean": mean} for arm, mean in (("dpo", 0.1), ("lorra", -0.1)))
        >>> figure = arms_at_kl([untuned, dpo, lorra], 0.01)
        >>> figure.layout.yaxis.categoryarray  # drawn from below
        ('dpo', 'lorra')
    """
    frame = check_table(table, labels=_LABELS, numbers=_NUMBERS)
    check_unique(frame, ["arm", "direction", "budget"], fix="Keep one set and one scorer, pooled over seeds.")
    is_untuned = frame["budget"].isna() & (frame["direction"] == "none")
    arms = frame[~is_untuned]
    n_untuned, n_at_it = int(is_untuned.sum()), int((arms["budget"] == budget).sum())
    if n_untuned != 1 or not n_at_it:
        raise ValueError(
            "table must have one row without budget and direction, the untuned model, and some with budget "
            f"{budget:g}, got {n_untuned} and {n_at_it}. Use the table of compare_at_kl."
        )
    untuned, directions = frame[is_untuned].iloc[0], ordered(arms["direction"], DIRECTIONS)
    figure = make_subplots(
        cols=len(directions), horizontal_spacing=0.17, subplot_titles=directions,
        x_title=f"mean score ({', '.join(ordered(frame['scorer']))})",
    )  # fmt: skip
    for column, direction in enumerate(directions, start=1):
        panel = arms[arms["direction"] == direction]
        here = panel[(panel["budget"] == budget) | panel["budget"].isna()]
        names = _sorted(panel, here, direction)
        figure.add_trace(_others(panel[panel["budget"].notna() & (panel["budget"] != budget)]), row=1, col=column)
        figure.add_trace(_dots(here, SYMBOLS[direction]), row=1, col=column)
        if untuned["low"] < untuned["high"]:  # without an interval there is none to shade
            band = {"fillcolor": FAINT, "opacity": 0.18, "line_width": 0, "layer": "below"}
            figure.add_vrect(untuned["low"], untuned["high"], **band, row=1, col=column)
        figure.add_vline(untuned["mean"], line={"color": INK, "dash": "dash", "width": 1}, row=1, col=column)
        figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], row=1, col=column)
    n = len(ordered(arms["arm"]))
    return apply_style(
        figure, title, _READING, f"KL {budget:g}. {sample(frame)}", height=260 + 26 * n, showlegend=False
    )


def _sorted(panel: pd.DataFrame, here: pd.DataFrame, direction: str) -> list[str]:
    """The arms, the furthest in the direction first; those that missed the budget last."""
    furthest = here.sort_values("mean", ascending=direction == "away", kind="stable")["arm"]
    return ordered([*furthest, *panel["arm"]])


def _dots(rows: pd.DataFrame, symbol: str) -> go.Scatter:
    """The arms at the budget, with their intervals; open where they have no strength."""
    hover = [
        f"{row['arm']}<br>score {row_estimate(row)}<br>KL {row_estimate(row, 'kl')}<br>"
        f"n = {number(row['n'], 0)}, {seeds_of(row)}"
        for _, row in rows.iterrows()
    ]
    colours = [_MARKED.get(arm, INK) for arm in rows["arm"]]
    marks = [f"{symbol}-open" if missing else symbol for missing in rows["budget"].isna()]
    bars = {"array": rows["high"] - rows["mean"], "arrayminus": rows["mean"] - rows["low"]}
    return go.Scatter(
        x=rows["mean"], y=rows["arm"], mode="markers", hovertext=hover, hoverinfo="text",
        marker={"symbol": marks, "size": 12, "color": colours}, error_x={"type": "data", "color": FAINT, **bars},
    )  # fmt: skip


def _others(rows: pd.DataFrame) -> go.Scatter:
    """The arms at the other budgets, small."""
    ranks = rows["budget"].rank(method="dense") if len(rows) else rows["budget"]
    hover = [f"{row['arm']} at KL {row['budget']:g}<br>score {row_estimate(row)}" for _, row in rows.iterrows()]
    return go.Scatter(
        x=rows["mean"], y=rows["arm"], mode="markers", hovertext=hover, hoverinfo="text",
        marker={"size": (3 + 1.5 * ranks).tolist(), "color": FAINT, "symbol": "circle-open"},
    )  # fmt: skip
