"""Tables for a paper or a README: a row per arm, a column per set and scorer, every number with its interval."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pandas as pd

from rt_lens.arms.comparison import beats
from rt_lens.common.arm_labels import ArmLabel
from rt_lens.common.formatting import estimate

Rows: TypeAlias = pd.DataFrame | Sequence[Mapping[str, Any]]
Pair: TypeAlias = tuple[str, str]
"""Arm and direction, or set and scorer."""

_LESS_IS_BETTER = {
    "perplexity",
    "KL",
    "repetition",
    "loop",
    "off_option_mass",
    "off_option_mass_multiple_choice",
}
_NEITHER = {"length"}
_PER_PANEL = 4  # columns such as "0.52 [0.43, 0.61]" that fit the width of a page
_IN_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    # After the end of a row, LaTeX reads a bracket as a length, and a star as a command.
    "[": "{[}", "]": "{]}", "*": "{*}",
    **{sign: rf"\{sign}" for sign in "&%$#_"},
}  # fmt: skip


def to_markdown(rows: Rows, *, caption: str, by_direction: bool = True) -> str:
    """The rows as a Markdown table: `0.52 [0.43, 0.61]` in each cell, the best of a column in bold, a note below.

    Args:
        rows: of `summary` or `side_effects` in results.json, or `ArmScores.summary()`. Columns: arm, direction, set,
            scorer, n, mean, low, high, seeds; optional perplexity and kl (with _low, _high) and n_texts.
        caption: one line above the table.
        by_direction: compare arms of one direction with each other; among arms `away` the lowest score is best. False
            for side effects, where less repetition and more of anything else is better in every direction.

    Raises:
        ValueError: if there is no row, a column is missing, or two rows have the same arm, direction, set and scorer.

    Example:
        >>> rows = load_results("runs/mood").content["summary"]
        >>> print(to_markdown(rows, caption="mood on tiny"))
        **mood on tiny**
        <BLANKLINE>
        | arm | direction | test: vader | texts: perplexity | texts: KL |
        |---|---|---:|---:|---:|
        | untuned | none | 0.30 [0.13, 0.47] | 19.87 [19.35, 20.52] | 0.000 |
        ...
    """
    grid = _grid(rows, by_direction)
    titles = [_mark(f"{name}: {scorer}") for name, scorer in grid.columns]
    lines = [f"**{_mark(caption)}**", "", f"| {' | '.join([*map(_mark, grid.heads), *titles])} |"]
    lines.append(f"|{'---|' * len(grid.heads)}{'---:|' * len(titles)}")
    for label in grid.labels:
        cells = [_filled(grid, label, column, lambda text: f"**{text}**", str) for column in grid.columns]
        lines.append(f"| {' | '.join([*map(_mark, label[: len(grid.heads)]), *cells])} |")
    return "\n".join([*lines, "", _mark(grid.note), ""])


def to_latex(rows: Rows, *, caption: str, by_direction: bool = True) -> str:
    """The rows as a LaTeX table with booktabs rules, in panels of four columns, which fit the width of a page.

    Args:
        rows: as for `to_markdown`.
        caption: of the table; the note on n, seeds and intervals follows it.
        by_direction: as for `to_markdown`.

    Raises:
        ValueError: as for `to_markdown`.

    Example:
        >>> rows = load_results("runs/mood").content["summary"]
        >>> table = to_latex(rows, caption="mood on tiny")
        >>> table.splitlines()[1], table.count("toprule")  # one panel
        ('\\\\begin{table}[htbp]', 1)
    """
    grid = _grid(rows, by_direction)
    panels = [grid.columns[start : start + _PER_PANEL] for start in range(0, len(grid.columns), _PER_PANEL)]
    lines = [
        r"% In the preamble: \usepackage{booktabs} \usepackage[T1]{fontenc}",
        r"\begin{table}[htbp]",
        r"\centering\small",
        rf"\caption{{{_tex(caption)}. {_tex(grid.note)}}}",
        ("\n" + r"\par\medskip" + "\n").join(_panel(grid, panel) for panel in panels),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def efficient(rows: Rows, *, side_effect: str = "kl") -> list[dict[str, Any]]:
    """Marks the efficient rows of one set and scorer: no other row has a better score without a larger side effect.

    Another row beats a row if it is at least as good on score and side effect, and better on one of them. A row is
    compared with rows of its own direction and of no direction, such as the untuned model. Among arms `away`, a lower
    score is better. A row without a measured side effect is not efficient.

    Args:
        rows: as for `to_markdown`, of one set and scorer.
        side_effect: column of the side effect, `kl` or `perplexity`.

    Returns:
        The rows with `efficient`, for `plots.pareto`.

    Raises:
        ValueError: if a column is missing, or the rows have several sets or scorers.

    Example:
        >>> rows = efficient(load_results("runs/mood").content["summary"])
        >>> [row["arm"] for row in rows if row["efficient"]][0]  # nothing has a smaller KL to the untuned model
        'untuned'
    """
    table = _checked(rows, ("arm", "direction", "set", "scorer", "mean", side_effect))
    if len(kinds := {(row["set"], row["scorer"]) for row in table}) > 1:
        raise ValueError(
            f"rows must have one set and one scorer, got {len(kinds)} pairs of them. Keep one of each, since different "
            "scores cannot share an axis."
        )

    def beaten(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        gain = (other["mean"] - row["mean"]) * (-1 if row["direction"] == "away" else 1)
        return beats(gain, row[side_effect] - other[side_effect])

    measured = [row for row in table if _there(row[side_effect]) and _there(row["mean"])]
    return [
        {**row, "efficient": row in measured and not any(
            beaten(row, other) for other in measured if other["direction"] in (row["direction"], "none")
        )}
        for row in table
    ]  # fmt: skip


@dataclass(frozen=True)
class _Grid:
    """The content of a table, before it is written as Markdown or LaTeX."""

    heads: list[str]
    labels: list[Pair]
    columns: list[Pair]
    cells: Mapping[tuple[Pair, Pair], str]
    best: set[tuple[Pair, Pair]]
    note: str


def _grid(rows: Rows, by_direction: bool) -> _Grid:
    table = _checked(rows, ("arm", "direction", "set", "scorer", "n", "mean", "low", "high", "seeds"))
    table += _of_texts(table)
    cells: dict[tuple[Pair, Pair], str] = {}
    for row in table:
        key = (_label(row), _column(row))
        if key in cells:
            raise ValueError(
                "rows must have one row per arm, direction, set and scorer, got two for "
                f"{', '.join(map(str, sum(key, ())))}. Pool them over seeds."
            )
        cells[key] = _cell(row)
    directed = any(row["direction"] != "none" for row in table)
    return _Grid(
        ["arm", "direction"] if directed else ["arm"],
        list(dict.fromkeys(map(_label, table))), list(dict.fromkeys(map(_column, table))), cells,
        _best(table, by_direction), _note(table, by_direction and directed),
    )  # fmt: skip


def _of_texts(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Perplexity and KL as separate rows, one for each arm."""
    arms = {_label(row): row for row in reversed(table)}
    return [
        {"arm": row["arm"], "direction": row["direction"], "set": "texts", "scorer": scorer, "seeds": row["seeds"],
         "n": row.get("n_texts"), "mean": row[name], "low": row.get(f"{name}_low"), "high": row.get(f"{name}_high")}
        for name, scorer in (("perplexity", "perplexity"), ("kl", "KL"))
        for row in reversed(arms.values())
        if _there(row.get(name))
    ]  # fmt: skip


