"""KL-then-steer beside plain steering, at equal effect and at equal KL: is the treated model's steering cheaper?

    python benchmarks/kl_then_steer.py               # into benchmarks/results/kl_then_steer.json and a picture
    python benchmarks/kl_then_steer.py --quick       # few steps and prompts, printed only

Every way to treat the model is tried once (seed 0) and judged on validation topics: the mean over both directions of
its effect at the stated KL. The best is treated again with each seed and shown on test topics that chose nothing. KL is
to the untuned and unsteered model, on the untuned model's own responses to held-out neutral prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import typer

import evidence
import rt_lens as rtl
from rt_lens.common.statistics.intervals import mean_interval
from rt_lens.data.builtin import (
    calibration_prompts,
    data_path,
    held_out_neutral_prompts,
    neutral_paragraphs,
)
from rt_lens.evaluation.texts import PerplexityResult
from rt_lens.models.forward import model_name
from rt_lens.models.tokens.chats import chat_text
from rt_lens.tuning.targets import Target, write_neutral
from tuning import DOSE, LAYER, N_TOKENS, SEEDS, Session

CONCEPTS = ("mood", "formality", "language", "refusal")
DOSES = (-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0)
TRIED = (-3.0, -1.5, 0.0, 1.5, 3.0)
EQUAL_EFFECT = (-3.0, -2.0, -1.0, 1.0, 2.0, 3.0)  # plain steering's multipliers, whose score is to be reached
BUDGETS, STATED = (0.003, 0.01, 0.03), 0.01
DRAWS = 2000
Row = dict[str, Any]


@dataclass(frozen=True)
class Treatment:
    """How the model is made ready to be steered.

    Attributes:
        learning_rate: of the weights; higher ones cost more KL without steering than they save with it.
        rank: of low-rank factors in all blocks; 0 trains whole matrices, after the steered block.
        concepts: steers along four behaviours, each taken from the model as it is by then, and not along mood alone.
        ramp: part of the steps in which the multiplier's range grows.
        everywhere: whether the KL is read at all tokens, and on plain paragraphs too, or on responses only.
        share: of the steps that are steered.
    """

    learning_rate: float = 4e-5
    rank: int = 0
    concepts: bool = False
    ramp: float = 0.0
    everywhere: bool = False
    share: float = 0.9

    def settings(self, steps: int) -> Row:
        blocks = tuple(range(30)) if self.rank else tuple(range(LAYER + 1, 30))
        return {
            "cosine_weight": 0.0, "token_weight": 0.0, "max_steps": steps, "epochs": 60, "neutral_batch_size": 8,
            "trained_layers": blocks, "validate_every": 40, "patience": 9, "learning_rate": self.learning_rate,
            "lora_rank": self.rank, "n_targets": 4,
        }  # fmt: skip


TREATMENTS = {
    "later blocks": Treatment(),
    "all blocks, LoRA": Treatment(3e-5, rank=128),
    "all blocks, four concepts": Treatment(3e-5, rank=128, concepts=True),
    "all blocks, four concepts, ramp, all tokens": Treatment(
        3e-5, rank=128, concepts=True, ramp=0.5, everywhere=True, share=0.7
    ),
}


class Study:
    """The behaviour, and what every treatment is measured on."""

    def __init__(self, steps: int, n_prompts: int, n_texts: int) -> None:
        self.session, self.steps, self.n = Session("mood", n_prompts, SEEDS), steps, n_prompts
        self.model = self.session.model
        prompts = [chat_text(self.model, prompt) for prompt in held_out_neutral_prompts()[:n_texts]]
        responses = rtl.generate(self.model, prompts, chat=False, max_new_tokens=N_TOKENS)
        self.texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        self.reference = rtl.evaluation.perplexity(self.model, self.texts, keep=True, batch_size=8)

    def parts(self, name: str) -> rtl.ContrastPairs:
        """The training pairs of a built-in behaviour."""
        experiment = rtl.load_experiment(name)
        split = experiment.split
        return experiment.pairs.split(split.train, split.validation, seed=split.seed)[0]

    def treated(self, how: Treatment, seed: int) -> rtl.WeightDelta:
        config = replace(self.session.tune, seed=seed, **how.settings(self.steps))
        vectors = self.session.drawn(seed)
        steer = rtl.tuning.KLThenSteer(
            [self.parts(name) for name in CONCEPTS] if how.concepts else [vectors],
            layers=[LAYER], strength=DOSE, share=how.share, ramp=how.ramp, n_pairs=8,
        )  # fmt: skip
        return rtl.tune(
            self.model, vectors, self.session.train, config, validation=self.session.validation,
            neutral=self.neutral(how, seed), steer=steer,
        )  # fmt: skip

    def neutral(self, how: Treatment, seed: int) -> list[Target]:
        """Responses to neutral prompts; with `everywhere` of twice as many, whole chats and paragraphs among them."""
        responses = self.session.neutral(seed)
        if not how.everywhere:
            return responses
        more = write_neutral(self.model, calibration_prompts(), replace(self.session.tune, seed=seed))
        start = responses[0].prompt.partition("system")[0]  # the template's opening token, which predicts the rest
        chats = [
            replace(each, prompt=start, answer=each.prompt[len(start) :] + each.answer) for each in responses + more
        ]
        return chats + [Target("\n", paragraph) for paragraph in neutral_paragraphs()]

    def curve(
        self, delta: rtl.WeightDelta | None, seed: int, doses: Sequence[float], prompts: Sequence[str]
    ) -> Iterator[tuple[float, list[float], PerplexityResult]]:
        """Multiplier, scores and KL, of a model with this delta, steered by this seed's vector."""
        vectors = self.session.drawn(seed)
        for dose in doses:
            hooks = rtl.add(vectors, [LAYER], dose) if dose else None
            scores, _ = self.session.scores(prompts, delta, hooks)
            with rtl.applied(self.model, delta, hooks):
                yield (
                    dose,
                    scores,
                    rtl.evaluation.perplexity(self.model, self.texts, reference=self.reference, batch_size=8),
                )


