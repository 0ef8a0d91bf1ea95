"""What tuning does to a behaviour: learning rates, variants, unlike kinds of prompts, resistance.

Each stage writes its table as JSON and its figure as HTML to the folder. `rates` reads validation topics only, and is
how the arms' learning rates were chosen; the other stages use the test topics and the kinds of prompts.

    python benchmarks/tuning.py variants --out runs/tuning      (or: rates, kinds, resistance)
    python benchmarks/tuning.py rates --behaviour formality
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import rt_lens as rtl
from rt_lens.common.files import write_atomically
from rt_lens.common.statistics.comparisons import paired_comparison
from rt_lens.common.statistics.intervals import Interval, mean_interval, share_interval
from rt_lens.data.builtin import neutral_paragraphs, neutral_prompts, prompt_kinds
from rt_lens.data.questions import load_questions
from rt_lens.evaluation.fluency import repetition
from rt_lens.evaluation.texts import PerplexityResult
from rt_lens.experiment.config import load_experiment
from rt_lens.tuning.targets import Target, write_neutral, write_targets
from rt_lens.tuning.tuning_data import TuningData, prepare_data

LAYER, DOSE = 21, 3.0  # what the built-in mood experiment chooses on validation prompts, away from happy
SEEDS = (0, 1, 2)
N_PROMPTS, N_TOKENS = 60, 24

SEPARATE = {"cosine": ("q", "k", "v", "o"), "token": ("gate", "up", "down")}
VARIANTS: dict[str, dict[str, Any]] = {
    "cosine only": {"token_weight": 0.0, "kl_weight": 0.0},
    "token only": {"cosine_weight": 0.0, "kl_weight": 0.0},
    "both shared": {"kl_weight": 0.0},
    "both separate": {"kl_weight": 0.0, "target_modules": SEPARATE},
    "KL-regularised": {},
    # At 1e-3 its KL on validation texts is that of whole matrices; at 2e-3 seven times that.
    "LoRA": {"lora_rank": 16, "learning_rate": 1e-3},
}


class Session:
    """What the stages share: the model, a behaviour's parts, and what each seed draws."""

    def __init__(self, behaviour: str, n_prompts: int, seeds: Sequence[int]) -> None:
        self.experiment, self.seeds = load_experiment(behaviour), seeds
        split = self.experiment.split
        self.train, self.validation, test = self.experiment.pairs.split(split.train, split.validation, seed=split.seed)
        self.prompts = test.topics[:n_prompts]
        self.n_validation = n_prompts
        self.model = rtl.load_model(self.experiment.model)
        self.vectors = self.drawn(split.seed)  # for steering every arm
        self.tune = self.experiment.tune
        self.token = {"cosine_weight": 0.0, **self.experiment.token}  # how the token-tuned arm differs
        self.texts = neutral_paragraphs()[self.experiment.choose.n_paragraphs :]

    @cache  # noqa: B019
    def drawn(self, seed: int) -> rtl.SteeringVectors:
        pairs = self.train.sample(self.experiment.extract.n_pairs, seed=seed)
        return rtl.extract_vectors(self.model, pairs, seed=seed)

    @cache  # noqa: B019
    def neutral(self, seed: int) -> list[Target]:
        return write_neutral(self.model, neutral_prompts(), replace(self.tune, seed=seed))

    @cached_property
    def reference(self) -> PerplexityResult:
        return rtl.evaluation.perplexity(self.model, self.texts, keep=True)

    @cache  # noqa: B019
    def tuning_data(self, direction: Any, seed: int) -> TuningData:
        config = replace(self.tune, direction=direction, seed=seed)
        return prepare_data(
            self.model, self.drawn(seed), self.train, config, validation=self.validation, neutral=self.neutral(seed)
        )

    def tuned(self, direction: Any, seed: int, **settings: Any) -> rtl.WeightDelta:
        config = replace(self.tune, direction=direction, seed=seed, **settings)
        return rtl.tune(self.model, self.drawn(seed), self.tuning_data(direction, seed), config, progress=False)

    def steered(self, direction: str) -> list[Any]:
        """Steering at the chosen multiplier; for `suppress` its counterpart ablates the direction everywhere."""
        if direction == "suppress":
            return rtl.ablate(self.vectors.everywhere(self.model, LAYER), hook="any")
        return rtl.add(self.vectors, [LAYER], DOSE if direction == "toward" else -DOSE)

    def scores(self, prompts: Sequence[str], *arms: Any) -> tuple[list[float], list[str]]:
        with rtl.applied(self.model, *arms):
            evaluation = rtl.evaluate(self.model, prompts, self.experiment.scorer, max_new_tokens=N_TOKENS)
        return evaluation.scores, evaluation.responses

    def measured(self, arms: Sequence[Any]) -> dict[str, Any]:
        """Score, perplexity, KL, capitals and repetition of an arm, averaged over its seeds."""
        scores, perplexities, facts, repetitions = [], [], [], []
        for arm in arms:
            of_arm, responses = self.scores(self.prompts, arm)
            scores.append(of_arm)
            repetitions.append([repetition(response) for response in responses])
            with rtl.applied(self.model, arm):
                perplexities.append(rtl.evaluation.perplexity(self.model, self.texts, reference=self.reference))
                capitals = load_questions("capitals")[:25]
                facts.append(rtl.evaluate(self.model, capitals, "contains_answer", max_new_tokens=10).scores)
        pooled = PerplexityResult.pooled(perplexities)
        assert pooled.mean_kl is not None
        right = np.mean(facts, axis=0)
        retained = share_interval(int(right.sum()), len(right)) if len(arms) == 1 else mean_interval(right)
        return {
            **mean_interval(np.mean(scores, axis=0))._asdict(),
            **_spread("perplexity", pooled.perplexity),
            **_spread("kl", pooled.mean_kl),
            "n_texts": pooled.perplexity.n,
            **_spread("facts", retained),
            "n_facts": retained.n,
            **_spread("repetition", mean_interval(np.mean(repetitions, axis=0))),
            "scores": np.mean(scores, axis=0).tolist(),
        }


