"""What tuning does: its variants, the weights that it may change, and the kinds of prompts that it carries over to.

Scores come measured; no figure here knows of a model or a scorer.
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
    key,
    ordered,
    row_estimate,
    sample,
    with_numbers,
)

ROW = 30  # pixels that a row of dots needs
LOG_TICKS = [a * 10**b for b in range(7) for a in (1, 2, 5)]


def variants(table: Table, *, title: str = "What each variant of tuning does, and what it costs") -> go.Figure:
    """Score, perplexity and KL of the tuning variants (columns), a block of rows per direction, as dots with whiskers.

    Args:
        table: one row per direction and variant, variants in the order in which to draw them. Columns: direction,
            variant, n (scored responses), mean, low, high (score), perplexity, perplexity_low, perplexity_high (per
            token), kl, kl_low, kl_high (from the untuned model, nats per token), seeds (list of int). NaN or None
            where nothing was measured. The variant `untuned` gives the dashed lines; a single one, of any direction
            or of `none`, serves every direction.
        title: heading of the figure.

    Raises:
        ValueError: if a column, all rows or the variant untuned is missing, or a direction and variant come twice.

    Example:
        >>> costs = {"perplexity": 21.0, "perplexity_low": 20.0, "perplexity_high": 22.0}
        >>> costs |= {"kl": 0.1, "kl_low": 0.08, "kl_high": 0.12, "n": 40, "seeds": [0]}
        >>> rows = [{"direction": "away", "variant": "untuned", "mean": 0.3, "low": 0.2, "high": 0.4} | costs]
        >>> rows += [{"direction": "away", "variant": "token only", "mean": 0.1, "low": 0.0, "high": 0.2} | costs]
        >>> figure = variants(rows)
    """
    costs = [f"{name}{end}" for name in ("perplexity", "kl") for end in ("", "_low", "_high")]
    frame = check_table(table, words=("direction", "variant", "seeds"), numbers=("n", "mean", "low", "high", *costs))
    once(frame, ["direction", "variant"])
    blocks = _blocks(renamed(frame, "score"))
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
                hovertext=[_variant_hover(own) for _, own in block.iterrows()],
                hoverinfo="text",
            )
            figure.add_trace(dots, row=row, col=column)
            if not np.isnan(untuned[name]):  # Plotly leaves out lines in panels that are still empty
                dashed = {"dash": "dash", "color": FAINT, "width": 1.5}
                figure.add_vline(x=untuned[name], line=dashed, row=row, col=column)
    figure.update_yaxes(type="category", autorange="reversed", zeroline=False).update_xaxes(zeroline=False)
    for column, (name, words) in enumerate(axes.items(), start=1):
        figure.update_xaxes(title_text=words, row=len(blocks), col=column)
        if name == "perplexity" and frame[name].max() > 3 * frame[name].min():
            figure.update_xaxes(type="log", tickvals=LOG_TICKS, col=column)
            figure.update_xaxes(title_text="perplexity<br>(per token, log scale)", row=len(blocks), col=column)
    reading = "Wanted: a score far from the dashed line (untuned), perplexity and KL near it. Whiskers: 95 % intervals."
    return apply_style(figure, title, reading, sample(frame), height=pixels + 170, showlegend=False)


def block_search(table: Table, *, title: str = "Which weights to tune") -> go.Figure:
    """Effect of tuning by the weights that each loss may change, largest first, beside the validation losses.

    Args:
        table: one row per choice of weights. Columns: cosine and token (weights that the loss may change, such as
            "v o"; empty for none), n (scored responses), mean, low, high (effect; positive: as wanted), total_loss,
            token_loss (nats) and cosine_loss (0 to 1) on validation pairs; if wanted, kl (weights, as cosine),
            perplexity, seed or seeds. NaN or None where nothing was measured. Without any effect the rows are sorted
            by the total loss, smallest first.
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing, a choice comes twice, or nothing was measured at all.

    Example:
        >>> row = {"n": 40, "mean": 0.3, "low": 0.2, "high": 0.4, "total_loss": 2.0, "token_loss": 1.8}
        >>> figure = block_search([row | {"cosine_loss": 0.2, "cosine": "v o", "token": "gate up down"}])
    """
    losses = {"total_loss": "total", "token_loss": "token (nats)", "cosine_loss": "cosine (0 to 1)"}
    frame = check_table(table, words=("cosine", "token"), numbers=("n", "mean", "low", "high", *losses))
    parts = [part for part in ("cosine", "token", "kl") if part in frame]
    frame = frame.assign(**{part: [_blocks_named(names) for names in frame[part]] for part in parts})
    once(frame, parts)
    if "perplexity" in frame:
        frame, losses = with_numbers(frame, ["perplexity"]), losses | {"perplexity": "perplexity"}
    frame = renamed(frame, "effect").sort_values(["effect", "total_loss"], ascending=[False, True], kind="stable")
    panels = {name: words for name, words in ({"effect": "effect"} | losses).items() if frame[name].notna().any()}
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
    for column, (name, words) in enumerate(panels.items(), start=1):
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
        figure.update_xaxes(title_text=f"validation loss:<br>{words}" if loss else words, nticks=4, row=1, col=column)
    figure.update_xaxes(zeroline=False).update_yaxes(type="category", autorange="reversed")
    if "effect" in panels:
        figure.add_vline(x=0, line={"dash": "dash", "color": INK, "width": 1}, row=1, col=1)
        reading = (
            "The higher a choice of weights stands, the more it does. Whiskers: 95 % intervals; dashed: no effect."
        )
    else:
        reading = "No effect was measured: the choices of weights stand by their total validation loss, smallest first."
    return apply_style(figure, title, reading, sample(frame), height=ROW * len(frame) + 200, showlegend=False)


def kinds(table: Table, *, title: str = "Does it carry over to other kinds of prompts?") -> go.Figure:
    """Change of the score against untuned, by kind of prompt and arm, one panel per direction.

    Args:
        table: one row per kind, arm and direction, kinds in the order in which to draw them. Columns: kind, arm,
            direction, n (paired responses), mean, low, high (score minus the untuned model's on the same prompts),
            seeds (list of int).
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing, or a kind, arm and direction come twice.

    Example:
        >>> row = {"arm": "rep_tuned", "direction": "away", "n": 40, "mean": -0.3, "low": -0.4, "high": -0.2}
        >>> figure = kinds([row | {"kind": kind, "seeds": [0]} for kind in ("stories", "instructions")])
    """
    frame = check_table(table, words=("kind", "arm", "direction", "seeds"), numbers=("n", "mean", "low", "high"))
    once(frame, ["kind", "arm", "direction"])
    frame = renamed(frame, "change")
    names, arms = ordered(frame["kind"]), ordered(frame["arm"], list(ARM_COLOURS))
    directions, colours = ordered(frame["direction"], DIRECTIONS), arm_colours(frame["arm"])
    figure = make_subplots(
        cols=len(directions),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=[f"direction: {direction}" for direction in directions],
    )
    step = 0.7 / len(arms)  # arms stand below each other within their kind
    for arm in arms:
        shift = (arms.index(arm) - (len(arms) - 1) / 2) * step
        for column, direction in enumerate(directions, start=1):
            own = frame[(frame["arm"] == arm) & (frame["direction"] == direction)]
            dots = go.Scatter(
                x=own["change"],
                y=[names.index(kind) + shift for kind in own["kind"]],
                error_x=whiskers(own, "change", colours[arm]),
                mode="markers",
                marker={"color": colours[arm], "size": 10},
                name=arm,
                showlegend=False,
                hovertext=[
                    f"{row['kind']}<br>{arm}, {direction}<br>change {row_estimate(row, 'change')}<br>{counted(row)}"
                    for _, row in own.iterrows()
                ],
                hoverinfo="text",
            )
            figure.add_trace(dots, row=1, col=column)
        figure.add_trace(key(arm, mode="markers", marker={"color": colours[arm], "size": 10}), row=1, col=1)
    for place in range(1, len(names)):
        figure.add_hline(y=place - 0.5, line={"color": "#E5E5E5", "width": 1})
    figure.add_vline(x=0, line={"dash": "dash", "color": INK, "width": 1.5})
    ticks = {"tickvals": list(range(len(names))), "ticktext": names}
    figure.update_yaxes(range=[len(names) - 0.5, -0.5], showgrid=False, zeroline=False, **ticks)
    figure.update_xaxes(title_text="score minus untuned score", zeroline=False, matches="x")
    reading = (
        "A whisker (95 % interval) that misses the dashed line: a change against the untuned model on the same prompts."
    )
    height = 200 + len(names) * max(2 * ROW, 22 * len(arms))
    apply_style(figure, title, reading, sample(frame), height=height, legend_traceorder="normal")
    return figure.update_annotations(yshift=4)


def once(frame: pd.DataFrame, columns: list[str], argument: str = "table") -> None:
    """Refuses a second row of the same names."""
    repeated = frame[frame.duplicated(columns)]
    if not repeated.empty:
        names = ", ".join(
            f"{name:g}" if isinstance(name, float) else unescape(str(name)) for name in repeated.iloc[0][columns]
        )
        raise ValueError(
            f"{argument} must have one row for each {' and '.join(columns)}, got {names} more than once. "
            "Pool the seeds first."
        )


def renamed(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """The frame with mean, low and high as name, name_low and name_high."""
    return frame.rename(columns={"mean": name, "low": f"{name}_low", "high": f"{name}_high"})


def whiskers(frame: pd.DataFrame, name: str, colour: str = INK) -> dict[str, Any]:
    """Error bars from name_low to name_high; none where they are NaN."""
    up, down = frame[f"{name}_high"] - frame[name], frame[name] - frame[f"{name}_low"]
    return {"type": "data", "array": up, "arrayminus": down, "color": colour, "thickness": 1.5, "width": 4}


def counted(row: pd.Series) -> str:
    return f"n = {number(row['n'], 0)}, seeds {', '.join(map(str, row['seeds']))}"


def _blocks(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Each direction's rows; one without an untuned row borrows the first, and one of nothing else is no block."""
    untuned = frame[frame["variant"] == "untuned"]
    if untuned.empty:
        names = unescape(", ".join(map(str, ordered(frame["variant"]))))
        raise ValueError(f"table must have a row of the variant 'untuned', got {names}. Add it.")
    blocks = {}
    tuned = frame[frame["variant"] != "untuned"]
    for direction in ordered((tuned if len(tuned) else frame)["direction"], DIRECTIONS):
        own = frame[frame["direction"] == direction]
        if not (own["variant"] == "untuned").any():
            own = pd.concat([untuned.iloc[:1], own])
        blocks[direction] = own
    return blocks


def _variant_hover(row: pd.Series) -> str:
    return (
        f"{row['variant']}, {row['direction']}<br>score {row_estimate(row, 'score')}<br>perplexity "
        f"{row_estimate(row, 'perplexity')}<br>KL {row_estimate(row, 'kl')} nats per token<br>{counted(row)}"
    )


def _search_hover(label: str, row: pd.Series, losses: dict[str, str]) -> str:
    parts = "<br>".join(f"{words} {number(row[name])}" for name, words in losses.items())
    return f"{label}<br>effect {row_estimate(row, 'effect')}, n = {number(row['n'], 0)}<br>{parts}"


def _blocks_named(names: Any) -> str:
    return names if isinstance(names, str) and names else "none"