@dataclass(frozen=True)
class Curve:
    """Scores and KL of one arm over doses and seeds.

    Attributes:
        doses: multipliers, rising.
        scores: seed, dose, prompt.
        kl: seed, dose, text; summed over tokens.
        sizes: tokens of each text.
    """

    doses: tuple[float, ...]
    scores: np.ndarray
    kl: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, study: Study, deltas: Sequence[rtl.WeightDelta | None], seeds: Sequence[int],
           doses: Sequence[float], prompts: Sequence[str]) -> Curve:  # fmt: skip
        measured = [list(study.curve(delta, seed, doses, prompts)) for delta, seed in zip(deltas, seeds, strict=True)]
        scores = np.array([[scores for _, scores, _ in of_seed] for of_seed in measured])
        kl = np.array([[result.kl for _, _, result in of_seed] for of_seed in measured])
        return cls(tuple(doses), scores, kl, np.array(study.reference.sizes))

    def side(self, sign: float, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
        """Score and KL of one direction's doses, from none on, over a draw of seeds, prompts and texts."""
        kept = [i for i, dose in sorted(enumerate(self.doses), key=lambda pair: abs(pair[1])) if dose * sign >= 0]
        scores = self.scores[draw.seeds][:, kept][:, :, draw.prompts].mean((0, 2))
        kl = self.kl[draw.seeds][:, kept][:, :, draw.texts].mean(0).sum(1) / self.sizes[draw.texts].sum()
        return scores, kl


@dataclass(frozen=True)
class Draw:
    """Which seeds, prompts and texts a bootstrap's draw has."""

    seeds: np.ndarray
    prompts: np.ndarray
    texts: np.ndarray


def draws(curve: Curve) -> Iterator[Draw]:
    """All as they are, and then with replacement."""
    generator, sizes = np.random.default_rng(0), (len(curve.scores), curve.scores.shape[2], len(curve.sizes))
    yield Draw(*(np.arange(n) for n in sizes))
    for _ in range(DRAWS):
        yield Draw(*(generator.integers(0, n, n) for n in sizes))


def effect_at(curve: Curve, sign: float, kl: float, draw: Draw) -> float:
    """The score at a KL, between doses along the KL's root, in which it is nearly straight; NaN out of reach."""
    scores, kls = curve.side(sign, draw)
    rising = np.maximum.accumulate(np.sqrt(np.maximum(kls, 0)))
    return float(np.interp(np.sqrt(kl), rising, scores, left=np.nan, right=np.nan))


def kl_at(curve: Curve, sign: float, score: float, draw: Draw) -> float:
    """The least KL at which a score is reached, between doses; NaN if it is not."""
    scores, kls = curve.side(sign, draw)
    reached = np.maximum.accumulate(sign * scores)
    rises = np.r_[True, np.diff(reached) > 0]  # a dose that scores no better reaches nothing new
    return float(np.interp(sign * score, reached[rises], kls[rises], left=np.nan, right=np.nan))


def differences(values: Sequence[tuple[float, float]]) -> Row:
    """Plain and treated, and their difference over the draws in which both are reached."""
    plain, treated = np.array(values).T
    apart = (treated - plain)[1:]
    reached = ~np.isnan(apart)
    low, high = np.quantile(apart[reached], [0.025, 0.975]) if reached.mean() > 0.9 else (None, None)
    point = treated[0] - plain[0]
    return {
        "plain": _or_none(plain[0]), "treated": _or_none(treated[0]), "treated minus plain": _or_none(point),
        "treated minus plain_low": low, "treated minus plain_high": high, "out of reach": float(1 - reached.mean()),
    }  # fmt: skip


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def at_equal_kl(plain: Curve, treated: Curve, budgets: Sequence[float]) -> list[Row]:
    rows = []
    for sign, direction in ((1.0, "toward"), (-1.0, "away")):
        for budget in budgets:
            found = [
                (effect_at(plain, sign, budget, draw), effect_at(treated, sign, budget, draw)) for draw in draws(plain)
            ]
            rows.append({"direction": direction, "KL": budget, **differences(found), **_sizes(plain)})
    return rows


def at_equal_effect(plain: Curve, treated: Curve, multipliers: Sequence[float]) -> list[Row]:
    """KL at the score that plain steering has at a multiplier."""
    rows = []
    for dose in multipliers:
        sign, found = float(np.sign(dose)), []
        for draw in draws(plain):
            score = plain.scores[draw.seeds][:, plain.doses.index(dose)][:, draw.prompts].mean()
            found.append((kl_at(plain, sign, score, draw), kl_at(treated, sign, score, draw)))
        score = plain.scores[:, plain.doses.index(dose)].mean()
        rows.append({"plain multiplier": dose, "score": float(score), **differences(found), **_sizes(plain)})
    return rows


def _sizes(curve: Curve) -> Row:
    return {"prompts": curve.scores.shape[2], "texts": len(curve.sizes), "seeds": len(curve.scores)}


def points(arm: str, curve: Curve, seeds: Sequence[int]) -> list[Row]:
    """A row per multiplier, means over seeds with intervals over prompts and texts."""
    rows = []
    for i, dose in enumerate(curve.doses):
        effect = mean_interval(curve.scores[:, i].mean(0))
        kl = mean_interval(curve.kl[:, i].mean(0) / curve.sizes)
        about = {
            "arm": arm,
            "multiplier": dose,
            "n": effect.n,
            "n_side_effect": kl.n,
            "seed": ", ".join(map(str, seeds)),
        }
        spread = {"effect": effect.mean, "effect_low": effect.low, "effect_high": effect.high}
        rows.append({**about, **spread, "side_effect": kl.mean, "side_effect_low": kl.low, "side_effect_high": kl.high})
    return rows


def tried(study: Study, prompts: Sequence[str]) -> tuple[str, list[Row]]:
    """Every treatment on validation topics, and the best of them at the stated KL."""
    rows: list[Row] = []
    plain = Curve.of(study, [None], [0], TRIED, prompts)
    for name, how in TREATMENTS.items():
        delta = study.treated(how, 0)
        treated = Curve.of(study, [delta], [0], TRIED, prompts)
        moved = {arm: _moved(curve) for arm, curve in (("plain", plain), ("treated", treated))}
        kept = {f"KL at {dose:g}": float(treated.kl[0, i].sum() / treated.sizes.sum()) for i, dose in enumerate(TRIED)}
        rows.append({"treatment": name, "effect": moved["treated"], "plain effect": moved["plain"], **kept,
                     "n": len(prompts), "seed": 0})  # fmt: skip
        _print(rows[-1:])
    best = max(rows, key=lambda row: -np.inf if np.isnan(row["effect"]) else row["effect"])
    return best["treatment"], rows


def _moved(curve: Curve) -> float:
    """The effect at the stated KL from no steering, each direction in its own sense; mean of both."""
    untouched, whole = curve.scores[:, curve.doses.index(0.0)].mean(), next(draws(curve))
    return float(np.mean([sign * (effect_at(curve, sign, STATED, whole) - untouched) for sign in (1.0, -1.0)]))


def main(quick: Annotated[bool, typer.Option(help="Few steps and prompts, printed only.")] = False) -> None:
    study = Study(*(2, 4, 4) if quick else (120, 60, 48))
    validation = study.session.validation.topics[: 4 if quick else 31]
    chosen, tries = tried(study, validation)
    test = data_path("fresh/mood.txt").read_text(encoding="utf-8").splitlines()[: study.n]
    plain = Curve.of(study, [None] * len(SEEDS), SEEDS, DOSES, test)
    deltas = [study.treated(TREATMENTS[chosen], seed) for seed in SEEDS]
    treated = Curve.of(study, deltas, SEEDS, DOSES, test)
    tables = {
        "tried": tries,
        "equal_kl": at_equal_kl(plain, treated, BUDGETS),
        "equal_effect": at_equal_effect(plain, treated, EQUAL_EFFECT),
        "points": [*points("steered", plain, SEEDS), *points("kl_then_steer", treated, SEEDS)],
    }
    for name in ("equal_kl", "equal_effect"):
        _print(tables[name])
    if not quick:
        figure = rtl.plots.effect_against_side_effect(tables["points"])
        rtl.save_figure(figure, evidence.PICTURES / "kl_then_steer.png", scale=1.5)
        about = {"model": model_name(study.model), "command": "python benchmarks/kl_then_steer.py", "chosen": chosen}
        typer.echo(f"Saved {evidence.write('kl_then_steer', about, tables)}.")


def _print(rows: Sequence[Row]) -> None:
    for row in rows:
        typer.echo(", ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    typer.run(main)
