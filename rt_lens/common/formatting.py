"""Numbers as text: one way to write a number, an estimate with its interval, and a p-value."""

from __future__ import annotations

import math


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` digits after the point; a dash for None and NaN.

    Example:
        >>> number(0.5124), number(-0.0001), number(None)
        ('0.512', '0.000', '–')
    """
    # Adding zero turns a rounded -0.0 into 0.0.
    return "–" if value is None or math.isnan(value) else f"{round(float(value), digits) + 0.0:.{digits}f}"


def estimate(mean: float | None, low: float | None, high: float | None, digits: int = 3) -> str:
    """A mean with its interval; the mean alone if there is no interval.

    Example:
        >>> estimate(0.5124, 0.43, 0.594)
        '0.512 [0.430, 0.594]'
        >>> estimate(0.5, None, None, digits=2)
        '0.50'
    """
    if mean is None or math.isnan(mean) or low is None or math.isnan(low):
        return number(mean, digits)
    return f"{number(mean, digits)} [{number(low, digits)}, {number(high, digits)}]"


def bracketed(mean: float | None, low: float | None, high: float | None, digits: int = 3) -> str:
    """A mean with its interval, and a dash in brackets where there is none; a dash alone without a mean.

    Example:
        >>> bracketed(0.5124, 0.43, 0.594), bracketed(0.5, None, None, digits=2), bracketed(None, None, None)
        ('0.512 [0.430, 0.594]', '0.50 [–]', '–')
    """
    text = estimate(mean, low, high, digits)
    return text if text == "–" or text.endswith("]") else f"{text} [–]"


def p_value(p: float | None) -> str:
    """A p-value with its relation sign, as in "p = 0.034".

    Example:
        >>> p_value(0.0342), p_value(0.00004), p_value(None)
        ('= 0.034', '< 0.001', '–')
    """
    return "–" if p is None or math.isnan(p) else "< 0.001" if p < 0.001 else f"= {p:.3f}"


def with_minus_sign(text: str) -> str:
    """The text with the minus sign of print in the place of hyphens."""
    return text.replace("-", "−")