def _best(table: Sequence[Mapping[str, Any]], by_direction: bool) -> set[tuple[Pair, Pair]]:
    """The best cells of each column at the printed precision; none where all cells are equal."""
    columns: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in table:
        separate = by_direction and row["scorer"] not in _LESS_IS_BETTER
        reference = row["scorer"] == "KL" and row["mean"] == 0
        if _there(row["mean"]) and not reference and row["scorer"] not in _NEITHER:
            columns.setdefault((_column(row), row["direction"] if separate else "none"), []).append(row)
    best = set()
    for ((_, scorer), direction), rows in columns.items():
        values = [round(float(row["mean"]), _digits(scorer)) for row in rows]
        if len(set(values)) > 1:
            top = min(values) if scorer in _LESS_IS_BETTER or direction == "away" else max(values)
            best |= {(_label(row), _column(row)) for row, value in zip(rows, values, strict=True) if value == top}
    return best


def _note(table: Sequence[Mapping[str, Any]], by_direction: bool) -> str:
    sizes: dict[str, set[int]] = {}
    arms: dict[str, dict[str, None]] = {}
    for row in table:
        if _there(row["n"]):
            sizes.setdefault(row["set"], set()).add(int(row["n"]))
        arms.setdefault(", ".join(map(str, row["seeds"])), {})[str(ArmLabel(*_label(row)))] = None
    ns = "; ".join(f"{name} {' to '.join(map(str, sorted({min(n), max(n)})))}" for name, n in sizes.items())
    seeds = "; ".join(f"{numbers} ({'; '.join(labels)})" for numbers, labels in arms.items())
    several = any(len(row["seeds"]) > 1 for row in table)
    over = "prompts, and over tuning seeds where an arm has several" if several else "prompts"
    bold = "best of a column among arms of one direction" if by_direction else "best of a column"
    return (
        f"Brackets: 95 % intervals over {over} (bootstrap or t; Wilson's for shares of a single seed). n: {ns}. "
        f"Seeds: {seeds}. Bold: {bold}; the difference from the next best can be noise."
    )


