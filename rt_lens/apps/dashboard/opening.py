"""Everything on pages of a browser: explore a prompt, vectors, steering, tuning, and arms compared.

The pages draw what `rt_lens.plots` gives and compute what the rooms below do; here are only controls, a queue of work,
and a server that listens on this machine alone.
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

    As the last line of a Jupyter cell it appears below the cell; elsewhere open its `url`. It works in a thread of this
    process with this very model, so leave the model alone while a page is busy.

    Args:
        model: HookedTransformer or TransformerBridge; None to look at a run only.
        vectors: of one behaviour, or name -> vectors. Those of shipped behaviours are made when they are first needed.
        run: folder of a finished run, whose figures, vectors and tuned arms are shown as well.
        behaviours: files of behaviours of your own, to be offered beside the shipped ones; or what `load_experiment`
            made of them.
        port: on which to listen, at 127.0.0.1 only; None for 8050, or any free one if that is taken.
        height: of the frame in Jupyter, in pixels.

    Returns:
        A Dashboard with `url`, `wait()` and `stop()`.

    Raises:
        ImportError: Dash is not installed.
        ValueError: neither a model nor a run, vectors of another model, or a port that is taken.
        FileNotFoundError: there is no run in the folder.

    Example:
        >>> board = dashboard(model, vectors)
        >>> board.url
        'http://127.0.0.1:8050/'
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
    bench = Session(model, _named(vectors), load_results(run) if run is not None else None, behaviours)
    try:
        return Dashboard(make_app(bench), bench.jobs, port, height)
    except BaseException:
        bench.jobs.close()
        raise


def _named(vectors: SteeringVectors | Mapping[str, SteeringVectors] | None) -> dict[str, SteeringVectors]:
    if isinstance(vectors, SteeringVectors):
        return {vectors.provenance.behaviour: vectors}
    return dict(vectors or {})
