"""Calibration: how often the model is correct at each level of confidence."""

from __future__ import annotations

import plotly.graph_objects as go

from rt_lens.plots.style import FAINT, INK, Table, apply_style, check_table


def calibration(table: Table, *, title: str = "Calibration: is confidence matched by accuracy?") -> go.Figure:
    """Draws a reliability diagram: accuracy against confidence, on the diagonal where the two agree.

    Args:
        table: one row per bin, as `calibration_curve` gives it. Columns: n (questions), predicted (mean confidence),
            right (share answered correctly), low, high (Wilson's 95 % interval).
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing.

    Example:
        >>> figure = calibration([{"n": 20, "predicted": 0.7, "right": 0.6, "low": 0.39, "high": 0.78}])
        >>> figure.data[1].x, figure.data[1].y  # confident in 70 %, correct in 60 %
        (array([0.7]), array([0.6]))
    """
    frame = check_table(table, numbers=("n", "predicted", "right", "low", "high"))
    bars = {"array": frame["high"] - frame["right"], "arrayminus": frame["right"] - frame["low"], "color": FAINT}
    figure = go.Figure(
        [
            go.Scatter(
                x=[0, 1], y=[0, 1], mode="lines", line={"dash": "dot", "color": FAINT}, name="agreement",
                hoverinfo="skip",
            ),
            go.Scatter(
                x=frame["predicted"], y=frame["right"], error_y=bars, mode="markers+lines", name="model",
                marker={"size": 10, "color": "#0072B2"}, line={"color": "#0072B2"},
                customdata=frame[["n", "low", "high"]].to_numpy(),
                hovertemplate="confidence %{x:.2f}<br>accuracy %{y:.2f} [%{customdata[1]:.2f}, %{customdata[2]:.2f}]"
                "<br>n = %{customdata[0]:.0f}<extra></extra>",
            ),
        ]
    )  # fmt: skip
    figure.update_xaxes(title="confidence (likelihood share of the likeliest option)", range=[0, 1.02])
    figure.update_yaxes(title="accuracy (share of questions answered correctly)", range=[-0.02, 1.04])
    reading = "Below the dotted line the model is overconfident. Bars: 95 % intervals (Wilson)."
    figure.update_layout(showlegend=False)
    figure.add_annotation(x=0.08, y=0.2, text="agreement", showarrow=False, font_color=INK)
    return apply_style(figure, title, reading, f"n = {frame['n'].sum():.0f} questions in {len(frame)} bins.")
