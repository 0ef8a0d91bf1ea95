"""Which method finds the better direction: methods x behaviours on the bundled model.

Validation pairs choose the layers (the recommendation for mean_diff), the multipliers are fixed beforehand (-2 and 2;
every method's vector has the mean difference's norm), and test prompts measure the effect once.

    python benchmarks/methods.py --out runs/methods
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import rt_lens as rtl
from rt_lens.common.files import write_atomically
from rt_lens.common.statistics.intervals import mean_interval
from rt_lens.data.builtin import neutral_paragraphs
from rt_lens.experiment.config import load_experiment
from rt_lens.vectors.methods import METHODS

BEHAVIOURS = ["mood", "formality", "language", "refusal"]  # `honesty` scores options, not responses
DOSE = 2.0


def rows_of(model: Any, behaviour: str, n_pairs: int, n_prompts: int, seed: int) -> list[dict[str, Any]]:
    """One row per method: held-out accuracy and AUC, stability, and the effect and side effect of steering with it."""
    experiment = load_experiment(behaviour)
    split = experiment.split
    train, validation, test = experiment.pairs.split(split.train, split.validation, seed=split.seed)
    sample = train.sample(n_pairs, seed)
    task = rtl.EvalTask(test.topics[:n_prompts], experiment.scorer)
    by_mean_diff = rtl.validate_vectors(model, sample, validation, seed=seed)
    layer = by_mean_diff.best if by_mean_diff.best is not None else 21
    print(f"{behaviour}: {by_mean_diff.reason}", flush=True)
    texts = neutral_paragraphs()[:6]
    untuned = rtl.evaluation.perplexity(model, texts).perplexity.mean
    rows = []
    for method in METHODS:
        validated = rtl.validate_vectors(model, sample, validation, method=method, layers=[layer], seed=seed)
        of_layer = validated.layers.iloc[0]
        swept = rtl.sweep(
            model, validated.vectors, task, multipliers=[-DOSE, DOSE], seed=seed, progress=False
        ).table.pivot(index="prompt", columns="multiplier", values="score")  # fmt: skip
        effect = mean_interval((swept[DOSE] - swept[-DOSE]).to_numpy(), seed)
        worst = 0.0
        for dose in (-DOSE, DOSE):
            with rtl.applied(model, rtl.add(validated.vectors, [layer], dose)):
                worst = max(worst, rtl.evaluation.perplexity(model, texts).perplexity.mean / untuned)
        rows.append(
            {
                "behaviour": behaviour,
                "layer": layer,
                "method": method,
                **{name: float(of_layer[name]) for name in of_layer.index if name not in ("layer", "seed")},
                "effect": effect.mean,
                "effect_low": effect.low,
                "effect_high": effect.high,
                "n_prompts": effect.n,
                "perplexity_ratio": worst,
                "seed": seed,
            }
        )
        print(markdown(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table with intervals."""

    def estimate(row: dict[str, Any], name: str) -> str:
        if row[name] != row[name]:  # random uses no pair
            return "-"
        return f"{row[name]:.2f} [{row[name + '_low']:.2f}, {row[name + '_high']:.2f}]".replace("-", "−")

    lines = [
        "| behaviour | layer | method | pair accuracy | AUC | stability | effect of ±2 | perplexity ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [estimate(row, name) for name in ("accuracy", "auc", "stability", "effect")]
        labels = f"| {row['behaviour']} | {row['layer']} | {row['method']} | "
        lines.append(labels + " | ".join(cells) + f" | {row['perplexity_ratio']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("behaviours", nargs="*", default=BEHAVIOURS)
    parser.add_argument("--n-pairs", type=int, default=96)
    parser.add_argument("--n-prompts", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    arguments = parser.parse_args()
    model = rtl.load_model()
    rows: list[dict[str, Any]] = []
    for behaviour in arguments.behaviours:
        rows += rows_of(model, behaviour, arguments.n_pairs, arguments.n_prompts, arguments.seed)
        write_atomically(arguments.out / "methods.json", json.dumps(rows, indent=1).encode())
    write_atomically(arguments.out / "methods.md", markdown(rows).encode())
    print(f"Saved {arguments.out / 'methods.md'}")


if __name__ == "__main__":
    main()
