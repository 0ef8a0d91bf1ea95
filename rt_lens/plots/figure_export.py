"""A figure -> a file for a page, a slide or a journal, at the width that it has on paper.

This module knows Plotly, and no figure of this package. kaleido, which drives Chromium, makes .png, .svg and .pdf.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from rt_lens.common.files import check_can_write, write_atomically

_MM_PER_PIXEL = 25.4 / 96  # CSS's pixel
# Figures are laid out for a screen: drawn a quarter wider than the paper, 14-pixel letters become 8.4 points.
_SHRUNK = 0.8
_HEIGHT = 470
# Mean width of a letter as a share of its size. Plotly clips a line that is too long.
_LETTER = 0.52
# Below this size the margins and axes leave no room for the data.
_LEAST_MM = 50.0
# Markup that Plotly renders and that has no width: <b>, </span>, <span style="color:red">.
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_PICTURES = (".png", ".svg", ".pdf")
_NO_TOOLS = {"displaylogo": False, "showSendToCloud": False, "typesetMath": False}


def save_figure(
    figure: go.Figure,
    path: str | Path,
    *,
    width_mm: float = 170.0,
    height_mm: float | None = None,
    scale: float = 3.0,
) -> Path:
    """Writes a figure on white paper, in the format that the ending of the path names.

    The write is atomic: the file is complete, or the old one stays.

    Args:
        figure: any figure; it is not changed.
        path: ends in .png, .svg or .pdf (a picture; needs `pip install 'rt_lens[print]'` and a Chromium or Chrome), in
            .html (one page that opens offline) or in .json (Plotly's own format).
        width_mm: width of a picture on paper, 50 or more; 170 fills an A4 page between its margins, 85 a column.
        height_mm: height of a picture on paper, 50 or more; by default the figure's own height.
        scale: pixels of a .png per 1/96 inch; 3 gives 288 dots per inch.

    Returns:
        The path.

    Raises:
        ValueError: for another ending, a size below 50 mm, or a scale that is not positive.
        ImportError: for a picture, if kaleido is not installed.
        FileNotFoundError: for a picture, if no Chromium or Chrome is found.
        OSError: if the disk is full or the folder cannot be written.

    Example:
        >>> figure = go.Figure(go.Bar(x=["untuned", "rep_tuned"], y=[0.3, 0.7]))
        >>> save_figure(figure, "scores.html").stat().st_size > 1_000_000  # plotly.js is in the page
        True
        >>> save_figure(figure, "scores.pdf", width_mm=85).read_bytes()[:5]  # a column of a journal
        b'%PDF-'
    """
    path = Path(path).expanduser()
    write = _writer(path.suffix.lower(), path)
    for name, size in (("width_mm", width_mm), ("height_mm", height_mm)):
        if size is not None and not (math.isfinite(size) and size >= _LEAST_MM):
            raise ValueError(
                f"{name} must be at least {_LEAST_MM:g} mm, which the margins need, got {size:g}. Try {name}=85."
            )
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive number, got {scale:g}. Try scale=3.")
    check_can_write(path, "path")
    # A plot background that the figure sets has a meaning: grey for what was not measured.
    drawn = copy.deepcopy(figure).update_layout(
        paper_bgcolor="white", plot_bgcolor=figure.layout.plot_bgcolor or "white"
    )
    return write_atomically(path, write(drawn, width_mm, height_mm, scale))


def _writer(ending: str, path: Path) -> Callable[..., bytes]:
    if ending in _PICTURES:
        return lambda figure, width, height, scale: _picture(figure, ending, width, height, scale)
    if ending == ".html":
        return lambda figure, *_: figure.to_html(include_plotlyjs=True, config=_NO_TOOLS, div_id="figure").encode()
    if ending == ".json":
        return lambda figure, *_: figure.to_json().encode()
    raise ValueError(f"path must end in .png, .svg, .pdf, .html or .json, got {path.name!r}.")


def _picture(figure: go.Figure, ending: str, width_mm: float, height_mm: float | None, scale: float) -> bytes:
    kaleido = _kaleido()
    width = width_mm / _MM_PER_PIXEL / _SHRUNK
    _wrap(figure, width)
    height = height_mm / _MM_PER_PIXEL / _SHRUNK if height_mm else figure.layout.height or _HEIGHT
    size = {"format": ending[1:], "width": round(width), "height": round(height)}
    # By default kaleido's page fetches MathJax from a server.
    options = {"mathjax": False}
    enlarged = _SHRUNK * (scale if ending == ".png" else 1.0)
    try:
        return bytes(kaleido.calc_fig_sync(figure, opts={**size, "scale": enlarged}, kopts=options))
    except (kaleido.errors.ChromeNotFoundError, kaleido.errors.BrowserFailedError) as error:
        tried = f" (BROWSER_PATH is {os.environ['BROWSER_PATH']})" if os.environ.get("BROWSER_PATH") else ""
        raise FileNotFoundError(
            f"path ends in {ending}, which needs Chromium or Chrome, but neither starts{tried}. Install one, set "
            "BROWSER_PATH to its program, or write .html."
        ) from error


def _kaleido() -> Any:
    try:
        import kaleido
        import kaleido.errors
    except ImportError:
        raise ImportError(
            "path ends in .png, .svg or .pdf, which needs kaleido 1 or newer. Run pip install 'rt_lens[print]', or "
            "write .html."
        ) from None
    return kaleido


def _wrap(figure: go.Figure, width: float) -> None:
    """Breaks title and subtitle into lines that fit, and makes the figure higher by the added lines."""
    title, added = figure.layout.title, 0.0
    for text in (title, title.subtitle):
        if text.text:
            size = text.font.size or 14
            lines = _broken(text.text, max(1, int((width - 20) / (_LETTER * size))))
            added += 1.3 * size * (len(lines) - len(text.text.split("<br>")))
            text.text = "<br>".join(lines)
    if added > 0:
        figure.layout.margin.t = (figure.layout.margin.t or 100) + added
        figure.layout.height = (figure.layout.height or _HEIGHT) + added


def _broken(text: str, letters: int) -> list[str]:
    """The text in lines of at most so many letters; a line that ends with a sentence stays apart from the next."""
    text = re.sub(r"(?<![.:;])<br>", " ", text)
    return [line for part in text.split("<br>") for line in _filled(part, letters)]


def _filled(part: str, letters: int) -> list[str]:
    """Fills lines with so many visible letters; a tag is never split, although it may hold spaces."""
    lines = [""]
    for word in re.findall(rf"(?:{_TAG.pattern}|\S)+", part):
        longer = f"{lines[-1]} {word}".lstrip()
        if _visible_length(longer) <= letters or not _visible_length(lines[-1]):
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _visible_length(text: str) -> int:
    """The number of letters that a reader sees: none of a tag, one of &lt;."""
    return len(unescape(_TAG.sub("", text)))
