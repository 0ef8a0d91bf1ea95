"""The effect of steering over many layers, and prompt by prompt."""

from __future__ import annotations

import textwrap

import numpy as np
import plotly.graph_objects as go

from rt_lens.common.formatting import number
from rt_lens.plots.style import (
    FAINT,
    INK,
    Table,
    apply_style,
    band,
    check_table,
    check_unique,
    doses_by_layer,
    escape_html,
    legend_entry,
    row_estimate,
    sample,
    with_minus_sign,
)

ROOM = (30, 12)  # the most layers and multipliers whose cells have room for a number


def sweep(table: Table, *, title: str = "Steering by layer and multiplier") -> go.Figure:
    """Draws the shift of the mean score over layers and multipliers as a heat map, with the scores where they fit.

    Args:
        table: one row per layer and multiplier. Columns: layer (block index), multiplier (times the vector's own
            length), n (scored responses), mean, low, high (score). The row of multiplier 0 is the unsteered model; a
            single one, of any layer or none, serves every layer.
        title: heading of the figure.

    Raises:
        ValueError: if a column, all rows or multiplier 0 is missing, or a layer and multiplier have two rows.

    Example:
        >>> row = {"layer": 21, "n": 30, "low": 0.2, "high": 0.5, "seed": 0}
        >>> figure = sweep([row | {"multiplier": 0, "mean": 0.25}, row | {"multiplier": 2, "mean": 0.5}])
        >>> figure.data[0].z, figure.data[0].text  # the shift is the colour, the score stands in the cell
        (array([[0.  , 0.25]]), (['0.25', '0.50'],))
    """
    frame = check_table(table, numbers=("layer", "multiplier", "n", "mean", "low", "high"))
    check_unique(frame, ["layer", "multiplier"], fix="Keep one scorer, pooled over seeds.")
    doses = doses_by_layer(frame)
    multipliers = sorted(frame["multiplier"].unique())
    rows = [at_layer.set_index("multiplier").reindex(multipliers) for at_layer in doses.values()]
    means = np.array([at_layer["mean"] for at_layer in rows])
    shifts = np.array([at_layer["mean"] - at_layer["mean"][0] for at_layer in rows])
    hover = [
        [
            f"layer {layer}, multiplier {multiplier:g}<br>score {row_estimate(cell)}<br>"
            f"shift {number(cell['mean'] - at_layer['mean'][0])}<br>n = {number(cell['n'], 0)}"
            for multiplier, cell in at_layer.iterrows()
        ]
        for layer, at_layer in zip(doses, rows, strict=True)
    ]
    heat = go.Heatmap(z=shifts, coloraxis="coloraxis", hovertext=hover, hoverinfo="text", xgap=1, ygap=1)
    roomy = len(doses) <= ROOM[0] and len(multipliers) <= ROOM[1]
    if roomy:
        heat.text = [["" if np.isnan(mean) else with_minus_sign(number(mean, 2)) for mean in row] for row in means]
        heat.texttemplate = "%{text}"
    figure = go.Figure(heat)
    # Cells are placed by their index, because layers and multipliers need not be evenly spaced.
    names = [with_minus_sign(f"{multiplier:g}") for multiplier in multipliers]
    figure.update_xaxes(title_text="multiplier (negative: away)", tickvals=list(range(len(names))), ticktext=names)
    step = -(-len(doses) // 40)
    figure.update_yaxes(
        title_text="layer (block index)", tickvals=list(range(0, len(doses), step)), ticktext=[*map(str, doses)][::step]
    )
    figure.update_xaxes(showgrid=False, zeroline=False).update_yaxes(showgrid=False, zeroline=False)
    limit = float(np.nanmax(np.abs(shifts), initial=0.0)) or 1.0
    bar = {"title": "score minus<br>unsteered"}
    figure.update_layout(coloraxis={"colorscale": "RdBu_r", "cmin": -limit, "cmax": limit, "colorbar": bar})
    reading = "Red: steering raises the mean score; blue: steering lowers it; white: no change from multiplier 0."
    reading += " In the cells: mean score." if roomy else " Hover for the mean score and its interval."
    reading += " Grey: not measured." if np.isnan(shifts).any() else ""
    height = 190 + min(max(24 * len(doses), 260), 720)
    return apply_style(figure, title, reading, sample(frame), height=height, plot_bgcolor="#D0D0D0")


def steerability(
    table: Table, summary: Table, *, note: str = "", title: str = "Dose-response, prompt by prompt"
) -> go.Figure:
    """Draws the score of every prompt against the multiplier, with those that move the wrong way marked, and the mean.

    Args:
        table: one row per prompt and multiplier. Columns: prompt (text or number), multiplier (times the vector's own
            length), score, wrong_way (bool: the prompt's score moves against the multiplier).
        summary: one row per multiplier. Columns: multiplier, n (prompts), mean, low, high (score).
        note: a sentence to add to the subtitle, such as the strength of the trend.
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing.

    Example:
        >>> rows = [{"prompt": "How are you?", "multiplier": m, "score": m / 10, "wrong_way": 0} for m in (-2, 0, 2)]
        >>> means = [{"multiplier": m, "n": 1, "mean": 0.1 * m, "low": 0.0, "high": 0.1} for m in (-2, 0, 2)]
        >>> [line.name for line in steerability(rows, means).data if line.name]
        ['How are you?', 'mean', 'right way (1)']
    """
    frame = check_table(table, labels=("prompt", "wrong_way"), numbers=("multiplier", "score"), unescaped=("prompt",))
    columns = ("multiplier", "n", "mean", "low", "high")
    middle = check_table(summary, numbers=columns, argument="summary").sort_values("multiplier")
    wrong = frame["wrong_way"].astype(bool).groupby(frame["prompt"], sort=False).any()
    colours = {True: "#D55E00", False: "#A0A0A0"}
    figure = go.Figure()
    # Prompts that move the wrong way are drawn last, so that the others do not hide them.
    for prompt in wrong.sort_values(kind="stable").index:
        rows = frame[frame["prompt"] == prompt].sort_values("multiplier")
        text = "<br>".join(escape_html(textwrap.wrap(textwrap.shorten(str(prompt), 160), 60)))
        line = go.Scatter(
            x=rows["multiplier"],
            y=rows["score"],
            mode="lines",
            line={"color": colours[wrong[prompt]], "width": 1.5},
            opacity=0.8 if wrong[prompt] else 0.4,
            name=escape_html(str(prompt)),
            showlegend=False,
            hovertext=[
                f"{text}<br>multiplier {row['multiplier']:g}: {number(row['score'])}" for _, row in rows.iterrows()
            ],
            hoverinfo="text",
        )
        figure.add_trace(line)
    figure.add_traces(band(middle, "multiplier", "#0072B2"))
    mean = go.Scatter(
        x=middle["multiplier"],
        y=middle["mean"],
        mode="lines+markers",
        line={"color": "#0072B2", "width": 4},
        marker_size=9,
        name="mean",
        hovertext=[
            f"multiplier {row['multiplier']:g}<br>mean score {row_estimate(row)}<br>n = {row['n']:g}"
            for _, row in middle.iterrows()
        ],
        hoverinfo="text",
    )
    figure.add_trace(mean)
    n_wrong = int(wrong.sum())
    figure.add_trace(
        legend_entry(f"right way ({len(wrong) - n_wrong})", mode="lines", line={"color": colours[False], "width": 1.5})
    )
    if n_wrong:
        figure.add_trace(
            legend_entry(f"wrong way ({n_wrong})", mode="lines", line={"color": colours[True], "width": 1.5})
        )
    figure.add_vline(x=0, line={"dash": "dash", "color": INK, "width": 1})
    figure.update_xaxes(title_text="multiplier (negative: away)", zeroline=False)
    figure.update_yaxes(title_text="score", zerolinecolor=FAINT)
    reading = (
        f"Each thin line is a prompt; {n_wrong} of {len(wrong)} move against the multiplier. Thick line: mean of the "
        f"prompts with its 95 % interval. {escape_html(note)}"
    )
    return apply_style(figure, title, reading.strip(), sample(middle), legend_traceorder="normal")
