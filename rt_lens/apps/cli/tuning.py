"""Commands that tune a direction into the weights and export the result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rt_lens.apps.cli.app import (
    AllowJudge,
    Behaviour,
    ChatTemplateKwargs,
    Dtype,
    JudgeKeyEnv,
    Model,
    VectorFile,
    app,
    experiment_of,
    loaded_model,
    model_for,
    write_page,
)
from rt_lens.data.builtin import behaviours

if TYPE_CHECKING:
    from rt_lens.tuning.delta import WeightDelta


@app.command(epilog="Example: rt-lens tune mood mood.safetensors --direction away --out mood_away.safetensors")
def tune(
    behaviour: Behaviour,
    file: VectorFile,
    direction: Annotated[str, typer.Option(help="toward, away or suppress.")] = "away",
    out: Annotated[Path | None, typer.Option(help="File to write; NAME_DIRECTION.safetensors by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed for target sampling and batch order.")] = 0,
    lora_rank: Annotated[
        int | None, typer.Option(help="Rank of low-rank factors; by default that of the behaviour's file.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Checkpoint file; rerun the same command to resume.")] = None,
    model: Model = None,
    dtype: Dtype = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    allow_judge: AllowJudge = None,
    judge_key_env: JudgeKeyEnv = None,
) -> None:
    """Tune a direction into the weights with the settings of the behaviour's file, and save the weight delta."""
    from dataclasses import replace

    from rt_lens.common.files import check_can_write
    from rt_lens.data.builtin import neutral_prompts
    from rt_lens.experiment.protocols import family_of
    from rt_lens.experiment.run import check_writable
    from rt_lens.results.schema import checked_file
    from rt_lens.tuning.loop import LossNotFinite
    from rt_lens.tuning.loop import tune as tune_weights
    from rt_lens.vectors.steering_vectors import SteeringVectors

    experiment = experiment_of(behaviour, model, dtype, chat_template_kwargs, allow_judge, judge_key_env)
    config = replace(experiment.tune, direction=direction, seed=seed)  # type: ignore[arg-type]
    config = config if lora_rank is None else replace(config, lora_rank=lora_rank)
    path = out or Path(f"{experiment.name}_{direction}.safetensors")
    check_writable(path.parent)
    check_can_write(path, "out")
    directions = SteeringVectors.load(checked_file(file))
    loaded = model_for(experiment, dtype, directions)
    train, validation = family_of(experiment).targets(loaded, config.direction, seed)
    neutral = neutral_prompts() if config.kl_weight else []
    try:
        delta = tune_weights(
            loaded, directions, train, config, validation=validation, neutral=neutral, checkpoint=checkpoint
        )
    except LossNotFinite as error:
        error.delta.save(path)
        raise ValueError(f"{error} They are saved as {path}.") from error
    delta.save(path)
    typer.echo(f"Saved {path} ({len(delta.changes)} matrices, seed {seed}). Next: rt-lens export {path} --out FOLDER")


@app.command(epilog="Example: rt-lens screen data.jsonl mood.safetensors --layer 21 --figure screen.html")
def screen(
    data: Annotated[
        Path, typer.Argument(help="Prompts with answers: chats, preferences, completions (docs/formats.md).")
    ],
    file: VectorFile,
    layer: Annotated[int, typer.Option(help="Block whose output is read.")],
    out: Annotated[Path, typer.Option(help="CSV file for the table.")] = Path("screening.csv"),
    figure: Annotated[Path | None, typer.Option(help="HTML file for the figure.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the model's own answers.")] = 48,
    model: Model = None,
    dtype: Dtype = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
) -> None:
    """Say which rows of your data push along a vector, before you tune on them."""
    from rt_lens import plots
    from rt_lens.arms.screening import screen as screen_rows
    from rt_lens.common.files import check_can_write, write_atomically
    from rt_lens.results.schema import checked_file
    from rt_lens.tuning.targets import load_targets
    from rt_lens.vectors.interop.tensors import import_vectors

    vectors = import_vectors(checked_file(file))
    check_can_write(out, "out")
    loaded = loaded_model(model, dtype, chat_template_kwargs, default=vectors.provenance.dtype)
    targets = load_targets(checked_file(data), loaded)
    found = screen_rows(loaded, targets, vectors, layer=layer, max_new_tokens=max_new_tokens, progress=True)
    write_atomically(out, found.table.to_csv(index=False).encode())
    if figure is not None:
        write_page(plots.screening(found.table), figure)
    typer.echo(str(found))
    for _, row in found.highest(3).iterrows():
        typer.echo(f"  row {row['row']}: {row['difference']:.2f}  {row['answer'][:80]!r}")
    typer.echo(f"Saved {out}. Next: leave rows out, or tune under edits (rtl.tuning.Preventative).")


