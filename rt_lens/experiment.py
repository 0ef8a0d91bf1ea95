"""The four arms from one TOML file: untuned, steered, token-tuned, rep-tuned, in both directions; results on disk.

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
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch

from rt_lens.evaluation import Evaluation, TextFit, evaluate, facts_kept, make_scorer, repetition, text_fit
from rt_lens.extraction import extract_vectors, logit_lens, separability, token_projections
from rt_lens.forward import check_layers, model_name
from rt_lens.losses import Direction
from rt_lens.models import DEFAULT_MODEL, load_model
from rt_lens.prompts import ContrastPairs, pairs_from_table, read_toml
from rt_lens.shipped import behaviour_file, capital_facts, neutral_paragraphs, neutral_prompts
from rt_lens.statistics import mean_interval, paired_comparison, share_interval
from rt_lens.steering import add, as_chat, generate_tokens
from rt_lens.tokens import encode, tokenizer_of
from rt_lens.tuning import TuneConfig, WeightDelta, prepare, tune, write_neutral
from rt_lens.vectors import SteeringVectors, write_atomically

DIRECTIONS: tuple[Direction, ...] = ("toward", "away")
_PAIRED = (("rep_tuned", "token_tuned"), ("rep_tuned", "steered"), ("token_tuned", "untuned"), ("steered", "untuned"))
T = TypeVar("T")


@dataclass(frozen=True)
class SplitConfig:
    """Shares of the topics: the test part gets the rest."""

    train: float = 0.4
    validation: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class ExtractConfig:
    """How many pairs the vectors are made from, and measured on (one held-out pair per validation topic)."""

    n_pairs: int = 96


@dataclass(frozen=True)
class ChooseConfig:
    """Layers and multipliers to try on validation prompts, and the most that perplexity may rise (as a ratio)."""

    layers: tuple[int, ...] = (15, 18, 21)
    multipliers: tuple[float, ...] = (1.0, 2.0, 3.0)
    bound: float = 1.1
    n_prompts: int = 20
    n_paragraphs: int = 8
    max_new_tokens: int = 32


@dataclass(frozen=True)
class TestConfig:
    """How the test prompts are asked; the paragraphs for perplexity and KL are those that no choice has seen."""

    n_prompts: int = 60
    max_new_tokens: int = 40
    n_facts: int = 40
    seed: int = 0


@dataclass(frozen=True)
class Experiment:
    """One behaviour's whole experiment, as its TOML file says.

    Attributes:
        name: of the behaviour.
        description: in a sentence.
        pairs: contrast pairs.
        scorer: name or `[scorer]` table.
        tune: settings of the rep-tuned arm; the token-tuned arm is the same without the cosine loss.
        tune_seeds: direction -> seeds; each tuned arm is tuned once per seed.
        model: name or path for `load_model`.
    """

    name: str
    description: str
    pairs: ContrastPairs
    scorer: str | Mapping[str, Any]
    tune: TuneConfig
    tune_seeds: Mapping[str, tuple[int, ...]]
    model: str = DEFAULT_MODEL
    split: SplitConfig = field(default_factory=SplitConfig)
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    choose: ChooseConfig = field(default_factory=ChooseConfig)
    test: TestConfig = field(default_factory=TestConfig)


def load_experiment(name_or_path: str | Path, *, model: str | None = None) -> Experiment:
    """Reads an experiment's TOML file, or a shipped behaviour's.

    Args:
        name_or_path: for example `mood`, or `my_behaviour.toml`.
        model: overrides the file's model.

    Raises:
        ValueError: unknown behaviour, a table or key that is not known (the nearest is named), or a value out of range.
    """
    path = behaviour_file(name_or_path)
    content = read_toml(path)
    tables = {"pairs", "scorer", "model", "split", "extract", "choose", "tune", "test"}
    _refuse_unknown(path.name, content, {"name", "description"} | tables)
    name = content.get("name", path.stem)
    tuning = dict(content.get("tune", {}))
    seeds = _seeds(tuning.pop("seeds", [0, 1, 2]))
    return Experiment(
        name=name,
        description=content.get("description", ""),
        pairs=pairs_from_table(name, content.get("pairs", {}), source=path.name),
        scorer=content.get("scorer", "vader"),
        tune=_table(TuneConfig, "tune", tuning),
        tune_seeds=seeds,
        model=model or content.get("model", {}).get("name", DEFAULT_MODEL),
        split=_table(SplitConfig, "split", content.get("split", {})),
        extract=_table(ExtractConfig, "extract", content.get("extract", {})),
        choose=_table(ChooseConfig, "choose", content.get("choose", {})),
        test=_table(TestConfig, "test", content.get("test", {})),
    )


def _seeds(seeds: Any) -> dict[str, tuple[int, ...]]:
    """Seeds for each direction, from one list for both or a table with a list for each."""
    each = seeds if isinstance(seeds, dict) else dict.fromkeys(DIRECTIONS, seeds)
    _refuse_unknown("tune.seeds", each, set(DIRECTIONS))
    for direction in DIRECTIONS:
        if not each.get(direction):
            raise ValueError(f"tune.seeds: none for {direction!r}. Give at least one, as in seeds = [0].")
    return {direction: tuple(each[direction]) for direction in DIRECTIONS}


def _table(kind: type[T], name: str, values: Mapping[str, Any]) -> T:
    _refuse_unknown(f"[{name}]", values, {entry.name for entry in fields(kind)})  # type: ignore[arg-type]
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _refuse_unknown(where: str, values: Mapping[str, Any], known: set[str]) -> None:
    for key in values:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(known))}."
            raise ValueError(f"config: {where} has an unknown key {key!r}. {hint}")


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
        if self.progress:
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
        with self._stage("tune"):
            deltas = self._tune(vectors)
        with self._stage("evaluate"):
            arms = self._measure_arms(vectors, choices, deltas)
            projections = self._projections(vectors, choices, deltas, arms[0].evaluation.responses[0])
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
                     "repetition": repetition(mine), "admissible": admissible}
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
            f"moves the mean score of {int(best['n'])} validation prompts from {unsteered:.2f} to "
            f"{best['mean']:.2f}, the furthest of {len(allowed)} within the bound"
        )
        return {"layer": int(best["layer"]), "multiplier": float(best["multiplier"]), "why": why}

    def _tune(self, vectors: SteeringVectors) -> dict[tuple[str, Direction, int], WeightDelta]:
        """Both tuned arms in both directions, once per seed; arms share targets, neutral prompts and settings."""
        base = self.experiment.tune
        neutral = write_neutral(self.model, neutral_prompts(), base) if base.kl_weight else []
        deltas: dict[tuple[str, Direction, int], WeightDelta] = {}
        self.history: list[dict[str, Any]] = []
        for direction in DIRECTIONS:
            aimed = replace(base, direction=direction)
            material = prepare(self.model, vectors, self.train, aimed, validation=self.validation, neutral=neutral)
            for arm, cosine_weight in (("token_tuned", 0.0), ("rep_tuned", base.cosine_weight)):
                for seed in self.experiment.tune_seeds[direction]:
                    config = replace(aimed, seed=seed, cosine_weight=cosine_weight)
                    delta = tune(self.model, vectors, material, config, progress=self.progress)
                    deltas[arm, direction, seed] = delta
                    named = {"arm": arm, "direction": direction, "seed": seed}
                    self.history += [{**named, **row} for row in delta.history]
            first = self.experiment.tune_seeds[direction][0]
            deltas["rep_tuned", direction, first].save(self.out / f"rep_tuned_{direction}.safetensors")
        return deltas

    def _measure_arms(
        self,
        vectors: SteeringVectors,
        choices: Mapping[str, Any],
        deltas: Mapping[tuple[str, Direction, int], WeightDelta],
    ) -> list[_Arm]:
        seed = self.experiment.test.seed
        reference = text_fit(self.model, self.test_texts, keep=True, seed=seed)
        arms = [self._measure("untuned", "none", seed, nullcontext(), reference)]
        for direction in DIRECTIONS:
            arms.append(
                self._measure("steered", direction, seed, self._steered(vectors, choices[direction]), reference)
            )
        for (arm, direction, tune_seed), delta in deltas.items():
            arms.append(self._measure(arm, direction, tune_seed, delta.applied(self.model), reference))
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
        assert fit.mean_kl is not None
        return {
            "arm": first.arm, "direction": first.direction, "set": "test", "scorer": self.scorer_name,
            "n": scores.n, "mean": scores.mean, "low": scores.low, "high": scores.high,
            "perplexity": fit.perplexity.mean, "perplexity_low": fit.perplexity.low,
            "perplexity_high": fit.perplexity.high,
            "kl": fit.mean_kl.mean, "kl_low": fit.mean_kl.low, "kl_high": fit.mean_kl.high,
            "facts": share.mean, "facts_low": share.low, "facts_high": share.high, "n_facts": share.n,
            "repetition": float(np.mean([repetition(arm.evaluation.responses) for arm in group])),
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

    def _projections(
        self, vectors: SteeringVectors, choices: Mapping[str, Any],
        deltas: Mapping[tuple[str, Direction, int], WeightDelta], answer: str,
    ) -> dict[str, Any]:  # fmt: skip
        """Layer x token projections of one test prompt with the untuned model's answer, before and after."""
        text = as_chat(self.model, [self.test_prompts[0]])[0] + answer
        seed = self.experiment.tune_seeds["away"][0]
        contexts: dict[str, AbstractContextManager[Any]] = {
            "untuned": nullcontext(),
            "steered away": self._steered(vectors, choices["away"]),
            "rep_tuned away": deltas["rep_tuned", "away", seed].applied(self.model),
        }
        found: dict[str, Any] = {}
        for name, context in contexts.items():
            with context:
                tokens, values = token_projections(self.model, vectors, text)
            found[name] = [[round(value, 3) for value in row] for row in values.tolist()]
        layers = [int(name.split(".")[1]) for name in vectors.hook_names]
        return {"prompt": self.test_prompts[0], "tokens": tokens, "layers": layers, "arms": found}


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
