"""The `rt-lens` command. It reads arguments and calls the rooms below; nobody imports it."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rt_lens.shipped import behaviours

if TYPE_CHECKING:
    from rt_lens.delta import WeightDelta
    from rt_lens.prompts import ContrastPairs
    from rt_lens.vectors import SteeringVectors

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


@app.command(epilog="Example: rt-lens run mood --out runs/mood")
def run(
    behaviour: Behaviour,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; runs/NAME by default.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what it would take: memory, steps, time.")] = False,
    model: Model = None,
) -> None:
    """Run the four arms (untuned, steered, token-tuned, rep-tuned) in both directions and write report.html."""
    from rt_lens.experiment import check_writable, load_experiment, plan_of, run_experiment
    from rt_lens.report import summary_sentences, write_report

    experiment = load_experiment(behaviour, model=model)
    if plan:
        typer.echo(str(plan_of(experiment)))
        return
    folder = check_writable(out or Path("runs") / experiment.name)
    results = run_experiment(experiment, folder)
    page = write_report(folder)
    typer.echo("\n" + "\n".join(summary_sentences(results)))
    stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in results["seconds"].items())
    typer.echo(f"\nTime: {stages}.")
    typer.echo(f"saved {folder / 'results.json'} - look: open {page} in a browser")


@app.command(epilog="Example: rt-lens extract mood --method mean_diff --out mood.safetensors --figure mood.html")
def extract(
    behaviour: Behaviour,
    out: Annotated[Path | None, typer.Option(help="File to write; NAME.safetensors by default.")] = None,
    method: Annotated[str, typer.Option(help="mean_diff, pca, logistic, mass_mean, leace, or random (control).")] = (
        "mean_diff"
    ),
    position: Annotated[str, typer.Option(help="last, mean, mean prompt, mean response, mean last 5, ...")] = "last",
    hook: Annotated[str, typer.Option(help="resid_pre, resid_mid, resid_post, attn_out or mlp_out.")] = "resid_post",
    n_pairs: Annotated[int, typer.Option(help="Contrast pairs to use, spread over topics.")] = 96,
    seed: Annotated[int, typer.Option(help="Of the selection of pairs, and of every interval.")] = 0,
    figure: Annotated[Path | None, typer.Option(help="HTML file for the figure of the evidence.")] = None,
    model: Model = None,
) -> None:
    """Extract a vector per layer, and say whether to believe them: held-out pairs, halves of the data, random ones."""
    from rt_lens import plots
    from rt_lens.experiment import check_writable
    from rt_lens.extraction import trust
    from rt_lens.models import DEFAULT_MODEL, load_model

    name, train, held_out = _parts(behaviour)
    path = out or Path(f"{name}.safetensors")
    check_writable(path.parent)
    loaded = load_model(model or DEFAULT_MODEL)
    chosen = train.sample(n_pairs, seed=seed)
    found = trust(loaded, chosen, held_out, method=method, position=position, hook=hook, seed=seed, progress=True)
    found.vectors.save(path)
    measures = [f"{name}{end}" for name in ("accuracy", "auc", "stability") for end in ("", "_low", "_high")]
    columns = ["layer", *measures, "n"]
    typer.echo(found.layers[columns].to_string(index=False, float_format=lambda value: f"{value:.2f}"))
    typer.echo(f"\n{found.reason}")
    if figure is not None:
        drawn = plots.trust(found.layers, found.learning, found.cosines, recommended=found.recommended)
        _write_page(drawn, figure)
    layer = found.best if found.best is not None else int(found.layers["layer"].iloc[-1])
    typer.echo(
        f"saved {path} ({len(found.layers)} layers, {len(chosen)} pairs, seed {seed}) - steer: "
        f'rt-lens steer {path} "Tell me about your weekend." --layer {layer} --multiplier 2'
    )


@app.command(epilog="Example: rt-lens vectors mood.safetensors --gguf mood.gguf --layers 1-29")
def vectors(
    file: VectorFile,
    gguf: Annotated[Path | None, typer.Option(help="Write a control vector for llama.cpp and repeng.")] = None,
    layers: Annotated[str | None, typer.Option(help="Blocks, such as 14-22 or 14,18; all by default.")] = None,
) -> None:
    """Show what a file of steering vectors holds (also .gguf, .pt, .npz of other tools), or convert it."""
    from rt_lens.exchange import import_vectors, save_gguf

    found = import_vectors(file)
    if layers is not None:
        found = found.select(_layers(layers), _kind_of(found))
    for key, value in found.provenance.to_json().items():
        typer.echo(f"{key:>15}: {value!r}")  # a stranger's file may hold what a terminal obeys
    for name, vector in found.vectors.items():
        typer.echo(f"{name:>32}: shape {tuple(vector.shape)}, norm {float(vector.norm()):.3g}")
    if gguf is not None:
        typer.echo(f"saved {save_gguf(found, gguf)} - use: llama-cli --control-vector-scaled {gguf}:1")


@app.command(epilog="Example: rt-lens sweep mood mood.safetensors --layers 14-22 --out runs/sweep.json")
def sweep(
    behaviour: Behaviour,
    file: VectorFile,
    layers: Annotated[str, typer.Option(help="Blocks, such as 14-22 or 14,18.")] = "14-22",
    multipliers: Annotated[str, typer.Option(help="Numbers, with commas.")] = "-3,-2,-1,0,1,2,3",
    n_prompts: Annotated[int, typer.Option(help="Validation prompts to use.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answers.")] = 24,
    out: Annotated[Path, typer.Option(help="Finished layers are kept here; run again to go on.")] = Path("sweep.json"),
    figure: Annotated[Path | None, typer.Option(help="HTML file for the heat map.")] = None,
    model: Model = None,
) -> None:
    """Steer over layers x multipliers on validation prompts, and score the answers with the behaviour's scorer."""
    from rt_lens import plots
    from rt_lens.exchange import import_vectors
    from rt_lens.experiment import check_writable, load_experiment
    from rt_lens.models import load_model
    from rt_lens.sweeping import Answers
    from rt_lens.sweeping import sweep as sweep_layers

    experiment = load_experiment(behaviour, model=model)
    directions, chosen = import_vectors(file), _layers(layers)
    _, _, held_out = _parts(behaviour)
    doses = [_number(text) for text in multipliers.split(",")]
    check_writable(out.parent)
    loaded = load_model(experiment.model)
    found = sweep_layers(
        loaded, directions, held_out.topics[:n_prompts], layers=chosen, multipliers=doses,
        metric=Answers(experiment.scorer, max_new_tokens), hook=_kind_of(directions), path=out,
    )  # fmt: skip
    table = found.summary()
    typer.echo(table.to_string(index=False, float_format=lambda value: f"{value:.2f}"))
    if figure is not None:
        _write_page(plots.sweep(table), figure)
    if len(doses) > 2:
        for layer in chosen:
            typer.echo(str(found.dose_response(layer)))
    typer.echo(f"saved {out} (n = {len(found.prompts)} prompts, seed {found.seed})")


