"""The style that all figures share: colours, frames, hover texts, and the checks of a figure's table."""

from __future__ import annotations

import textwrap
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from html import escape, unescape
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.colors import hex_to_rgb
from torch import Tensor

from rt_lens.common.formatting import estimate
from rt_lens.common.formatting import with_minus_sign as with_minus_sign

Table: TypeAlias = pd.DataFrame | Sequence[Mapping[str, Any]]
PerLayer: TypeAlias = Float[Tensor, " layer"] | Float[np.ndarray, " layer"]  # the space is for linters
PerToken: TypeAlias = Float[Tensor, "layer pos"] | Float[np.ndarray, "layer pos"]
Number: TypeAlias = int | float  # runtime type checkers do not accept an int as a float

# Okabe and Ito's palette, whose colours stay distinct for colour-blind readers.
ARM_COLOURS = {"untuned": "#7F7F7F", "steered": "#E69F00", "token_tuned": "#56B4E9", "rep_tuned": "#009E73"}
# Arms named after the direction of their tuning, and KL-then-steer (black, the palette's last).
ARM_COLOURS |= {
    "toward_tuned": "#D55E00",
    "away_tuned": "#0072B2",
    "suppress_tuned": "#CC79A7",
    "kl_then_steer": "#000000",
}
_OLD_NAMES = {"out_tuned": "suppress_tuned"}
SPARE_COLOURS = ("#CC79A7", "#D55E00", "#0072B2", "#F0E442")
DIRECTIONS = ("none", "toward", "away", "suppress")
SYMBOLS = {"none": "circle", "toward": "triangle-up", "away": "triangle-down", "suppress": "diamond"}
LOSS_PARTS = {"total": "total", "token": "token (nats)", "cosine": "cosine (0 to 1)", "kl": "KL (nats)"}
OTHER_LOSSES = {
    "preference": "preference (nats)", "lorra": "distance to aim", "circuit_breaker": "cosine to untuned (0 to 1)",
    "retain": "distance kept (neutral)",
}  # fmt: skip
INK, FAINT = "#222222", "#8A8A8A"
_TOP = 60  # px above the panels of a figure without title, for their names and Plotly's buttons


def check_table(
    table: Table,
    *,
    labels: Sequence[str] = (),
    numbers: Sequence[str] = (),
    unescaped: Sequence[str] = (),
    argument: str = "table",
) -> pd.DataFrame:
    """The table as a DataFrame with its columns checked, its numbers as float (None becomes NaN) and its text escaped.

    Args:
        table: a DataFrame, or a list of rows.
        labels: columns that must be there, of any type.
        numbers: columns that must be there and hold numbers.
        unescaped: columns whose text stays as it is, for a figure that measures or cuts it before it escapes it.
        argument: the name of the table in messages.

    Raises:
        ValueError: if a column or all rows are missing, or text stands among numbers.
    """
    frame = table if isinstance(table, pd.DataFrame) else pd.DataFrame(list(table))
    if frame.empty:
        columns = ", ".join([*labels, *numbers])
        raise ValueError(f"{argument} must have at least one row, got none. Give rows with the columns {columns}.")
    frame = with_numbers(frame.reset_index(drop=True), numbers, labels=labels, argument=argument)
    for column in frame.columns:
        if column not in unescaped and not pd.api.types.is_numeric_dtype(frame[column]):
            frame[column] = frame[column].map(escape_html)
    return frame


def with_numbers(
    frame: pd.DataFrame, numbers: Sequence[str], *, labels: Sequence[str] = (), argument: str = "table"
) -> pd.DataFrame:
    """The frame, which must have all these columns, with the numbers made float (None becomes NaN)."""
    missing = [column for column in (*labels, *numbers) if column not in frame.columns]
    if missing:
        required, present = ", ".join([*labels, *numbers]), ", ".join(map(str, frame.columns))
        raise ValueError(f"{argument} must have the columns {required}, got {present}. Add {', '.join(missing)}.")
    for column in numbers:
        try:
            frame = frame.assign(**{column: frame[column].astype(float)})
        except (TypeError, ValueError) as refusal:
            raise ValueError(f"{argument} must hold numbers in the column {column}, got text ({refusal}).") from refusal
    return frame


