"""Learned scalings: which block writes more, which less, and what they cost."""

from __future__ import annotations

import itertools

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rt_lens.plots.style import Table, apply_style, arm_colours, check_table, ordered, row_estimate, sample, whiskers

_READING = (
    "A factor of 1 + alpha on what a block writes, at strength 1: red writes more, blue less, and at strength -1 the "
    "other way round. White: left as it is."
)


def scaling(table: Table, *, title: str = "Learned scaling, by layer and component") -> go.Figure:
    """Draws the alphas of a scaling: a row per component, a column per layer, a panel for each role.

    Args:
        table: one row per factor. Columns: role, layer, component, alpha, n (prompts it was learned on), seed.
            `Scaling.table` returns such rows.
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing.

    Example:
        >>> row = {"role": "all", "component": "mlp_out", "n": 84, "seed": 0}
        >>> scaling([row | {"layer": layer, "alpha": layer / 10} for layer in range(3)]).data[0].z.tolist()
        [[0.0, 0.1, 0.2]]
    """
    frame = check_table(table, labels=("role", "component"), numbers=("layer", "alpha", "n"))
    roles, components = ordered(frame["role"]), ordered(frame["component"])
    layers = sorted(frame["layer"].unique())
    figure = make_subplots(
        rows=len(roles), cols=1, shared_xaxes=True, vertical_spacing=0.3 / max(len(roles), 2),
        subplot_titles=["" if role == "all" else role for role in roles],
    )  # fmt: skip
    for number, role in enumerate(roles, start=1):
        cells = frame[frame["role"] == role].pivot(index="component", columns="layer", values="alpha")
        z = cells.reindex(index=components, columns=layers).to_numpy(float)
        figure.add_trace(
            go.Heatmap(
                x=layers, y=components, z=z, coloraxis="coloraxis", xgap=1, ygap=1, hoverongaps=False,
                hovertemplate="layer %{x}, %{y}<br>alpha %{z:.3f}<extra>" + role + "</extra>",
            ),
            row=number, col=1,
        )  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(title_text="layer", row=len(roles), col=1)
    top = float(np.nanmax(np.abs(frame["alpha"]))) or 1.0
    figure.update_layout(coloraxis={"colorscale": "RdBu_r", "cmin": -top, "cmax": top, "colorbar": {"title": "alpha"}})
    active = int((frame["alpha"] != 0).sum())
    facts = f"{active} of {len(frame)} factors are not 0. Prompts: {sample(frame)}"
    height = 260 + 26 * len(components) * len(roles) + 40 * len(roles)
    return apply_style(figure, title, _READING, facts, height=height)


def few_numbers(table: Table, *, title: str = "How few numbers turn an answer round?") -> go.Figure:
    """Draws the effect of learned edits, and what they do to other tokens, against how many of their numbers are not 0.

    Args:
        table: one row per edit. Columns: task, edit (the colour, such as `scaling` or `vector`), not_zero; n, shift,
            shift_low, shift_high (logits); KL_of_others, KL_of_others_low, KL_of_others_high (nats); seed.
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing.

    Example:
        >>> row = {"task": "capitals", "edit": "scaling", "n": 72, "seed": 0, "shift": 3.0, "shift_low": 2.5}
        >>> row |= {"shift_high": 3.5, "KL_of_others": 0.2, "KL_of_others_low": 0.1, "KL_of_others_high": 0.3}
        >>> [trace.x.tolist() for trace in few_numbers([row | {"not_zero": n} for n in (60, 12)]).data]
        [[12.0, 60.0], [12.0, 60.0]]
    """
    measures = {"shift": "shift (logits)", "KL_of_others": "KL of other tokens (nats)"}
    ends = [f"{name}{end}" for name in measures for end in ("", "_low", "_high")]
    frame = check_table(table, labels=("task", "edit"), numbers=("not_zero", "n", *ends))
    tasks, edits = ordered(frame["task"]), ordered(frame["edit"])
    colours = arm_colours(edits)
    figure = make_subplots(
        rows=2, cols=len(tasks), shared_xaxes=True, shared_yaxes="rows", subplot_titles=tasks,
        vertical_spacing=0.08, horizontal_spacing=0.05,
    )  # fmt: skip
    for task, edit in itertools.product(tasks, edits):
        rows = frame[(frame["task"] == task) & (frame["edit"] == edit)].sort_values("not_zero")
        for number, name in enumerate(measures, start=1):
            hover = [
                f"{edit}, {row['not_zero']:g} numbers<br>{name} {row_estimate(row, name)}<br>n = {row['n']:g}"
                for _, row in rows.iterrows()
            ]
            first = task == tasks[0] and number == 1 and len(rows) > 0
            figure.add_trace(
                go.Scatter(
                    x=rows["not_zero"], y=rows[name], mode="lines+markers", name=edit, legendgroup=edit,
                    showlegend=first, line={"color": colours[edit]}, marker={"size": 10}, hovertext=hover,
                    hoverinfo="text", error_y=whiskers(rows, name, colours[edit]),
                ),
                row=number, col=1 + tasks.index(task),
            )  # fmt: skip
    figure.update_xaxes(type="log", tickvals=[factor * 10**power for power in range(6) for factor in (1, 3)])
    figure.update_xaxes(title_text="numbers that are not 0", row=2)
    for number, heading in enumerate(measures.values(), start=1):
        figure.update_yaxes(title_text=heading, row=number, col=1, rangemode="tozero")
    reading = (
        "Each point is learned with another weight on few numbers. Above: half the distance between the edit's logit "
        "difference and its opposite's; up and left is best. Below: the cost; less is better. Bars: 95 % intervals."
    )
    return apply_style(figure, title, reading, sample(frame), height=640)