def _parts(behaviour: str) -> tuple[str, ContrastPairs, ContrastPairs]:
    """A behaviour's name, its training and its validation pairs; an experiment's test topics are in neither."""
    from rt_lens.experiment import load_experiment, parts
    from rt_lens.prompts import load_pairs
    from rt_lens.shipped import behaviour_file

    if behaviour_file(behaviour).suffix == ".toml":
        experiment = load_experiment(behaviour)
        train, validation, _ = parts(experiment)
        return experiment.name, train, validation
    pairs = load_pairs(behaviour)
    train, validation, _ = pairs.split(0.4, 0.2)
    return pairs.name, train, validation


def _kind_of(found: SteeringVectors) -> str:
    """The kind of hook point of a file's vectors."""
    kinds = {name.split(".", 2)[-1] for name in found.hook_names}
    return kinds.pop() if len(kinds) == 1 else "resid_post"


def _layers(text: str) -> list[int]:
    """Block indices of a text such as 14-22 or 14,18."""
    chosen: list[int] = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        if not low.strip().isdigit() or (high and not high.strip().isdigit()):
            raise ValueError(f"layers: {text!r} came; blocks such as 14-22 or 14,18 are wanted.")
        chosen.extend(range(int(low), int(high or low) + 1))
    return chosen


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"multipliers: {text!r} came; numbers such as -2,0,2 are wanted.") from None


def _write_page(figure: Any, path: Path) -> None:
    from rt_lens.files import write_atomically

    write_atomically(path, figure.to_html(include_plotlyjs=True).encode())
    typer.echo(f"saved {path} - look: open it in a browser")


