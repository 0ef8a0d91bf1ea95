"""The trials of a search: effect on validation prompts against KL on the same prompts, one panel per arm."""

from __future__ import annotations

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
    check_table,
    check_unique,
    escape_html,
    ordered,
)

_COLUMNS = 4


def trials(table: Table, *, budget: float, seed: int, title: str = "What the search tried") -> go.Figure:
    """Draws the trials of each arm; the one chosen is filled and has its interval, the Pareto front is joined.

    Args:
        table: a row per arm and trial. Columns: arm, number, n, effect, low, high (change of the score in each
            direction's sense, mean of both), own_kl (nats per token on the validation prompts), front, chosen (bool),
            settings (a mapping). Trials without an effect failed, and are counted below.
        budget: KL on neutral texts, nats per token, at which all were measured.
        seed: of the search.
        title: heading of the figure.

    Raises:
        ValueError: if a column is missing, a trial has two rows, or no trial was measured.

    Example:
        >>> row = {"arm": "steered", "n": 24, "low": 0.1, "high": 0.3, "own_kl": 0.02, "settings": {"layer": 20}}
        >>> rows = [row | {"number": n, "effect": 0.1 * n, "front": n == 2, "chosen": n == 2} for n in (1, 2)]
        >>> figure = trials(rows, budget=0.01, seed=0)
        >>> [trace.name for trace in figure.data]
        ['front', 'trials', 'chosen']
    """
    numbers = ("number", "n", "effect", "low", "high", "own_kl")
    frame = check_table(table, labels=("arm", "front", "chosen", "settings"), numbers=numbers)
    check_unique(frame, ["arm", "number"], fix="Keep one search.")
    done = frame[frame["effect"].notna()]
    if done.empty:
        raise ValueError(f"table must have at least one trial with an effect, got {len(frame)} that all failed.")
    arms = ordered(done["arm"])
    columns = min(_COLUMNS, len(arms))
    n_rows = -(-len(arms) // columns)
    headings = [_heading(arm, frame[frame["arm"] == arm]) for arm in arms]
    figure = make_subplots(
        rows=n_rows, cols=columns, shared_xaxes="all", shared_yaxes="all", subplot_titles=headings,
        horizontal_spacing=0.03, vertical_spacing=0.12,
    )  # fmt: skip
    colours = arm_colours(arms)
    for index, arm in enumerate(arms):
        place = {"row": index // columns + 1, "col": index % columns + 1}
        for trace in _panel(done[done["arm"] == arm], colours[arm]):
            figure.add_trace(trace, **place)
        figure.add_hline(y=0, line={"color": FAINT, "width": 1.5, "dash": "dash"}, **place)
    figure.update_xaxes(zeroline=False, rangemode="tozero")
    for index in range(max(0, len(arms) - columns), len(arms)):  # the lowest panel of each column
        place = {"row": index // columns + 1, "col": index % columns + 1}
        figure.update_xaxes(title_text="KL on the prompts (nats)", showticklabels=True, **place)
    figure.update_yaxes(zeroline=False)
    figure.update_yaxes(title_text="effect (score units)", col=1)
    reading = (
        f"Each mark is one trial at KL {budget:g} on neutral texts. Filled: the trial chosen, with its 95 % interval. "
        "Dotted: no other trial has at least as large an effect at no more KL on the behaviour's own prompts. The "
        "chosen trial is the best of several on these prompts, so its effect here is flattering; the test is not."
    )
    facts = f"n = {number(done['n'].max(), 0)} validation prompts, both directions; seed {seed}."
    return apply_style(figure, title, reading, facts, height=170 + 260 * n_rows, showlegend=False)


def _heading(arm: str, rows: pd.DataFrame) -> str:
    failed = int(rows["effect"].isna().sum())
    return f"{arm}, {len(rows)} trials" + (f" ({failed} failed)" if failed else "")


def _panel(rows: pd.DataFrame, colour: str) -> list[go.Scatter]:
    """The front as a line, all trials hollow, and the one chosen."""
    front = rows[rows["front"].astype(bool)].sort_values("own_kl")
    is_chosen = rows["chosen"].astype(bool)
    chosen, others = rows[is_chosen], rows[~is_chosen]
    marker = {"size": 10, "line": {"color": colour, "width": 2}}
    bar = {"array": chosen["high"] - chosen["effect"], "arrayminus": chosen["effect"] - chosen["low"]}
    return [
        go.Scatter(
            x=front["own_kl"], y=front["effect"], mode="lines", name="front", hoverinfo="skip",
            line={"color": colour, "width": 1.5, "dash": "dot"},
        ),
        _marks(others, "trials", marker | {"color": "white"}),
        _marks(chosen, "chosen", marker | {"color": colour, "size": 13, "line": {"color": INK, "width": 1}}).update(
            error_y={"type": "data", "color": colour, "visible": bool(np.isfinite(bar["array"]).all()), **bar}
        ),
    ]  # fmt: skip


def _marks(rows: pd.DataFrame, name: str, marker: dict[str, object]) -> go.Scatter:
    hover = [
        f"{row['arm']}, trial {number(row['number'], 0)}<br>"
        f"effect {estimate(row['effect'], row['low'], row['high'])}<br>"
        f"KL on the prompts {number(row['own_kl'], 4)}<br>{_settings(row['settings'])}"
        for _, row in rows.iterrows()
    ]
    return go.Scatter(
        x=rows["own_kl"], y=rows["effect"], mode="markers", name=name, marker=marker, hovertext=hover, hoverinfo="text"
    )


def _settings(settings: dict[str, object]) -> str:
    lines = [escape_html(f"{name} = {value}") for name, value in settings.items()]
    return "<br>".join(lines) or "the file's settings"