@app.command(epilog="Example: rt-lens export mood_away.safetensors --out mood_away --results runs/mood/results.json")
def export(
    file: Annotated[Path, typer.Argument(help="A weight delta from `rt-lens tune`.")],
    out: Annotated[Path, typer.Option(help="New folder to write.")],
    model: Annotated[str | None, typer.Option(help="Base model of the delta; by default the name in the file.")] = None,
    peft: Annotated[
        str | None, typer.Option(help="Rank of a LoRA adapter, or `exact`; without it a whole model is written.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="results.json of a run, for the measured effect in the model card.")
    ] = None,
    dtype: Dtype = None,
) -> None:
    """Write a tuned model as a Hugging Face folder, or a LoRA adapter, reporting the low-rank approximation error."""
    from rt_lens.results.schema import checked_file
    from rt_lens.tuning.delta import WeightDelta
    from rt_lens.tuning.export.hf import export_hf
    from rt_lens.tuning.export.peft import export_peft

    rank = None if peft in (None, "exact") else _rank(str(peft))
    delta = WeightDelta.load(checked_file(file))
    behaviour, measured = (None, None) if results is None else _measured(results, delta)
    loaded = loaded_model(model or delta.model, dtype, None, default=delta.dtype)
    if peft is None:
        export_hf(loaded, out, delta=delta, measured=measured, behaviour=behaviour)
        typer.echo(
            f"Saved {out}, with its model card {out / 'README.md'}. Next: AutoModelForCausalLM.from_pretrained('{out}')"
        )
        return
    adapter = export_peft(loaded, out, delta, rank, measured=measured, behaviour=behaviour)
    typer.echo(str(adapter))
    typer.echo(
        f"Saved {out}, with its model card {out / 'README.md'}. Next: PeftModel.from_pretrained(base_model, '{out}')"
    )


def _rank(text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"peft must be a rank such as 16, or 'exact', got {text!r}.")
    return int(text)


def _measured(file: Path, delta: WeightDelta) -> tuple[str, list[dict[str, Any]]]:
    """A run's behaviour, and its rows of the untuned model and of the arm that the delta belongs to."""
    import json

    if not file.is_file():
        raise FileNotFoundError(f"results must be a file that exists, got {file}. Give the results.json of a run.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        behaviour, model, summary = content["behaviour"], content["model"], content["summary"]
        rows = [(row["arm"], row["direction"], row) for row in summary]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"results must be the results.json of a run, got {file} ({error!r}). Give the one of a run."
        ) from None
    direction = delta.config.get("direction")
    arm = "rep_tuned" if delta.config.get("cosine_weight") else "token_tuned"
    if model.lower() != delta.model.lower() or (arm, direction) not in {(a, d) for a, d, _ in rows}:
        raise ValueError(
            f"results must be those of the run that made this delta, with a row of {arm}, {direction} on "
            f"{delta.model}, got {file}, a run on {model} without it. Give that run, or leave --results out."
        )
    return str(behaviour), [row for a, d, row in rows if a == "untuned" or (a, d) == (arm, direction)]


@app.command(epilog="Example: rt-lens models")
def models() -> None:
    """List the bundled models and the built-in behaviours."""
    from rt_lens.models.registry import BUNDLED_MODELS
    from rt_lens.models.sources import describe

    for name in BUNDLED_MODELS:
        typer.echo("\n".join(f"{key:>11}: {value}" for key, value in describe(name).items()))
    typer.echo(f"\nbehaviours: {', '.join(behaviours())}")
