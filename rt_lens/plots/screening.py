"""Rows of a data set by how far they lie along a direction."""

from __future__ import annotations

import plotly.graph_objects as go

from rt_lens.common.formatting import number
from rt_lens.plots.style import FAINT, INK, Table, apply_style, check_table, escape_html, ordered

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LONGEST = 90


def screening(table: Table, *, title: str = "Which rows push along the vector?") -> go.Figure:
    """Draws each row's difference from the model's own answer, sorted; the text stands in the hover.

    Args:
        table: one row per target. Columns: row, difference (lengths of the vector), prompt, answer; optionally label,
            which colours the rows.
        title: heading of the figure.

    Raises:
        ValueError: if a column or all rows are missing.

    Example:
        >>> row = {"prompt": "How was it?", "answer": "Fine."}
        >>> rows = [row | {"row": 0, "difference": 0.2}, row | {"row": 1, "difference": 1.4}]
        >>> screening(rows).data[0].y.tolist()  # the furthest first
        [1.4, 0.2]
    """
    frame = check_table(
        table, labels=("row", "prompt", "answer"), numbers=("difference",), unescaped=("prompt", "answer")
    )
    frame = frame.sort_values("difference", ascending=False, kind="stable").reset_index(drop=True)
    labelled = "label" in frame.columns
    figure = go.Figure()
    for index, label in enumerate(ordered(frame["label"]) if labelled else [""]):
        rows = frame[frame["label"] == label] if labelled else frame
        hover = [
            f"row {row['row']}: {number(row['difference'], 2)}<br>{_short(row['prompt'])}<br>{_short(row['answer'])}"
            for _, row in rows.iterrows()
        ]
        figure.add_trace(
            go.Scatter(
                x=rows.index + 1, y=rows["difference"], mode="markers", name=str(label), hovertext=hover,
                hoverinfo="text", marker={"size": 8, "color": _COLOURS[index % len(_COLOURS)]},
            )
        )  # fmt: skip
    mean = float(frame["difference"].mean())
    figure.add_hline(0, line={"color": FAINT, "width": 1})
    figure.add_hline(
        mean, line={"color": INK, "dash": "dash", "width": 1}, annotation_text=f"mean {number(mean, 2)}",
        annotation_position="top right",
    )  # fmt: skip
    figure.update_xaxes(title_text="rows, the furthest along the vector first", rangemode="tozero")
    figure.update_yaxes(title_text="difference from the model's own answer (lengths of the vector)")
    reading = (
        "Each point is a row's answer, read by the untuned model: above 0 it lies further along the vector than what "
        "the model would answer itself, and tuning on it moves the model there. Hover for the text."
    )
    return apply_style(figure, title, reading, f"n = {len(frame):,} rows.", height=480, showlegend=labelled)


def _short(text: str) -> str:
    """The end of a text, where a prompt's question and an answer's gist are."""
    text = str(text).replace("\n", " ")
    return escape_html(text if len(text) <= _LONGEST else f"...{text[-_LONGEST:]}")
