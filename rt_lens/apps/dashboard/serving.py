"""The app on a port of this machine, in a thread, until it is stopped."""

from __future__ import annotations

import logging
import socket
import threading
from html import escape

from dash import Dash
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from rt_lens.apps.dashboard.work import Jobs

HOST = "127.0.0.1"
PORT = 8050


class _Quiet(WSGIRequestHandler):
    """Pages send several requests a second; only errors are logged."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        if str(code).startswith("5"):
            super().log_request(code, size)


class Dashboard:
    """A running dashboard. In Jupyter it appears below the cell.

    Attributes:
        url: its address for a browser on this machine.
    """

    def __init__(self, app: Dash, jobs: Jobs, port: int | None, height: int) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = _bound(app, port)
        self._jobs, self._height = jobs, height
        self.url = f"http://{HOST}:{self._server.port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, name="rt_lens server", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Blocks until the dashboard stops, or until Ctrl-C."""
        while self._thread.is_alive():
            self._thread.join(0.2)

    def stop(self) -> None:
        """Ends its jobs and frees the port; open pages work again after a restart on the same port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._jobs.close()

    def __repr__(self) -> str:
        return f"Dashboard({self.url})"

    def _repr_html_(self) -> str:
        return (
            f'<iframe src="{escape(self.url)}" title="rt_lens dashboard" width="100%" height="{self._height}" '
            'style="border: 1px solid #ccc"></iframe>'
        )


def _bound(app: Dash, port: int | None) -> BaseWSGIServer:
    """A server on this port; without a port on 8050, or on any free port if 8050 is taken.

    Raises:
        ValueError: if the port is no port, or taken.
    """
    if port is not None and not 0 <= port <= 65535:
        raise ValueError(f"port must be a number from 1024 to 65535, or None for any free port, got {port}.")
    refused = ""
    for number in [port] if port is not None else [PORT, 0]:
        with socket.socket() as listener:  # Werkzeug would end the program if the port is taken
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((HOST, number))
            except OSError as error:
                refused = error.strerror or str(error)
                continue
            listener.listen()
            return make_server(
                HOST, number, app.server, threaded=True, request_handler=_Quiet, fd=listener.fileno()
            )  # fmt: skip
    raise ValueError(f"port {port} is not available ({refused}). Give another, or None for any free port.")
