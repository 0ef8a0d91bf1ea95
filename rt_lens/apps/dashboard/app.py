"""The Dash app: its frame, its pages, and the headers that restrict it to this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dash import Dash, Input, Output, State, dcc, html, no_update
from flask import Response

from rt_lens.apps.dashboard import compare, explore, steering, tuning, vectors
from rt_lens.apps.dashboard.panel import named
from rt_lens.apps.dashboard.session import Session

PAGES = {"explore": explore, "vectors": vectors, "steering": steering, "tuning": tuning, "compare": compare}

# Screen readers need the language, and keyboard users the skip link.
_FRAME = """<!doctype html>
<html lang="en">
<head>{%metas%}<title>{%title%}</title>{%favicon%}{%css%}</head>
<body><a class="skip" href="#main">Skip to the content</a>{%app_entry%}
<footer>{%config%}{%scripts%}{%renderer%}</footer></body>
</html>
"""


def make_app(session: Session) -> Dash:
    """The app of one session; it loads nothing from outside this machine."""
    app = Dash(
        __name__, title="rt_lens", update_title="", index_string=_FRAME, suppress_callback_exceptions=True,
        assets_folder=str(Path(__file__).parent / "assets"), serve_locally=True,
    )  # fmt: skip
    app.layout = _frame(session)
    _connect_pages(app, session)
    for page in PAGES.values():
        page.connect(app, session)
    _keep_to_this_machine(app)
    return app


def _frame(session: Session) -> html.Div:
    links = [html.Li(dcc.Link(name.capitalize(), href=f"/{name}"), id=f"link-{name}") for name in PAGES]
    model = (
        f"{session.name}, {session.n_layers} layers" if session.has_model else f"{session.name} (not on this machine)"
    )
    run = f"run {session.run.folder.name}" if session.run is not None else "no run"
    header = html.Header(
        [
            html.H1("rt_lens"),
            html.Nav(html.Ul(links), **named("Pages")),
            html.P(f"{model} · {run}", className="about"),
        ]
    )
    slots = [html.Section(id=f"page-{name}", hidden=True, **named(name.capitalize())) for name in PAGES]
    # An empty figure makes the browser load Plotly while the user is still typing.
    early = html.Div(dcc.Graph(id="early"), hidden=True)
    return html.Div(
        [dcc.Location(id="url"), dcc.Store(id="visited", data=[]), header, html.Main(slots, id="main"), early]
    )


def _connect_pages(app: Dash, session: Session) -> None:
    """Lays out a page at its first visit and keeps it, so that going back restores everything."""

    @app.callback(
        output={
            "visited": Output("visited", "data"),
            "content": [Output(f"page-{name}", "children") for name in PAGES],
            "hidden": [Output(f"page-{name}", "hidden") for name in PAGES],
            "links": [Output(f"link-{name}", "className") for name in PAGES],
        },
        inputs={"path": Input("url", "pathname"), "visited": State("visited", "data")},
    )
    def visit(path: str | None, visited: list[str]) -> dict[str, Any]:
        requested = (path or "/").strip("/")
        current = requested if requested in PAGES else next(iter(PAGES))
        return {
            "visited": [*visited, current],
            "content": [
                page.layout(session) if name == current not in visited else no_update for name, page in PAGES.items()
            ],
            "hidden": [name != current for name in PAGES],
            "links": ["current" if name == current else "" for name in PAGES],
        }


def _keep_to_this_machine(app: Dash) -> None:
    server = app.server
    # DNS rebinding: a foreign page whose name resolves to this machine sends its own name as host.
    server.config["TRUSTED_HOSTS"] = ["127.0.0.1", "localhost"]
    scripts = " ".join(app.csp_hashes())
    policy = (
        f"default-src 'none'; script-src 'self' {scripts}; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
        "img-src 'self' data: blob:; font-src 'self' data:; base-uri 'none'; form-action 'none'; "
        # Notebooks on this machine may embed it; a foreign page could steal clicks that way.
        "frame-ancestors 'self' http://localhost:* http://127.0.0.1:* vscode-webview:"
    )

    @server.after_request
    def headers(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = policy
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response
