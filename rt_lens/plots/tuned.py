"""Tuned arms compared: variants of tuning, the weights that may change, and kinds of prompts.

The tables hold measured scores; no figure in this module knows a model or a scorer.
"""

from __future__ import annotations

from html import unescape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rt_lens.common.formatting import number
from rt_lens.plots.style import (
    ARM_COLOURS,
    DIRECTIONS,
    FAINT,
    INK,
    Table,
    apply_style,
    arm_colours,
    check_table,
    check_unique,
    legend_entry,
    ordered,
    row_estimate,
    sample,
    whiskers,
    with_measure,
    with_numbers,
)

ROW = 30  # height of a row of dots, in pixels
LOG_TICKS = [a * 10**b for b in range(7) for a in (1, 2, 5)]


def variants(table: Table, *, title: str = "Effect and side effects of the tuning variants") -> go.Figure:
    """Draws score, perplexity and KL of the tuning variants as dots with whiskers, a block of rows per direction.

    Args:
        table: one row per direction and variant, variants in the order in which to draw them. Columns: direction,
            variant, n (scored responses), mean, low, high (score), perplexity, perplexity_low, perplexity_high (per
            token), kl, kl_low, kl_high (from the untuned model, nats per token), seeds (list of int). NaN or None
            where nothing was measured. The variant `untuned` gives the dashed lines; a single one, of any direction
            or of `none`, serves every direction.
        title: heading of the figure.

    Raises:
        ValueError: if a column, all rows or the variant untuned is missing, or a direction and variant have two rows.

    Example:
        >>> shared = {"perplexity": 21.0, "perplexity_low": 20.0, "perplexity_high": 22.0}
        >>> shared |= {"kl": 0.1, "kl_low": 0.08, "kl_high": 0.12, "n": 40, "seeds": [0]}
        >>> rows = [{"direction": "away", "variant": "untuned", "mean": 0.3, "low": 0.2, "high": 0.4} | shared]
        >>> rows += [{"direction": "away", "variant": "token only", "mean": 0.1, "low": 0.0, "high": 0.2} | shared]
        >>> scores, perplexities, kl = variants(rows).data
        >>> dict(zip(scores.y, map(float, scores.x)))
        {'untuned': 0.3, 'token only': 0.1}
    """
    side_effects = [f"{name}{end}" for name in ("perplexity", "kl") for end in ("", "_low", "_high")]
    frame = check_table(
        table, labels=("direction", "variant", "seeds"), numbers=("n", "mean", "low", "high", *side_effects)
    )
    check_unique(frame, ["direction", "variant"])
    blocks = _blocks(with_measure(frame, "score"))
    axes = {
        "score": "mean score",
        "perplexity": "perplexity<br>(per token)",
        "kl": "KL from untuned<br>(nats per token)",
    }
    heights = [len(block) for block in blocks.values()]
    pixels = ROW * sum(heights) + 44 * len(blocks)
    figure = make_subplots(
        rows=len(blocks),
        cols=len(axes),
        shared_xaxes=True,
        shared_yaxes=True,
        row_heights=heights,
        vertical_spacing=44 / pixels,
        horizontal_spacing=0.035,
        column_widths=[0.4, 0.3, 0.3],
        subplot_titles=[title for direction in blocks for title in (f"direction: {direction}", "", "")],
    )
    for row, block in enumerate(blocks.values(), start=1):
        untuned = block[block["variant"] == "untuned"].iloc[0].fillna({"kl": 0.0})
        for column, name in enumerate(axes, start=1):
            dots = go.Scatter(
                x=block[name],
                y=block["variant"],
                error_x=whiskers(block, name),
                mode="markers",
                marker={
                    "color": [ARM_COLOURS.get(variant, INK) for variant in block["variant"]],
                    "size": 10,
                    "line": {"color": "white", "width": 1},
                },
                hovertext=[_variant_hover(variant) for _, variant in block.iterrows()],
                hoverinfo="text",
            )
            figure.add_trace(dots, row=row, col=column)
            if not np.isnan(untuned[name]):  # Plotly ignores a line in a panel without data
                dashed = {"dash": "dash", "color": FAINT, "width": 1.5}
                figure.add_vline(x=untuned[name], line=dashed, row=row, col=column)
    figure.update_yaxes(type="category", autorange="reversed", zeroline=False).update_xaxes(zeroline=False)
    for column, (name, axis_title) in enumerate(axes.items(), start=1):
        figure.update_xaxes(title_text=axis_title, row=len(blocks), col=column)
        if name == "perplexity" and frame[name].max() > 3 * frame[name].min():
            figure.update_xaxes(type="log", tickvals=LOG_TICKS, col=column)
            figure.update_xaxes(title_text="perplexity<br>(per token, log scale)", row=len(blocks), col=column)
    reading = "Best: a score far from the dashed line (untuned), perplexity and KL near it. Whiskers: 95 % intervals."
    return apply_style(figure, title, reading, sample(frame), height=pixels + 170, showlegend=False)


