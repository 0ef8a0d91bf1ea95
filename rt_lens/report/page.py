"""The page: sections put together, and written whole or not at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from rt_lens.files import write_atomically
from rt_lens.report.sections import sections
from rt_lens.report.sentences import findings
from rt_lens.results import load_results

_SETS_TOLD = 2
# The page needs nothing from outside, and this makes the browser hold it to that.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_STYLE = """
body { font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #222; background: #fff;
  max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: .2rem; } h2 { margin: 2.5rem 0 .5rem; border-bottom: 1px solid #ddd; }
h3 { margin: 1.8rem 0 .3rem; }
nav a { margin-right: .9rem; white-space: nowrap; color: #0072b2; }
.summary { background: #f6f6f2; border-left: 4px solid #009e73; padding: .8rem 1.1rem; margin: 1rem 0; }
.summary span { display: block; }
.scroll { max-height: 75vh; overflow: auto; border: 1px solid #ddd; margin: 1rem 0; }
table { border-collapse: separate; border-spacing: 0; font-size: 14px; width: 100%; }
th { position: sticky; top: 0; background: #eee; text-align: left; z-index: 1; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #e4e4e4; vertical-align: top; }
.responses td { min-width: 14rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.responses td:first-child { position: sticky; left: 0; background: #fff; font-weight: 600; min-width: 10rem; }
.score { display: block; color: #555; font-weight: 600; margin-top: .4rem; }
"""


def write_report(run_dir: str | Path) -> Path:
    """Writes `run_dir/report.html` from the run's three files; an older report stays until the new one is whole.

    Args:
        run_dir: folder with results.json, responses.jsonl and projections.json.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: if one of the three files is not there.
        ValueError: if a file is not valid JSON, lacks a key or column, or has a schema that is not known.

    Example:
        >>> print(write_report("runs/mood"))
    """
    run = load_results(run_dir)
    page = _page(run.content, run.responses(), run.projections())
    # A model may emit half a surrogate pair, which UTF-8 cannot hold.
    return write_atomically(run.folder / "report.html", page.encode("utf-8", "replace"))


def _page(results: Mapping[str, Any], responses: Sequence[Mapping], projections: Mapping[str, Any]) -> str:
    parts = sections(results, responses, projections)
    title = f"{results['behaviour']} on {results['model']}"
    links = " ".join(f'<a href="#{_slug(name)}">{escape(name)}</a>' for name in parts)
    body = "\n".join(
        f'<section id="{_slug(name)}">\n<h2>{escape(name)}</h2>\n{content}\n</section>'
        for name, content in parts.items()
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n<script>{get_plotlyjs()}</script>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(results['description'])}</p>\n"
        f'<div class="summary">{_summary(results)}</div>\n'
        f"<nav>{links}</nav>\n{body}\n</body>\n</html>\n"
    )


def _summary(results: Mapping[str, Any]) -> str:
    """The sentences; those of the third set and later ones are folded."""
    opening, sets, closing = findings(results)
    first, later = list(sets.values())[:_SETS_TOLD], dict(list(sets.items())[_SETS_TOLD:])
    folded = [
        f"<details><summary>{escape(name)}</summary>{_spans(sentences)}</details>" for name, sentences in later.items()
    ]
    return "\n".join([_spans([*opening, *itertools.chain(*first)]), *folded, _spans(closing)])


def _spans(sentences: Iterable[str]) -> str:
    return "\n".join(f"<span>{escape(sentence)}</span>" for sentence in sentences)


def _slug(name: str) -> str:
    return name.lower().replace(",", "").replace(" ", "-")