@app.command(epilog="Example: rt-lens evaluate my_prompts.csv --scorer vader --delta mood_away.safetensors")
def evaluate(
    questions: Annotated[
        str, typer.Argument(help="A .csv, .jsonl or .txt file of prompts; or a shipped set: capitals.")
    ],
    scorer: Annotated[
        list[str] | None,
        typer.Option(help="A name, pattern:REGEX, or a .toml file with a [scorer] table. Repeat it for more."),
    ] = None,
    delta: Annotated[Path | None, typer.Option(help="A change of weights: a tuned arm beside the untuned.")] = None,
    vectors: Annotated[Path | None, typer.Option(help="Steering vectors: a steered arm beside the untuned.")] = None,
    layer: Annotated[int | None, typer.Option(help="Block for --vectors.")] = None,
    multiplier: Annotated[float, typer.Option(help="For --vectors.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answers.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the intervals.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for scores and answers.")] = None,
    model: Model = None,
) -> None:
    """Ask prompts of your own, and score the answers of the untuned, the steered and the tuned model."""
    from rt_lens.delta import WeightDelta
    from rt_lens.exchange import import_vectors
    from rt_lens.experiment import check_writable
    from rt_lens.models import DEFAULT_MODEL, load_model
    from rt_lens.questions import load_questions
    from rt_lens.results import write_scores
    from rt_lens.scoreboard import Exam, compare_arms
    from rt_lens.steering import add

    exam = Exam(load_questions(questions), [_scorer(text) for text in scorer or ["vader"]], max_new_tokens)
    arms: dict[str, Any] = {"untuned": None}
    if vectors is not None:
        if layer is None:
            raise ValueError("layer: --vectors came without it. Name a block, as in --layer 21.")
        directions = import_vectors(vectors)
        arms["steered"] = add(directions, [layer], multiplier, hook=_kind_of(directions))
    if delta is not None:
        arms["tuned"] = WeightDelta.load(delta)
    if out is not None:
        check_writable(out)
    loaded = load_model(model or DEFAULT_MODEL)
    board = compare_arms(loaded, arms, {Path(questions).stem: exam}, seed=seed)
    _print(board.summary()[["arm", "set", "scorer", "n", "mean", "low", "high"]])
    if len(arms) > 1:
        _print(board.comparisons()[["a", "b", "scorer", "n", "difference", "low", "high", "p", "p_holm"]])
    typer.echo(f"95 % intervals; p_holm is corrected for the number of comparisons. Seed {seed}.")
    if out is not None:
        write_scores(out, board)
        typer.echo(f"saved {out / 'scores.csv'} - the answers: {out / 'responses.jsonl'}")


def _print(table: Any) -> None:
    typer.echo(table.to_string(index=False, float_format=lambda value: f"{value:.3f}") + "\n")


def _scorer(text: str) -> Any:
    """A scorer from the command line: a name, a file with a [scorer] table, or pattern:REGEX."""
    from rt_lens.evaluation import make_scorer
    from rt_lens.prompts import read_toml

    if text.startswith("pattern:"):
        return make_scorer({"kind": "pattern", "pattern": text.removeprefix("pattern:")})
    if text.endswith(".toml"):
        if not Path(text).is_file():
            raise FileNotFoundError(f"scorer: there is no file {text}. Give a .toml file with a [scorer] table.")
        return make_scorer(read_toml(Path(text)).get("scorer", {}))
    return make_scorer(text)


@app.command(epilog='Example: rt-lens steer mood.safetensors "Tell me about your weekend." --layer 18 --multiplier -2')
def steer(
    file: VectorFile,
    prompt: Annotated[str, typer.Argument(help="What the user says.")],
    layer: Annotated[int, typer.Option(help="Block whose output the vector is added to.")],
    multiplier: Annotated[float, typer.Option(help="Times the vector's own length; negative steers away.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answers.")] = 60,
    model: Model = None,
) -> None:
    """Answer a prompt untouched and steered."""
    from rt_lens.exchange import import_vectors
    from rt_lens.generation import generate
    from rt_lens.models import DEFAULT_MODEL, load_model
    from rt_lens.steering import add

    directions = import_vectors(file)
    hooks = add(directions, [layer], multiplier, hook=_kind_of(directions))
    loaded = load_model(model or DEFAULT_MODEL)
    directions.check_fits(loaded)
    typer.echo(f"untuned:\n{generate(loaded, [prompt], max_new_tokens=max_new_tokens)[0]}\n")
    with loaded.hooks(fwd_hooks=hooks):
        answer = generate(loaded, [prompt], max_new_tokens=max_new_tokens)[0]
    typer.echo(f"steered (layer {layer}, multiplier {multiplier:g}):\n{answer}")


