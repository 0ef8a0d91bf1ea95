"""The four arms, run: results on disk.

The rule that keeps the results honest is written into the order of things here: vectors and weights see the training
topics, every choice sees the validation topics, and the test topics are asked once, at the end.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from rt_lens.evaluation import Evaluation, TextFit, evaluate, facts_kept, make_scorer, repetition, text_fit
from rt_lens.experiment.config import DIRECTIONS, Experiment
from rt_lens.extraction import extract_vectors, logit_lens, separability, token_projections
from rt_lens.files import write_atomically
from rt_lens.forward import check_layers, model_name
from rt_lens.generation import as_chat, generate_tokens
from rt_lens.models import load_model
from rt_lens.shipped import capital_facts, neutral_paragraphs, neutral_prompts
from rt_lens.statistics import mean_interval, paired_comparison, share_interval
from rt_lens.steering import add
from rt_lens.tokens import encode, tokenizer_of
from rt_lens.tuning import prepare, tune, write_neutral
from rt_lens.vectors import SteeringVectors

_PAIRED = (("rep_tuned", "token_tuned"), ("rep_tuned", "steered"), ("token_tuned", "untuned"), ("steered", "untuned"))


def check_writable(folder: Path) -> Path:
    """Makes the folder and writes a file there, before any long work.

    Raises:
        ValueError: if that fails; nothing else has been done by then.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ".writable", b"").unlink()
    except OSError as error:
        raise ValueError(f"out: cannot write to {folder} ({error.strerror}). Give another folder with --out.") from None
    return folder


def run_experiment(experiment: Experiment, out: Path, *, progress: bool = True) -> dict[str, Any]:
    """Runs the four arms in both directions and writes vectors, deltas, responses and `results.json` to `out`.

    Args:
        experiment: from `load_experiment`.
        out: folder; checked before the long work. Vectors and deltas are written as they are made.
        progress: show bars and the stages.

    Returns:
        The content of `results.json`.

    Raises:
        ValueError: for an unwritable folder, too few topics, or layers outside the model.
    """
    check_writable(out)
    return _Run(experiment, out, progress).run()


@dataclass(frozen=True)
class _Arm:
    """One arm in one direction, with one seed, measured on the test prompts."""

    arm: str
    direction: str
    seed: int
    evaluation: Evaluation
    fit: TextFit
    facts: list[bool]


