"""The command that opens the pages."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from rt_lens.cli.app import Model, app


@app.command(
    epilog="Example: rt-lens dashboard runs/mood   (or, on a model alone: rt-lens dashboard --vectors mood.safetensors)"
)
def dashboard(
    run: Annotated[Path | None, typer.Argument(help="Folder of a finished run; none to work on a model alone.")] = None,
    vectors: Annotated[
        list[Path] | None, typer.Option(help="A file of steering vectors to have at hand; may be repeated.")
    ] = None,
    behaviour: Annotated[
        list[str] | None, typer.Option(help="A file of a behaviour of your own to offer; may be repeated.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="On 127.0.0.1; 8050 by default, or any that is free.")] = None,
    model: Model = None,
) -> None:
    """Show a finished run, and work live on the model, in a browser on this machine."""
    from rt_lens.dashboard import dashboard as open_dashboard
    from rt_lens.exchange import import_vectors
    from rt_lens.experiment import load_experiment

    for own in behaviour or []:
        load_experiment(own)  # refused before the model is loaded
    named = {}
    for found in map(import_vectors, vectors or []):
        named[found.provenance.behaviour] = found
    loaded = _loaded(run, model)
    board = open_dashboard(loaded, named, run=run, behaviours=behaviour or [], port=port)
    typer.echo(f"open {board.url} in a browser on this machine; Ctrl-C ends it")
    with suppress(KeyboardInterrupt):
        board.wait()
    board.stop()


def _loaded(run: Path | None, model: str | None) -> Any:
    """The model that was asked for, or the run's; none, with a word about it, if the run's is not at hand."""
    from rt_lens.models import DEFAULT_MODEL, load_model
    from rt_lens.results import load_results

    if model is not None or run is None:
        return load_model(model or DEFAULT_MODEL)
    name = load_results(run).content["model"]
    try:
        return load_model(name)
    except (ValueError, OSError) as refusal:
        typer.echo(f"the run's model is not at hand, so the pages show the run alone ({refusal})", err=True)
        return None