def block_search(table: Table, *, title: str = "Which weights to tune") -> go.Figure:
    """Draws the effect of tuning by the weights that each loss may change, largest first, beside the validation losses.

    Args:
        table: one row per choice of weights. Columns: cosine and token (weights that the loss may change, such as
            "v o"; empty for none), n (scored responses), mean, low, high (effect; positive is intended), total_loss,
            token_loss (nats) and cosine_loss (0 to 1) on validation pairs; optionally kl (weights, as cosine),
            perplexity, seed or seeds. NaN or None where nothing was measured. Without any effect the rows are sorted
            by the total loss, smallest first.
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing, a choice has two rows, or nothing was measured.

    Example:
        >>> row = {"n": 40, "mean": 0.3, "low": 0.2, "high": 0.4, "total_loss": 2.0, "token_loss": 1.8}
        >>> figure = block_search([row | {"cosine_loss": 0.2, "cosine": "v o", "token": "gate up down"}])
        >>> figure.data[0].y, [panel.name for panel in figure.data]
        (('cosine: v o | token: gate up down',), ['effect', 'total_loss', 'token_loss', 'cosine_loss'])
    """
    losses = {"total_loss": "total", "token_loss": "token (nats)", "cosine_loss": "cosine (0 to 1)"}
    frame = check_table(table, labels=("cosine", "token"), numbers=("n", "mean", "low", "high", *losses))
    parts = [part for part in ("cosine", "token", "kl") if part in frame]
    frame = frame.assign(**{part: [_weights_text(names) for names in frame[part]] for part in parts})
    check_unique(frame, parts)
    if "perplexity" in frame:
        frame, losses = with_numbers(frame, ["perplexity"]), losses | {"perplexity": "perplexity"}
    frame = with_measure(frame, "effect").sort_values(["effect", "total_loss"], ascending=[False, True], kind="stable")
    panels = {
        name: axis_title for name, axis_title in ({"effect": "effect"} | losses).items() if frame[name].notna().any()
    }
    if not panels:
        raise ValueError(f"table must hold a number in one of mean, {', '.join(losses)}, got only empty values.")
    labels = [" | ".join(f"{part}: {row[part]}" for part in parts) for _, row in frame.iterrows()]
    figure = make_subplots(
        cols=len(panels),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        column_widths=[2 if name == "effect" else 1 for name in panels],
    )
    hover = [_search_hover(label, row, losses) for label, (_, row) in zip(labels, frame.iterrows(), strict=True)]
    colours = {"effect": ARM_COLOURS["rep_tuned"]}
    for column, (name, axis_title) in enumerate(panels.items(), start=1):
        dots = go.Scatter(
            x=frame[name],
            y=labels,
            mode="markers",
            marker={"color": colours.get(name, INK), "size": 10 if name == "effect" else 8},
            error_x=whiskers(frame, name, colours[name]) if name == "effect" else None,
            hovertext=hover,
            hoverinfo="text",
            name=name,
        )
        figure.add_trace(dots, row=1, col=column)
        loss = name.endswith("_loss")
        axis_title = f"validation loss:<br>{axis_title}" if loss else axis_title
        figure.update_xaxes(title_text=axis_title, nticks=4, row=1, col=column)
    figure.update_xaxes(zeroline=False).update_yaxes(type="category", autorange="reversed")
    if "effect" in panels:
        figure.add_vline(x=0, line={"dash": "dash", "color": INK, "width": 1}, row=1, col=1)
        reading = (
            "Choices of weights are sorted by effect, largest on top. Whiskers: 95 % intervals; dashed line: no effect."
        )
    else:
        reading = "No effect was measured, so choices of weights are sorted by total validation loss, smallest on top."
    return apply_style(figure, title, reading, sample(frame), height=ROW * len(frame) + 200, showlegend=False)


