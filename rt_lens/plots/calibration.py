"""Whether stated probabilities come true."""

from __future__ import annotations

import plotly.graph_objects as go

from rt_lens.plots.style import FAINT, INK, Table, apply_style, check_table


def calibration(table: Table, *, title: str = "Does it know what it knows?") -> go.Figure:
    """A reliability diagram: the share that came true over the probability stated, on a diagonal if they agree.

    Args:
        table: what `rt_lens.common.statistics.calibration_curve` gives: columns n, predicted, right,
            low, high (Wilson's 95 % interval), a row per bin.
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing.

    Example:
        >>> figure = calibration([{"n": 20, "predicted": 0.7, "right": 0.6, "low": 0.39, "high": 0.78}])
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
                x=frame["predicted"], y=frame["right"], error_y=bars, mode="markers+lines", name="found",
                marker={"size": 10, "color": "#0072B2"}, line={"color": "#0072B2"},
                customdata=frame[["n", "low", "high"]].to_numpy(),
                hovertemplate="stated %{x:.2f}<br>right %{y:.2f} [%{customdata[1]:.2f}, %{customdata[2]:.2f}]"
                "<br>n = %{customdata[0]:.0f}<extra></extra>",
            ),
        ]
    )  # fmt: skip
    figure.update_xaxes(title="share of likelihood of the likeliest option", range=[0, 1.02])
    figure.update_yaxes(title="share of such questions answered right", range=[-0.02, 1.04])
    reading = "Below the dotted line the model is surer than it is right. Bars are 95 % intervals (Wilson)."
    figure.update_layout(showlegend=False)
    figure.add_annotation(x=0.08, y=0.2, text="agreement", showarrow=False, font_color=INK)
    return apply_style(figure, title, reading, f"n = {frame['n'].sum():.0f} questions in {len(frame)} bins.")
