"""Numbers and arm names as text, and rows in groups, for sentences and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any, Literal

from rt_lens.common import formatting
from rt_lens.common.arm_labels import ArmLabel
from rt_lens.common.formatting import p_value as p_value

Row = Mapping[str, Any]


def grouped(rows: Iterable[Row], *keys: str) -> dict[tuple, list[Row]]:
    """The rows by these keys; groups and rows keep their order."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def of_first_scorer(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Set -> the rows of its first scorer, which figures and sentences show."""
    by_set: dict[str, list[Row]] = {}
    for row in rows:
        set_rows = by_set.setdefault(row["set"], [])
        if not set_rows or set_rows[0]["scorer"] == row["scorer"]:
            set_rows.append(row)
    return by_set


def arm(row: Row, which: str = "arm") -> str:
    """The arm of a row with its direction, if it has one."""
    return str(ArmLabel(row[which], row["direction" if which == "arm" else f"{which}_direction"]))


def side_effect_of(rows: Iterable[Row]) -> Literal["kl", "perplexity"] | None:
    """The side effect to plot scores against: KL, or perplexity where KL was not measured, or None."""
    rows = list(rows)
    columns: tuple[Literal["kl", "perplexity"], ...] = ("kl", "perplexity")
    return next((column for column in columns if any(row[column] is not None for row in rows)), None)


def sample(row: Row) -> str:
    """Number of items and seeds of a row."""
    return f"n = {row['n']}, {seeds(row)}"


def seeds(row: Row) -> str:
    """The seeds of a row."""
    return f"{'seed' if len(row['seeds']) == 1 else 'seeds'} {', '.join(map(str, row['seeds']))}"


def number(value: float | None, digits: int = 3) -> str:
    """`rt_lens.common.formatting.number` with a minus sign in place of the hyphen."""
    return formatting.number(value, digits).replace("-", "−")


def estimate(row: Row, key: str = "mean", digits: int = 3) -> str:
    """A number of a row with its interval, as `0.512 [0.430, 0.594]`; `0.512 [–]` if it has no interval.

    Negative numbers have a minus sign, not a hyphen.
    """
    low, high = ("low", "high") if key in ("mean", "difference") else (f"{key}_low", f"{key}_high")
    return formatting.bracketed(row[key], row.get(low), row.get(high), digits).replace("-", "−")


def brief(row: Row, key: str = "mean") -> str:
    """The same with two digits."""
    return estimate(row, key, digits=2)


def said(response: str | None) -> str:
    """A response as markup; words in place of one that shows nothing, and a dash where there is none."""
    return "–" if response is None else escape(response) if response.strip() else "<i>(empty)</i>"


def counted(numbers: Iterable[int]) -> str:
    """One number, or the range of several."""
    ordered = sorted(set(numbers))
    return str(ordered[0]) if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"


def joined(words: Iterable[str]) -> str:
    """A list in a sentence: commas, and `and` before the last."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def listed(rows: Sequence[Row], phrase: Callable[[Row], str]) -> str:
    """A phrase for each row, with n and seeds once at the end where all rows share them."""
    samples = {sample(row) for row in rows}
    if len(samples) == 1:
        return f"{'; '.join(phrase(row) for row in rows)} ({'each ' if len(rows) > 1 else ''}{samples.pop()})"
    return "; ".join(f"{phrase(row)} ({sample(row)})" for row in rows)