@app.command(epilog="Example: rt-lens tune mood mood.safetensors --direction away --out mood_away.safetensors")
def tune(
    behaviour: Behaviour,
    file: VectorFile,
    direction: Annotated[str, typer.Option(help="toward, away or out.")] = "away",
    out: Annotated[Path | None, typer.Option(help="File to write; NAME_DIRECTION.safetensors by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of target selection and batch order.")] = 0,
    lora_rank: Annotated[int | None, typer.Option(help="Train low-rank factors; else as the file says.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Keep the run's state here; run again to go on.")] = None,
    model: Model = None,
) -> None:
    """Tune a direction into the weights, with the settings of the behaviour's file, and save the change of weights."""
    from dataclasses import replace

    from rt_lens.experiment import check_writable, load_experiment, protocol_of
    from rt_lens.models import load_model
    from rt_lens.shipped import neutral_prompts
    from rt_lens.tuning import LossNotFinite
    from rt_lens.tuning import tune as tune_weights
    from rt_lens.vectors import SteeringVectors

    experiment = load_experiment(behaviour, model=model)
    config = replace(experiment.tune, direction=direction, seed=seed)  # type: ignore[arg-type]
    config = config if lora_rank is None else replace(config, lora_rank=lora_rank)
    path = out or Path(f"{experiment.name}_{direction}.safetensors")
    check_writable(path.parent)
    directions = SteeringVectors.load(file)
    loaded = load_model(experiment.model, dtype=experiment.dtype)
    train, validation = protocol_of(experiment, loaded).targets(config.direction)
    neutral = neutral_prompts() if config.kl_weight else []
    try:
        delta = tune_weights(
            loaded, directions, train, config, validation=validation, neutral=neutral, checkpoint=checkpoint
        )
    except LossNotFinite as stopped:
        stopped.delta.save(path)
        raise ValueError(f"{stopped} They are saved as {path}.") from stopped
    delta.save(path)
    typer.echo(
        f"saved {path} ({len(delta.changes)} matrices, seed {seed}) - export: rt-lens export {path} --out FOLDER"
    )


@app.command(epilog="Example: rt-lens export mood_away.safetensors --out mood_away --results runs/mood/results.json")
def export(
    file: Annotated[Path, typer.Argument(help="A change of weights: what `rt-lens tune` wrote.")],
    out: Annotated[Path, typer.Option(help="New folder to write.")],
    model: Annotated[
        str | None, typer.Option(help="Model that it was made on; by default the name in the file.")
    ] = None,
    peft: Annotated[
        str | None, typer.Option(help="A LoRA adapter of this rank, or `exact`; else a whole model.")
    ] = None,
    results: Annotated[Path | None, typer.Option(help="results.json of a run, for the card's measured effect.")] = None,
) -> None:
    """Write a tuned model as a Hugging Face folder, or as a LoRA adapter with the error of its low rank."""
    from rt_lens.delta import WeightDelta
    from rt_lens.export import export_hf, export_peft
    from rt_lens.models import load_model

    rank = None if peft in (None, "exact") else _rank(str(peft))
    delta = WeightDelta.load(file)
    behaviour, measured = (None, None) if results is None else _measured(results, delta)
    loaded = load_model(model or delta.model)
    if peft is None:
        export_hf(loaded, out, delta=delta, measured=measured, behaviour=behaviour)
        typer.echo(f"saved {out} - use: AutoModelForCausalLM.from_pretrained('{out}'); its card: {out / 'README.md'}")
        return
    adapter = export_peft(loaded, out, delta, rank, measured=measured, behaviour=behaviour)
    typer.echo(str(adapter))
    typer.echo(f"saved {out} - use: PeftModel.from_pretrained(base_model, '{out}'); its card: {out / 'README.md'}")


def _rank(text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"peft: {text!r} came; a rank such as 16, or 'exact', is wanted.")
    return int(text)


def _measured(file: Path, delta: WeightDelta) -> tuple[str, list[dict[str, Any]]]:
    """A run's behaviour, and its rows of the untuned model and of what a delta was tuned as."""
    import json

    if not file.is_file():
        raise FileNotFoundError(f"results: there is no file {file}. Give the results.json of a run.")
    try:
        found = json.loads(file.read_text())
        behaviour, model, summary = found["behaviour"], found["model"], found["summary"]
        rows = [(row["arm"], row["direction"], row) for row in summary]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"results: {file} is no results.json of a run ({error!r}). Give the one of a run.") from None
    direction = delta.config.get("direction")
    arm = "rep_tuned" if delta.config.get("cosine_weight") else "token_tuned"
    if model.lower() != delta.model.lower() or (arm, direction) not in {(a, d) for a, d, _ in rows}:
        raise ValueError(
            f"results: {file} is of {model} and has no row of {arm} {direction} on {delta.model}, which this change "
            "is. Give the run that it came from, or leave --results out."
        )
    return str(behaviour), [row for a, d, row in rows if a == "untuned" or (a, d) == (arm, direction)]


@app.command(epilog="Example: rt-lens compare runs/mood runs/mood_after --fail-on-change")
def compare(
    run_a: Annotated[Path, typer.Argument(help="Folder of a finished run, to refer to.")],
    run_b: Annotated[Path, typer.Argument(help="Folder of the run to judge.")],
    fail_on_change: Annotated[
        bool, typer.Option("--fail-on-change", help="Exit with 1 if something changed beyond noise.")
    ] = False,
) -> None:
    """Say what changed from one run to another beyond noise: scores and side effects of every arm, row by row."""
    from rt_lens.results import compare_runs, load_results

    found = compare_runs(load_results(run_a), load_results(run_b))
    typer.echo(str(found))
    if fail_on_change and len(found.changed):
        raise typer.Exit(1)


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
