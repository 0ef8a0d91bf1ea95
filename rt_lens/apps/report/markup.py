"""The building blocks of the page: parts with headings, tables, charts. They take plain text and escape it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go

from rt_lens.plots.style import take_title

_DEEPEST = 3  # levels of headings


@dataclass(frozen=True)
class Part:
    """A heading, its content, and its parts.

    Attributes:
        name: the heading, as plain text.
        html: the content below it, as markup.
        parts: parts of the next level, each listed in the contents.
    """

    name: str
    html: str = ""
    parts: tuple[Part, ...] = ()


def rendered(part: Part, section: str = "", level: int = 2) -> str:
    """The part as a section, whose id is the target of its link in the contents."""
    section = section or slug(part.name)
    inner = "\n".join(
        rendered(below, f"{section}-{number}", min(level + 1, _DEEPEST)) for number, below in enumerate(part.parts)
    )
    return f'<section id="{section}">\n<h{level}>{escape(part.name)}</h{level}>\n{part.html}\n{inner}\n</section>'


def contents(parts: Iterable[Part]) -> str:
    """A nested list of links to all parts."""
    return f'<nav aria-label="Contents"><h2>Contents</h2>{_links((slug(part.name), part) for part in parts)}</nav>'


def _links(sections: Iterable[tuple[str, Part]]) -> str:
    items = []
    for section, part in sections:
        below = [(f"{section}-{number}", inner) for number, inner in enumerate(part.parts)]
        link = f'<a href="#{section}">{escape(part.name)}</a>'
        items.append(f"<li>{link}{_links(below) if below else ''}</li>")
    return f"<ul>{''.join(items)}</ul>"


def slug(name: str) -> str:
    """The id of a section with this heading."""
    return name.lower().replace(",", "").replace("?", "").replace(" ", "-")


def items(sentences: Iterable[str]) -> str:
    """The sentences as a list."""
    return "<ul>" + "\n".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def folded(heading: str, html: str) -> str:
    """Markup that a reader unfolds by its heading."""
    return f"<details><summary>{escape(heading)}</summary>{html}</details>"


def table(label: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain text, in a box that scrolls. The first cell of each row is its header."""
    return boxed(label, header, ([escape(cell) for cell in row] for row in rows))


def boxed(label: str, header: Iterable[str], rows: Iterable[Sequence[str]], kind: str = "numbers") -> str:
    """The same as `table`, for cells that are markup."""
    heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "\n".join(
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    # A box that scrolls must take the keyboard's focus, so that all of it can be read without a mouse.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table: {escape(label)}">'
        f'<table class="{kind}"><thead><tr>{heads}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    )


def chart(name: str, figure: go.Figure) -> str:
    """An element for the figure, and its content as JSON, which the page's script draws when it comes into view.

    Title and subtitle become the caption, as text of the page: it wraps in any window, and screen readers read it.

    Args:
        name: unique name of this chart; not the id of a section.
        figure: of `rt_lens.plots`, which escapes its labels. Its title is removed.
    """
    heading, subtitle = map(escape, take_title(figure))
    # Plotly writes < > / as \u003c \u003e \u002f in its JSON, so no label can close the script element.
    return (
        f"<figure><figcaption><b>{heading}</b><br>{subtitle}</figcaption>"
        f'<div id="figure-{name}" class="plotly-graph-div" style="height:{figure.layout.height:g}px"></div>'
        f'<script type="application/json">{figure.to_json()}</script></figure>'
    )
