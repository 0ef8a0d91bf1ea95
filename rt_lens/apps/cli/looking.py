"""The command that opens the pages."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rt_lens.apps.cli.app import (
    AllowJudge,
    ChatTemplateKwargs,
    Dtype,
    JudgeKeyEnv,
    Model,
    app,
    loaded_model,
    permissions_of,
    template_kwargs,
)

if TYPE_CHECKING:
    from rt_lens.vectors.steering_vectors import SteeringVectors


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
    dtype: Dtype = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    allow_judge: AllowJudge = None,
    judge_key_env: JudgeKeyEnv = None,
) -> None:
    """Show a finished run, and work live on the model, in a browser on this machine."""
    from rt_lens.apps.dashboard.opening import dashboard as open_dashboard
    from rt_lens.experiment.config import load_experiment

    permissions = permissions_of(allow_judge, judge_key_env)
    # Read, and refused, before the model is loaded.
    experiments = [load_experiment(own, permissions=permissions) for own in behaviour or []]
    named = _named(vectors or [])
    of_vectors = next((each.provenance.dtype for each in named.values()), "float32")
    loaded = _loaded(run, model, dtype, chat_template_kwargs, of_vectors)
    board = open_dashboard(loaded, named, run=run, behaviours=experiments, port=port)
    typer.echo(f"open {board.url} in a browser on this machine; Ctrl-C ends it")
    with suppress(KeyboardInterrupt):
        board.wait()
    board.stop()


def _named(files: list[Path]) -> dict[str, SteeringVectors]:
    """Vectors by behaviour; by file where two are of one behaviour, as those of other tools are all unknown."""
    from rt_lens.results.schema import checked_file
    from rt_lens.vectors.interop.tensors import import_vectors

    found = [(file, import_vectors(checked_file(file))) for file in files]
    told = [vectors.provenance.behaviour for _, vectors in found]
    named = {
        behaviour if told.count(behaviour) == 1 else file.stem: vectors
        for behaviour, (file, vectors) in zip(told, found, strict=True)
    }
    if len(named) < len(files):
        raise ValueError(f"vectors: of {len(files)} files two have one name. Rename one: {', '.join(map(str, files))}.")
    return named


def _loaded(run: Path | None, model: str | None, dtype: str | None, told: str | None, of_vectors: str) -> Any:
    """The model that was asked for, or the run's; none, with a word about it, if the run's is not at hand."""
    from rt_lens.models.load import load_model
    from rt_lens.results.schema import load_results

    if model is not None or run is None:
        return loaded_model(model, dtype, told, default=of_vectors)
    content = load_results(run).content
    settings = content.get("again", {}).get("settings") or {}
    try:
        return load_model(
            content["model"], dtype=dtype or settings.get("dtype", "float32"),
            chat_template_kwargs=template_kwargs(told) or settings.get("chat_template_kwargs"),
        )  # fmt: skip
    except (ValueError, OSError) as refusal:
        typer.echo(f"the run's model is not at hand, so the pages show the run alone ({refusal})", err=True)
        return None
