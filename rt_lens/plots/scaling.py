"""Learned scalings: which block writes more, which less, and what they cost."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rt_lens.plots.style import Table, apply_style, check_table, ordered, sample

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