def kinds(table: Table, *, title: str = "Does the change generalise to other kinds of prompts?") -> go.Figure:
    """Draws the change of the score from the untuned model, by kind of prompt and arm, one panel per direction.

    Args:
        table: one row per kind, arm and direction, kinds in the order in which to draw them. Columns: kind, arm,
            direction, n (paired responses), mean, low, high (score minus the untuned model's on the same prompts),
            seeds (list of int).
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing, or a kind, arm and direction have two rows.

    Example:
        >>> row = {"arm": "rep_tuned", "direction": "away", "n": 40, "mean": -0.3, "low": -0.4, "high": -0.2}
        >>> figure = kinds([row | {"kind": kind, "seeds": [0]} for kind in ("stories", "instructions")])
        >>> figure.layout.yaxis.ticktext, figure.data[0].x
        (('stories', 'instructions'), array([-0.3, -0.3]))
    """
    frame = check_table(table, labels=("kind", "arm", "direction", "seeds"), numbers=("n", "mean", "low", "high"))
    check_unique(frame, ["kind", "arm", "direction"])
    frame = with_measure(frame, "change")
    names, arms = ordered(frame["kind"]), ordered(frame["arm"], list(ARM_COLOURS))
    directions, colours = ordered(frame["direction"], DIRECTIONS), arm_colours(frame["arm"])
    figure = make_subplots(
        cols=len(directions),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=[f"direction: {direction}" for direction in directions],
    )
    step = 0.7 / len(arms)  # the arms of a kind are drawn one below the other
    for arm in arms:
        shift = (arms.index(arm) - (len(arms) - 1) / 2) * step
        for column, direction in enumerate(directions, start=1):
            rows = frame[(frame["arm"] == arm) & (frame["direction"] == direction)]
            dots = go.Scatter(
                x=rows["change"],
                y=[names.index(kind) + shift for kind in rows["kind"]],
                error_x=whiskers(rows, "change", colours[arm]),
                mode="markers",
                marker={"color": colours[arm], "size": 10},
                name=arm,
                showlegend=False,
                hovertext=[
                    f"{row['kind']}<br>{arm}, {direction}<br>change {row_estimate(row, 'change')}<br>{counted(row)}"
                    for _, row in rows.iterrows()
                ],
                hoverinfo="text",
            )
            figure.add_trace(dots, row=1, col=column)
        figure.add_trace(legend_entry(arm, mode="markers", marker={"color": colours[arm], "size": 10}), row=1, col=1)
    for index in range(1, len(names)):
        figure.add_hline(y=index - 0.5, line={"color": "#E5E5E5", "width": 1})
    figure.add_vline(x=0, line={"dash": "dash", "color": INK, "width": 1.5})
    ticks = {"tickvals": list(range(len(names))), "ticktext": names}
    figure.update_yaxes(range=[len(names) - 0.5, -0.5], showgrid=False, zeroline=False, **ticks)
    figure.update_xaxes(title_text="score minus untuned score", zeroline=False, matches="x")
    reading = "A whisker (95 % interval) that excludes 0 shows a change from the untuned model on the same prompts."
    height = 200 + len(names) * max(2 * ROW, 22 * len(arms))
    apply_style(figure, title, reading, sample(frame), height=height, legend_traceorder="normal")
    return figure.update_annotations(yshift=4)


def counted(row: pd.Series) -> str:
    return f"n = {number(row['n'], 0)}, seeds {', '.join(map(str, row['seeds']))}"


def _blocks(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each direction; one without an untuned row borrows the first, one with nothing else is left out."""
    untuned = frame[frame["variant"] == "untuned"]
    if untuned.empty:
        names = unescape(", ".join(map(str, ordered(frame["variant"]))))
        raise ValueError(f"table must have a row of the variant 'untuned', got {names}. Add it.")
    blocks = {}
    tuned = frame[frame["variant"] != "untuned"]
    for direction in ordered((tuned if len(tuned) else frame)["direction"], DIRECTIONS):
        rows = frame[frame["direction"] == direction]
        if not (rows["variant"] == "untuned").any():
            rows = pd.concat([untuned.iloc[:1], rows])
        blocks[direction] = rows
    return blocks


def _variant_hover(row: pd.Series) -> str:
    return (
        f"{row['variant']}, {row['direction']}<br>score {row_estimate(row, 'score')}<br>perplexity "
        f"{row_estimate(row, 'perplexity')}<br>KL {row_estimate(row, 'kl')} nats per token<br>{counted(row)}"
    )


def _search_hover(label: str, row: pd.Series, losses: dict[str, str]) -> str:
    parts = "<br>".join(f"{loss} {number(row[name])}" for name, loss in losses.items())
    return f"{label}<br>effect {row_estimate(row, 'effect')}, n = {number(row['n'], 0)}<br>{parts}"


def _weights_text(names: Any) -> str:
    return names if isinstance(names, str) and names else "none"
