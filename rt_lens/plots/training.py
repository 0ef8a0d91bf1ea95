"""The losses of a tuning run."""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rt_lens.plots.style import (
    DIRECTIONS,
    LOSS_PARTS,
    OTHER_LOSSES,
    Table,
    apply_style,
    arm_colours,
    check_table,
    ordered,
    sample,
)


def losses(history: Table, *, title: str = "Losses while tuning") -> go.Figure:
    """Draws loss curves: a panel per loss part and direction, a thin line per arm, seed and split.

    Args:
        history: one row per logged step. Columns: arm, direction, seed, step, split ("train" or "validation"), and the
            parts total, token (nats), cosine (0 to 1), kl (nats per token); NaN or None where a part is unused. If
            there, also preference (nats), lorra, circuit_breaker and retain (see `TuneConfig`).
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing, or no part holds a number.

    Example:
        >>> row = {"arm": "rep_tuned", "direction": "away", "seed": 0, "split": "train", "token": 1.9, "kl": None}
        >>> figure = losses([row | {"step": step, "total": 2.5 - step, "cosine": 0.6 - step / 10} for step in (0, 1)])
        >>> [panel.text for panel in figure.layout.annotations]  # no panel for the unused KL
        ['total, away', 'token (nats), away', 'cosine (0 to 1), away']
    """
    labels = ("arm", "direction", "seed", "split")
    frame = check_table(history, labels=labels, numbers=("step", *LOSS_PARTS), argument="history")
    others = {part: name for part, name in OTHER_LOSSES.items() if part in frame}
    names = {**LOSS_PARTS, **others}
    parts = [part for part in names if frame[part].notna().any()]
    if not parts:
        raise ValueError(f"history must hold a number in one of {', '.join(LOSS_PARTS)}, got only empty values.")
    directions = ordered(frame["direction"], DIRECTIONS)
    # Beyond four, parts lie below each other: side by side they would be too narrow.
    below = len(parts) > len(LOSS_PARTS)
    cells = [(direction, part) for direction in directions for part in parts]
    if below:
        cells = [(direction, part) for part in parts for direction in directions]
    n_rows, n_columns = (len(parts), len(directions)) if below else (len(directions), len(parts))
    figure = make_subplots(
        rows=n_rows,
        cols=n_columns,
        shared_xaxes=True,
        horizontal_spacing=0.06,
        vertical_spacing=0.24 / n_rows,
        subplot_titles=[f"{names[part]}, {direction}" for direction, part in cells],
    )
    colours, named = arm_colours(frame["arm"]), set()
    for (arm, direction, seed, split), run in frame.sort_values("step", kind="stable").groupby([*labels], sort=False):
        for part in parts:
            row, column = divmod(cells.index((direction, part)), n_columns)
            curve = run.dropna(subset=[part])
            if curve.empty:
                continue
            group = f"{arm}, {split}"
            line = go.Scatter(
                x=curve["step"],
                y=curve[part],
                mode="lines",
                line={"color": colours[str(arm)], "width": 1.3, "dash": "dash" if split == "validation" else "solid"},
                name=group,
                legendgroup=group,
                showlegend=group not in named,
                hovertemplate=f"{group}<br>step %{{x}}<br>{names[part]} %{{y:.4f}}<extra>seed {seed}</extra>",
            )
            figure.add_trace(line, row=row + 1, col=column + 1)
            named.add(group)
    figure.update_xaxes(title_text="step", row=n_rows)
    figure.update_yaxes(title_text="loss", col=1)
    reading = "Overfitting: the dashed line (validation) rises while the solid line (train) falls. One line per seed."
    apply_style(figure, title, reading, sample(frame), height=200 + 260 * n_rows)
    # The legend lies below, because four panels need the width.
    legend = {"orientation": "h", "yref": "container", "y": 0.01, "yanchor": "bottom", "x": 0, "xanchor": "left"}
    return figure.update_layout(legend=legend, margin_b=110)