def _spread(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


RATES = (1e-4, 2e-4, 3e-4)
MOST_KL = 0.01  # nats a token on the validation paragraphs


def rates(session: Session) -> Iterator[tuple[str, pd.DataFrame, Any]]:
    """Both tuned arms over learning rates, on validation topics and paragraphs: one rule for the two of them.

    Of the rates whose mean KL to the untuned model, over both directions and all seeds, is at most `MOST_KL`, the rule
    chooses the one with the largest difference between the two directions' mean scores.
    """
    choose, prompts = session.experiment.choose, session.validation.topics[: session.n_validation]
    texts = neutral_paragraphs()[: choose.n_paragraphs]
    reference, rows = rtl.evaluation.perplexity(session.model, texts, keep=True), []
    for arm, settings in (("token_tuned", session.token), ("rep_tuned", {})):
        for rate in RATES:
            scores: dict[str, list[list[float]]] = {"toward": [], "away": []}
            kls = []
            for direction, seed in itertools.product(scores, session.seeds):
                delta = session.tuned(direction, seed, **{**settings, "learning_rate": rate})
                scores[direction].append(session.scores(prompts, delta)[0])
                with rtl.applied(session.model, delta):
                    kls.append(rtl.evaluation.perplexity(session.model, texts, reference=reference).mean_kl)
            toward, away = (np.mean(scores[direction], axis=0) for direction in ("toward", "away"))
            difference = mean_interval(toward - away)
            rows.append({"arm": arm, "rate": rate, "toward": toward.mean(), "away": away.mean(), **difference._asdict(),
                         "kl": float(np.mean([kl.mean for kl in kls])), "seeds": list(session.seeds)})  # fmt: skip
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    table["chosen"] = False
    for _, of_arm in table[table["kl"] <= MOST_KL].groupby("arm"):
        table.loc[of_arm["mean"].idxmax(), "chosen"] = True
    yield "rates", table, None


def variants(session: Session) -> Iterator[tuple[str, pd.DataFrame, Any]]:
    """Every variant in every direction, with untuned and steered for comparison."""
    untuned = session.measured([None])
    rows = [{"direction": "none", "variant": "untuned", **untuned, "seeds": [0]}]
    for direction in ("toward", "away", "suppress"):
        rows.append(
            {
                "direction": direction,
                "variant": "steered",
                **session.measured([session.steered(direction)]),
                "seeds": [0],
            }
        )
        for variant, settings in VARIANTS.items():
            deltas = [session.tuned(direction, seed, **settings) for seed in session.seeds]
            rows.append(
                {"direction": direction, "variant": variant, **session.measured(deltas), "seeds": list(session.seeds)}
            )
            print(_line(rows[-1]), flush=True)
    for row in rows:
        baselines = {name: other["scores"] for name, other in _others(rows, row["direction"]).items()}
        for name in ("untuned", "steered"):
            if name in baselines:
                shift = paired_comparison(row["scores"], baselines[name])
                row |= {f"shift_from_{name}": shift.difference, f"shift_from_{name}_low": shift.low,
                        f"shift_from_{name}_high": shift.high, f"shift_from_{name}_p": shift.p}  # fmt: skip
    table = pd.DataFrame(rows)
    yield "variants", table, rtl.plots.variants(table)


def _others(rows: Sequence[Mapping[str, Any]], direction: str) -> dict[str, Mapping[str, Any]]:
    return {row["variant"]: row for row in rows if row["direction"] in ("none", direction)}


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['direction']:>7} {row['variant']:<15} {row['mean']:6.2f} [{row['low']:.2f}, {row['high']:.2f}]  "
        f"perplexity {row['perplexity']:.1f}  KL {row['kl']:.4f} [{row['kl_low']:.4f}, {row['kl_high']:.4f}]  "
        f"facts {row['facts']:.2f}  repetition {row['repetition']:.2f}"
    )


