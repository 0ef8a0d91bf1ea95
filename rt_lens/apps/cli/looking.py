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
    run: Annotated[
        Path | None, typer.Argument(help="Folder of a finished run. Leave it out to work on a model alone.")
    ] = None,
    vectors: Annotated[list[Path] | None, typer.Option(help="Steering-vector file to load. Can be repeated.")] = None,
    behaviour: Annotated[
        list[str] | None, typer.Option(help="Custom behaviour file to include. Can be repeated.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port on 127.0.0.1; by default 8050, or any free one.")] = None,
    model: Model = None,
    dtype: Dtype = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    allow_judge: AllowJudge = None,
    judge_key_env: JudgeKeyEnv = None,
) -> None:
    """Browse a finished run and experiment with the live model in a local dashboard."""
    from rt_lens.apps.dashboard.opening import dashboard as open_dashboard
    from rt_lens.experiment.config import load_experiment

    permissions = permissions_of(allow_judge, judge_key_env)
    # Files are read, and refused, before the model is loaded.
    experiments = [load_experiment(file, permissions=permissions) for file in behaviour or []]
    named = _named(vectors or [])
    vectors_dtype = next((file_vectors.provenance.dtype for file_vectors in named.values()), "float32")
    loaded = _loaded(run, model, dtype, chat_template_kwargs, vectors_dtype)
    server = open_dashboard(loaded, named, run=run, behaviours=experiments, port=port)
    typer.echo(f"Serving {server.url}. Next: open it in a browser on this machine; Ctrl-C stops the dashboard.")
    with suppress(KeyboardInterrupt):
        server.wait()
    server.stop()


def _named(files: list[Path]) -> dict[str, SteeringVectors]:
    """Vectors by behaviour; by file name where two files have one behaviour, as files of other tools do."""
    from rt_lens.results.schema import checked_file
    from rt_lens.vectors.interop.tensors import import_vectors

    imported = [(file, import_vectors(checked_file(file))) for file in files]
    names = [vectors.provenance.behaviour for _, vectors in imported]
    named = {
        behaviour if names.count(behaviour) == 1 else file.stem: vectors
        for behaviour, (file, vectors) in zip(names, imported, strict=True)
    }
    if len(named) < len(files):
        raise ValueError(
            f"vectors must be files with different names, got {', '.join(map(str, files))}, two of which have one "
            "name. Rename one."
        )
    return named


def _loaded(run: Path | None, model: str | None, dtype: str | None, kwargs: str | None, default: str) -> Any:
    """The model of `--model`, or of the run; None, with a message, if the run's model is not available."""
    from rt_lens.models.load import load_model
    from rt_lens.results.schema import load_results

    if model is not None or run is None:
        return loaded_model(model, dtype, kwargs, default=default)
    content = load_results(run).content
    settings = content.get("reproducibility", {}).get("settings") or {}
    try:
        return load_model(
            content["model"], dtype=dtype or settings.get("dtype", "float32"),
            chat_template_kwargs=template_kwargs(kwargs) or settings.get("chat_template_kwargs"),
        )  # fmt: skip
    except (ValueError, OSError) as error:
        typer.echo(
            f"The run's model is not available, so the pages show the run alone ({error}). To work on a model, name it "
            "with --model.",
            err=True,
        )
        return None
