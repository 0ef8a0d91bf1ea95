"""The `rt-lens` command. It reads arguments and calls the rooms below; nobody imports it."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from rt_lens.shipped import behaviours

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
VectorFile = Annotated[Path, typer.Argument(help="A file that `rt-lens extract` wrote.")]


@app.command(epilog="Example: rt-lens run mood --out runs/mood")
def run(
    behaviour: Behaviour,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; runs/NAME by default.")] = None,
    model: Model = None,
) -> None:
    """Run the four arms (untuned, steered, token-tuned, rep-tuned) in both directions and write report.html."""
    from rt_lens.experiment import check_writable, load_experiment, run_experiment
    from rt_lens.report import summary_sentences, write_report

    experiment = load_experiment(behaviour, model=model)
    folder = check_writable(out or Path("runs") / experiment.name)
    results = run_experiment(experiment, folder)
    page = write_report(folder)
    typer.echo("\n" + "\n".join(summary_sentences(results)))
    stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in results["seconds"].items())
    typer.echo(f"\nTime: {stages}.")
    typer.echo(f"saved {folder / 'results.json'} - look: open {page} in a browser")


@app.command(epilog="Example: rt-lens extract mood --out mood.safetensors")
def extract(
    behaviour: Behaviour,
    out: Annotated[Path | None, typer.Option(help="File to write; NAME.safetensors by default.")] = None,
    n_pairs: Annotated[int, typer.Option(help="Contrast pairs to use, spread over topics.")] = 96,
    seed: Annotated[int, typer.Option(help="Of the split into training and held-out pairs, and of the selection.")] = 0,
    model: Model = None,
) -> None:
    """Extract a mean-difference vector per layer, and say how well each separates held-out pairs."""
    from rt_lens.experiment import check_writable
    from rt_lens.extraction import extract_vectors, separability
    from rt_lens.models import DEFAULT_MODEL, load_model
    from rt_lens.prompts import load_pairs

    pairs = load_pairs(behaviour)
    path = out or Path(f"{pairs.name}.safetensors")
    check_writable(path.parent)
    train, held_out = pairs.split(0.7, seed=seed)
    loaded = load_model(model or DEFAULT_MODEL)
    chosen = train.sample(n_pairs, seed=seed)
    vectors = extract_vectors(loaded, chosen, seed=seed, progress=True)
    vectors.save(path)
    table = separability(loaded, vectors, held_out.sample(len(held_out.topics), seed=seed), progress=True)
    layer = int(table.sort_values("accuracy", ascending=False, kind="stable")["layer"].iloc[0])
    typer.echo(table.to_string(index=False, float_format=lambda value: f"{value:.2f}"))
    typer.echo(
        f"saved {path} ({len(table)} layers, {len(chosen)} pairs, seed {seed}) - steer: "
        f'rt-lens steer {path} "Tell me about your weekend." --layer {layer} --multiplier 2'
    )


@app.command(epilog='Example: rt-lens steer mood.safetensors "Tell me about your weekend." --layer 18 --multiplier -2')
def steer(
    vectors: VectorFile,
    prompt: Annotated[str, typer.Argument(help="What the user says.")],
    layer: Annotated[int, typer.Option(help="Block whose output the vector is added to.")],
    multiplier: Annotated[float, typer.Option(help="Times the vector's own length; negative steers away.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answers.")] = 60,
    model: Model = None,
) -> None:
    """Answer a prompt untouched and steered."""
    from rt_lens.generation import generate
    from rt_lens.models import DEFAULT_MODEL, load_model
    from rt_lens.steering import add
    from rt_lens.vectors import SteeringVectors

    directions = SteeringVectors.load(vectors)
    hooks = add(directions, [layer], multiplier)
    loaded = load_model(model or DEFAULT_MODEL)
    directions.check_fits(loaded)
    typer.echo(f"untuned:\n{generate(loaded, [prompt], max_new_tokens=max_new_tokens)[0]}\n")
    with loaded.hooks(fwd_hooks=hooks):
        answer = generate(loaded, [prompt], max_new_tokens=max_new_tokens)[0]
    typer.echo(f"steered (layer {layer}, multiplier {multiplier:g}):\n{answer}")


@app.command(epilog="Example: rt-lens tune mood mood.safetensors --direction away --out mood_away.safetensors")
def tune(
    behaviour: Behaviour,
    vectors: VectorFile,
    direction: Annotated[str, typer.Option(help="toward, away or out.")] = "away",
    out: Annotated[Path | None, typer.Option(help="File to write; NAME_DIRECTION.safetensors by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of target selection and batch order.")] = 0,
    model: Model = None,
) -> None:
    """Tune a direction into the weights, with the settings of the behaviour's file, and save the change of weights."""
    from dataclasses import replace

    from rt_lens.experiment import check_writable, load_experiment
    from rt_lens.models import load_model
    from rt_lens.shipped import neutral_prompts
    from rt_lens.tuning import tune as tune_weights
    from rt_lens.vectors import SteeringVectors

    experiment = load_experiment(behaviour, model=model)
    token_weight = 0.0 if direction == "out" else experiment.tune.token_weight
    config = replace(experiment.tune, direction=direction, seed=seed, token_weight=token_weight)  # type: ignore[arg-type]
    path = out or Path(f"{experiment.name}_{direction}.safetensors")
    check_writable(path.parent)
    directions = SteeringVectors.load(vectors)
    train, validation, _ = experiment.pairs.split(
        experiment.split.train, experiment.split.validation, seed=experiment.split.seed
    )
    loaded = load_model(experiment.model)
    delta = tune_weights(loaded, directions, train, config, validation=validation, neutral=neutral_prompts())
    delta.save(path)
    typer.echo(
        f"saved {path} ({len(delta.changes)} matrices, seed {seed}) - use: WeightDelta.load('{path}').applied(model)"
    )


@app.command(epilog="Example: rt-lens models")
def models() -> None:
    """List the embedded models and the shipped behaviours."""
    from rt_lens.models import EMBEDDED_MODELS, describe

    for name in EMBEDDED_MODELS:
        typer.echo("\n".join(f"{key:>11}: {value}" for key, value in describe(name).items()))
    typer.echo(f"\nbehaviours: {', '.join(behaviours())}")


def main() -> None:
    """Entry point: bad input is one line and exit code 2."""
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        app()
    except (ValueError, KeyError, FileNotFoundError) as error:
        message = error.args[0] if isinstance(error, KeyError) else error
        sys.stderr.write(f"rt-lens: {message}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
