"""Commands that measure: run a whole experiment, evaluate your own prompts, compare two runs."""

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
    app,
    experiment_of,
    loaded_model,
    permissions_of,
)

if TYPE_CHECKING:
    from rt_lens.evaluation.permissions import Permissions


@app.command(epilog="Example: rt-lens run mood --out runs/mood")
def run(
    behaviour: Behaviour,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; runs/NAME by default.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only estimate what the run needs: memory, steps, time.")
    ] = False,
    search: Annotated[
        int | None,
        typer.Option(help="First search each arm's settings with this many trials, on validation prompts."),
    ] = None,
    model: Model = None,
    dtype: Dtype = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    allow_judge: AllowJudge = None,
    judge_key_env: JudgeKeyEnv = None,
) -> None:
    """Compare the arms of a behaviour at equal damage, in both directions, and write report.html."""
    from rt_lens.apps.report.page import write_report
    from rt_lens.apps.report.verdict import spoken
    from rt_lens.experiment.plan import plan_of
    from rt_lens.experiment.run import check_writable, run_experiment

    experiment = experiment_of(behaviour, model, dtype, chat_template_kwargs, allow_judge, judge_key_env, search)
    if plan:
        typer.echo(str(plan_of(experiment)))
        return
    folder = check_writable(out or Path("runs") / experiment.name)
    results = run_experiment(experiment, folder, source=behaviour)
    page = write_report(folder)
    typer.echo("\n" + "\n".join(spoken(results)))
    stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in results["seconds"].items())
    typer.echo(f"\nTime: {stages}.")
    if results["search"]:
        typer.echo(f"Saved {folder / 'settings.toml'}: the settings found, to paste into a behaviour's file.")
    typer.echo(f"Saved {folder / 'results.json'}. Next: open {page} in a browser, or rt-lens dashboard {folder}")


@app.command(epilog="Example: rt-lens evaluate my_prompts.csv --scorer vader --delta mood_away.safetensors")
def evaluate(
    questions: Annotated[
        str, typer.Argument(help="A .csv, .jsonl or .txt file of prompts, or a built-in set: capitals.")
    ],
    scorer: Annotated[
        list[str] | None,
        typer.Option(help="A name, pattern:REGEX, or a .toml file with a [scorer] table. Can be repeated."),
    ] = None,
    delta: Annotated[Path | None, typer.Option(help="Weight delta to evaluate as a tuned arm.")] = None,
    vectors: Annotated[Path | None, typer.Option(help="Steering vectors to evaluate as a steered arm.")] = None,
    layer: Annotated[int | None, typer.Option(help="Layer at which to add --vectors.")] = None,
    multiplier: Annotated[float, typer.Option(help="Multiplier for --vectors.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the responses in tokens.")] = 40,
    seed: Annotated[int, typer.Option(help="Seed for the bootstrap.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for scores and responses.")] = None,
    model: Model = None,
    dtype: Dtype = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    allow_judge: AllowJudge = None,
    judge_key_env: JudgeKeyEnv = None,
) -> None:
    """Ask your own prompts, and score the responses of the untuned, the steered and the tuned model."""
    from rt_lens.arms.comparison import EvalTask, compare_arms
    from rt_lens.data.questions import load_questions
    from rt_lens.experiment.run import check_writable
    from rt_lens.results.schema import check_no_run, checked_file
    from rt_lens.results.writing import write_scores
    from rt_lens.steering.binding import add
    from rt_lens.tuning.delta import WeightDelta
    from rt_lens.vectors.interop.tensors import import_vectors

    permissions = permissions_of(allow_judge, judge_key_env)
    scorers = [_scorer(text, permissions) for text in scorer or ["vader"]]
    task = EvalTask(load_questions(questions), scorers, max_new_tokens)
    arms: dict[str, Any] = {"untuned": None}
    default = "float32"
    if vectors is not None:
        if layer is None:
            raise ValueError("layer must be a block for --vectors, got none. Name one, as in --layer 21.")
        directions = import_vectors(checked_file(vectors))
        default = directions.provenance.dtype
        arms["steered"] = add(directions, [layer], multiplier, hook=directions.kind)
    if delta is not None:
        arms["tuned"] = WeightDelta.load(checked_file(delta))
        default = arms["tuned"].dtype
    if out is not None:
        check_no_run(out)
        check_writable(out)
    loaded = loaded_model(model, dtype, chat_template_kwargs, default=default)
    scores = compare_arms(loaded, arms, {Path(questions).stem: task}, seed=seed)
    _print(scores.summary()[["arm", "set", "scorer", "n", "mean", "low", "high"]])
    if len(arms) > 1:
        _print(scores.comparisons()[["a", "b", "scorer", "n", "difference", "low", "high", "p", "p_holm"]])
    alike = " (–: all scores are the same, so there is none)" if scores.summary()["low"].isna().any() else ""
    typer.echo(
        f"Low and high are 95 % confidence intervals{alike}; p_holm is adjusted for the number of comparisons. "
        f"Seed {seed}."
    )
    if out is not None:
        write_scores(out, scores)
        typer.echo(f"Saved {out / 'scores.csv'}. Next: read the responses in {out / 'responses.jsonl'}")


def _print(table: Any) -> None:
    typer.echo(table.to_string(index=False, float_format=lambda value: f"{value:.3f}", na_rep="–") + "\n")


def _scorer(text: str, permissions: Permissions) -> Any:
    """A scorer from the command line: a name, a file with a [scorer] table, or pattern:REGEX."""
    from rt_lens.data.readers import read_toml
    from rt_lens.evaluation.registry import make_scorer

    if text.startswith("pattern:"):
        return make_scorer({"kind": "pattern", "pattern": text.removeprefix("pattern:")})
    if text.endswith(".toml"):
        if not Path(text).is_file():
            raise FileNotFoundError(
                f"scorer must be a file that exists, got {text}. Give a .toml file with a [scorer] table."
            )
        return make_scorer(permissions.checked(read_toml(Path(text)).get("scorer", {}), Path(text)))
    return make_scorer(text)


@app.command(epilog="Example: rt-lens compare runs/mood runs/mood_after --fail-on-change")
def compare(
    run_a: Annotated[Path, typer.Argument(help="Folder of a finished run: the reference.")],
    run_b: Annotated[Path, typer.Argument(help="Run to compare with the reference.")],
    fail_on_change: Annotated[
        bool, typer.Option("--fail-on-change", help="Exit with 1 if anything changed beyond noise.")
    ] = False,
) -> None:
    """Report differences between two runs that exceed noise: scores and side effects of every arm, row by row."""
    from rt_lens.results.comparing import compare_runs
    from rt_lens.results.schema import load_results

    comparison = compare_runs(load_results(run_a), load_results(run_b))
    typer.echo(str(comparison))
    if fail_on_change and len(comparison.changed):
        raise typer.Exit(1)