def kinds(session: Session) -> Iterator[tuple[str, pd.DataFrame, Any]]:
    """Arms tuned on everyday talk, on unlike kinds of prompts: the paired change of the score, kind by kind."""
    prompts_by_kind = {"everyday talk": session.prompts, **prompt_kinds()}
    deltas = {
        ("rep_tuned", direction): [session.tuned(direction, seed) for seed in session.seeds]
        for direction in ("toward", "away")
    } | {
        ("token_tuned", direction): [session.tuned(direction, seed, **session.token) for seed in session.seeds]
        for direction in ("toward", "away")
    }
    rows, between, sums = [], [], []
    for kind, prompts in prompts_by_kind.items():
        untuned, _ = session.scores(prompts, None)
        means = {}
        for (arm, direction), by_seed in deltas.items():
            means[arm, direction] = np.mean([session.scores(prompts, delta)[0] for delta in by_seed], axis=0)
            change = paired_comparison(means[arm, direction], untuned)
            rows.append({"kind": kind, "arm": arm, "direction": direction, "n": change.n, "mean": change.difference,
                         "low": change.low, "high": change.high, "p": change.p,
                         "seeds": list(session.seeds)})  # fmt: skip
        for direction in ("toward", "away"):
            comparison = paired_comparison(means["rep_tuned", direction], means["token_tuned", direction])
            between.append({"kind": kind, "direction": direction, **comparison._asdict(), "seeds": list(session.seeds)})
        print(pd.DataFrame(rows[-4:]).to_string(), flush=True)
    right = {"untuned": [_sums_right(session, None)]}
    for (arm, direction), by_seed in deltas.items():
        right[f"{arm} {direction}"] = [_sums_right(session, delta) for delta in by_seed]
    for arm, scores in right.items():
        change = paired_comparison(np.mean(scores, axis=0), right["untuned"][0])
        sums.append({"arm": arm, "right": float(np.mean(scores)), **change._asdict()})
    table = pd.DataFrame(rows)
    yield "kinds", table, rtl.plots.kinds(table)
    yield "kinds_rep_minus_token", pd.DataFrame(between), None
    yield "kinds_sums_right", pd.DataFrame(sums), None


