"""Numbers as words, and rows in groups, for sentences and tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

Row = Mapping[str, Any]


def grouped(rows: Iterable[Row], *keys: str) -> dict[tuple, list[Row]]:
    """The rows by these keys, groups and rows in order of appearance."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def of_first_scorer(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Set -> the rows of its first scorer, which is the one that figures and sentences show."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        own = found.setdefault(row["set"], [])
        if not own or own[0]["scorer"] == row["scorer"]:
            own.append(row)
    return found


def arm(row: Row, which: str = "arm") -> str:
    """An arm with its direction, if it has one."""
    direction = row["direction" if which == "arm" else f"{which}_direction"]
    return str(row[which]) if direction == "none" else f"{row[which]}, {direction}"


def harm_of(rows: Iterable[Row]) -> Literal["kl", "perplexity"] | None:
    """The side effect to set scores against: KL, or perplexity where KL was not measured, or none."""
    rows = list(rows)
    kinds: tuple[Literal["kl", "perplexity"], ...] = ("kl", "perplexity")
    return next((kind for kind in kinds if any(row[kind] is not None for row in rows)), None)


def sample(row: Row) -> str:
    return f"n = {row['n']}, {seeds(row)}"


def seeds(row: Row) -> str:
    return f"{'seed' if len(row['seeds']) == 1 else 'seeds'} {', '.join(map(str, row['seeds']))}"


def estimate(row: Row, key: str = "mean", digits: int = 3) -> str:
    """`0.512 [0.430, 0.594]`; the interval of another measure than the score is in its own columns, if at all."""
    low, high = ("low", "high") if key in ("mean", "difference") else (f"{key}_low", f"{key}_high")
    known = row[key] is not None and row.get(low) is not None
    interval = f" [{number(row[low], digits)}, {number(row[high], digits)}]" if known else ""
    return number(row[key], digits) + interval


def brief(row: Row, key: str = "mean") -> str:
    return estimate(row, key, digits=2)


def number(value: float | int | None, digits: int = 3) -> str:
    # Adding zero turns a rounded -0.0 into 0.0.
    return "–" if value is None or math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}"


def p_value(p: float | int | None) -> str:
    return "–" if p is None else "< 0.001" if p < 0.001 else f"= {p:.3f}"


def counted(numbers: Iterable[int]) -> str:
    """One number, or from the least to the most."""
    found = sorted(set(numbers))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def joined(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def listed(rows: Sequence[Row], say: Any) -> str:
    """The rows told one after the other, with n and seeds once at the end where all share them."""
    samples = {sample(row) for row in rows}
    if len(samples) == 1:
        return f"{'; '.join(say(row) for row in rows)} ({'each ' if len(rows) > 1 else ''}{samples.pop()})"
    return "; ".join(f"{say(row)} ({sample(row)})" for row in rows)
