"""Activation scaling beside a learned vector: what both do to two answers, at equal KL, and with how many numbers.

    python benchmarks/scaling.py               # both tasks, into benchmarks/results/scaling.json and pictures
    python benchmarks/scaling.py --quick       # one task, few steps, printed only

Everything is learned on the training part of a task. The vector's layer and the weight of minimality of both are chosen
on the validation part: the largest shift at the stated KL. The test part is asked once with what was chosen, and, for
the curve of sparsity, with each weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer

import evidence
import rt_lens as rtl
from rt_lens.arms import AnswerEffects, Calibrated, KLMeter, answer_effects, calibrate
from rt_lens.common.statistics.intervals import share_interval
from rt_lens.data import calibration_paragraphs, load_two_answers, neutral_paragraphs, two_answer_tasks
from rt_lens.models.forward import model_name
from rt_lens.steering import add, scale
from rt_lens.tuning import AnswerConfig, learn_scaling, learn_vector
from rt_lens.vectors import Scaling, SteeringVectors

CONFIG = AnswerConfig(steps=80, learning_rate=0.03)
SPARSE = (0.0, 0.03, 0.1, 0.3, 1.0)
LAYERS, SPARSE_VECTORS = (9, 15, 21), (0.0, 0.01)
BUDGETS, STATED = (0.003, 0.01, 0.03, 0.1), 0.01
Row = dict[str, Any]


def hooks_of(found: Scaling | SteeringVectors) -> Any:
    return scale(found.everywhere) if isinstance(found, Scaling) else add(found)


def numbers_of(found: Scaling | SteeringVectors) -> tuple[int, int]:
    """How many numbers were learned, and how many are not 0."""
    if isinstance(found, Scaling):
        return found.n_parameters, found.n_active
    vectors = list(found.vectors.values())
    return sum(vector.numel() for vector in vectors), sum(int(vector.count_nonzero()) for vector in vectors)


def row_of(effects: AnswerEffects, **about: Any) -> Row:
    """Shift, what the negative strength turns round, both signs' opposition, and the KL over other tokens."""
    shift, opposite, others = effects.shift, effects.opposite, effects.faithfulness
    negative = effects.differences[-1.0]
    turned = share_interval(int((negative < 0).sum()), len(negative))
    return {
        **about, "n": shift.n, "shift": shift.mean, "shift_low": shift.low, "shift_high": shift.high,
        "negative_answer": turned.mean, "negative_answer_low": turned.low, "negative_answer_high": turned.high,
        "opposite": opposite.mean, "opposite_low": opposite.low, "opposite_high": opposite.high,
        "KL_of_others": others.mean, "KL_of_others_low": others.low, "KL_of_others_high": others.high,
        "seed": effects.seed,
    }  # fmt: skip


class Task:
    """One task: what is learned on its training part, chosen on its validation part and shown on its test part."""

    def __init__(self, model: Any, name: str, config: AnswerConfig, progress: bool) -> None:
        self.model, self.name, self.config, self.progress = model, name, config, progress
        self.parts = {part: load_two_answers(name, part=part) for part in ("train", "validation", "test")}
        self.meter = KLMeter(model, calibration_paragraphs()[:12])
        self.others = KLMeter(model, neutral_paragraphs()[:12])

    def scalings(self, weights: Sequence[float]) -> dict[str, Scaling]:
        return {
            f"scaling, weight {weight:g}": learn_scaling(
                self.model, self.parts["train"], replace(self.config, minimality_weight=weight), progress=self.progress
            )[0]
            for weight in weights
        }

    def vectors(self, layers: Sequence[int], weights: Sequence[float]) -> dict[str, SteeringVectors]:
        return {
            f"vector, layer {layer}, weight {weight:g}": learn_vector(
                self.model, self.parts["train"], replace(self.config, minimality_weight=weight), layers=[layer],
                progress=self.progress,
            )[0]
            for layer in layers
            for weight in weights
        }  # fmt: skip

    def at(self, found: Any, budgets: Sequence[float]) -> list[Calibrated]:
        return calibrate(hooks_of(found), self.meter, budgets, held_out=self.others)

    def chosen(self, candidates: dict[str, Any]) -> tuple[str, list[Row]]:
        """The candidate that shifts the validation prompts most at the stated KL."""
        rows = []
        for how, found in candidates.items():
            (at,) = self.at(found, [STATED])
            if at.reached:
                effects = answer_effects(self.model, self.parts["validation"], at.intervention)
                rows.append(
                    row_of(effects, task=self.name, how=how, numbers=numbers_of(found)[1], strength=at.strength)
                )
        return max(rows, key=lambda row: row["shift"])["how"], rows

    def curve(self, kind: str, how: str, found: Any) -> list[Row]:
        """Test prompts at every budget."""
        rows = []
        for at in self.at(found, BUDGETS):
            about = {"task": self.name, "edit": kind, "chosen": how, "numbers": numbers_of(found)[1], "KL": at.budget}
            if at.reached:
                reached = at.held_out.mean if at.held_out else None
                effects = answer_effects(self.model, self.parts["test"], at.intervention)
                rows.append(row_of(effects, **about, KL_reached=reached, strength=at.strength))
        return rows


def main(quick: Annotated[bool, typer.Option(help="One task, few steps, printed only.")] = False) -> None:
    model = rtl.load_model()
    config = replace(CONFIG, steps=4) if quick else CONFIG
    tables: dict[str, list[Row]] = {"validation": [], "test": [], "sparsity": [], "untuned": []}
    for name in two_answer_tasks()[: 1 if quick else None]:
        task = Task(model, name, config, not quick)
        scalings = task.scalings(SPARSE[:2] if quick else SPARSE)
        vectors = task.vectors(LAYERS[:1] if quick else LAYERS, SPARSE_VECTORS[:1] if quick else SPARSE_VECTORS)
        for kind, candidates in (("scaling", scalings), ("vector", vectors)):
            how, rows = task.chosen(candidates)
            tables["validation"] += rows
            tables["test"] += task.curve(kind, how, candidates[how])
            if kind == "scaling" and not quick:
                figure = rtl.plots.scaling(candidates[how].table(), title=f"{name}: learned scaling ({how})")
                rtl.save_figure(figure, evidence.PICTURES / f"scaling_{name}.png", scale=1.5)
        for how, found in {**scalings, **vectors}.items():
            learned, active = numbers_of(found)
            effects = answer_effects(model, task.parts["test"], hooks_of(found))
            kind = how.partition(", weight")[0]  # a vector of each layer has a curve of its own
            tables["sparsity"].append(row_of(effects, task=name, edit=kind, how=how, learned=learned, not_zero=active))
        effects = answer_effects(model, task.parts["test"], hooks_of(next(iter(scalings.values()))))
        tables["untuned"].append({"task": name, **next(row for row in effects.table() if row["strength"] == 0)})
        _print(tables["test"])
    if not quick:
        shown = [row for row in tables["sparsity"] if row["not_zero"]]
        rtl.save_figure(rtl.plots.few_numbers(shown), evidence.PICTURES / "few_numbers.png", scale=1.5)
        about = {"model": model_name(model), "command": "python benchmarks/scaling.py", "stated": STATED}
        typer.echo(f"Saved {evidence.write('scaling', about, tables)}.")


def _print(rows: Sequence[Row]) -> None:
    for row in rows:
        typer.echo(", ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    typer.run(main)