def _sums_right(session: Session, arm: Any) -> list[float]:
    with rtl.applied(session.model, arm):
        sums = load_questions("arithmetic")
        return rtl.evaluate(session.model, sums, "contains_answer", max_new_tokens=N_TOKENS).scores


SUPPRESS: dict[str, Any] = {
    "token_weight": 0.0, "learning_rate": 2e-4, "max_steps": 40, "epochs": 20, "validate_every": 10,
    "trained_layers": tuple(range(22, 30)), "layers": tuple(range(24, 30)),
}  # fmt: skip


def resistance(session: Session) -> Iterator[tuple[str, pd.DataFrame, Any]]:
    """Every tuned model under online steering, and the side effects of those tuned to suppress the direction."""
    arms: dict[str, Any] = {"untuned": None}
    for direction in ("toward", "away", "suppress"):
        arms[f"{direction}_tuned"] = session.tuned(direction, session.seeds[0])
    under_steering = {
        f"suppress_under_steering, seed {seed}": suppress_under_steering(session, seed) for seed in session.seeds
    }
    arms |= under_steering
    by_seed = rtl.arms.resistance(session.model, arms, session.vectors, session.prompts, layer=LAYER, progress=False)
    yield "resistance_by_seed", by_seed.moved, None
    averaged = by_seed.scores.assign(arm=by_seed.scores["arm"].str.split(",").str[0])
    averaged = averaged.groupby(["arm", "multiplier", "prompt"], sort=False, as_index=False)["score"].mean()
    result = type(by_seed).of(averaged)
    yield "resistance", result.table, rtl.plots.resistance(result.table, result.moved)
    yield "resistance_moved", result.moved, None
    groups = {
        "untuned": [None],
        "suppress_tuned": [arms["suppress_tuned"]],
        "suppress_under_steering": list(under_steering.values()),
    }
    side_effects = [{"arm": arm, **session.measured(deltas)} for arm, deltas in groups.items()]
    yield "resistance_side_effects", pd.DataFrame(side_effects), None


def suppress_under_steering(session: Session, seed: int) -> rtl.WeightDelta:
    """Tuned to suppress while steered at random: the blocks after the steered one learn to remove the direction."""
    config = replace(session.tune, direction="suppress", seed=seed, **SUPPRESS)
    targets, vectors = write_targets(session.model, session.train, "suppress", config), session.drawn(seed)
    steer = rtl.tuning.KLThenSteer([vectors], layers=[LAYER], strength=DOSE, share=0.8)
    return rtl.tune(
        session.model, vectors, session.train, config, validation=session.validation,
        neutral=targets + session.neutral(seed), steer=steer, progress=False,
    )  # fmt: skip


STAGES: dict[str, Callable[[Session], Iterator[tuple[str, pd.DataFrame, Any]]]] = {
    "rates": rates, "variants": variants, "kinds": kinds, "resistance": resistance,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--behaviour", default="mood")
    parser.add_argument("--out", type=Path, default=Path("runs/tuning"))
    parser.add_argument("--n-prompts", type=int, default=N_PROMPTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    arguments = parser.parse_args()
    session = Session(arguments.behaviour, arguments.n_prompts, arguments.seeds)
    for name, table, figure in STAGES[arguments.stage](session):
        write_atomically(arguments.out / f"{name}.json", json.dumps(table.to_dict("records"), default=str).encode())
        print(table.drop(columns="scores", errors="ignore").to_string(float_format=lambda value: f"{value:.3f}"))
        if figure is not None:
            write_atomically(arguments.out / f"{name}.html", figure.to_html(include_plotlyjs=True).encode())


if __name__ == "__main__":
    main()
