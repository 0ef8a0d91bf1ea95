"""The commands that serve: the pages, and an endpoint for other programs."""

from __future__ import annotations

import os
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


@app.command(epilog="Example: rt-lens serve --delta mood_away.safetensors --steer mood.safetensors:21:2")
def serve(
    delta: Annotated[
        list[Path] | None,
        typer.Option(help="Weight delta from `rt-lens tune`; its file's name is a model. Can be repeated."),
    ] = None,
    steer: Annotated[
        list[str] | None, typer.Option(help="FILE:LAYER:MULTIPLIER of steering vectors; a model, too. Can be repeated.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 8000,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with a key that requests have to send; none by default.")
    ] = None,
    most_waiting: Annotated[int, typer.Option(help="Requests that may wait; more are turned away.")] = 16,
    model: Model = None,
    dtype: Dtype = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
) -> None:
    """Serve the model, tuned or steered, at an OpenAI-compatible address on this machine."""
    try:
        import uvicorn

        from rt_lens.apps.endpoint.app import make_endpoint
    except ImportError:
        raise ImportError("serve needs fastapi and uvicorn: pip install 'rt_lens[serve]'.") from None
    from rt_lens.apps.endpoint.arms import arms_of

    key = None if api_key_env is None else _key(api_key_env)
    files = arms_of(delta or [], steer or [])  # read, and refused, before the model is loaded
    loaded = loaded_model(model, dtype, chat_template_kwargs)
    endpoint = make_endpoint(loaded, files(loaded), api_key=key, most_waiting=most_waiting)
    names = ", ".join(endpoint.state.worker.arms)
    typer.echo(f"Serving http://127.0.0.1:{port}/v1 (models: {names}). Ctrl-C stops it.")
    uvicorn.run(endpoint, host="127.0.0.1", port=port, log_level="warning")
    endpoint.state.worker.close()


def _key(name: str) -> str:
    key = os.environ.get(name, "")
    if not key:
        raise ValueError(
            f"api_key_env must name an environment variable with a key, got {name}, which is not set. Set it."
        )
    return key


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
