"""What all commands share: the application, their arguments, and how these are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rt_lens.evaluation.permissions import Permissions
    from rt_lens.prompts import ContrastPairs

app = typer.Typer(
    name="rt-lens",
    help="Find a behaviour's direction in a language model, steer with it, tune it into the weights, compare.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Behaviour = Annotated[
    str, typer.Argument(help="A shipped behaviour, or your own file (see data/behaviours/mood.toml).")
]
Model = Annotated[str | None, typer.Option(help="Embedded model, Hugging Face folder, .gguf file or hub name.")]
VectorFile = Annotated[
    Path, typer.Argument(help="A file that `rt-lens extract` wrote, or another tool's .gguf, .pt or .npz.")
]
AllowJudge = Annotated[
    list[str] | None,
    typer.Option(help="https://host[:port] of a judge that the behaviour's file may use; may be repeated."),
]
JudgeKeyEnv = Annotated[
    str | None, typer.Option(help="Environment variable with the key for the one judge of --allow-judge.")
]


def permissions_of(allow_judge: list[str] | None, judge_key_env: str | None) -> Permissions:
    """What a behaviour's file may use: by these options, and by the user's own settings."""
    from rt_lens.evaluation.permissions import Permissions

    return Permissions.of_user(allow_judge or [], judge_key_env)


def parts_of(behaviour: str, permissions: Permissions) -> tuple[str, ContrastPairs, ContrastPairs]:
    """A behaviour's name, its training and its validation pairs; an experiment's test topics are in neither."""
    from rt_lens.experiment import load_experiment, parts
    from rt_lens.files import as_name
    from rt_lens.prompts import load_pairs
    from rt_lens.shipped import behaviour_file

    if behaviour_file(behaviour).suffix == ".toml":
        experiment = load_experiment(behaviour, permissions=permissions)
        train, validation, _ = parts(experiment)
        return experiment.name, train, validation
    pairs = load_pairs(behaviour)
    train, validation, _ = pairs.split(0.4, 0.2)
    return as_name(pairs.name), train, validation


def model_of(behaviour: str, permissions: Permissions) -> tuple[str, str]:
    """Name and type of the model that a behaviour's file asks for."""
    from rt_lens.experiment import load_experiment
    from rt_lens.models import DEFAULT_MODEL
    from rt_lens.shipped import behaviour_file

    if behaviour_file(behaviour).suffix != ".toml":
        return DEFAULT_MODEL, "float32"
    experiment = load_experiment(behaviour, permissions=permissions)
    return experiment.model, experiment.dtype


def write_page(figure: Any, path: Path) -> None:
    from rt_lens.files import write_atomically

    write_atomically(path, figure.to_html(include_plotlyjs=True).encode())
    typer.echo(f"saved {path} - look: open it in a browser")
