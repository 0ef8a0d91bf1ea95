"""Tables for a paper or a README: arms down, sets and scorers across, every number with its interval."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pandas as pd

from rt_lens.arms.comparison import beats

Rows: TypeAlias = pd.DataFrame | Sequence[Mapping[str, Any]]
Pair: TypeAlias = tuple[str, str]
"""Arm and direction, or set and scorer."""

_LESS_IS_BETTER = {"perplexity", "KL", "repetition", "loop", "other", "other_letters"}
_NEITHER = {"length"}
_PER_PANEL = 4  # columns such as "0.52 [0.43, 0.61]" that a page's width holds
_IN_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    # After the end of a row, a bracket would be read as its length, and a star as an order.
    "[": "{[}", "]": "{]}", "*": "{*}",
    **{sign: rf"\{sign}" for sign in "&%$#_"},
}  # fmt: skip


def to_markdown(rows: Rows, *, caption: str, by_direction: bool = True) -> str:
    """The rows as a Markdown table: `0.52 [0.43, 0.61]` in each cell, the best of a column in bold, a note below.

    Args:
        rows: of `summary` or `side_effects` in results.json, or `ArmScores.summary()`. Columns: arm, direction, set,
            scorer, n, mean, low, high, seeds; perplexity and kl (with _low, _high) and n_texts where there are any.
        caption: one line above the table.
        by_direction: the best arm away has the lowest score, and arms of one direction stand against one another. False
            for side effects, where less repetition and more of anything else is better, whatever the direction.

    Raises:
        ValueError: no row, a column that is missing, or an arm, direction, set and scorer that come twice.

    Example:
        >>> print(to_markdown(board.summary(), caption="mood on SmolLM2-135M-Instruct"), encoding="utf-8")
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
    """The same as a LaTeX table with booktabs' rules, in panels of four columns, which fit a page's width.

    Args:
        rows: as for `to_markdown`.
        caption: of the table; the note on n, seeds and intervals follows it.
        by_direction: as for `to_markdown`.

    Raises:
        ValueError: as for `to_markdown`.

    Example:
        >>> table = to_latex(board.summary(), caption="mood on SmolLM2-135M-Instruct")
        >>> Path("table.tex").write_text(table, encoding="utf-8")
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


def efficient(rows: Rows, *, harm: str = "kl") -> list[dict[str, Any]]:
    """The rows of one set and scorer, and whether no other is at least as good at no more harm, one of them strictly.

    Arms of one direction stand against one another and against those of none, such as the untuned model. Away, a lower
    score is better. A row whose harm was not measured is not efficient.

    Args:
        rows: as for `to_markdown`, of one set and scorer.
        harm: column of the side effect, `kl` or `perplexity`.

    Returns:
        The rows with `efficient`, for `plots.pareto`.

    Raises:
        ValueError: a column that is missing, or rows of several sets or scorers.

    Example:
        >>> plots.pareto(efficient(board.summary().query("set == 'test' and scorer == 'vader'")))
    """
    table = _checked(rows, ("arm", "direction", "set", "scorer", "mean", harm))
    if len({(row["set"], row["scorer"]) for row in table}) > 1:
        raise ValueError("rows: of several sets or scorers. Keep one of each; their scores share no axis.")

    def beaten(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        gain = (other["mean"] - row["mean"]) * (-1 if row["direction"] == "away" else 1)
        return beats(gain, row[harm] - other[harm])

    measured = [row for row in table if _there(row[harm]) and _there(row["mean"])]
    return [
        {**row, "efficient": row in measured and not any(
            beaten(row, other) for other in measured if other["direction"] in (row["direction"], "none")
        )}
        for row in table
    ]  # fmt: skip


@dataclass(frozen=True)
class _Grid:
    """What a table says, before it is Markdown or LaTeX."""

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
        place = (_label(row), _column(row))
        if place in cells:
            raise ValueError(f"rows: {', '.join(map(str, sum(place, ())))} came more than once. Pool it over seeds.")
        cells[place] = _cell(row)
    several = any(row["direction"] != "none" for row in table)
    return _Grid(
        ["arm", "direction"] if several else ["arm"],
        list(dict.fromkeys(map(_label, table))), list(dict.fromkeys(map(_column, table))), cells,
        _best(table, by_direction), _note(table, by_direction and several),
    )  # fmt: skip


def _of_texts(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Perplexity and KL as rows of their own, once for each arm."""
    arms = {_label(row): row for row in reversed(table)}
    return [
        {"arm": row["arm"], "direction": row["direction"], "set": "texts", "scorer": scorer, "seeds": row["seeds"],
         "n": row.get("n_texts"), "mean": row[name], "low": row.get(f"{name}_low"), "high": row.get(f"{name}_high")}
        for name, scorer in (("perplexity", "perplexity"), ("kl", "KL"))
        for row in reversed(arms.values())
        if _there(row.get(name))
    ]  # fmt: skip


