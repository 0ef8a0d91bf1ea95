"""What all commands share: the application, their arguments, and how these are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rt_lens.data.contrast_pairs import ContrastPairs
    from rt_lens.evaluation.permissions import Permissions
    from rt_lens.experiment.config import Experiment
    from rt_lens.vectors.steering_vectors import SteeringVectors

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
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; by default that of what was made on the model.")
]
ChatTemplateKwargs = Annotated[
    str | None,
    typer.Option(help="JSON that the chat template is given besides the messages: '{\"enable_thinking\": false}'."),
]
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


def loaded_model(
    name: str | None, dtype: str | None, chat_template_kwargs: str | None, *, default: str = "float32"
) -> Any:
    """The model of `--model`, as `--dtype` and `--chat-template-kwargs` want it.

    Args:
        name: the bundled model for None.
        dtype: `default` for None: what the file of vectors or the change of weights that is used with it says.
        chat_template_kwargs: JSON.
        default: see `dtype`.
    """
    from rt_lens.models.load import load_model
    from rt_lens.models.registry import DEFAULT_MODEL

    told = template_kwargs(chat_template_kwargs)
    return load_model(name or DEFAULT_MODEL, dtype=dtype or default, chat_template_kwargs=told)


def model_for(experiment: Experiment, dtype: str | None, vectors: SteeringVectors) -> Any:
    """An experiment's model, for vectors made on it: as `--dtype` says, else as they say, else as the experiment."""
    from rt_lens.models.load import load_model

    of_vectors = vectors.provenance.dtype
    kind = dtype or (of_vectors if of_vectors != "float32" else experiment.dtype)
    return load_model(experiment.model, dtype=kind, chat_template_kwargs=experiment.chat_template_kwargs)


def template_kwargs(text: str | None) -> Mapping[str, Any]:
    """What `--chat-template-kwargs` says.

    Raises:
        ValueError: if it is no JSON object.
    """
    try:
        found = json.loads(text or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"chat_template_kwargs must be a JSON object, got {text!r}. "
            """Write it in single quotes, as in '{"enable_thinking": false}'."""
        )
    return found


def permissions_of(allow_judge: list[str] | None, judge_key_env: str | None) -> Permissions:
    """What a behaviour's file may use: by these options, and by the user's own settings."""
    from rt_lens.evaluation.permissions import Permissions

    return Permissions.of_user(allow_judge or [], judge_key_env)


def parts_of(behaviour: str, permissions: Permissions) -> tuple[str, ContrastPairs, ContrastPairs]:
    """A behaviour's name, its training and its validation pairs; an experiment's test topics are in neither."""
    from rt_lens.common.files import as_name
    from rt_lens.data.builtin import behaviour_file
    from rt_lens.data.contrast_pairs import load_pairs
    from rt_lens.experiment.config import load_experiment
    from rt_lens.experiment.protocols import parts

    if behaviour_file(behaviour).suffix == ".toml":
        experiment = load_experiment(behaviour, permissions=permissions)
        name, shared_out = experiment.name, parts(experiment)
    else:
        pairs = load_pairs(behaviour)
        name, shared_out = as_name(pairs.name), pairs.split(0.4, 0.2)  # type: ignore[assignment]
    if left_out := getattr(shared_out, "left_out", 0):
        typer.echo(f"{left_out:,} pairs are left out, so that training, validation and test share nothing", err=True)
    train, validation, _ = shared_out
    return name, train, validation


def model_of(behaviour: str, permissions: Permissions) -> tuple[str, str]:
    """Name and type of the model that a behaviour's file asks for."""
    from rt_lens.data.builtin import behaviour_file
    from rt_lens.experiment.config import load_experiment
    from rt_lens.models.registry import DEFAULT_MODEL

    if behaviour_file(behaviour).suffix != ".toml":
        return DEFAULT_MODEL, "float32"
    experiment = load_experiment(behaviour, permissions=permissions)
    return experiment.model, experiment.dtype


def write_page(figure: Any, path: Path) -> None:
    from rt_lens.common.files import write_atomically

    write_atomically(path, figure.to_html(include_plotlyjs=True).encode())
    typer.echo(f"saved {path} - look: open it in a browser")
