"""What plotly.js draws of a label: tags and `<br>` are markup, entities letters, `$...$` TeX, `%{...}` filled in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import plotly.graph_objects as go

# Each of the ways in which plotly.js takes a letter for more than itself; "&lt;" must be seen as these four letters.
HOSTILE = "<s>a & b</s> &lt; $x$ %{y} <b>"
_LETTERS = {"amp": "&", "lt": "<", "gt": ">", "nbsp": "\xa0", "times": "×", "plusmn": "±", "deg": "°", "mu": "μ"}


def as_drawn(text: str) -> str:
    """The text as svg_text_utils.js of plotly.js shows it; a line's end is a space."""
    assert not re.search(r"[$]+[^$]*[$]+", text), f"TeX, where MathJax is loaded: {text!r}"
    shown = re.sub(r"<[^<>]*>", lambda tag: " " if tag[0].startswith("<br") else "", text)
    return re.sub(r"&(#\d+|[a-z]+);", lambda found: _letter(found[1], found[0]), shown)


def _letter(name: str, whole: str) -> str:
    return chr(int(name[1:])) if name.startswith("#") else _LETTERS.get(name, whole)


def strings_of(part: Any) -> Iterator[str]:
    """Every string of a figure's JSON."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, dict):
        for inner in part.values():
            yield from strings_of(inner)
    elif isinstance(part, list | tuple | np.ndarray):
        for inner in part:
            yield from strings_of(inner)


def check_drawn_as_it_is(figure: go.Figure, text: str = HOSTILE, least: int = 2) -> None:
    """Every string of the figure that has the text in it shows it letter by letter, in at least so many places."""
    held = list(strings_of(figure.to_plotly_json()))
    assert not [each for each in held if re.search(r"<(?!br>|extra>|/extra>)", each)]
    assert all(each.count("%{y}") <= 1 for each in held), "only a template's own"
    seen = [each for each in map(as_drawn, held) if text in each]
    assert len(seen) >= least, held
