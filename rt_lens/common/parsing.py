"""Parsing of layers and numbers as people type them, on the command line and on pages.

This module knows no model, so it does not check whether a layer exists.
"""

from __future__ import annotations

import math
import re

_MOST_LAYERS = 1000
_SPAN = re.compile(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", re.ASCII)


def layers_of(text: str) -> list[int]:
    """Block indices of a text such as `14-22` or `14,18`, in its order.

    Raises:
        ValueError: for another text, a span that ends before it begins, or more blocks than any model has.

    Example:
        >>> layers_of("14-16,20")
        [14, 15, 16, 20]
    """
    chosen: list[int] = []
    for part in text.split(","):
        match = _SPAN.fullmatch(part)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if low > high:
            raise ValueError(
                f"layers must be blocks such as 14-22 or 14,18, got {text!r}. Join blocks with commas or a dash."
            )
        if len(chosen) + high - low >= _MOST_LAYERS:  # before the list is built
            raise ValueError(
                f"layers must be at most {_MOST_LAYERS:,} blocks, got {text!r}. Name the blocks that you mean."
            )
        chosen.extend(range(low, high + 1))
    return chosen


def multipliers_of(text: str) -> list[float]:
    """Numbers of a text such as `-2,0,2`, in its order; the minus sign of figures (U+2212) is read too.

    Raises:
        ValueError: if a part is no finite number.

    Example:
        >>> multipliers_of("-1.5, 0, 3")
        [-1.5, 0.0, 3.0]
    """
    try:
        numbers = [float(part.replace("−", "-")) for part in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"multipliers must be numbers such as -2,0,2, got {text!r}. Join numbers with commas.")
    return numbers


def whole_number(name: str, value: float | None, low: int, high: int) -> int:
    """The whole number in a field of a form, which may be empty.

    Args:
        name: of the field, for the message.
        value: its content; None if that is no number.
        low: smallest allowed number.
        high: largest allowed number.

    Raises:
        ValueError: if it is no whole number, or out of range.

    Example:
        >>> whole_number("prompts", 6.0, 2, 60)
        6
    """
    if value is None or not low <= value <= high or value != int(value):
        shown = "none" if value is None else f"{value:g}"
        raise ValueError(f"{name} must be a whole number from {low} to {high:,}, got {shown}. Fill in such a number.")
    return int(value)
