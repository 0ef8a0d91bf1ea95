"""Screening data along a vector, and tuning on it with a guard: does the table find the rows, and does the guard hold?

    python benchmarks/screening.py             # into benchmarks/results/screening.json and a picture
    python benchmarks/screening.py --quick     # few rows and steps, printed only

The vector is the persona vector of Chen et al. 2025: mean activations over responses that the model wrote under happy
personas minus those of responses under sad ones, to half of the training topics. The rows: responses to the other half
under happy personas, and as many without a persona. Three seeds draw them. Models are tuned on the happy rows by their
tokens: plainly, or while steered towards them (preventative steering), to be used without. The drift along the vector
is read at the last token of validation prompts, the behaviour in responses to them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import typer

import evidence
import rt_lens as rtl
from rt_lens.arms import mean_projections, screen
from rt_lens.common.statistics.intervals import mean_interval
from rt_lens.models.forward import model_name
from tuning import LAYER, SEEDS, Session

GUARDS = (1.0, 2.0)
Row = dict[str, Any]


def interval_of(name: str, values: Any) -> Row:
    found = mean_interval(np.asarray(values, dtype=float))
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


class Data:
    """One seed's rows: happy ones, and plain ones."""

    def __init__(self, session: Session, seed: int, n: int) -> None:
        self.config, self.seed = replace(session.tune, n_targets=n, seed=seed), seed
        for_vector, pairs = session.train.split(0.5, seed=seed)
        glad, grim = (self._written(session, for_vector, way) for way in ("toward", "away"))
        answers = {target.prompt: target.answer for target in grim}
        both = [rtl.data.Pair("", "", _user(target.prompt), target.answer, negative_prefill=answers[target.prompt])
                for target in glad if target.prompt in answers]  # fmt: skip
        self.vectors = rtl.extract_vectors(
            session.model,
            rtl.ContrastPairs("mood", tuple(both)),
            layers=sorted({LAYER, *self.config.layers}),
            position="mean response",
        )
        self.happy, self.plain = (self._written(session, pairs, way) for way in ("toward", "suppress"))

    def _written(self, session: Session, pairs: rtl.ContrastPairs, direction: Any) -> list[Any]:
        return rtl.tuning.write_targets(session.model, pairs, direction, self.config)

    def screened(self, session: Session) -> tuple[Row, list[Row]]:
        labels = [True] * len(self.happy) + [False] * len(self.plain)
        found = screen(
            session.model, [*self.happy, *self.plain], self.vectors, layer=LAYER,
            max_new_tokens=self.config.target_tokens, seed=self.seed,
        )  # fmt: skip
        auc = found.auc(labels)
        rows = found.table.assign(label=["happy persona" if label else "no persona" for label in labels])
        about = {"happy": len(self.happy), "no persona": len(self.plain), "seed": self.seed}
        means = rows.groupby("label")["difference"]
        return {
            **about, "AUC": auc.mean, "AUC_low": auc.low, "AUC_high": auc.high,
            **interval_of("difference, happy", means.get_group("happy persona")),
            **interval_of("difference, no persona", means.get_group("no persona")),
        }, rows.to_dict("records")  # fmt: skip


def _user(prompt: Any) -> str:
    """The user message of a chat."""
    return str(prompt.messages[-1]["content"])


def tuned(session: Session, data: Data, guard: float, steps: int) -> rtl.WeightDelta:
    """Tuned on the happy rows by their tokens, while steered along the vector if there is a guard."""
    steer = rtl.tuning.Preventative(rtl.add(data.vectors, [LAYER], guard)) if guard else None
    config = replace(
        data.config, direction="toward", cosine_weight=0.0, kl_weight=0.0, learning_rate=2e-4, max_steps=steps, epochs=9
    )
    return rtl.tune(session.model, data.vectors, data.happy, config, steer=steer, progress=False)


def drift(session: Session, data: Data, arms: dict[str, Any], prompts: list[str]) -> list[Row]:
    """For each arm where validation prompts lie along the vector, and the score of the responses."""
    at = mean_projections(session.model, data.vectors.select([LAYER]), prompts, arms=arms)
    length = float(data.vectors.at_layers([LAYER])[f"blocks.{LAYER}.hook_resid_post"].norm())
    rows = []
    for arm, delta in arms.items():
        here = at[at["arm"] == arm].iloc[0]
        scores, _ = session.scores(prompts, delta)
        rows.append({"arm": arm, "seed": data.seed, "projection": here["mean"] / length, "scores": scores})
    return rows


def pooled(rows: list[Row], n: int) -> list[Row]:
    """Each arm over its seeds: projections with their range, scores averaged prompt by prompt."""
    arms = dict.fromkeys(row["arm"] for row in rows)
    tables = []
    for arm in arms:
        of_arm = [row for row in rows if row["arm"] == arm]
        projections = [row["projection"] for row in of_arm]
        tables.append(
            {"arm": arm, "projection at the last token (lengths)": float(np.mean(projections)),
             "over seeds": f"{min(projections):.2f} to {max(projections):.2f}",
             **interval_of("score", np.mean([row["scores"] for row in of_arm], axis=0)), "n": n,
             "seeds": ", ".join(str(row["seed"]) for row in of_arm)}
        )  # fmt: skip
    return tables


def main(quick: Annotated[bool, typer.Option(help="Few rows and steps, printed only.")] = False) -> None:
    n, steps, n_prompts = (6, 2, 4) if quick else (60, 40, 31)
    session = Session("mood", n_prompts, SEEDS)
    prompts, screened, drifts = session.validation.topics[:n_prompts], list[Row](), list[Row]()
    for seed in SEEDS[: 1 if quick else None]:
        data = Data(session, seed, n)
        row, rows = data.screened(session)
        screened.append(row)
        if seed == 0 and not quick:
            rtl.save_figure(rtl.plots.screening(rows), evidence.PICTURES / "screening.png", scale=1.5)
        guards = {f"guarded, {guard:g}": tuned(session, data, guard, steps) for guard in GUARDS}
        arms = {"untuned": None, "tuned": tuned(session, data, 0.0, steps), **guards}
        drifts += drift(session, data, arms, prompts)
        typer.echo(f"{row}\n{[(each['arm'], each['projection'], np.mean(each['scores'])) for each in drifts[-4:]]}")
    tables = {"auc": screened, "drift": pooled(drifts, n_prompts)}
    for line in tables["drift"]:
        typer.echo(", ".join(f"{name} {value}" for name, value in line.items()))
    if not quick:
        about = {"model": model_name(session.model), "command": "python benchmarks/screening.py", "layer": LAYER}
        typer.echo(f"Saved {evidence.write('screening', about, tables)}.")


if __name__ == "__main__":
    typer.run(main)
