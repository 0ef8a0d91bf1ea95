"""The application, and the arguments that several commands share."""

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
    help="Find the direction of a behaviour in a language model, steer with it, "
    "fine-tune it into the weights, and compare the results.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Behaviour = Annotated[
    str, typer.Argument(help="A built-in behaviour, or your own file (see data/behaviours/mood.toml).")
]
Model = Annotated[str | None, typer.Option(help="Bundled model, Hugging Face folder, .gguf file or hub name.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; default: dtype of the vectors, delta or experiment."),
]
ChatTemplateKwargs = Annotated[
    str | None,
    typer.Option(help="Extra chat-template variables, as JSON: '{\"enable_thinking\": false}'."),
]
VectorFile = Annotated[
    Path, typer.Argument(help="A file from `rt-lens extract`, or a .gguf, .pt, .npz or .json file of another tool.")
]
AllowJudge = Annotated[
    list[str] | None,
    typer.Option(help="https://host[:port] of a judge that the behaviour's file may use. Can be repeated."),
]
JudgeKeyEnv = Annotated[
    str | None, typer.Option(help="Environment variable that holds the API key of the judge allowed by --allow-judge.")
]


def loaded_model(
    name: str | None, dtype: str | None, chat_template_kwargs: str | None, *, default: str = "float32"
) -> Any:
    """Loads the model of `--model` with `--dtype` and `--chat-template-kwargs`.

    Args:
        name: None for the bundled model.
        dtype: None for `default`.
        chat_template_kwargs: JSON.
        default: type of the vectors or of the weight delta that are used with the model.
    """
    from rt_lens.models.load import load_model
    from rt_lens.models.registry import DEFAULT_MODEL

    kwargs = template_kwargs(chat_template_kwargs)
    return load_model(name or DEFAULT_MODEL, dtype=dtype or default, chat_template_kwargs=kwargs)


def model_for(experiment: Experiment, dtype: str | None, vectors: SteeringVectors) -> Any:
    """Loads an experiment's model: in the type of `--dtype`, else of the vectors, else of the experiment."""
    from rt_lens.models.load import load_model

    vectors_dtype = vectors.provenance.dtype
    dtype = dtype or (vectors_dtype if vectors_dtype != "float32" else experiment.dtype)
    return load_model(experiment.model, dtype=dtype, chat_template_kwargs=experiment.chat_template_kwargs)


def template_kwargs(text: str | None) -> Mapping[str, Any]:
    """The JSON of `--chat-template-kwargs`.

    Raises:
        ValueError: if it is not a JSON object.
    """
    try:
        kwargs = json.loads(text or "{}")
    except ValueError:
        kwargs = None
    if not isinstance(kwargs, dict):
        raise ValueError(
            f"chat_template_kwargs must be a JSON object, got {text!r}. "
            """Write it in single quotes, as in '{"enable_thinking": false}'."""
        )
    return kwargs


def permissions_of(allow_judge: list[str] | None, judge_key_env: str | None) -> Permissions:
    """The judges that a behaviour's file may use: those of these options and of the user's own settings."""
    from rt_lens.evaluation.permissions import Permissions

    return Permissions.of_user(allow_judge or [], judge_key_env)


def experiment_of(
    behaviour: str, model: str | None, dtype: str | None, chat_template_kwargs: str | None,
    allow_judge: list[str] | None, judge_key_env: str | None, search: int | None = None,
) -> Experiment:  # fmt: skip
    """The experiment of a behaviour's file, with what the command's options change of it."""
    from rt_lens.experiment.config import load_experiment

    return load_experiment(
        behaviour, model=model, dtype=dtype, chat_template_kwargs=template_kwargs(chat_template_kwargs),
        search=search, permissions=permissions_of(allow_judge, judge_key_env),
    )  # fmt: skip


def parts_of(behaviour: str, permissions: Permissions) -> tuple[str, ContrastPairs, ContrastPairs]:
    """A behaviour's name, its training pairs and its validation pairs. Neither has the test topics of an experiment."""
    from rt_lens.common.files import as_name
    from rt_lens.data.builtin import behaviour_file
    from rt_lens.data.contrast_pairs import load_pairs
    from rt_lens.experiment.config import load_experiment
    from rt_lens.experiment.protocols import parts

    if behaviour_file(behaviour).suffix == ".toml":
        experiment = load_experiment(behaviour, permissions=permissions)
        name, split = experiment.name, parts(experiment)
    else:
        pairs = load_pairs(behaviour)
        name, split = as_name(pairs.name), pairs.split(0.4, 0.2)  # type: ignore[assignment]
    if left_out := getattr(split, "left_out", 0):
        typer.echo(
            f"{left_out:,} pairs are left out, so that training, validation and test share no topic, persona or "
            "prefill. Give more of them to use more pairs.",
            err=True,
        )
    train, validation, _ = split
    return name, train, validation


def model_of(behaviour: str, permissions: Permissions) -> tuple[str, str]:
    """Name and type of the model in a behaviour's file."""
    from rt_lens.data.builtin import behaviour_file
    from rt_lens.experiment.config import load_experiment
    from rt_lens.models.registry import DEFAULT_MODEL

    if behaviour_file(behaviour).suffix != ".toml":
        return DEFAULT_MODEL, "float32"
    experiment = load_experiment(behaviour, permissions=permissions)
    return experiment.model, experiment.dtype


def write_page(figure: Any, path: Path) -> None:
    """Saves a figure as an HTML page."""
    from rt_lens.common.files import write_atomically

    write_atomically(path, figure.to_html(include_plotlyjs=True).encode())
    typer.echo(f"Saved {path}. Next: open it in a browser.")
