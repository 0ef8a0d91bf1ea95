"""Commands that come before a run: write a behaviour's file, and check one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rt_lens.apps.cli.app import (
    AllowJudge,
    Behaviour,
    ChatTemplateKwargs,
    Dtype,
    JudgeKeyEnv,
    Model,
    app,
    permissions_of,
    template_kwargs,
)

if TYPE_CHECKING:
    from rt_lens.experiment.check import Finding
    from rt_lens.experiment.config import Experiment


@app.command(epilog="Example: rt-lens new my_behaviour")
def new(
    name: Annotated[str, typer.Argument(help="Name of your behaviour; files and folders are called after it.")],
    out: Annotated[Path | None, typer.Option(help="File to write; NAME.toml by default.")] = None,
) -> None:
    """Write a small behaviour's file that runs, with comments on what to change in it, and check it."""
    from rt_lens.common.files import check_can_write, check_name, write_atomically
    from rt_lens.data.builtin import new_behaviour
    from rt_lens.experiment.config import load_experiment

    check_name(name, "name")
    path = out or Path(f"{name}.toml")
    if path.exists():
        raise ValueError(
            f"out must be a file that does not exist yet, got {path}. Choose another name, or give one with --out."
        )
    check_can_write(path, "out")
    write_atomically(path, new_behaviour(name).encode())
    _print(_static(load_experiment(path)))
    typer.echo(
        f"Saved {path}. It is an example that runs. Next: open it in an editor, write your own personas, topics and "
        f"scorer, then rt-lens check {path} --measure"
    )


@app.command(epilog="Example: rt-lens check my_behaviour.toml --measure")
def check(
    behaviour: Behaviour,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Load the model, and ask it topics (none of the test) with and without personas."
        ),
    ] = False,
    model: Model = None,
    dtype: Dtype = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    allow_judge: AllowJudge = None,
    judge_key_env: JudgeKeyEnv = None,
) -> None:
    """Say what will help or hurt a behaviour's run. Exit with 1 if `rt-lens run` would refuse it."""
    from rt_lens.data.builtin import behaviour_file
    from rt_lens.experiment.check import Finding
    from rt_lens.experiment.config import load_experiment

    behaviour_file(behaviour)  # an unknown name or file is no finding
    permissions, kwargs = permissions_of(allow_judge, judge_key_env), template_kwargs(chat_template_kwargs)
    try:
        experiment = load_experiment(
            behaviour, model=model, dtype=dtype, chat_template_kwargs=kwargs, permissions=permissions
        )
    except ValueError as error:
        findings = [Finding("error", "file", str(error))]
    else:
        findings = _static(experiment)
        if measure and not _count(findings, "error"):
            findings = [*_measured(experiment), *findings]
    _print(findings)
    if _count(findings, "error"):
        typer.echo(f"rt-lens run would refuse this. Next: mend the error, then rt-lens check {behaviour}")
        raise typer.Exit(1)
    first = "" if measure else f"rt-lens check {behaviour} --measure (asks the model), then "
    typer.echo(f"Next: {first}rt-lens run {behaviour}")


@app.command(epilog="Example: rt-lens look refusal.json")
def look(
    file: Annotated[Path, typer.Argument(help="A .jsonl, .json, .csv or .tsv file, of rt_lens or of another tool.")],
    model: Model = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
) -> None:
    """Say what a file holds: kind, number, balance, repetitions, lengths, and its first item as the model reads it."""
    from rt_lens.data.contents import look as look_at
    from rt_lens.models.load import load_tokenizer
    from rt_lens.models.registry import DEFAULT_MODEL

    if not file.is_file():
        raise ValueError(f"file must be an existing file, got {file}. Check the path.")
    reader = load_tokenizer(model or DEFAULT_MODEL, chat_template_kwargs=template_kwargs(chat_template_kwargs))
    contents = look_at(file, reader)
    typer.echo(str(contents))
    if "pairs" in contents.holds:
        position = " --position letter" if contents.lettered else ""
        typer.echo(f"Next: rt-lens extract {file}{position} --out vectors.safetensors")
    elif "questions" in contents.holds:
        typer.echo(f"Next: rt-lens evaluate {file} --scorer NAME")


def _static(experiment: Experiment) -> list[Finding]:
    from rt_lens.experiment.check import check_behaviour

    return check_behaviour(experiment)


def _measured(experiment: Experiment) -> list[Finding]:
    from rt_lens.experiment.check import measure_behaviour
    from rt_lens.models.load import load_model

    typer.echo(f"Loading {experiment.model} and asking it topics of the training and validation parts ...", err=True)
    model = load_model(experiment.model, dtype=experiment.dtype, chat_template_kwargs=experiment.chat_template_kwargs)
    return measure_behaviour(experiment, model)


def _print(findings: list[Finding]) -> None:
    """One line for each finding, and how many of them ask for something."""
    for finding in findings:
        typer.echo(str(finding))
    counts = ((_count(findings, verdict), verdict) for verdict in ("error", "warning"))
    typer.echo("\n" + ", ".join(f"{n} {verdict}{'s' * (n != 1)}" for n, verdict in counts) + ".")


def _count(findings: list[Finding], verdict: str) -> int:
    return sum(finding.verdict == verdict for finding in findings)