def with_new_names(table: Table, old_names: Mapping[str, str]) -> pd.DataFrame:
    """The table as a DataFrame, with columns that have an old name under their new one."""
    frame = table if isinstance(table, pd.DataFrame) else pd.DataFrame(list(table))
    old = [column for column in frame.columns if column in old_names]
    if old:
        new = ", ".join(old_names[column] for column in old)
        warnings.warn(f"'{', '.join(old)}' is now '{new}'; the old name still works.", UserWarning, stacklevel=3)
    return frame.rename(columns=dict(old_names))


def check_unique(
    frame: pd.DataFrame, columns: list[str], argument: str = "table", fix: str = "Pool the seeds first."
) -> None:
    """Refuses a table that has two rows of the same names.

    Raises:
        ValueError: names the first of them.
    """
    repeated = frame[frame.duplicated(columns)]
    if not repeated.empty:
        names = ", ".join(
            f"{name:g}" if isinstance(name, float) else unescape(str(name)) for name in repeated.iloc[0][columns]
        )
        raise ValueError(
            f"{argument} must have one row for each {' and '.join(columns)}, got {names} more than once. {fix}"
        )


def with_measure(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """The frame with mean, low and high as name, name_low and name_high."""
    return frame.rename(columns={"mean": name, "low": f"{name}_low", "high": f"{name}_high"})


def whiskers(frame: pd.DataFrame, name: str, colour: str = INK) -> dict[str, Any]:
    """Error bars from name_low to name_high; none where they are NaN."""
    up, down = frame[f"{name}_high"] - frame[name], frame[name] - frame[f"{name}_low"]
    return {"type": "data", "array": up, "arrayminus": down, "color": colour, "thickness": 1.5, "width": 4}


def apply_style(
    figure: go.Figure, title: str, reading: str, sample: str = "", *, height: int = 470, **layout: Any
) -> go.Figure:
    """Gives the figure the shared style; the sentence on how to read it is broken into lines, or Plotly clips it."""
    lines = [*textwrap.wrap(reading, 125, break_long_words=False), *([sample] if sample else [])]
    subtitle = {"text": "<br>".join(lines), "font": {"size": 14, "color": "#555555"}}
    figure.update_layout(
        template="plotly_white",
        font={"family": "Helvetica, Arial, sans-serif", "size": 14, "color": INK},
        title={
            "text": escape_html(title),
            "font_size": 19,
            "x": 0.01,
            "y": 1,
            "yanchor": "top",
            "pad": {"t": 16},
            "subtitle": subtitle,
        },
        margin={"l": 80, "r": 30, "t": 82 + 20 * len(lines), "b": 70},
        height=height + 20 * (len(lines) - 1),
        hoverlabel={"bgcolor": "white", "font_size": 13},
        **layout,
    )
    figure.update_annotations(font_size=14)
    figure.update_yaxes(ticklabelstandoff=5)
    return figure


def take_title(figure: go.Figure) -> tuple[str, str]:
    """Removes the title, and returns it with its subtitle as plain text: text of a page wraps in any window."""
    title, height, top = figure.layout.title, figure.layout.height, figure.layout.margin.t
    heading, subtitle = (unescape((text or "").replace("<br>", " ")) for text in (title.text, title.subtitle.text))
    figure.update_layout(title=None, margin_t=_TOP, height=height - top + _TOP)
    return heading, subtitle


def escape_html(value: Any) -> Any:
    """A copy whose strings Plotly draws literally; it would render some HTML and `$...$` as TeX, and fill in `%{...}`.

    Every figure function escapes its arguments once, at its entrance, so callers pass text as it is. Quotes stay,
    because Plotly decodes &lt; &gt; &amp; and numeric entities such as &#36;, but not &quot;.

    Args:
        value: a string, or a list or tuple, which becomes a list; any other value is returned unchanged.

    Example:
        >>> escape_html(["<b>", "$x$"])
        ['&lt;b&gt;', '&#36;x&#36;']
    """
    if isinstance(value, str):
        return escape(value, quote=False).replace("$", "&#36;").replace("%{", "&#37;{")
    return [escape_html(inner) for inner in value] if isinstance(value, list | tuple) else value


def sample(frame: pd.DataFrame) -> str:
    """The sample size and seeds, `n = 72; seeds 0, 1.`, as far as the frame has the columns n and seeds or seed."""
    facts = []
    if "n" in frame and frame["n"].notna().any():
        low, high = frame["n"].min(), frame["n"].max()
        facts.append(f"n = {low:g}" if low == high else f"n = {low:g} to {high:g}")
    if "seeds" in frame:
        seeds = {seed for row in frame["seeds"] for seed in row}
    else:
        seeds = set(frame["seed"]) if "seed" in frame else set()
    if seeds:
        noun = "seed" if len(seeds) == 1 else "seeds"
        facts.append(f"{noun if facts else noun.capitalize()} {', '.join(map(str, sorted(seeds)))}")
    return "; ".join(facts) + "." if facts else ""


def seeds_of(row: pd.Series) -> str:
    """The seeds in a hover text: `seeds 0, 1`, or a dash for an arm that was never tuned."""
    return f"seeds {', '.join(map(str, row['seeds'])) or '–'}"


def row_estimate(row: Mapping[str, Any] | pd.Series, measure: str = "mean", digits: int = 3) -> str:
    """A measure of a row with its interval: `0.512 [0.430, 0.594]`.

    The interval of `mean` and of `difference` stands in the columns low and high; another measure has its own columns
    (`kl_low`, `kl_high`), or no interval.

    Example:
        >>> row = {"mean": 0.512, "low": 0.43, "high": 0.594, "kl": 0.1}
        >>> row_estimate(row), row_estimate(row, "kl")
        ('0.512 [0.430, 0.594]', '0.100')
    """
    low, high = ("low", "high") if measure in ("mean", "difference") else (f"{measure}_low", f"{measure}_high")
    return estimate(row[measure], row.get(low), row.get(high), digits)


def shown(token: str) -> str:
    """The token with its whitespace made visible: ⏎ for a newline, ⇥ for a tab, · for each leading space.

    A token without a visible character becomes its code points, U+200B for example, and an empty token becomes ∅.
    """
    stripped = token.lstrip(" ")
    marked = ("·" * (len(token) - len(stripped)) + stripped).replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
    if all(unicodedata.category(letter)[0] in "CMZ" for letter in marked):  # control, format, accents, separators
        return " ".join(f"U+{ord(letter):04X}" for letter in marked) or "∅"
    return marked


def band(
    frame: pd.DataFrame, x: str, colour: str, *, low: str = "low", high: str = "high", **style: Any
) -> tuple[go.Scatter, go.Scatter]:
    """The lower and upper edge of an interval, pale between them; add them in this order, one right after the other."""
    edge: dict[str, Any] = {"x": frame[x], "mode": "lines", "line_width": 0, "hoverinfo": "skip", "showlegend": False}
    filling = {"fill": "tonexty", "fillcolor": f"rgba{(*hex_to_rgb(colour), 0.18)}"}
    return go.Scatter(y=frame[low], **edge | style), go.Scatter(y=frame[high], **edge | filling | style)


def legend_entry(name: str, **style: Any) -> go.Scatter:
    """A legend entry without data."""
    return go.Scatter(x=[None], y=[None], name=name, hoverinfo="skip", **style)


def unsteered(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of multiplier 0; the table must have at least one."""
    zero = frame[frame["multiplier"] == 0]
    if zero.empty:
        raise ValueError(
            f"table must have a row of multiplier 0, the unsteered model, got {ordered(frame['multiplier'])}. Add it."
        )
    return zero


def doses_by_layer(frame: pd.DataFrame) -> dict[int, pd.DataFrame]:
    """The rows of each layer by multiplier; a layer without a row of multiplier 0 borrows the first."""
    zero, doses = unsteered(frame), {}
    for layer in sorted(frame["layer"].dropna().unique()):
        rows = frame[frame["layer"] == layer]
        if not (rows["multiplier"] == 0).any():
            rows = pd.concat([rows, frame.loc[zero.index[:1]]])
        doses[int(layer)] = rows.sort_values("multiplier")
    return doses


def ordered(values: Iterable[Any], known: Sequence[Any] = ()) -> list[Any]:
    """The distinct values: those in `known` first, in its order, then the others in theirs."""
    distinct = list(dict.fromkeys(values))
    return [value for value in known if value in distinct] + [value for value in distinct if value not in known]


def arm_colours(names: Iterable[str]) -> dict[str, str]:
    """The colour of every arm; an unknown arm gets a spare one, unlike those of the known arms if one is left."""
    known = ARM_COLOURS | {old: ARM_COLOURS[new] for old, new in _OLD_NAMES.items()}
    names = list(dict.fromkeys(names))
    unknown = [name for name in names if name not in known]
    taken = {known[name] for name in names if name in known}
    spare = [colour for colour in SPARE_COLOURS if colour not in taken] or SPARE_COLOURS
    return known | {name: spare[i % len(spare)] for i, name in enumerate(unknown)}
