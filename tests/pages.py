"""Reading what a page shows: the parts, figures and table cells of Dash components."""

from __future__ import annotations

from typing import Any

from dash.development.base_component import Component


def parts(content: Any) -> list[Any]:
    """A component, or several, with all that is inside, from the outside in."""
    components = content if isinstance(content, list) else [content]
    return [part for one in components for part in ([one, *one._traverse()] if isinstance(one, Component) else [one])]


def figures(content: Any) -> dict[str, Any]:
    return {part.id: part.figure for part in parts(content) if type(part).__name__ == "Graph"}


def cells(content: Any) -> list[list[str]]:
    rows = [part for part in parts(content) if type(part).__name__ == "Tr"]
    return [[cell.children for cell in row.children] for row in rows]