def _best(table: Sequence[Mapping[str, Any]], by_direction: bool) -> set[tuple[Pair, Pair]]:
    """The cells that no other of their column beats at the printed precision; none where all are alike."""
    columns: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in table:
        apart = by_direction and row["scorer"] not in _LESS_IS_BETTER
        reference = row["scorer"] == "KL" and row["mean"] == 0
        if _there(row["mean"]) and not reference and row["scorer"] not in _NEITHER:
            columns.setdefault((_column(row), row["direction"] if apart else "none"), []).append(row)
    found = set()
    for ((_, scorer), direction), rivals in columns.items():
        values = [round(float(row["mean"]), _digits(scorer)) for row in rivals]
        if len(set(values)) > 1:
            top = min(values) if scorer in _LESS_IS_BETTER or direction == "away" else max(values)
            found |= {(_label(row), _column(row)) for row, value in zip(rivals, values, strict=True) if value == top}
    return found


def _note(table: Sequence[Mapping[str, Any]], apart: bool) -> str:
    sizes: dict[str, set[int]] = {}
    arms: dict[str, dict[str, None]] = {}
    for row in table:
        if _there(row["n"]):
            sizes.setdefault(row["set"], set()).add(int(row["n"]))
        arm = row["arm"] if row["direction"] == "none" else f"{row['arm']} {row['direction']}"
        arms.setdefault(", ".join(map(str, row["seeds"])), {})[arm] = None
    ns = "; ".join(f"{name} {' to '.join(map(str, sorted({min(n), max(n)})))}" for name, n in sizes.items())
    seeds = "; ".join(f"{own} ({', '.join(which)})" for own, which in arms.items())
    several = any(len(row["seeds"]) > 1 for row in table)
    over = "prompts, and over tuning seeds where there are several" if several else "prompts"
    bold = "best of a column among arms of one direction" if apart else "best of a column"
    return (
        f"Brackets: 95 % intervals over {over} (bootstrap or t; Wilson's for shares of a single seed). n: {ns}. "
        f"Seeds: {seeds}. Bold: {bold}, which need not differ beyond noise from the next."
    )


def _checked(rows: Rows, wanted: Sequence[str]) -> list[dict[str, Any]]:
    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
    if frame.empty:
        raise ValueError("rows: none came; at least one is wanted, as `ArmScores.summary()` gives.")
    if missing := [column for column in wanted if column not in frame]:
        raise ValueError(f"rows: no column {', '.join(missing)} (came: {', '.join(map(str, frame.columns))}).")
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def _label(row: Mapping[str, Any]) -> Pair:
    return row["arm"], row["direction"]


def _column(row: Mapping[str, Any]) -> Pair:
    return row["set"], row["scorer"]


def _there(value: Any) -> bool:
    return value is not None and not math.isnan(value)


def _cell(row: Mapping[str, Any]) -> str:
    digits = _digits(row["scorer"])
    if not _there(row["mean"]):
        return "–"
    interval = f" [{_number(row['low'], digits)}, {_number(row['high'], digits)}]" if _there(row["low"]) else ""
    return _number(row["mean"], digits) + interval


def _digits(scorer: str) -> int:
    return 3 if scorer == "KL" else 2


def _number(value: float, digits: int) -> str:
    # Adding zero turns a rounded -0.0 into 0.0.
    return f"{round(float(value), digits) + 0.0:.{digits}f}"


def _filled(
    grid: _Grid,
    label: Pair,
    column: Pair,
    bold: Callable[[str], str],
    written: Callable[[str], str],
) -> str:
    """A cell, its mean in bold if it is the best."""
    mean, space, interval = grid.cells.get((label, column), "–").partition(" ")
    best = (label, column) in grid.best
    return (bold(written(mean)) if best else written(mean)) + space + written(interval)


def _panel(grid: _Grid, columns: Sequence[Pair]) -> str:
    n = len(grid.heads)
    sets: list[list[Any]] = []
    for place, (name, _) in enumerate(columns, start=n + 1):
        if sets and sets[-1][0] == name:
            sets[-1][2] = place
        else:
            sets.append([name, place, place])
    above = " & ".join([*[""] * n, *(rf"\multicolumn{{{b - a + 1}}}{{c}}{{{_tex(name)}}}" for name, a, b in sets)])
    rules = " ".join(rf"\cmidrule(lr){{{a}-{b}}}" for _, a, b in sets)
    lines = [rf"\begin{{tabular}}{{@{{}}{'l' * n}{'r' * len(columns)}@{{}}}}", r"\toprule", rf"{above} \\", rules]
    lines += [rf"{' & '.join(map(_tex, [*grid.heads, *(scorer for _, scorer in columns)]))} \\", r"\midrule"]
    for label in grid.labels:
        cells = [_filled(grid, label, column, lambda text: rf"\textbf{{{text}}}", _figures) for column in columns]
        lines.append(rf"{' & '.join([*map(_tex, label[:n]), *cells])} \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _figures(text: str) -> str:
    """Numbers and brackets in LaTeX: a minus sign instead of a hyphen."""
    return text.replace("-", "$-$").replace("–", "--")


def _tex(text: Any) -> str:
    return "".join(_IN_LATEX.get(sign, sign) for sign in " ".join(str(text).split()))


def _mark(text: Any) -> str:
    """Text on one line with no markup of its own; entities first, for Markdown lets HTML through."""
    return re.sub(r"([\\`*_~\[\]#|])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))
