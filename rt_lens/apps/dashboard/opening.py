"""The dashboard in a browser: explore a prompt, vectors, steering and tuning, and compare arms.

The pages show the figures of `rt_lens.plots` and call the rooms below. This package adds controls, a queue of jobs,
and a server that listens on this machine only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rt_lens.models.protocol import Model
from rt_lens.vectors.steering_vectors import SteeringVectors

if TYPE_CHECKING:
    from rt_lens.apps.dashboard.serving import Dashboard
    from rt_lens.experiment.config import Experiment


def dashboard(
    model: Model | None = None,
    vectors: SteeringVectors | Mapping[str, SteeringVectors] | None = None,
    *,
    run: str | Path | None = None,
    behaviours: Sequence[str | Path | Experiment] = (),
    port: int | None = None,
    height: int = 900,
) -> Dashboard:
    """Opens the dashboard on this machine: live on a model, on a finished run, or both.

    As the last line of a Jupyter cell it appears below the cell; elsewhere open its `url` in a browser. Its jobs run in
    a thread of this process on this same model, so do not use the model while a page is busy.

    Args:
        model: HookedTransformer or TransformerBridge; None to show a run only.
        vectors: of one behaviour, or name -> vectors; those of other behaviours are extracted when first needed.
        run: folder of a finished run; the pages show its figures, vectors and tuned arms.
        behaviours: files of your own behaviours, or experiments from `load_experiment`, offered beside the built-in
            ones.
        port: the port at 127.0.0.1; None for 8050, or any free port if 8050 is taken.
        height: height of the frame in Jupyter, in pixels.

    Returns:
        A Dashboard with `url`, `wait()` and `stop()`.

    Raises:
        ImportError: if Dash is not installed.
        ValueError: if there is neither a model nor a run, the vectors are of another model, or the port is taken.
        FileNotFoundError: if there is no run in the folder.

    Example:
        >>> board = dashboard(model, vectors)
        >>> board.url
        'http://127.0.0.1:.../'
        >>> board.stop()  # without it, the dashboard runs until Python ends
    """
    try:
        import dash  # noqa: F401
    except ImportError:
        raise ImportError(
            "The dashboard needs dash, which is not installed. Run pip install 'rt_lens[dashboard]'."
        ) from None
    from rt_lens.apps.dashboard.app import make_app
    from rt_lens.apps.dashboard.serving import Dashboard
    from rt_lens.apps.dashboard.session import Session
    from rt_lens.results.schema import load_results

    if model is None and run is None:
        raise ValueError(
            "model or run must be given, got neither. Give a model, the folder of a finished run, or both."
        )
    session = Session(model, _named(vectors), load_results(run) if run is not None else None, behaviours)
    try:
        return Dashboard(make_app(session), session.jobs, port, height)
    except BaseException:
        session.jobs.close()
        raise


def _named(vectors: SteeringVectors | Mapping[str, SteeringVectors] | None) -> dict[str, SteeringVectors]:
    if isinstance(vectors, SteeringVectors):
        return {vectors.provenance.behaviour: vectors}
    return dict(vectors or {})
