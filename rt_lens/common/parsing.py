"""What people type where layers and numbers are wanted, on the command line and on pages, read and refused in one way.

It knows no model: whether a layer exists is for the rooms that have one.
"""

from __future__ import annotations

import math
import re

_MOST_LAYERS = 1000
_SPAN = re.compile(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", re.ASCII)


def layers_of(text: str) -> list[int]:
    """Block indices of a text such as `14-22` or `14,18`, in its order.

    Raises:
        ValueError: if it is no such text, a span ends before it begins, or it names more blocks than any model has.

    Example:
        >>> layers_of("14-16,20")
        [14, 15, 16, 20]
    """
    chosen: list[int] = []
    for part in text.split(","):
        found = _SPAN.fullmatch(part)
        low, high = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if low > high:
            raise ValueError(
                f"layers must be blocks such as 14-22 or 14,18, got {text!r}. Join blocks with commas or a dash."
            )
        if len(chosen) + high - low >= _MOST_LAYERS:  # before a list of them is made
            raise ValueError(
                f"layers must be at most {_MOST_LAYERS:,} blocks, got {text!r}. Name the blocks that you mean."
            )
        chosen.extend(range(low, high + 1))
    return chosen


def multipliers_of(text: str) -> list[float]:
    """Numbers of a text such as `-2,0,2`, in its order; a figure's own minus sign will do as well.

    Raises:
        ValueError: if a part is no number, or not a finite one.

    Example:
        >>> multipliers_of("-1.5, 0, 3")
        [-1.5, 0.0, 3.0]
    """
    try:
        found = [float(part.replace("−", "-")) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise ValueError(f"multipliers must be numbers such as -2,0,2, got {text!r}. Join numbers with commas.")
    return found


def whole_number(name: str, value: float | None, low: int, high: int) -> int:
    """A whole number from a field that may have been left empty or hold anything.

    Args:
        name: of the field, for the message.
        value: what it holds; None if that is no number.
        low: the least that will do.
        high: the most.

    Raises:
        ValueError: if it is none, or out of range.

    Example:
        >>> whole_number("prompts", 6.0, 2, 60)
        6
    """
    if value is None or not low <= value <= high or value != int(value):
        shown = "none" if value is None else f"{value:g}"
        raise ValueError(f"{name} must be a whole number from {low} to {high:,}, got {shown}. Fill in such a number.")
    return int(value)