class _Run:
    """The experiment's stages, in order; each is timed."""

    def __init__(self, experiment: Experiment, out: Path, progress: bool) -> None:
        self.experiment, self.out, self.progress = experiment, out, progress
        self.seconds: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []
        self.projections: dict[str, list[list[float]]] = {}
        self.scorer_name, self.score = make_scorer(experiment.scorer)
        split = experiment.split
        self.train, self.validation, test = experiment.pairs.split(split.train, split.validation, seed=split.seed)
        self.test_prompts = test.topics[: experiment.test.n_prompts]
        if len(self.test_prompts) < experiment.test.n_prompts:
            raise ValueError(
                f"test.n_prompts: {experiment.test.n_prompts} asked for, {len(self.test_prompts)} topics fall to the "
                "test part. Give more topics, or smaller shares to train and validation."
            )
        paragraphs, chosen = neutral_paragraphs(), experiment.choose.n_paragraphs
        self.choice_texts, self.test_texts = paragraphs[:chosen], paragraphs[chosen:]
        self.facts = capital_facts()[: experiment.test.n_facts]

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        if self.progress and name not in self.seconds:
            print(f"{name} ...", flush=True)
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def run(self) -> dict[str, Any]:
        experiment = self.experiment
        with self._stage("load"):
            self.model = load_model(experiment.model)
            check_layers(self.model, experiment.choose.layers)
            check_layers(self.model, experiment.tune.layers)
            check_layers(self.model, experiment.tune.blocks)
        with self._stage("extract"):
            pairs = self.train.sample(experiment.extract.n_pairs, seed=experiment.split.seed)
            vectors = extract_vectors(self.model, pairs, seed=experiment.split.seed)
            vectors.save(self.out / "vectors.safetensors")
            # One pair per held-out topic: pairs of one topic are not independent.
            held_out = self.validation.sample(len(self.validation.topics), seed=experiment.split.seed)
            separated = separability(self.model, vectors, held_out)
        with self._stage("choose"):
            doses = self._dose_response(vectors)
            choices: dict[str, Any] = {direction: self._choice(doses, direction) for direction in DIRECTIONS}
        with self._stage("evaluate"):
            reference = text_fit(self.model, self.test_texts, keep=True, seed=experiment.test.seed)
            arms = [self._measure("untuned", "none", experiment.test.seed, nullcontext(), reference)]
            self.shown_text = as_chat(self.model, self.test_prompts[:1])[0] + arms[0].evaluation.responses[0]
            self._project("untuned", vectors, nullcontext())
            for direction in DIRECTIONS:
                steered = self._steered(vectors, choices[direction])
                arms.append(self._measure("steered", direction, experiment.test.seed, steered, reference))
            self._project("steered away", vectors, self._steered(vectors, choices["away"]))
        arms += self._tuned_arms(vectors, reference)
        results = {
            "schema": 1,
            "behaviour": experiment.name,
            "description": experiment.description,
            "model": model_name(self.model),
            "versions": _versions(),
            "seed": experiment.split.seed,
            "choices": {**choices, "rule": self._rule()},
            "arms": [self._row([arm]) | {"seed": arm.seed} for arm in arms],
            "summary": [self._row(group) | {"seeds": [arm.seed for arm in group]} for group in _grouped(arms)],
            "comparisons": self._comparisons(arms),
            "separability": separated.to_dict("records"),
            "dose_response": doses.to_dict("records"),
            "bound": experiment.choose.bound,
            "history": self.history,
            "logit_lens": logit_lens(self.model, vectors).to_dict("records"),
            "seconds": {stage: round(value, 1) for stage, value in self.seconds.items()},
        }
        responses = [json.dumps(line, ensure_ascii=False) for arm in arms for line in _answers(arm)]
        write_atomically(self.out / "responses.jsonl", "\n".join(responses).encode())
        projections = {
            "prompt": self.test_prompts[0],
            "tokens": self.shown_tokens,
            "layers": [int(name.split(".")[1]) for name in vectors.hook_names],
            "arms": self.projections,
        }
        write_atomically(self.out / "projections.json", json.dumps(projections, ensure_ascii=False).encode())
        write_atomically(self.out / "results.json", json.dumps(_plain(results), ensure_ascii=False, indent=1).encode())
        return _plain(results)

    def _dose_response(self, vectors: SteeringVectors) -> pd.DataFrame:
        """Score and perplexity over layers and multipliers, on validation prompts; one batch per layer."""
        choose = self.experiment.choose
        multipliers = sorted({0.0, *choose.multipliers, *(-m for m in choose.multipliers)})
        prompts = self.validation.topics[: choose.n_prompts]
        encoded = [encode(self.model, text) for text in as_chat(self.model, prompts)]
        tokenizer, rows = tokenizer_of(self.model), []
        untuned = text_fit(self.model, self.choice_texts).perplexity.mean
        for layer in choose.layers:
            each = torch.tensor([m for m in multipliers for _ in prompts])
            with self.model.hooks(fwd_hooks=add(vectors, [layer], each)):
                new = generate_tokens(self.model, encoded * len(multipliers), choose.max_new_tokens)
            answers = tokenizer.batch_decode(new, skip_special_tokens=True)
            for place, multiplier in enumerate(multipliers):
                mine = answers[place * len(prompts) : (place + 1) * len(prompts)]
                with self.model.hooks(fwd_hooks=add(vectors, [layer], multiplier)):
                    perplexity = text_fit(self.model, self.choice_texts).perplexity.mean if multiplier else untuned
                found = mean_interval([self.score(answer) for answer in mine], self.experiment.split.seed)
                admissible = perplexity <= choose.bound * untuned
                rows.append(
                    {"layer": layer, "multiplier": multiplier, **found._asdict(), "perplexity": perplexity,
                     "repetition": float(np.mean(repetition(mine))), "admissible": admissible}
                )  # fmt: skip
        return pd.DataFrame(rows)

    def _rule(self) -> str:
        choose = self.experiment.choose
        return (
            f"Of the layers and multipliers whose perplexity on {len(self.choice_texts)} neutral paragraphs is at most "
            f"{choose.bound:g} times the untuned model's, the one that moves the mean score of {choose.n_prompts} "
            "validation prompts furthest in the direction; of equals, the smaller multiplier."
        )

    def _choice(self, doses: pd.DataFrame, direction: str) -> dict[str, Any]:
        sign = 1 if direction == "toward" else -1
        allowed = doses[doses["admissible"] & (doses["multiplier"] * sign > 0)]
        if allowed.empty:
            raise ValueError(
                f"choose.multipliers: none for {direction!r} keeps perplexity within "
                f"{self.experiment.choose.bound:g} times the untuned model's. "
                "Offer smaller multipliers, or raise choose.bound."
            )
        ranked = allowed.assign(moved=sign * allowed["mean"], size=allowed["multiplier"].abs())
        best = ranked.sort_values(["moved", "size"], ascending=[False, True]).iloc[0]
        unsteered = float(doses.loc[doses["multiplier"] == 0, "mean"].iloc[0])
        why = (
            f"It moves the mean score of {int(best['n'])} validation prompts from {unsteered:.2f} to "
            f"{best['mean']:.2f}, the furthest of {len(allowed)} within the bound"
        )
        return {"layer": int(best["layer"]), "multiplier": float(best["multiplier"]), "why": why}

    def _tuned_arms(self, vectors: SteeringVectors, reference: TextFit) -> list[_Arm]:
        """Both tuned arms in both directions, once per seed, on the same targets, neutral prompts and settings.

        Each is measured as soon as it is tuned, so that one delta at a time is held.
        """
        base, arms = self.experiment.tune, []
        with self._stage("tune"):
            # As many neutral prompts as one run's steps can read.
            enough = neutral_prompts()[: base.max_steps * base.neutral_batch_size]
            neutral = write_neutral(self.model, enough, base) if base.kl_weight else []
        for direction in DIRECTIONS:
            aimed, seeds = replace(base, direction=direction), self.experiment.tune_seeds[direction]
            with self._stage("tune"):
                material = prepare(self.model, vectors, self.train, aimed, validation=self.validation, neutral=neutral)
            for arm, cosine_weight in (("token_tuned", 0.0), ("rep_tuned", base.cosine_weight)):
                for seed in seeds:
                    config = replace(aimed, seed=seed, cosine_weight=cosine_weight)
                    with self._stage("tune"):
                        delta = tune(self.model, vectors, material, config, progress=self.progress)
                    with self._stage("evaluate"):
                        arms.append(self._measure(arm, direction, seed, delta.applied(self.model), reference))
                    named = {"arm": arm, "direction": direction, "seed": seed}
                    self.history += [{**named, **row} for row in delta.history]
                    if arm == "rep_tuned" and seed == seeds[0]:
                        delta.save(self.out / f"rep_tuned_{direction}.safetensors")
                        self._project(f"rep_tuned {direction}", vectors, delta.applied(self.model))
        return arms

    def _steered(self, vectors: SteeringVectors, choice: Mapping[str, Any]) -> AbstractContextManager[Any]:
        return self.model.hooks(fwd_hooks=add(vectors, [choice["layer"]], choice["multiplier"]))

    def _measure(
        self, arm: str, direction: str, seed: int, context: AbstractContextManager[Any], reference: TextFit
    ) -> _Arm:
        test = self.experiment.test
        with context:
            evaluation = evaluate(
                self.model, self.test_prompts, self.score, max_new_tokens=test.max_new_tokens, seed=test.seed
            )
            fit = text_fit(self.model, self.test_texts, reference=reference, seed=test.seed)
            facts = facts_kept(self.model, self.facts)
        return _Arm(arm, direction, seed, evaluation, fit, facts)

    def _row(self, group: Sequence[_Arm]) -> dict[str, Any]:
        """One row of results, averaged over the seeds in the group; intervals are over prompts, texts and questions."""
        first, seed = group[0], self.experiment.test.seed
        scores = mean_interval(np.mean([arm.evaluation.scores for arm in group], axis=0), seed)
        fit = TextFit.pooled([arm.fit for arm in group])
        right = np.mean([arm.facts for arm in group], axis=0)
        share = share_interval(int(right.sum()), len(right)) if len(group) == 1 else mean_interval(right, seed)
        repeats = mean_interval(np.mean([repetition(arm.evaluation.responses) for arm in group], axis=0), seed)
        assert fit.mean_kl is not None
        return {
            "arm": first.arm, "direction": first.direction, "set": "test", "scorer": self.scorer_name,
            "n": scores.n, "mean": scores.mean, "low": scores.low, "high": scores.high,
            "perplexity": fit.perplexity.mean, "perplexity_low": fit.perplexity.low,
            "perplexity_high": fit.perplexity.high, "n_texts": fit.perplexity.n,
            "kl": fit.mean_kl.mean, "kl_low": fit.mean_kl.low, "kl_high": fit.mean_kl.high,
            "facts": share.mean, "facts_low": share.low, "facts_high": share.high, "n_facts": share.n,
            "repetition": repeats.mean, "repetition_low": repeats.low, "repetition_high": repeats.high,
        }  # fmt: skip

    def _comparisons(self, arms: Sequence[_Arm]) -> list[dict[str, Any]]:
        """Paired over prompts; scores of tuned arms are averaged over seeds first."""
        mean_scores, seeds = {}, {}
        for group in _grouped(arms):
            for direction in DIRECTIONS if group[0].arm == "untuned" else (group[0].direction,):
                mean_scores[group[0].arm, direction] = np.mean([arm.evaluation.scores for arm in group], axis=0)
                seeds[group[0].arm, direction] = [arm.seed for arm in group]
        rows = []
        for direction in DIRECTIONS:
            for a, b in _PAIRED:
                first, second = mean_scores[a, direction], mean_scores[b, direction]
                found = paired_comparison(first, second, self.experiment.test.seed)
                rows.append({"direction": direction, "a": a, "b": b, **found._asdict(), "seeds": seeds[a, direction]})
        return rows

    def _project(self, name: str, vectors: SteeringVectors, context: AbstractContextManager[Any]) -> None:
        """Layer x token projections of the first test prompt with the untuned model's answer, the same for all arms."""
        with context:
            self.shown_tokens, values = token_projections(self.model, vectors, self.shown_text)
        self.projections[name] = [[round(value, 3) for value in row] for row in values.tolist()]


def _grouped(arms: Sequence[_Arm]) -> list[list[_Arm]]:
    groups: dict[tuple[str, str], list[_Arm]] = {}
    for arm in arms:
        groups.setdefault((arm.arm, arm.direction), []).append(arm)
    return list(groups.values())


def _answers(arm: _Arm) -> Iterator[dict[str, Any]]:
    found = arm.evaluation
    for prompt, response, score in zip(found.prompts, found.responses, found.scores, strict=True):
        yield {"arm": arm.arm, "direction": arm.direction, "seed": arm.seed, "prompt": prompt, "response": response,
               "score": score}  # fmt: skip


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "threads": str(torch.get_num_threads())}
    for package in ("rt_lens", "torch", "transformer-lens", "transformers", "vaderSentiment", "scipy", "plotly"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "source"
    return found


def _plain(value: Any) -> Any:
    """Numbers and containers that JSON knows; what is not a number becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