def _checked(rows: Rows, columns: Sequence[str]) -> list[dict[str, Any]]:
    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
    if frame.empty:
        raise ValueError("rows must have at least one row, got none. Give those of `ArmScores.summary()`.")
    if missing := [column for column in columns if column not in frame]:
        raise ValueError(
            f"rows must have the column {', '.join(missing)}, got {', '.join(map(str, frame.columns))}. Give the rows "
            "of `ArmScores.summary()`."
        )
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def _label(row: Mapping[str, Any]) -> Pair:
    return row["arm"], row["direction"]


def _column(row: Mapping[str, Any]) -> Pair:
    return row["set"], row["scorer"]


def _there(value: Any) -> bool:
    return value is not None and not math.isnan(value)


def _cell(row: Mapping[str, Any]) -> str:
    return estimate(row["mean"], row["low"], row["high"], _digits(row["scorer"]))


def _digits(scorer: str) -> int:
    return 3 if scorer == "KL" else 2


def _filled(
    grid: _Grid,
    label: Pair,
    column: Pair,
    bold: Callable[[str], str],
    write: Callable[[str], str],
) -> str:
    """The text of a cell, with its mean in bold if it is the best."""
    mean, space, interval = grid.cells.get((label, column), "–").partition(" ")
    best = (label, column) in grid.best
    return (bold(write(mean)) if best else write(mean)) + space + write(interval)


def _panel(grid: _Grid, columns: Sequence[Pair]) -> str:
    n = len(grid.heads)
    sets: list[list[Any]] = []
    for number, (name, _) in enumerate(columns, start=n + 1):
        if sets and sets[-1][0] == name:
            sets[-1][2] = number
        else:
            sets.append([name, number, number])
    header = " & ".join([*[""] * n, *(rf"\multicolumn{{{b - a + 1}}}{{c}}{{{_tex(name)}}}" for name, a, b in sets)])
    rules = " ".join(rf"\cmidrule(lr){{{a}-{b}}}" for _, a, b in sets)
    lines = [rf"\begin{{tabular}}{{@{{}}{'l' * n}{'r' * len(columns)}@{{}}}}", r"\toprule", rf"{header} \\", rules]
    lines += [rf"{' & '.join(map(_tex, [*grid.heads, *(scorer for _, scorer in columns)]))} \\", r"\midrule"]
    for label in grid.labels:
        cells = [_filled(grid, label, column, lambda text: rf"\textbf{{{text}}}", _figures) for column in columns]
        lines.append(rf"{' & '.join([*map(_tex, label[:n]), *cells])} \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _figures(text: str) -> str:
    """Numbers and brackets for LaTeX, with a minus sign instead of a hyphen."""
    return text.replace("-", "$-$").replace("–", "--")


def _tex(text: Any) -> str:
    return "".join(_IN_LATEX.get(sign, sign) for sign in " ".join(str(text).split()))


def _mark(text: Any) -> str:
    """Text on one line with its markup escaped. HTML is escaped first, since Markdown passes it on."""
    return re.sub(r"([\\`*_~\[\]#|])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))
