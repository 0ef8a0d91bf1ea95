"""Builds the page from its parts, and writes it as a whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from rt_lens.apps.report.markup import Part, contents, folded, items, rendered
from rt_lens.apps.report.reproducibility import repeat
from rt_lens.apps.report.sections import sections
from rt_lens.apps.report.sentences import findings, headline
from rt_lens.apps.report.uncertainty import uncertainty_sentences
from rt_lens.apps.report.verdict import notice, opening
from rt_lens.common.files import write_atomically
from rt_lens.results.schema import load_results

_SETS_UNFOLDED = 2
_ARMS = {
    "untuned": "the original model",
    "steered": "the vector is added to the residual stream in every forward pass",
    "token_tuned": "the weights are trained with the token loss only",
    "rep_tuned": "the weights are trained with the token loss and a cosine loss on the activations",
}
# The page loads nothing from elsewhere, and this policy makes the browser enforce it.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_STYLE = """
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #222; background: #fff;
  max-width: 1100px; margin: 0 auto; padding: 1rem 1rem 4rem; }
h1 { margin: .5rem 0 .2rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .5rem; border-bottom: 1px solid #ddd; }
h3 { margin: 1.8rem 0 .3rem; } ul { padding-left: 1.2rem; margin: .4rem 0; }
section { scroll-margin-top: 1rem; overflow-wrap: break-word; }
a { color: #00568a; }
a:focus-visible, summary:focus-visible, [tabindex]:focus-visible { outline: 3px solid #d55e00; outline-offset: 2px; }
.skip { position: absolute; left: -999rem; } .skip:focus { left: 1rem; top: .3rem; background: #fff; padding: .3rem; }
nav { background: #f6f6f2; padding: .3rem 1rem .6rem; margin: 1rem 0; }
nav h2 { font-size: 1rem; border: 0; margin: .2rem 0; } nav { font-size: 14px; line-height: 1.6; }
nav ul { columns: 4 11rem; list-style: none; padding: 0; margin: 0; } nav ul ul { columns: auto; padding-left: .9rem; }
.summary { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
.summary section { background: #f6f6f2; border-left: 5px solid #009e73; padding: .6rem 1.1rem; min-width: 0; }
.summary section + section { border-color: #e69f00; }
.summary h2 { margin: .2rem 0; border: 0; } .summary h3 { font-size: 1rem; margin: .8rem 0 0; }
.summary li { margin: .3rem 0; }
#read-this-first { background: #fdf3e7; border-left: 5px solid #d55e00; padding: .6rem 1.1rem; margin: 1rem 0; }
#read-this-first h2 { margin: .2rem 0; border: 0; }
details { margin: .6rem 0; } summary { cursor: pointer; }
pre { background: #f3f3ef; padding: .7rem 1rem; overflow: auto; max-height: 60vh; font-size: 14px; }
figure { margin: 1.2rem 0; } figcaption { color: #444; font-size: 15px; } figcaption b { color: #222; }
.scroll { max-height: 75vh; overflow: auto; border: 1px solid #ddd; margin: 1rem 0; }
table { border-collapse: separate; border-spacing: 0; font-size: 14px; width: 100%; }
th { text-align: left; } thead th { position: sticky; top: 0; background: #eee; z-index: 2; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #e4e4e4; vertical-align: top; }
tbody th { position: sticky; left: 0; background: #fff; font-weight: 600; }
.numbers td { font-variant-numeric: tabular-nums; }
.responses td { min-width: 14rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.responses tbody th { min-width: 9rem; }
.summary .responses td { min-width: 8rem; } .summary .responses tbody th { min-width: 0; }
.score { display: block; color: #555; font-weight: 600; margin-top: .4rem; }
@media (min-width: 1420px) {
  body { max-width: 1390px; display: grid; grid-template-columns: 250px minmax(0, 1fr); column-gap: 2rem; }
  header { grid-column: 2; } nav { grid-row: 1 / span 2; position: sticky; top: 1rem; align-self: start;
    max-height: calc(100vh - 2rem); overflow: auto; } nav ul { columns: auto; }
}
@media (max-width: 700px) { tbody th { position: static; } }
@media print { nav, .skip { display: none; } .scroll, pre { max-height: none; overflow: visible; }
  .plotly-graph-div { zoom: .65; } figure, tr { break-inside: avoid; } thead th, tbody th { position: static; } }
"""
# Plotly takes up to a second to load, and a chart half a second to draw. Both wait until the text is readable, and only
# charts in or near the window are drawn, but all of them before printing.
_SCRIPT = """
const charts = [...document.querySelectorAll(".plotly-graph-div")], drawn = new Set();
const load = () => {
  if (window.Plotly) return;
  const script = document.createElement("script");
  script.textContent = document.getElementById("plotly").textContent;
  document.head.append(script);
};
const draw = element => {
  if (drawn.has(element)) return;
  drawn.add(element);
  load();
  const figure = JSON.parse(element.nextElementSibling.textContent);
  Plotly.newPlot(element, figure.data, figure.layout,
    {responsive: true, displaylogo: false, showSendToCloud: false, typesetMath: false});
};
const watch = new IntersectionObserver(seen => seen.filter(one => one.isIntersecting).forEach(one => {
  watch.unobserve(one.target);
  draw(one.target);
}), {rootMargin: "300px"});
charts.forEach(element => watch.observe(element));
addEventListener("beforeprint", () => charts.forEach(draw));
addEventListener("load", () => setTimeout(load, 200));
"""


def write_report(run_dir: str | Path) -> Path:
    """Writes `run_dir/report.html` from the run's three files. An older report stays until the new one is complete.

    Args:
        run_dir: folder with results.json, responses.jsonl and projections.json.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: if one of the three files does not exist.
        ValueError: if a file is not valid JSON, lacks a key or column, or has an unknown schema.

    Example:
        >>> from rt_lens.apps.report.page import write_report
        >>> page = write_report("runs/mood")
        >>> page.name, "<h1>mood on tiny</h1>" in page.read_text(encoding="utf-8")
        ('report.html', True)
    """
    run = load_results(run_dir)
    page = _page(run.content, run.responses(), run.projections())
    # A model can generate half a surrogate pair, which UTF-8 cannot encode.
    return write_atomically(run.folder / "report.html", page.encode("utf-8", "replace"))


def _page(results: Mapping[str, Any], responses: Sequence[Mapping], projections: Mapping[str, Any]) -> str:
    title = f"{results['behaviour']} on {results['model']}"
    first_screen = opening(results, responses)
    details = [
        Part("Results", _findings(results)),
        Part("How certain are these results?", items(uncertainty_sentences(results))),
    ]
    # A run at equal damage opens with one picture; what is known in detail is folded below it.
    folds = [Part(part.name, folded("All of it, in sentences", part.html)) for part in details]
    summary = [*first_screen[1:], *folds] if first_screen else details
    lead = [*notice(results), *first_screen[:1]]
    rest = [*sections(results, responses, projections), repeat(results)]
    first = "\n".join(map(rendered, summary))
    opens, listed = "\n".join(map(rendered, lead)), contents([*lead, *summary, *rest])
    # Nothing but a warning stands before the picture.
    above, below = ("", listed) if lead else (listed, "")
    body = "\n".join(map(rendered, rest))
    # The text stands before Plotly's four megabytes, so that it can be read while they load.
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#results">Skip to the results</a>\n'
        f"<header>\n<h1>{escape(title)}</h1>\n<p>{escape(results['description'])}</p>\n</header>\n"
        f'{above}\n<main>\n{opens}\n<div class="summary">\n{first}\n</div>\n{below}\n{body}\n</main>\n'
        f'<script type="text/plain" id="plotly">{get_plotlyjs()}</script>\n'
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _findings(results: Mapping[str, Any]) -> str:
    """The sentences; those of the third set and of later sets are folded."""
    parts = findings(results)
    names = dict.fromkeys(row["arm"] for row in results["summary"])
    own = {arm: escape(text.rstrip(".")) for arm, text in (results["at_kl"] or {"arms": {}})["arms"].items()}
    described = {**_ARMS, **own}
    explained = "; ".join(f"<b>{escape(arm)}</b>: {described[arm]}" for arm in names if arm in described)
    arms = f"<p>The arms: {explained}.</p>" if explained else ""
    sets = [
        folded(name, items(sentences)) if number >= _SETS_UNFOLDED else f"<h3>{escape(name)}</h3>{items(sentences)}"
        for number, (name, sentences) in enumerate(parts.sets.items())
    ]
    side_effects = [f"<h3>Side effects</h3>{items(parts.side_effects)}"] if parts.side_effects else []
    claims = (
        [f"<p><b>{escape(claim)}</b> {escape(support)}</p>" for claim, support in headline(results)]
        if results["at_kl"] is None  # at equal damage the first screen says it, by the strengths that were set
        else []
    )
    return "\n".join([*claims, items(parts.opening) if parts.opening else "", arms, *sets, *side_effects])
